"""The cache against plain Python over the same trajectories."""

import importlib.util
import json
import os
import resource
import struct
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectory_rows import phases, step_rows, trajectories

from rloop_mcore.algorithm.experts import drawn
from rloop_mcore.algorithm.hard_problems import is_hard
from rloop_mcore.errors import UserError
from rloop_mcore.trajectory import reader, selection, writer
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.schema import KEY, SCHEMA, from_table, to_table, with_large_lists
from rloop_mcore.types import Example, ExpertQuery, Times


def key(row):
    return row.iteration, row.step, row.problem_id, row.sample


def fill(directory, rows, cuts=()):
    """A cache of the rows, sealed at the cuts; opened anew."""
    cache = TrajectoryCache(directory)
    bounds = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    for low, high in pairwise(bounds):
        cache.append(rows[low:high])
        cache.seal()
    return TrajectoryCache(directory)


def test_a_folder_is_found_in_a_locale_that_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    fill(folder, step_rows(0, 0))
    pq.write_table(pa.table({"a": [7]}), folder / "any.parquet")
    program = """
import sys
from pathlib import Path
from rloop_mcore.platform.parquet import open_parquet
from rloop_mcore.trajectory.cache import TrajectoryCache
assert sys.getfilesystemencoding() != "utf-8"
folder = Path(sys.argv[1])
with open_parquet(folder / "any.parquet") as file:
    assert file.read()["a"].to_pylist() == [7]
print(len(list(TrajectoryCache(folder).rows())), TrajectoryCache(folder).phases()[0].trajectories)
"""
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program, folder], env=os.environ | plain, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(len(step_rows(0, 0)))] * 2, done.stderr


def plain_experts(rows, query):
    outcomes = defaultdict(list)
    for row in rows:
        outcomes[row.iteration, row.problem_id].append(row.correct)
    experts, seen = [], set()
    for row in sorted(rows, key=key):
        verdicts, threshold = outcomes[row.iteration, row.problem_id], query.hard_threshold
        if row.iteration not in query.iterations or not row.correct or len(row.response_ids) < query.min_tokens:
            continue
        if threshold is not None and not is_hard(sum(verdicts), len(verdicts), threshold):
            continue
        if query.steps and not query.steps[0] <= row.step <= query.steps[1]:
            continue
        if query.deduplicate and (row.problem_id, row.response_ids) in seen:
            continue
        seen.add((row.problem_id, row.response_ids))
        experts.append(row)
    return [experts[position] for position in drawn([key(row) for row in experts], query)]


def selected(cache, query):
    return [
        row for piece in selection.select_experts(cache.directory, cache._shards, query) for row in from_table(piece)
    ]


def plain_digest(rows):
    total = sha256()
    for row in sorted(rows, key=key):
        problem = row.problem_id.encode()
        content = struct.pack(
            "<6i", row.iteration, row.step, row.sample, len(problem), len(row.prompt_ids), len(row.response_ids)
        )
        content += problem
        content += struct.pack(f"<{len(row.prompt_ids)}i", *row.prompt_ids)
        content += struct.pack(f"<{len(row.response_ids)}i", *row.response_ids)
        content += struct.pack(f"<{len(row.logprobs)}f", *row.logprobs)
        content += struct.pack("<?d", row.correct, row.reward)
        total.update(sha256(content).digest())
    return total.hexdigest()


queries = st.builds(
    ExpertQuery,
    iterations=st.sampled_from([(0,), (1,), (2,), (0, 1)]),
    hard_threshold=st.sampled_from([None, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0]),
    deduplicate=st.booleans(),
    steps=st.sampled_from([(), (0, 1), (1, 4)]),
    min_tokens=st.integers(0, 2),
    max_per_problem=st.integers(0, 2),
    share=st.sampled_from([1.0, 0.5]),
)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 80), max_size=3),
    query=queries,
    piece=st.sampled_from([1, 3, 16_384]),
    once=st.sampled_from([0, 6, 131_072]),
)
def test_selection_equals_a_plain_pass(seed, cuts, query, piece, once):
    rows = phases(seed)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "PIECE", piece)
        patch.setattr(selection, "READ_ONCE", once)
        cache = fill(Path(folder), rows, cuts)
        expected = plain_experts(rows, query)
        assert selected(cache, query) == expected
        assert cache.count_experts(query) == len(expected)


def test_a_selection_may_hold_any_number_of_tokens():
    """Of lists without values, which take no memory: 2^31 of them and more in all."""
    lists = pa.ListArray.from_arrays(pa.array([0, 2**31 - 1], pa.int32()), pa.nulls(2**31 - 1))
    table = pa.table({"response_ids": pa.chunked_array([lists, lists])})
    with pytest.raises(pa.ArrowInvalid, match="offset overflow"):
        table.combine_chunks()
    joined = with_large_lists(table).combine_chunks()
    assert len(joined["response_ids"].chunk(0).values) == 2 * (2**31 - 1)


