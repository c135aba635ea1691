"""`rloop grade`: grade a file of answers with the verifier of the rewards."""

from __future__ import annotations

from pathlib import Path

from rloop_mcore.config import RewardConfig
from rloop_mcore.reward.grade import grade_file


def grade(path: Path, out: Path | None, answer_format: str) -> int:
    """Grade the rows of `path`; print the counts by reason. Raises UserError for a bad file."""
    summary = grade_file(path, out, RewardConfig(answer_format=answer_format))
    for key, value in summary.items():
        print(f"{key}: {value}")
    return 0
