"""Grade a file of responses: what `rloop grade` does."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rloop_mcore.config import RewardConfig
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import parse_json, write_atomic
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.types import Problem

_FIELDS = ("id", "gold", "pred")


def grade_file(
    path: Path, out: Path | None, config: RewardConfig, tell: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Grade the rows {"id", "gold", "pred"} of a JSONL file; `pred` is a whole response, `gold` an answer or a
    solution of GSM8K, which ends in "#### " and the answer.

    `out` gets the same rows with "correct", "reason" and "seconds" added; `tell` is told how many rows of how many are
    done. Returns the counts: rows, correct, accuracy and the number of rows by reason. A row that is not of this form
    is a UserError with its line, as are a file without rows and an `out` that is the file itself.
    """
    rows = read_rows(path)
    if not rows:
        raise UserError(f"{path} holds no rows to grade.")
    if out is not None and out.exists() and out.samefile(path):
        raise UserError(f"--json {out} is the file that is graded: give another name.")
    # Here the failures are the result, not a sign that training would learn nonsense.
    with RewardPool(dataclasses.replace(config, max_failure_share=1.0)) as pool:
        futures = [
            pool.submit([(Problem(str(row["id"]), "", row["gold"].rpartition("#### ")[2].strip()), row["pred"], False)])
            for row in rows
        ]
        verdicts = []
        for done, future in enumerate(futures):
            tell(done, len(rows))
            verdicts += future.result()
        tell(len(rows), len(rows))
    if out is not None:
        graded = [
            row | {"correct": verdict.correct, "reason": verdict.reason, "seconds": round(verdict.seconds, 6)}
            for row, verdict in zip(rows, verdicts, strict=True)
        ]
        write_atomic(out, "".join(json.dumps(row) + "\n" for row in graded))
    correct = sum(verdict.correct for verdict in verdicts)
    return {
        "rows": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows),
        "answer_format": config.answer_format,
        "reasons": dict(sorted(Counter(verdict.reason for verdict in verdicts).items())),
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the file, checked; UserError with file and line for the first bad one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a JSONL file to grade") from error
    return [_read_row(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _read_row(line: bytes, where: str) -> dict[str, Any]:
    wanted = 'want {"id": ..., "gold": "the right answer", "pred": "the whole response"}'
    try:
        row = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {wanted}") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object; {wanted}")
    for field in _FIELDS:
        if field not in row:
            raise UserError(f"{where}: no field {field!r}; {wanted}")
    for field in ("gold", "pred"):
        if not isinstance(row[field], str):
            raise UserError(f"{where}: {field!r} must be a string and is {json.dumps(row[field])[:80]}; {wanted}")
    return row
