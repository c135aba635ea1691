"""`rloop grade`: grade a file of answers with the verifier of the rewards."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from rloop_mcore.config import RewardConfig
from rloop_mcore.progress import ProgressDisplay, seconds_left
from rloop_mcore.reward.grade import grade_file


def grade(path: Path, out: Path | None, answer_format: str) -> int:
    """Grade the rows of `path`; print the counts by reason. Raises UserError for a bad file."""
    display, begun = ProgressDisplay(Console(stderr=True, highlight=False)), time.monotonic()

    def tell(done: int, total: int) -> None:
        left_s = seconds_left(time.monotonic() - begun, done, total - done)
        display.show(f"grading {path.name}", done, total, left_s, {})

    try:
        summary = grade_file(path, out, RewardConfig(answer_format=answer_format), tell)
    finally:
        display.close()
    for key, value in summary.items():
        print(f"{key}: {value}")
    return 0
