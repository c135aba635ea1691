"""What happened to a run, from its journal and its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rloop_mcore.analysis.read_run import Run

_NAMES = {
    "base": "base",
    "explore": "exploration",
    "select": "selection",
    "exploit": "fine-tuning",
    "evaluate": "evaluation",
}


@dataclass(frozen=True, slots=True)
class Event:
    """`time` is Unix seconds; `kind` one of start, kill, stop, requeue, change, guard, skip, removed, phase, policy."""

    time: float
    kind: str
    text: str


def events(run: Run) -> list[Event]:
    """In the order of time."""
    found = [event for number, record in enumerate(run.journal) for event in _of_record(number, record)]
    return sorted([*found, *_skips(run)], key=lambda event: event.time)


def environments(run: Run) -> list[dict[str, Any]]:
    """The machines and the software that the run's processes had: a record of each start, without equal neighbours."""
    starts = [record for record in run.journal if record.get("event") == "started"]
    flat = []
    for record in starts:
        found = dict(record["environment"])
        packages = found.pop("packages")
        flat.append({"host": record["host"], **found, **packages})
    return [each for number, each in enumerate(flat) if number == 0 or each != flat[number - 1]]


def _of_record(number: int, record: dict[str, Any]) -> Iterator[Event]:
    time = record.get("time", 0.0)
    match record.get("event"):
        case "started":
            yield from _start(number, time, record)
        case "changed":
            for key, values in record["keys"].items():
                forced = ", by force" if key in record["forced"] else ""
                yield Event(time, "change", f"{key}: {values['before']} → {values['now']}{forced}")
        case "guard":
            ended = ", which ended the phase" if record["policy"] == "end_phase" and record.get("early") else ""
            yield Event(time, "guard", f"{_place(record)}: {record['reason']}{ended}")
        case "removed":
            yield Event(time, "removed", ", ".join(record["paths"]))
        case "policy":
            reason = f": {record['reason']}" if record.get("reason") else ""
            yield Event(time, "policy", f"θ{record['iteration']}{reason}")
        case "done":
            facts = (
                f": {record['experts']} trajectories of {record['problems']} problems" if "experts" in record else ""
            )
            yield Event(time, "phase", f"iteration {record['iteration'] + 1}: {_NAMES[record['phase']]} done{facts}")


def _start(number: int, time: float, record: dict[str, Any]) -> Iterator[Event]:
    previous, job = record.get("previous"), f", job {record['job']}" if record.get("job") else ""
    if record.get("restarts"):
        yield Event(time, "requeue", f"Slurm has started the job {record['restarts']} times again{job}")
    if number == 0:
        yield Event(time, "start", f"on {record['host']}{job}")
    elif previous is None:
        yield Event(time, "kill", f"the process before ended without a word; resumed on {record['host']}{job}")
    else:
        yield Event(time, "stop", f"{previous['message'] or 'finished'}; resumed on {record['host']}{job}")


def _skips(run: Run) -> Iterator[Event]:
    """Neighbouring steps of a phase with skipped updates are one event."""
    lines = [line for line in run.metrics if line.get("phase") in ("sft", "explore", "exploit")]
    for (iteration, phase, skipped), group in groupby(
        lines, key=lambda line: (line["iteration"], line["phase"], (line.get("skipped") or 0) > 0)
    ):
        if not skipped:
            continue
        steps = list(group)
        first, last, count = steps[0]["step"], steps[-1]["step"], sum(line["skipped"] for line in steps)
        where = f"step {first}" if first == last else f"steps {first} to {last}"
        name = _NAMES.get(phase, phase)
        yield Event(steps[0]["time"], "skip", f"iteration {iteration + 1}, {name}, {where}: {count:g} updates skipped")


def _place(record: dict[str, Any]) -> str:
    return f"iteration {record['iteration'] + 1}, {_NAMES.get(record['phase'], record['phase'])}, step {record['step']}"
