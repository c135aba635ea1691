"""A disk that is really full: a tmpfs of 256 kB, filled up to a few kB. Nothing is lost or doubled, and it goes on."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MOUNT = "mount -t tmpfs -o size=256k none {folder}"
IN_A_NAMESPACE = ["unshare", "-rm", "sh", "-c"]

FILL = """
import errno, os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
folder = Path(sys.argv[1])

def fill(leave):
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        os.truncate(file.name, max(0, os.path.getsize(file.name) - leave))

def fails(work):
    try:
        work()
    except OSError as error:
        assert error.errno == errno.ENOSPC
        return True
    return False
"""

CACHE = """
from trajectory_rows import step_rows
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.writer import stored_order
from rloop_mcore.trajectory.compact import compact
from rloop_mcore.trajectory.quarantine import quarantine

cache = TrajectoryCache(folder / "cache")
cache.append(step_rows(0, 0))
names = cache.seal()
failed = 0
for step, leave in enumerate([0, 4096, 8192, 12288, 16384], start=1):
    before, rows = cache.digest(), cache.count()
    fill(leave)
    cache.append(step_rows(0, step))
    if fails(cache.seal):
        failed += 1
        opened = TrajectoryCache(folder / "cache")
        assert (opened.digest(), opened.count(), opened.verify()) == (before, rows, [])
        assert fails(cache.seal)
    (folder / "filler").unlink()
    names = cache.seal()
    opened = TrajectoryCache(folder / "cache")
    assert list(opened.rows()) == [row for n in range(step + 1) for row in stored_order(step_rows(0, n))]
    assert len(names) == step + 1
    opened.keep_only(names)
assert failed >= 3, failed

digest, files = cache.digest(), sorted(os.listdir(folder / "cache"))
fill(0)
assert fails(lambda: compact(folder / "cache", names))
assert sorted(os.listdir(folder / "cache")) == files
assert TrajectoryCache(folder / "cache").digest() == digest
(folder / "filler").unlink()
assert compact(folder / "cache", names) == (6, 1)
assert TrajectoryCache(folder / "cache").digest() == digest

(shard,) = (folder / "cache").glob("*.parquet")
os.truncate(shard, 100)
manifest = (folder / "cache" / "manifest.json").read_bytes()
fill(0)
assert fails(lambda: quarantine(folder / "cache"))
assert (folder / "cache" / "manifest.json").read_bytes() == manifest and shard.exists()
(folder / "filler").unlink()
assert [lost.name for lost in quarantine(folder / "cache")] == [shard.name]
"""

JOURNAL = """
from rloop_mcore.journal import Journal

journal, written, failed = Journal(folder / "journal.jsonl"), [], 0
for number in range(12):
    text = f"{number}" * 3000
    fill(4096 * (number % 3))
    if fails(lambda: journal.record("note", text=text)):
        failed += 1
        assert [r["text"] for r in journal.records] == written
        assert [r["text"] for r in Journal(journal.path).records] == written
        assert fails(lambda: journal.record("note", text=text))
        (folder / "filler").unlink()
        journal.record("note", text=text)
    written.append(text)
    assert [r["text"] for r in Journal(journal.path).records] == written
assert 3 <= failed < 12, failed
"""

MODEL = """
from rloop_mcore.data.countdown_model import write_model

for leave in (0, 65536):
    fill(leave)
    assert fails(lambda: write_model(folder / "model", seed=0))
    assert [path.name for path in folder.iterdir()] == ["filler"]
"""


@pytest.fixture(scope="module", autouse=True)
def small_disk_is_possible() -> None:
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    with_a_mount = [*IN_A_NAMESPACE, MOUNT.format(folder="/mnt")]
    if subprocess.run(with_a_mount, capture_output=True, timeout=60).returncode:
        pytest.skip("needs user namespaces, to mount a small tmpfs")


@pytest.mark.parametrize("work", [CACHE, JOURNAL, MODEL], ids=["cache", "journal", "model"])
def test_a_full_disk_is_an_error_and_then_it_goes_on(tmp_path: Path, work: str) -> None:
    script = tmp_path / "work.py"
    script.write_text(FILL + work)
    folder = tmp_path / "disk"
    folder.mkdir()
    python = shlex.join([sys.executable, str(script), str(folder), str(Path(__file__).parent)])
    command = f"{MOUNT.format(folder=folder)} && exec {python}"
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*IN_A_NAMESPACE, command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
