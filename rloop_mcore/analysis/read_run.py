"""Read what a run has written so far; a run that is still going on may be read at any moment."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import json_object, read_json_lines
from rloop_mcore.types import PolicyName

_PLACE = {"iteration": int, "phase": str, "step": int, "global_step": int}  # of every line of metrics.jsonl
_METRIC_NAME = re.compile(r"(avg|pass|maj)@\d+")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One checkpoint on the validation problems.

    `metrics` maps "avg@32", "pass@8", ... to {"mean", "low", "high"}. `phase` is "base" for theta_0, "explore" for
    an RL checkpoint after `step` steps of iteration `iteration`, "exploit" for theta_{iteration+1}. `conditions` are
    the prompt template and the answer format, "" where an older rloop wrote it. `problems` has a hash of what was
    asked under each id, none where an older rloop wrote it. `sources` has the metrics of each source of the problems,
    none where they are of one.
    """

    name: str
    iteration: int
    phase: str
    step: int
    policy: str | None
    metrics: dict[str, dict[str, float]]
    conditions: str = ""
    problems: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """Avg@n, whatever n is."""
        return self.metrics[average_key(self.metrics)]["mean"]


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run directory. `metrics` and `journal` are JSON objects in the order they were written."""

    name: str
    path: Path
    config: str
    settings: dict[str, Any]  # the configuration as nested dictionaries
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]  # in the order of training
    journal: list[dict[str, Any]]

    def samples_file(self, evaluation: Evaluation) -> Path:
        """Where the graded responses of an evaluation are, if they are kept."""
        return self.path / "evaluation" / f"{evaluation.name}.parquet"

    @property
    def hard_threshold(self) -> float:
        """Under which success rate a problem is hard; where the run has no such filter, the paper's."""
        return float(self.settings.get("algorithm", {}).get("hard_threshold") or 0.1)

    @property
    def removed(self) -> set[str]:
        """The policies (as evaluations name them) that `checkpoint.keep_best` did not keep."""
        return {path for record in self.journal if record.get("event") == "removed" for path in record["paths"]}


def read_run(path: Path) -> Run:
    """Read a run directory. Raises UserError if it isn't one, or if a file of it is damaged."""
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl", "journal.jsonl", "evaluation")):
        raise UserError(
            f"{path} is not a run directory, or its run has not begun: it holds no config.yaml, metrics.jsonl, "
            "journal.jsonl or evaluation/"
        )
    config, settings = _read_config(path / "config.yaml")
    return Run(
        name=path.resolve().name,
        path=path,
        config=config,
        settings=settings,
        metrics=_read_metrics(path / "metrics.jsonl"),
        evaluations=_read_evaluations(path / "evaluation"),
        journal=read_json_lines(path / "journal.jsonl"),
    )


def conditions_in_words(record: dict[str, Any]) -> str:
    """The prompt template and the answer format of a result, in words; "" where it doesn't say."""
    return ", ".join(str(record[key]) for key in ("template", "answer_format") if record.get(key))


def average_key(metrics: dict[str, Any]) -> str:
    """The name under which an evaluation holds its Avg@n, e.g. "avg@32"."""
    return next(key for key in metrics if key.startswith("avg@"))


def average_keys(metrics: dict[str, Any]) -> list[str]:
    """The names of Avg@n in what several evaluations hold, by n."""
    return sorted((key for key in metrics if key.startswith("avg@")), key=lambda key: int(key.removeprefix("avg@")))


def pass_keys(metrics: dict[str, Any]) -> list[str]:
    """The names of the pass@k of an evaluation for k > 1, by k (pass@1 is Avg@n once more)."""
    keys = [key for key in metrics if key.startswith("pass@") and key != "pass@1"]
    return sorted(keys, key=lambda key: int(key.removeprefix("pass@")))


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """Its text and what that holds."""
    if not path.exists():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())  # PyYAML draws where it is, over several lines
        raise UserError(f"{path} is not a YAML file ({why}): the file is damaged") from None
    if not isinstance(settings, dict | None):
        raise UserError(f"{path} holds no keys: it is not the configuration of a run")
    return text, settings or {}


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    """Each line says of which step it is, and all else in it is numbers. Raises UserError where that is not so."""
    lines = read_json_lines(path)
    for number, line in enumerate(lines, start=1):
        missing = [key for key, kind in _PLACE.items() if not isinstance(line.get(key), kind)]
        strange = [key for key, value in line.items() if not (key == "phase" or value is None or _is_finite(value))]
        if wrong := missing + strange:
            raise UserError(f"{path}, line {number}: {wrong[0]} is {line.get(wrong[0])!r:.40}: the file is damaged")
    return lines


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _read_evaluations(directory: Path) -> list[Evaluation]:
    evaluations = [_read_evaluation(path) for path in directory.glob("*.json") if not path.name.startswith(".")]
    order = {"base": 0, "explore": 1, "exploit": 2}
    known = [evaluation for evaluation in evaluations if evaluation is not None]
    return sorted(known, key=lambda each: (each.iteration, order.get(each.phase, 3), each.step))


def _read_evaluation(path: Path) -> Evaluation | None:
    place = PolicyName.of(path.stem)
    if place is None:
        return None  # written by `rloop evaluate` under a name of the user's
    try:
        record = json_object(path.read_text(encoding="utf-8"))
        metrics, policy, conditions = record["metrics"], record.get("policy"), conditions_in_words(record)
        problems, groups = record.get("problem_digests", {}), record.get("groups", {}).get("source", {})
        sources = {source: group["metrics"] for source, group in groups.items()}
        average_key(metrics)
        found = [pair for each in (metrics, *sources.values()) for pair in each.items()]
        of_numbers = all(_METRIC_NAME.fullmatch(key) and _is_interval(value) for key, value in found)
        if not (of_numbers and isinstance(policy, str | None) and isinstance(problems, dict)):
            raise ValueError("metrics, policy or problem_digests is of another form")
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise UserError(f"{path} is not an evaluation with an avg@N in its metrics ({error!r:.200})") from error
    return Evaluation(path.stem, *place, policy, metrics, conditions, problems, sources)


def _is_interval(value: Any) -> bool:
    return all(_is_finite(value[bound]) for bound in ("mean", "low", "high"))