def test_an_expert_set_is_written_with_its_lineage(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "PIECE", 3)
    rows, query = phases(seed=5), ExpertQuery((0,), hard_threshold=None, deduplicate=False)
    cache, folder = fill(tmp_path / "cache", rows, cuts=[30, 60]), tmp_path / "experts" / "i0"
    expected = plain_experts(rows, query)
    assert len(expected) > 3
    counts = {"experts": len(expected), "problems": len({row.problem_id for row in expected})}
    assert cache.write_experts(query, folder) == counts

    found = cache.experts(folder)
    assert list(found) == [Example(row.prompt_ids, row.response_ids, 1.0) for row in expected]
    assert (found[-1], found[1:3]) == (list(found)[-1], list(found)[1:3])
    with pytest.raises(IndexError):
        found[len(found)]
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    assert [row for table in tables for row in from_table(table)] == expected
    assert all(len(table) <= 3 for table in tables)

    lineage = json.loads((folder / "lineage.json").read_text())
    assert ExpertQuery(**{**lineage["query"], "iterations": (0,), "steps": ()}) == query
    assert lineage["query"]["iterations"] == [0]
    asked = [shard for shard in cache._shards if shard.steps[0][0] == 0]
    assert [(s["name"], s["sha256"]) for s in lineage["cache"]] == [(s.name, s.sha256) for s in asked]
    assert {name: lineage[name] for name in counts} == counts

    cache.write_experts(replace(query, iterations=(0, 7)), folder)  # a shard is asked that has one of them
    again = json.loads((folder / "lineage.json").read_text())
    assert again["cache"] == lineage["cache"]


def test_a_shard_that_cannot_be_opened_is_not_called_damaged(tmp_path):
    (shard,) = fill(tmp_path, step_rows(0, 0))._shards
    (tmp_path / shard.name).unlink()
    (tmp_path / shard.name).mkdir()
    with pytest.raises(UserError, match=r"shard-000000\.parquet cannot be read \(Is a directory\)"):
        reader.ShardFile(tmp_path, shard)


def test_an_expert_set_without_a_manifest_is_not_an_empty_one(tmp_path):
    cache, folder = fill(tmp_path / "cache", phases(seed=5)), tmp_path / "experts"
    cache.write_experts(ExpertQuery((0,), None), folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"the expert set .* is damaged: manifest\.json is missing"):
        cache.experts(folder)


def test_a_selection_opens_few_shards_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "_threads", lambda: 4)
    rows = [row for step in range(80) for row in step_rows(0, step, problems=1)]
    cache = fill(tmp_path, rows, cuts=range(4, 320, 4))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limit[1]))
    try:
        assert len(cache._shards) == 80
        assert cache.count_experts(ExpertQuery((0,), None, deduplicate=False)) == sum(row.correct for row in rows)
        assert sum(cache.success_histogram(0)) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_an_empty_expert_set(tmp_path):
    cache = fill(tmp_path / "cache", [replace(row, correct=False) for row in step_rows(0, 0)])
    assert cache.write_experts(ExpertQuery((0,), 0.1), tmp_path / "experts") == {"experts": 0, "problems": 0}
    assert list(cache.experts(tmp_path / "experts")) == []


def test_a_damaged_expert_set_is_named(tmp_path):
    cache, folder = fill(tmp_path / "cache", phases(seed=5)), tmp_path / "experts"
    cache.write_experts(ExpertQuery((0,), None), folder)
    (folder / "shard-000000.parquet").unlink()
    with pytest.raises(UserError, match=r"the expert set .* is damaged: shard-000000\.parquet is missing"):
        cache.experts(folder)


@settings(max_examples=20)
@given(rows=trajectories(), cuts=st.lists(st.integers(0, 30), max_size=3))
def test_count_and_digest_equal_a_plain_pass(rows, cuts):
    with TemporaryDirectory() as folder:
        cache = fill(Path(folder), rows, cuts)
        assert cache.count() == len(rows)
        assert cache.digest() == plain_digest(rows)
        assert cache.verify() == []


@settings(max_examples=30)
@given(rows=trajectories())
def test_a_shard_gives_back_every_field_bit_by_bit(rows):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "shard.parquet"
        shard = writer.write_shard(path, writer.encode(rows)) if rows else None
        back = from_table(reader.ShardFile(path.parent, shard).read(SCHEMA.names)) if shard else []
    assert back == writer.stored_order(rows)
    assert sorted(back, key=key) == sorted(rows, key=key)
    assert [struct.pack("<d", row.reward) for row in back] == [
        struct.pack("<d", row.reward) for row in writer.stored_order(rows)
    ]


