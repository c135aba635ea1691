"""`rloop status`: where a run stands, from its files alone. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rloop_mcore.kept_policies import best
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.platform.files import read_json_lines
from rloop_mcore.progress import figures_text
from rloop_mcore.trajectory.cache import TrajectoryCache

_SAID_ABOVE = ("iteration", "phase", "step", "total", "time")
_GUARD = ("iteration", "phase", "step", "policy", "reason")  # where steps went wrong in a row, and what followed


def status(path: Path, as_json: bool) -> int:
    """Print the state of the run in `path`. Raises UserError where there is none.

    Without the cache's digest where nobody asked for JSON: it takes reading every trajectory.
    """
    state = read_status(RunDirectory(path), digest=as_json)
    if as_json:
        print(json.dumps(state))
    else:
        console = Console()
        last = state["metrics"]  # of a step that may not be committed yet
        if last.get("total") and all(last.get(key) == state[key] for key in ("iteration", "phase")):
            state["step"] = f"{state['step']} of {last['total']}"
        others = {key: value for key, value in last.items() if key not in _SAID_ABOVE}
        state["expert"] = [f"{count} trajectories of iteration {i}" for i, count in enumerate(state["expert"])]
        state["metrics"] = figures_text(last) or others  # of a step there are dozens: --json has them all
        for key, value in state.items():
            if value not in (None, [], {}):
                # the last words of a run may be anybody's, brackets included
                console.print(Text.assemble((f"{key:14}", "bold"), f" {_in_words(value)}"), soft_wrap=True)
    return 0


def _in_words(value: Any) -> str:
    """Numbers in four digits, and nothing of how Python writes them."""
    if isinstance(value, dict):
        return "  ".join(f"{key} {_in_words(item)}" for key, item in value.items() if item is not None)
    if isinstance(value, list):
        return "; ".join(map(_in_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_status(run: RunDirectory, digest: bool = True) -> dict[str, Any]:
    """What `rloop status --json` prints."""
    config, journal = run.read_config(), run.open_journal()
    records = journal.records
    policies = [record for record in records if "digest" in record]
    place = next(reversed(journal.places()), None)
    cache = TrajectoryCache(run.cache) if run.cache.is_dir() else None
    return {
        "state": _state(run, journal.finished(config.algorithm.iterations)),
        "message": (run.ending() or {}).get("message") or None,
        "iteration": place["iteration"] if place else 0,
        "phase": place["phase"] if place else "base",
        "step": place.get("step", 0) if place else 0,
        "policy_digest": policies[-1]["digest"] if policies else None,
        "base_digest": next((r["digest"] for r in records if r["event"] == "policy" and r["iteration"] == 0), None),
        "cache": {"trajectories": cache.count() if cache else 0}
        | ({"digest": cache.digest() if cache else None} if digest else {}),
        "best": _best(run, records),
        "expert": [r["experts"] for r in records if r["event"] == "done" and r["phase"] == "select"],
        "guard": [{key: r[key] for key in _GUARD} for r in records if r["event"] == "guard"],
        "metrics": next(reversed(read_json_lines(run.path / "metrics.jsonl")), {}),
    }


def _best(run: RunDirectory, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The checkpoint that validation picks of those so far."""
    found = best(records)
    if found is None:
        return None
    return {"name": found.name, "path": str(run.path / found.path), found.metric: found.average}


def _state(run: RunDirectory, finished: bool) -> str:
    if run.locked():
        return "running"
    if finished:
        return "finished"
    ending = run.ending()
    return "failed" if ending is not None and ending["code"] == 1 else "interrupted"
