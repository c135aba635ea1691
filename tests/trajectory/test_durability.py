"""Whatever a crash or a disk does to the cache, it holds exactly what was sealed or kept, or says what is damaged."""

import json
import os
import shutil
from hashlib import file_digest, sha256
from pathlib import Path

import pytest
from trajectory_rows import step_rows

from rloop_mcore.errors import UserError
from rloop_mcore.trajectory import reader
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.types import ExpertQuery

FILE_OPERATIONS = ["replace", "fsync", "unlink", "open"]


def build(directory: Path, steps: int = 3) -> list[str]:
    """A cache with one shard a step, four trajectories by four each."""
    cache = TrajectoryCache(directory)
    for step in range(steps):
        cache.append(step_rows(0, step))
        cache.seal()
    return [f"shard-{step:06d}.parquet" for step in range(steps)]


@pytest.fixture
def reference(tmp_path):
    """The digests of caches with 0, 1, 2, ... steps."""
    digests = []
    for steps in range(5):
        build(tmp_path / f"reference{steps}", steps)
        digests.append(TrajectoryCache(tmp_path / f"reference{steps}").digest())
    return digests


def before_each_operation(monkeypatch, action):
    """Call `action(n)` before the n-th operation on the file system."""
    count = [0]

    def wrap(real):
        def operation(*args, **kwargs):
            count[0] += 1
            action(count[0])
            return real(*args, **kwargs)

        return operation

    for name in FILE_OPERATIONS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return count


def snapshots_of(monkeypatch, directory: Path, target: Path, work) -> list[Path]:
    """Copies of `directory` as a kill -9 before each file operation of `work`, or after the last, leaves it."""
    copying = []

    def copy(number):
        if not copying:
            copying.append(True)
            shutil.copytree(directory, target / f"{number:03d}") if directory.exists() else None
            copying.clear()

    with monkeypatch.context() as patch:
        before_each_operation(patch, copy)
        work()
    shutil.copytree(directory, target / "end")
    return sorted(target.iterdir())


def test_killed_anywhere_in_a_seal_the_cache_holds_what_was_sealed_before_or_also_the_new_step(
    tmp_path, monkeypatch, reference
):
    names = build(tmp_path / "cache", 2)
    cache = TrajectoryCache(tmp_path / "cache")
    cache.append(step_rows(0, 2))
    snapshots = snapshots_of(monkeypatch, cache.directory, tmp_path / "snapshots", cache.seal)
    assert len(snapshots) > 8
    counts = []
    for snapshot in snapshots:
        opened = TrajectoryCache(snapshot)
        counts.append(opened.count())
        assert opened.verify() == []
        assert opened.digest() == reference[opened.count() // 16]
        # the journal names the first two: the resumed run keeps those and does the step again
        opened.keep_only(names)
        assert sorted(p.name for p in snapshot.iterdir()) == ["manifest.json", *names, "times"]
        assert sorted(p.name for p in (snapshot / "times").iterdir()) == names
        assert opened.digest() == reference[2]
        opened.append(step_rows(0, 2))
        opened.seal()
        assert TrajectoryCache(snapshot).digest() == reference[3]
    assert counts == sorted(counts)
    assert set(counts) == {32, 48}


def test_killed_anywhere_in_keep_only_it_can_be_done_again(tmp_path, monkeypatch, reference):
    names = build(tmp_path / "cache", 4)
    (tmp_path / "cache" / ".tmp-1-shard-000004.parquet").write_bytes(b"torn")
    cache = TrajectoryCache(tmp_path / "cache")
    snapshots = snapshots_of(
        monkeypatch, cache.directory, tmp_path / "snapshots", lambda: cache.keep_only([names[0], names[1]])
    )
    assert len(snapshots) > 6
    for snapshot in snapshots:
        opened = TrajectoryCache(snapshot)
        assert opened.digest() in (reference[4], reference[2])
        opened.keep_only([names[0], names[1]])
        assert TrajectoryCache(snapshot).digest() == reference[2]
        assert sorted(p.name for p in snapshot.iterdir()) == ["manifest.json", *names[:2], "times"]
        assert sorted(p.name for p in (snapshot / "times").iterdir()) == names[:2]


@pytest.mark.parametrize("first", [True, False])
def test_a_failing_operation_in_a_seal_loses_nothing_and_the_seal_can_be_repeated(
    tmp_path, monkeypatch, reference, first
):
    sealed = 0 if first else 2
    number = 0
    while True:
        number += 1
        directory = tmp_path / f"cache{number}"
        build(directory, sealed)
        cache = TrajectoryCache(directory)
        cache.append(step_rows(0, sealed))

        def fail(current, number=number):
            if current == number:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            before_each_operation(patch, fail)
            try:
                cache.seal()
                break
            except OSError:
                pass
        assert TrajectoryCache(directory).digest() in reference[sealed : sealed + 2]
        assert len(cache.seal()) == sealed + 1
        assert TrajectoryCache(directory).digest() == reference[sealed + 1]
    assert number > 8


def test_shards_are_fsynced_and_renamed_before_the_manifest(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name)), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(("replace", Path(b).name)), rename(a, b)))
    build(tmp_path / "cache", 1)
    temporary = f".tmp-{os.getpid()}-"
    assert events == [
        ("fsync", tmp_path.name),
        ("fsync", "cache"),  # which has the new folder of times
        ("fsync", temporary + "shard-000000.parquet"),
        ("replace", "shard-000000.parquet"),
        ("fsync", "times"),
        ("fsync", temporary + "shard-000000.parquet"),
        ("replace", "shard-000000.parquet"),
        ("fsync", "cache"),
        ("fsync", temporary + "manifest.json"),
        ("replace", "manifest.json"),
        ("fsync", "cache"),
    ]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "shard-000001.parquet is missing"),
        (lambda path: os.truncate(path, 100), "shard-000001.parquet has 100 bytes instead of"),
        (lambda path: os.truncate(path, 0), "shard-000001.parquet has 0 bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "shard-000001.parquet has .* bytes instead of"),
    ],
)
def test_a_missing_or_torn_shard_is_named_at_open(tmp_path, damage, says):
    names = build(tmp_path)
    damage(tmp_path / names[1])
    with pytest.raises(
        UserError, match=rf"{says}.*restore.*or set them aside with `rloop cache .* --quarantine`"
    ) as error:
        TrajectoryCache(tmp_path)
    assert names[0] not in str(error.value)


