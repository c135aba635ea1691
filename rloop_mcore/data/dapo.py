"""DAPO-Math-17k as published (BytedTsinghua-SIA/DAPO-Math-17k): chat messages, and the gold answer in `reward_model`.

Its file repeats each problem about a hundred times; `load_problems` leaves the repetitions out.
"""

from __future__ import annotations

from typing import Any

_BEFORE = "where $Answer is the answer to the problem.\n\n"
_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def is_dapo_row(row: Any) -> bool:
    """Is it a row of that form?"""
    return isinstance(row, dict) and isinstance(row.get("prompt"), list) and isinstance(row.get("reward_model"), dict)


def from_dapo_row(row: dict[str, Any]) -> dict[str, Any]:
    """The row in the project's schema, the published prompt's instructions taken off; its id comes of its content."""
    last = row["prompt"][-1] if row["prompt"] else None
    text = last.get("content") if isinstance(last, dict) else None
    if isinstance(text, str):
        text = text.partition(_BEFORE)[2] or text
        text = text.removesuffix(_AFTER).strip()
    return {"problem": text, "answer": row["reward_model"].get("ground_truth"), "source": row.get("data_source")}
