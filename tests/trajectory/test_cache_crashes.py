"""The cache against a plain model of it: kills and power cuts between any two file operations of a seal, a start, a
compaction, a quarantine."""

from __future__ import annotations

import os
import sys
from collections import Counter
from itertools import count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

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
from rloop_mcore.trajectory.quarantine import quarantine
from rloop_mcore.types import Trajectory

sys.path.append(str(Path(__file__).parents[1]))
from crashes import Disk

SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
DAMAGES = ["gone", "torn", "flipped"]  # of a shard, which is set aside then
KINDS = ["step", "two steps", "two steps", "unjournaled step", "next iteration", "start", "compact", *DAMAGES]


@pytest.fixture(autouse=True, scope="module")
def small_pieces():
    """Row groups of 8 rows, merged shards of at most 12: a step has 4."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROW_GROUP", 8)
        patch.setattr(compacting, "ROWS", 12)
        yield


class Run:
    """A run's cache, and what it has to hold: the rows of every seal that the journal names."""

    def __init__(self, folder: Path, draw: Random) -> None:
        self.cache, self.disk, self.draw = folder / "cache", Disk(folder), draw
        self.journal: dict[str, list[Trajectory]] = {}
        self.lost: set[str] = set()  # seals
        self.unjournaled: list[Trajectory] = []  # what the cache may hold beyond the journal
        self.damage: list[str] = []  # that was done and perhaps not set aside yet
        self.iteration = self.step = 0

    def do(self, kind: str, death: int | None, power: bool) -> bool:
        """Do something and die at a file operation of it; returns whether it came to that."""
        if kind in ("step", "two steps", "unjournaled step"):
            self.take_steps(2 if kind == "two steps" else 1, death, journal=kind != "unjournaled step")
        elif kind == "next iteration":
            self.iteration, self.step = self.iteration + 1, 0
            self.take_steps(1, death, journal=True)
        else:
            if kind in DAMAGES:
                self.damage_a_shard(kind)
            with self.disk.dying_at(death):
                {"start": self.start, "compact": self.compact}.get(kind, self.quarantine)()
        died = self.disk.dead
        if power:
            self.disk.lose_power(self.draw)
        return died

    def start(self) -> TrajectoryCache | None:
        try:
            cache = TrajectoryCache(self.cache)
            cache.keep_only(list(self.journal))
            return cache
        except UserError:
            assert self.damage
            return None

    def compact(self) -> None:
        try:
            compact(self.cache, self.journal)
        except UserError:
            assert self.damage

    def quarantine(self) -> None:
        quarantine(self.cache)

    def resume(self) -> TrajectoryCache:
        """A start that nothing disturbs, damaged shards set aside before it."""
        with self.disk.dying_at(None):
            if self.damage:
                self.quarantine()
            self.damage = []
            cache = self.start()
        assert cache is not None
        self.unjournaled = []
        return cache

    def take_steps(self, steps: int, death: int | None, journal: bool) -> None:
        """Each sealed and journaled, in one process."""
        cache = self.resume()
        for _ in range(steps):
            rows = step_rows(self.iteration, self.step, problems=2, group=2)
            self.draw.shuffle(rows)
            cache.append(rows)
            names: list[str] = []
            with self.disk.dying_at(death):
                names = cache.seal()
            self.unjournaled = rows
            if self.disk.dead or not journal:
                return
            (new,) = set(names) - set(self.journal)
            assert set(self.journal) < set(names)
            self.journal[new], self.unjournaled = rows, []
            self.step += 1

    def damage_a_shard(self, how: str) -> None:
        """Where there is one; its rows are lost then."""
        self.resume()
        files = sorted(self.cache.glob("*.parquet"))
        if not files:
            return
        path = self.draw.choice(files)
        steps = {(row["iteration"], row["step"]) for row in pq.read_table(path).select([0, 1]).to_pylist()}
        self.lost |= {name for name, rows in self.journal.items() if rows[0].key[:2] in steps}
        content = bytearray(path.read_bytes())
        if how == "gone":
            path.unlink()
        elif how == "torn":
            os.truncate(path, self.draw.randrange(len(content)))
        else:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
            path.write_bytes(content)
        self.disk.settle()
        self.damage = self.damage_found()
        assert path.name in self.damage[0]

    def damage_found(self) -> list[str]:
        try:
            return TrajectoryCache(self.cache).verify()
        except UserError as refusal:
            return [str(refusal)]

    def check(self) -> None:
        """The damage is known and named, or all but what is lost is there and perhaps one seal more than the journal
        names; after a start these are."""
        wanted, found = self.wanted(), self.damage_found()
        assert found in ([], self.damage)
        if not found:
            assert held(TrajectoryCache(self.cache)) in (wanted, in_order([*wanted, *self.unjournaled]))
        cache = self.resume()
        for opened in (cache, TrajectoryCache(self.cache)):
            assert held(opened) == wanted
            assert opened.count() == len(wanted)
            assert opened.verify() == []
            losses = {(loss.iteration, loss.step): (loss.lost, loss.left) for loss in opened.losses()}
            assert losses == {step: (rows, 0) for step, rows in self.rows_lost().items()}
        named = {path.name for path in self.cache.iterdir()} if self.cache.exists() else set()
        assert {name for name in named if not name.endswith(".parquet")} <= {"manifest.json", "quarantine", "times"}
        assert sum(pq.read_metadata(path).num_rows for path in self.cache.glob("*.parquet")) == len(wanted)

    def wanted(self) -> list[Trajectory]:
        return in_order(row for name, rows in self.journal.items() if name not in self.lost for row in rows)

    def rows_lost(self) -> Counter[tuple[int, int]]:
        return Counter((row.iteration, row.step) for name in self.lost for row in self.journal[name])