def test_every_flipped_bit_is_found_by_verify_and_its_shard_named(tmp_path):
    names = build(tmp_path)
    path = tmp_path / names[1]
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        (phrase,) = TrajectoryCache(tmp_path).verify()
        assert phrase.startswith(names[1])


def test_a_flipped_bit_in_a_page_is_never_taken_for_data(tmp_path):
    names = build(tmp_path)
    reference = TrajectoryCache(tmp_path).digest()
    path = tmp_path / names[1]
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    phrases = []
    for position in range(4, len(content) - footer, 13):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            assert TrajectoryCache(tmp_path).digest() == reference  # a part that the digest doesn't cover
        except UserError as damage:
            phrases.append(str(damage))
    assert all(names[1] in phrase for phrase in phrases)
    assert len(phrases) > 20


def test_a_flipped_bit_in_a_footer_is_named_by_a_query(tmp_path):
    """Parquet has no checksum there: a reader may stumble anywhere, or read something else."""
    names = build(tmp_path)
    path = tmp_path / names[1]
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    for position in range(len(content) - footer, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"{names[1]} is damaged \(its footer is missing or changed\)"):
            TrajectoryCache(tmp_path).count_experts(ExpertQuery((0,), 0.1))


def test_an_unreadable_shard_is_named_by_a_query(tmp_path):
    names = build(tmp_path)
    path = tmp_path / names[2]
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match=names[2]):
        TrajectoryCache(tmp_path).count_experts(ExpertQuery((0,), 0.1))


def test_every_changed_byte_of_the_manifest_is_found_at_open(tmp_path):
    build(tmp_path, 2)
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for position, byte in enumerate(content):
        damaged = bytearray(content)
        damaged[position] = ord("7") if byte != ord("7") else ord("8")
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            TrajectoryCache(tmp_path)


def test_a_manifest_cut_anywhere_is_found_at_open(tmp_path):
    build(tmp_path, 2)
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for size in range(len(content) - 1):  # without its newline it is whole
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            TrajectoryCache(tmp_path)


def test_a_lost_manifest_is_noticed_by_the_next_start(tmp_path):
    names = build(tmp_path, 2)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"lacks {', '.join(names)}, which the journal names"):
        TrajectoryCache(tmp_path).keep_only(names)
    assert {path.name for path in tmp_path.glob("*.parquet")} == set(names)


def test_a_manifest_of_another_version_is_no_damage(tmp_path):
    build(tmp_path, 1)
    entries = json.loads((tmp_path / "manifest.json").read_text())["shards"]
    for change in ({"steps": None}, {"shape": 3}):
        write = [{**entry, **change} for entry in entries]
        content = {"check": sha256(json.dumps(write).encode()).hexdigest(), "shards": write}
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"manifest\.json is of another version of rloop"):
            TrajectoryCache(tmp_path)


def test_a_shard_that_the_disk_cannot_read_is_named(tmp_path, monkeypatch):
    names = build(tmp_path)

    def unreadable(file, name):
        if file.name.endswith(names[1]):
            raise OSError(5, "Input/output error")
        return file_digest(file, name)

    monkeypatch.setattr(reader, "file_digest", unreadable)
    assert TrajectoryCache(tmp_path).verify() == [f"{names[1]} cannot be read (Input/output error)"]


def test_a_shard_the_journal_names_and_the_cache_lacks_is_an_error(tmp_path):
    names = build(tmp_path, 1)
    with pytest.raises(UserError, match=r"lacks shard-000007\.parquet, which the journal names"):
        TrajectoryCache(tmp_path).keep_only([*names, "shard-000007.parquet"])
