"""The journal against a list of records: a kill or a power cut between any two file operations loses none of them."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from crashes import Disk
from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore.journal import Journal

SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
records = st.fixed_dictionaries(
    {"event": st.sampled_from(["commit", "done"]), "note": st.text(max_size=20) | st.integers()}
)


def held(path: Path) -> list[dict[str, Any]]:
    """What a reader finds: the model's part of the records."""
    return [{key: value for key, value in r.items() if key not in ("n", "time")} for r in Journal(path).records]


def write(path: Path, model: list[dict[str, Any]]) -> None:
    journal = Journal(path)
    for record in model:
        journal.record(**record)


def resume(path: Path) -> None:
    """What a start does before it trusts what it read."""
    Journal(path).make_durable()


@settings(max_examples=12)
@given(before=st.lists(records, max_size=3), flying=records, seed=st.integers(0, 2**32))
@pytest.mark.parametrize("power", [False, True])
def test_a_crash_at_any_operation_leaves_what_was_recorded_and_perhaps_the_record_in_flight(
    power: bool, before: list[dict[str, Any]], flying: dict[str, Any], seed: int
) -> None:
    outcomes = set()
    for operation in count(1):
        with TemporaryDirectory(dir=SHM) as folder:
            path = Path(folder) / "journal.jsonl"
            write(path, before)
            disk = Disk(Path(folder))
            with disk.dying_at(operation):
                Journal(path).record(**flying)
            if power:
                disk.lose_power(Random(f"{seed} {operation}"))
            found = held(path)
            if not disk.dead:
                assert found == [*before, flying]
                break
            assert found in (before, [*before, flying])
            outcomes.add(len(found))
            with disk.dying_at(None):
                resume(path)
            disk.lose_power(Random(seed))
            assert held(path) == found
            write(path, [flying])
            assert held(path) == [*found, flying]
    assert operation > 4
    assert len(before) in outcomes


@settings(max_examples=60)
@given(
    work=st.lists(
        st.tuples(records, st.none() | st.integers(1, 7), st.none() | st.integers(1, 3), st.booleans(), st.booleans())
    ),
    seed=st.integers(0, 2**32),
)
def test_crash_after_crash_the_journal_is_what_was_last_trusted_and_what_was_recorded_since(
    work: list[tuple[dict[str, Any], int | None, int | None, bool, bool]], seed: int
) -> None:
    draw = Random(seed)
    with TemporaryDirectory(dir=SHM) as folder:
        path, disk = Path(folder) / "journal.jsonl", Disk(Path(folder))
        trusted: list[dict[str, Any]] = []
        for record, death, death_at_resume, power, power_at_resume in work:
            with disk.dying_at(death):
                write(path, [record])
            possible = [[*trusted, record]] if not disk.dead else [trusted, [*trusted, record]]
            if power:
                disk.lose_power(draw)
            assert held(path) in possible
            with disk.dying_at(death_at_resume):
                resume(path)
            if not disk.dead:
                possible = [held(path)]
            if power_at_resume:
                disk.lose_power(draw)
            assert held(path) in possible
            trusted = held(path)
            with disk.dying_at(None):
                resume(path)
