"""Which files the workers take first, what they don't look for garbage in, and that no example has a deadline."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import pytest

from rloop_mcore.platform.process import importing

# A file is one worker's (`--dist loadfile`): the longest come first, lest one worker has them when the other is done.
LONGEST = [
    *("system/test_kill.py", "parallel", "system", "reward/test_math.py", "test_loop.py"),
    *("weights", "rollout", "platform"),
]

with suppress(ImportError):  # a borrowed GPU machine has it not, and runs tests without examples (docs/gpu.md)
    from hypothesis import settings

    settings.register_profile("patient", deadline=None)  # on a busy machine an example may wait longer than 200 ms
    settings.load_profile("patient")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What the test files import, torch and transformers among it, is no garbage: to look for it there took up to a
    sixth of the CPU time of a worker."""
    with importing():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        return next((n for n, path in enumerate(LONGEST) if item.path.is_relative_to(here / path)), len(LONGEST))

    items.sort(key=place)
