"""The process groups of a layout on a CPU: how many, and that they go with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.config import LayoutConfig  # noqa: E402


@pytest.fixture(autouse=True)
def _leave() -> Iterator[None]:
    yield
    parallel.destroy()


def polling_threads() -> int:
    """Those of gloo's groups that wake a hundred times a second."""
    return sum(path.read_text() == "gloo_tcp_loop\n" for path in Path("/proc/self/task").glob("*/comm"))


def test_one_process_has_its_own_group_and_torchruns() -> None:
    before = polling_threads()
    parallel.initialize(LayoutConfig(), seed=0, timeout_s=60.0)
    assert polling_threads() - before == 2


def test_a_layout_that_is_left_takes_its_threads_along() -> None:
    before = polling_threads()
    for _ in range(3):
        parallel.initialize(LayoutConfig(), seed=0, timeout_s=60.0)
        parallel.leave_layout()
        assert polling_threads() - before == 1