def test_rare_successes_come_first():
    wins = {"p0": 3, "p1": 0, "p2": 1, "p3": 4}
    rows = [replace(row, correct=row.sample < wins[row.problem_id]) for row in step_rows(0, 0)]
    stored = [(row.problem_id, row.sample) for row in writer.stored_order(rows)]
    right = [("p2", 0), *(("p0", n) for n in range(3)), *(("p3", n) for n in range(4))]
    wrong = [("p0", 3), *(("p1", n) for n in range(4)), *(("p2", n) for n in range(1, 4))]
    assert stored == right + wrong


def test_times_are_beside_the_shards(tmp_path):
    started = datetime(2026, 11, 26, 23, 59, 59, 250_000, tzinfo=UTC)
    times = Times(started.timestamp(), 1.5, 0.25)
    rows = [replace(row, times=times if row.sample else Times()) for row in step_rows(0, 0)]
    cache = fill(tmp_path / "cache", rows)
    table = pq.read_table(tmp_path / "cache" / "times" / "shard-000000.parquet")
    found = {tuple(row[name] for name in KEY): row for row in table.to_pylist()}
    assert set(found) == {key(row) for row in rows}
    late = found[key(rows[1])]
    assert (late["started"], late["generate_s"], late["grade_s"]) == (started, 1.5, 0.25)
    assert cache.digest() == fill(tmp_path / "other", [replace(row, times=Times()) for row in rows]).digest()
    (tmp_path / "cache" / ".ipynb_checkpoints").mkdir()  # what a browser of files leaves is no shard, and no obstacle
    cache.keep_only([])
    assert list((tmp_path / "cache" / "times").iterdir()) == []


def test_logprobs_are_kept_as_float32():
    row = replace(step_rows(0, 0)[0], response_ids=(1, 2), logprobs=(-0.1, -1e-9))
    (back,) = from_table(to_table([row]))
    assert back.logprobs == struct.unpack("<2f", struct.pack("<2f", -0.1, -1e-9))


def test_a_selection_over_many_row_groups_reads_only_those_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROW_GROUP", 8)
    wins = {"p1": 1, "p2": 1, "p3": 9, "p4": 16}
    rows = [
        replace(row, correct=15 - row.sample < wins.get(row.problem_id, 0))
        for row in step_rows(0, 0, problems=20, group=16)
    ]
    cache = fill(tmp_path / "cache", rows)
    assert list(cache.rows()) == writer.stored_order(rows)
    written = pq.read_metadata(tmp_path / "cache" / cache._shards[0].name)
    assert [written.row_group(n).num_rows for n in range(written.num_row_groups)] == [8, 8, 304]
    read = []
    original = reader.ShardFile._read
    monkeypatch.setattr(
        reader.ShardFile,
        "_read",
        lambda self, groups, columns, dictionary=(): (
            read.append((list(groups), "response_ids" in columns)),
            original(self, groups, columns, dictionary),
        )[1],
    )
    hard = [row for row in rows if row.correct and row.problem_id in ("p1", "p2")]
    assert selected(cache, ExpertQuery((0,), 0.1)) == sorted(hard, key=key)
    # Their two successes are the rarest in the step: they are in the first row group, and nothing else is read.
    assert [groups for groups, tokens in read if tokens] == [[0]]