def in_order(rows) -> list[Trajectory]:
    return sorted(rows, key=lambda row: row.key)


def held(cache: TrajectoryCache) -> list[Trajectory]:
    return in_order(cache.rows())


@settings(max_examples=80)
@given(
    work=st.lists(
        st.tuples(st.sampled_from(KINDS), st.none() | st.integers(1, 30), st.booleans(), st.booleans()), max_size=8
    ),
    seed=st.integers(0, 2**32),
)
def test_crash_after_crash_the_cache_holds_what_the_journal_names(
    work: list[tuple[str, int | None, bool, bool]], seed: int
) -> None:
    with TemporaryDirectory(dir=SHM) as folder:
        run = Run(Path(folder), Random(seed))
        for kind, death, power, checked in work:
            run.do(kind, death, power)
            if checked:
                run.check()
        run.check()


def two_steps(folder: str) -> Run:
    run = Run(Path(folder), Random(1))
    run.do("two steps", None, False)
    return run


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("kind", ["step", "start", "compact", *DAMAGES])
def test_a_crash_at_every_operation(kind: str, power: bool) -> None:
    for operation in count(1):
        with TemporaryDirectory(dir=SHM) as folder:
            run = two_steps(folder)
            run.do("unjournaled step", None, False)
            died = run.do(kind, operation, power)
            run.check()
            if not died:
                break
    assert operation > 5


@pytest.mark.parametrize("kind", ["compact", "torn"])
def test_a_power_cut_after_a_kill_amid_the_replacement_of_the_manifest(kind: str) -> None:
    """A start finds a manifest that is not durable yet, and dies while it removes what that doesn't name."""
    with TemporaryDirectory(dir=SHM) as folder:
        run = two_steps(folder)
        run.do(kind, None, False)
        last = run.disk.operations
    for operation in range(max(1, last - 6), last + 1):
        for later in count(1):
            with TemporaryDirectory(dir=SHM) as folder:
                run = two_steps(folder)
                run.do(kind, operation, False)
                died = run.do("start", later, True)
                run.check()
                if not died:
                    break


@pytest.mark.parametrize("seed", range(5))
def test_a_cache_whose_first_seal_was_killed_is_as_durable_as_any(seed: int) -> None:
    for operation in count(1):
        with TemporaryDirectory(dir=SHM) as folder:
            run = Run(Path(folder), Random(seed))
            died = run.do("step", operation, False)
            run.do("step", None, True)
            run.check()
            if not died:
                break


@pytest.mark.parametrize("seed", range(5))
def test_a_damaged_file_is_still_there_after_a_power_cut(seed: int) -> None:
    with TemporaryDirectory(dir=SHM) as folder:
        run = two_steps(folder)
        run.do("torn", None, False)
        run.disk.lose_power(Random(seed))
        (aside,) = (run.cache / "quarantine").iterdir()
        assert aside.name in run.damage[0]


def test_a_second_compaction_changes_nothing() -> None:
    with TemporaryDirectory(dir=SHM) as folder:
        run = Run(Path(folder), Random(1))
        for _ in range(7):
            run.do("step", None, False)
        before = TrajectoryCache(run.cache).digest()
        assert compact(run.cache, run.journal)[1] < 7
        manifest, files = (run.cache / "manifest.json").read_bytes(), sorted(run.cache.iterdir())
        assert TrajectoryCache(run.cache).digest() == before
        few = len(list(run.cache.glob("*.parquet")))
        assert compact(run.cache, run.journal) == (few, few)
        assert ((run.cache / "manifest.json").read_bytes(), sorted(run.cache.iterdir())) == (manifest, files)
