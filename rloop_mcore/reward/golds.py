"""Gold answers that don't verify against themselves: nobody can earn the reward of such a problem."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rloop_mcore.config import RewardConfig
from rloop_mcore.platform.files import parse_json, passing_over_a_full_disk, write_atomic
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.types import Problem

_PACKAGES = ("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")


def unverifiable(problems: Sequence[Problem], config: RewardConfig, kept: Path | None = None) -> dict[str, str]:
    """The ids of problems whose gold the math verifier does not call equal to itself, each with the verdict's reason.

    None for other verifiers, which alone know what their golds are. Equal text does not count here, though it does in
    grading: a gold that only its own spelling can match teaches spelling. The file `kept` keeps the result: as long as
    it is whole, and of these problems and this verifier, nothing is graded again.
    """
    if config.verifier != "math" or not problems:
        return {}
    if kept is not None and (before := _read(kept, problems, config)) is not None:
        return before
    checking = dataclasses.replace(config, verifier="rloop_mcore.reward.math:verify_gold", max_failure_share=1.0)
    with RewardPool(checking) as pool:
        verdicts = pool.grade([(problem, "", False) for problem in problems])
    found = {p.id: verdict.reason for p, verdict in zip(problems, verdicts, strict=True) if not verdict.correct}
    if kept is not None:
        record = {"unverifiable": found, "digest": _digest(found, problems, config)}
        with passing_over_a_full_disk():
            write_atomic(kept, json.dumps(record, indent=1) + "\n")
    return found


def _read(kept: Path, problems: Sequence[Problem], config: RewardConfig) -> dict[str, str] | None:
    """What an earlier start found; None where that is missing, damaged, or of something else."""
    try:
        record = parse_json(kept.read_bytes())
        found = dict(record["unverifiable"])
        return found if record["digest"] == _digest(found, problems, config) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(found: Mapping[str, str], problems: Sequence[Problem], config: RewardConfig) -> str:
    """sha256 over the result and all that it follows from."""
    code = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))}
    packages = {name: version(name) for name in _PACKAGES}
    golds = [(problem.id, problem.answer) for problem in problems]
    limits = config.deadline_s, config.memory_mib
    return hashlib.sha256(json.dumps([found, golds, limits, code, packages]).encode()).hexdigest()