@pytest.mark.parametrize("deduplicate", [True, False])
def test_a_selection_of_many_has_a_piece_in_memory_at_a_time(tmp_path, monkeypatch, deduplicate):
    monkeypatch.setattr(selection, "PIECE", 4)
    monkeypatch.setattr(selection, "READ_ONCE", 4)
    rows = phases(3)
    cache, query = fill(tmp_path / "cache", rows, cuts=[40]), ExpertQuery((0, 1), None, deduplicate)
    taken = []
    original = reader.ShardFile.take
    monkeypatch.setattr(
        reader.ShardFile,
        "take",
        lambda self, wanted, columns=SCHEMA.names: (
            taken.append((int(wanted.sum()), "logprobs" in columns)),
            original(self, wanted, columns),
        )[1],
    )
    pieces = selection.select_experts(cache.directory, cache._shards, query)
    assert taken == []
    sizes = []
    for piece in pieces:
        sizes.append(len(piece))
        whole = [count for count, tokens in taken if tokens]
        assert sum(whole) == sum(sizes), "what was read whole is what was given out"
    expected = plain_experts(rows, query)
    assert len(expected) > 8
    assert sizes == [4] * (len(expected) // 4) + ([len(expected) % 4] if len(expected) % 4 else [])


@pytest.mark.parametrize("deduplicate", [True, False])
def test_experts_are_counted_without_what_selecting_them_reads(tmp_path, monkeypatch, deduplicate):
    rows = phases(3)
    cache = fill(tmp_path / "cache", rows)
    query, read = ExpertQuery((0,), None, deduplicate), set()
    original = reader.ShardFile._read
    monkeypatch.setattr(
        reader.ShardFile,
        "_read",
        lambda self, groups, columns, dictionary=(): (
            read.update(columns),
            original(self, groups, columns, dictionary),
        )[1],
    )
    assert cache.count_experts(query) == len(plain_experts(rows, query)) > 0
    assert not read & {"prompt_ids", "logprobs"}
    assert ("response_ids" in read) == deduplicate


def test_digest_sees_content_and_not_versions_or_shards(tmp_path):
    rows = step_rows(0, 0) + step_rows(0, 1)
    digest = fill(tmp_path / "a", rows).digest()
    assert fill(tmp_path / "b", rows[::-1], cuts=[3, 7]).digest() == digest
    assert (
        fill(tmp_path / "c", [replace(row, weight_versions=((77, 1),), reason="x") for row in rows]).digest() == digest
    )
    changes = {
        "sample": 99,
        "prompt_ids": (5, 7),
        "response_ids": tuple(i + 1 for i in rows[3].response_ids),
        "logprobs": tuple(p - 1e-6 for p in rows[3].logprobs),
        "correct": not rows[3].correct,
        "reward": 0.1000000001,
    }
    for number, (name, value) in enumerate(changes.items()):
        changed = [*rows[:3], replace(rows[3], **{name: value}), *rows[4:]]
        assert fill(tmp_path / str(number), changed).digest() != digest, name


def test_success_histogram(tmp_path):
    def problem(name, successes, samples):
        source = step_rows(1, 0, problems=1, group=samples)
        return [replace(row, problem_id=name, correct=row.sample < successes) for row in source]

    rows = problem("a", 0, 7) + problem("b", 1, 10) + problem("c", 3, 30) + problem("d", 2, 30) + problem("e", 5, 5)
    cache = fill(tmp_path, rows + problem("f", 1, 1) + step_rows(0, 0))
    assert cache.success_histogram(1) == [2, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert cache.success_histogram(2) == [0] * 10


def test_what_is_appended_counts_when_sealed(tmp_path):
    cache = TrajectoryCache(tmp_path / "new" / "cache")
    assert cache.seal() == []
    assert not cache.directory.exists()
    cache.append(step_rows(0, 0))
    assert cache.count() == 0
    assert cache.seal() == ["shard-000000.parquet"]
    assert cache.seal() == ["shard-000000.parquet"]
    cache.append(step_rows(0, 1))
    assert cache.seal() == ["shard-000000.parquet", "shard-000001.parquet"]
    assert cache.count() == TrajectoryCache(cache.directory).count() == 32


def test_a_trajectory_whose_logprobs_do_not_match_is_refused(tmp_path):
    cache = TrajectoryCache(tmp_path)
    cache.append([replace(step_rows(0, 0)[0], logprobs=())])
    with pytest.raises(ValueError, match="but 0 logprobs"):
        cache.seal()


def test_another_schema_version_is_refused(tmp_path, monkeypatch):
    cache = fill(tmp_path, step_rows(0, 0))
    monkeypatch.setattr(reader, "VERSION", 99)
    with pytest.raises(UserError, match=r"has trajectory schema version \d+; this rloop reads version 99"):
        cache.digest()


@pytest.mark.parametrize("tool", ["duckdb", "pandas"])
def test_other_tools_open_the_shards(tmp_path, tool):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed")
    rows = sorted(step_rows(0, 0) + step_rows(0, 1), key=key)
    fill(tmp_path, rows, cuts=[16])
    if tool == "duckdb":
        import duckdb

        query = f"select problem_id, response_ids, logprobs, correct from '{tmp_path}/*.parquet'"
        found = duckdb.sql(query + " order by iteration, step, problem_id, sample").fetchall()
    else:
        import pandas

        frame = pandas.concat(pandas.read_parquet(path) for path in sorted(tmp_path.glob("*.parquet")))
        frame = frame.sort_values(list(KEY))
        found = frame[["problem_id", "response_ids", "logprobs", "correct"]].itertuples(index=False)
    assert [(p, tuple(ids), tuple(map(float, logprobs)), bool(ok)) for p, ids, logprobs, ok in found] == [
        (row.problem_id, row.response_ids, row.logprobs, row.correct) for row in rows
    ]


def test_status_needs_no_torch(tmp_path):
    fill(tmp_path, step_rows(0, 0))
    code = (
        "import sys, pathlib\n"
        "from rloop_mcore.trajectory.cache import TrajectoryCache\n"
        f"cache = TrajectoryCache(pathlib.Path({str(tmp_path)!r}))\n"
        "print(cache.count(), len(cache.digest()), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=60
    )
    assert done.stdout.split() == ["16", "64", "False"], done.stderr
