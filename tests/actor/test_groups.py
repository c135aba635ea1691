"""The process groups of a layout on a CPU: how many, and that they go with it."""

from __future__ import annotations

from pathlib import Path

from ranks import launch

GROUP = 3  # threads of one of gloo's groups; one of them wakes a hundred times a second


def test_a_layout_has_one_group_beside_torchruns_and_takes_it_along() -> None:
    """In a process of its own: the groups of other tests end when they like."""
    said = launch(Path(__file__).with_name("worker_groups.py"), processes=1)
    assert [int(number) / GROUP for number in said.split()] == [2, 1, 2, 1, 2, 1, 0]
