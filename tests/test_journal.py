"""The journal: replay equals what was recorded, whatever byte a crash stopped at."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore.errors import UserError
from rloop_mcore.journal import PHASES, Journal

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
records = st.lists(
    st.fixed_dictionaries(
        {
            "event": st.sampled_from(["commit", "done"]),
            "iteration": st.integers(0, 2),
            "phase": st.sampled_from(PHASES),
            "step": st.integers(0, 3),
            "note": scalars | st.lists(scalars, max_size=2),
        }
    ),
    max_size=8,
)


def without_own_keys(journal: Journal) -> list[dict]:
    return [{key: value for key, value in r.items() if key not in ("n", "time")} for r in journal.records]


def write(path: Path, model: list[dict]) -> list[int]:
    """Record the model; the file's size after each record."""
    journal, sizes = Journal(path), [0]
    for record in model:
        journal.record(**record)
        sizes.append(path.stat().st_size)
    return sizes


@settings(max_examples=40)
@given(model=records, fraction=st.floats(0, 1), more=records)
def test_truncated_anywhere_it_holds_the_whole_lines_and_goes_on(model, fraction, more):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        sizes = write(path, model)
        cut = int(fraction * sizes[-1])
        if model:
            os.truncate(path, cut)
        survivors = model[: sum(size <= cut for size in sizes[1:])]

        journal = Journal(path)
        assert without_own_keys(journal) == survivors
        for record in more:
            journal.record(**record)

        reopened = Journal(path)
        assert reopened.records == journal.records
        assert without_own_keys(reopened) == survivors + more
        for iteration in range(3):
            for phase in PHASES:
                mine = [r for r in survivors + more if (r["iteration"], r["phase"]) == (iteration, phase)]
                commits = [r for r in mine if r["event"] == "commit"]
                newest = reopened.newest("commit", iteration, phase)
                assert (newest and {k: v for k, v in newest.items() if k not in ("n", "time")}) == (
                    commits[-1] if commits else None
                )
                assert reopened.done(iteration, phase) == any(r["event"] == "done" for r in mine)


def test_every_single_byte_cut_of_a_small_journal(tmp_path):
    path = tmp_path / "journal.jsonl"
    sizes = write(path, [{"event": "commit", "step": step} for step in range(3)])
    content = path.read_bytes()
    for cut in range(len(content) + 1):
        path.write_bytes(content[:cut])
        assert len(Journal(path).records) == sum(size <= cut for size in sizes[1:])


@pytest.mark.parametrize("flip", [0x01, 0x80, ord("}") ^ ord("\n"), ord("}") ^ ord("\r")])
def test_a_changed_byte_before_the_last_line_is_refused_and_named(tmp_path, flip):
    path = tmp_path / "journal.jsonl"
    sizes = write(path, [{"event": "commit", "step": step} for step in range(3)])
    content = bytearray(path.read_bytes())
    for position in range(sizes[1], sizes[2] - 1):  # without its newline: then it would be part of the last line
        damaged = content.copy()
        damaged[position] ^= flip
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"journal\.jsonl line 2 is corrupt"):
            Journal(path)


def test_a_missing_line_is_refused_even_as_the_last_but_one(tmp_path):
    path = tmp_path / "journal.jsonl"
    write(path, [{"event": "commit", "step": step} for step in range(3)])
    first, _, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + third)
    with pytest.raises(UserError, match="line 2 is corrupt"):
        Journal(path)


@pytest.mark.parametrize("tail", [b"\0" * 50, b'{"n":1,"event":"co', b"garbage\n"])
def test_a_torn_last_line_is_dropped_and_cut_off_before_the_next_record(tmp_path, tail):
    path = tmp_path / "journal.jsonl"
    write(path, [{"event": "first"}])
    path.write_bytes(path.read_bytes() + tail)
    torn = path.read_bytes()
    journal = Journal(path)
    assert path.read_bytes() == torn  # a reader beside a running writer changes nothing
    journal.record("second")
    assert [r["event"] for r in Journal(path).records] == ["first", "second"]


def test_a_failed_fsync_is_not_a_record_and_the_next_one_is(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.record("first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            journal.record("lost", text="x" * 1000)
    assert [r["event"] for r in journal.records] == ["first"]
    journal.record("second")
    assert [r["event"] for r in Journal(path).records] == ["first", "second"]


def test_a_journal_that_is_gone_meanwhile_is_not_made_anew_of_zeros(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("first")
    journal.path.unlink()
    with pytest.raises(FileNotFoundError):
        journal.record("second")
    assert not journal.path.exists()


def test_file_and_directory_entry_are_fsynced_before_record_returns(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.record("first")
    assert synced == [str(path), str(tmp_path)]
    journal.record("second")
    assert synced == [str(path), str(tmp_path), str(path)]


def test_what_was_replayed_is_brought_to_disk_with_its_name(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    write(path, [{"event": "first"}])
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    Journal(tmp_path / "none.jsonl").make_durable()
    assert synced == []
    Journal(path).make_durable()
    assert synced == [str(path), str(tmp_path)]


def test_a_run_is_finished_when_its_last_iteration_is_measured_or_the_base_where_there_is_none(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    assert not journal.finished(0)
    ended = []
    for iteration, phase in ((0, "base"), (0, "evaluate"), (1, "exploit"), (1, "evaluate")):
        journal.record("done", iteration=iteration, phase=phase)
        ended.append([iterations for iterations in (0, 1, 2, 3) if journal.finished(iterations)])
    assert ended == [[0], [0, 1], [0, 1], [0, 1, 2]]


def test_where_a_run_has_been_are_its_commits_and_ends_of_phases(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    for event in ("started", "commit", "measured", "done", "commit", "policy"):
        journal.record(event)
    assert [record["event"] for record in journal.places()] == ["commit", "done", "commit"]


def test_lines_are_json_objects_with_the_documented_checksum(tmp_path):
    from hashlib import blake2b

    path = tmp_path / "journal.jsonl"
    write(path, [{"event": "note", "text": 'quotes ", "check":"0", ü and\nnewline'}, {"event": "b", "check_": 1}])
    for number, line in enumerate(path.read_text().splitlines()):
        record = json.loads(line)
        assert record["n"] == number
        assert list(record)[-1] == "check"
        body = line[: line.rindex(',"check"')] + "}"
        assert record["check"] == blake2b(body.encode(), digest_size=8).hexdigest()


def test_start_policy_is_the_newest_of_its_iteration_under_the_run_directory(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("policy", iteration=0, path="/models/base", digest="a")
    journal.record("policy", iteration=1, path="policies/theta_1", digest="b")
    journal.record("policy", iteration=0, path="policies/sft", digest="c")
    reopened = Journal(tmp_path / "journal.jsonl")
    assert (reopened.start_policy(0).path, reopened.start_policy(0).digest) == (tmp_path / "policies/sft", "c")
    assert reopened.start_policy(1).path == tmp_path / "policies/theta_1"
    with pytest.raises(LookupError, match="no policy for iteration 2"):
        reopened.start_policy(2)


def test_what_is_no_record_is_refused_and_leaves_the_journal_alone(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(ValueError, match="own"):
        journal.record("commit", n=3)
    with pytest.raises(ValueError, match="JSON"):
        journal.record("commit", loss=float("nan"))
    with pytest.raises(ValueError, match="'rest' is none of"):
        journal.done(0, "rest")
    assert journal.records == []
    assert not journal.path.exists()
