"""Which files the workers take first."""

from __future__ import annotations

from pathlib import Path

import pytest

# A file is one worker's (`--dist loadfile`): the longest come first, lest one worker has them when the other is done.
LONGEST = ["system/test_kill.py", "parallel", "system", "weights", "rollout", "platform"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        return next((n for n, path in enumerate(LONGEST) if item.path.is_relative_to(here / path)), len(LONGEST))

    items.sort(key=place)
