"""Merging small shards: the same rows in fewer files, for every reader and for a resumed run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectory_rows import step_rows

from rloop_mcore.errors import UserError
from rloop_mcore.trajectory import compact as compacting
from rloop_mcore.trajectory import writer
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.compact import compact
from rloop_mcore.trajectory.manifest import read_manifest
from rloop_mcore.trajectory.quarantine import quarantine
from rloop_mcore.types import ExpertQuery


def build(directory: Path, steps: list[tuple[int, int]]) -> list[str]:
    """A shard of 16 rows a step of these (iteration, step)."""
    cache = TrajectoryCache(directory)
    for iteration, step in steps:
        cache.append(step_rows(iteration, step))
        cache.seal()
    return [f"shard-{number:06d}.parquet" for number in range(len(steps))]


STEPS = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_rows_stay_and_shards_of_an_iteration_become_one(tmp_path: Path) -> None:
    names = build(tmp_path, STEPS)
    before = TrajectoryCache(tmp_path)
    rows, digest = list(before.rows()), before.digest()
    experts = [before.count_experts(ExpertQuery((iteration,), 0.5)) for iteration in (0, 1)]
    histograms = [before.success_histogram(iteration) for iteration in (0, 1)]
    assert compact(tmp_path, names) == (5, 2)
    merged = ["shard-000000-000002.parquet", "shard-000003-000004.parquet"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", *merged, "times"]
    assert sorted(path.name for path in (tmp_path / "times").iterdir()) == names
    cache = TrajectoryCache(tmp_path)
    assert list(cache.rows()) == rows
    assert (cache.count(), cache.digest(), cache.verify()) == (80, digest, [])
    assert [cache.count_experts(ExpertQuery((iteration,), 0.5)) for iteration in (0, 1)] == experts
    assert [cache.success_histogram(iteration) for iteration in (0, 1)] == histograms
    assert [len(shard.steps) for shard in read_manifest(tmp_path)] == [3, 2]


def test_a_resumed_run_goes_on_after_it_and_knows_the_old_names(tmp_path: Path) -> None:
    names = build(tmp_path, STEPS)
    compact(tmp_path, names)
    cache = TrajectoryCache(tmp_path)
    cache.keep_only(names)
    assert cache.count() == 80
    cache.append(step_rows(1, 2))
    assert cache.seal() == [*names, "shard-000005.parquet"]
    compact(tmp_path, [*names, "shard-000005.parquet"])
    assert [shard.name for shard in read_manifest(tmp_path)] == [
        "shard-000000-000002.parquet",
        "shard-000003-000005.parquet",
    ]
    TrajectoryCache(tmp_path).keep_only([*names, "shard-000005.parquet"])
    assert TrajectoryCache(tmp_path).count() == 96


def test_a_journal_that_lost_its_end_is_told_apart_from_a_crash(tmp_path: Path) -> None:
    names = build(tmp_path, STEPS)
    compact(tmp_path, names)
    with pytest.raises(UserError, match=r"000003-000004.parquet was merged .* no longer names shard-000004.parquet"):
        TrajectoryCache(tmp_path).keep_only(names[:-1])
    assert TrajectoryCache(tmp_path).count() == 80
    TrajectoryCache(tmp_path).keep_only(names[:3])  # to the end of the iteration before: whole shards
    assert TrajectoryCache(tmp_path).count() == 48


def test_what_the_journal_does_not_name_is_left_for_the_next_start(tmp_path: Path) -> None:
    names = build(tmp_path, STEPS)
    assert compact(tmp_path, names[:-1]) == (5, 3)
    TrajectoryCache(tmp_path).keep_only(names[:-1])
    assert TrajectoryCache(tmp_path).count() == 64


def test_a_damaged_shard_is_not_made_to_look_sound(tmp_path: Path) -> None:
    names = build(tmp_path, STEPS)
    content = bytearray((tmp_path / names[1]).read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / names[1]).write_bytes(content)
    manifest = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"shard-000001\.parquet has another content .* --quarantine"):
        compact(tmp_path, names)
    assert (tmp_path / "manifest.json").read_bytes() == manifest
    quarantine(tmp_path)
    assert compact(tmp_path, names) == (4, 3)  # of the second iteration; the lost one parts those of the first
    assert [shard.name for shard in read_manifest(tmp_path)] == [*names[:3], "shard-000003-000004.parquet"]
    cache = TrajectoryCache(tmp_path)
    cache.keep_only(names)
    assert cache.count() == 64
    assert [(loss.iteration, loss.step, loss.lost) for loss in cache.losses()] == [(0, 1, 16)]


@settings(max_examples=15)
@given(limit=st.integers(1, 90), group=st.integers(1, 20))
def test_merged_shards_are_at_most_so_large_and_a_second_time_nothing_changes(
    tmp_path_factory: pytest.TempPathFactory, limit: int, group: int
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    names = build(directory, STEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compacting, "ROWS", limit)
        patch.setattr(writer, "ROW_GROUP", group)
        compact(directory, names)
        shards = read_manifest(directory)
        for shard in shards:
            if len(shard.sealed_as) == 1:
                continue
            assert shard.rows <= limit
            metadata = pq.read_metadata(directory / shard.name)
            sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            assert set(sizes[:-1]) <= {group}
            assert sum(sizes) == shard.rows
        for left, right in pairwise(shards):
            same_iteration = left.steps[0][0] == right.steps[0][0]
            assert not same_iteration or left.rows + right.rows > limit
        assert compact(directory, names) == (len(shards), len(shards))
    assert read_manifest(directory) == shards


def test_a_merged_file_is_written_like_a_sealed_one(tmp_path: Path) -> None:
    names = build(tmp_path, STEPS[:2])

    def settings_of(path: Path) -> list[tuple]:
        group = pq.read_metadata(path).row_group(0)
        columns = [group.column(index) for index in range(group.num_columns)]
        return [(column.path_in_schema, column.compression, column.encodings) for column in columns]

    sealed, schema = settings_of(tmp_path / names[0]), pq.read_schema(tmp_path / names[0])
    compact(tmp_path, names)
    (merged,) = tmp_path.glob("*.parquet")
    assert settings_of(merged) == sealed
    assert pq.read_schema(merged).equals(schema, check_metadata=True)
