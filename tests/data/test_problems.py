import dataclasses
import json
import random
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rloop_mcore.data.problems import digest_of_problems, load_problems
from rloop_mcore.errors import UserError
from rloop_mcore.types import Problem

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ROWS = [
    {"id": "a", "problem": "1 + 1", "answer": "2", "source": "s", "meta": {"level": 1}},
    {"id": "b", "problem": "größer: 2 + 2", "answer": "4", "source": "s", "meta": {}},
    {"id": "c", "problem": "3 + 3", "answer": "6", "source": "t", "meta": {"level": 2}},
]
PROBLEMS = [Problem(**row) for row in ROWS]


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_jsonl(tmp_path: Path) -> None:
    assert load_problems(jsonl(tmp_path / "p.jsonl", ROWS)) == PROBLEMS


@pytest.mark.parametrize("change", [{"id": "d"}, {"problem": "3 + 4"}, {"answer": "7"}, {"meta": {"level": 3}}])
def test_the_digest_of_problems_is_of_all_that_a_run_makes_of_them_in_any_order(change: dict[str, object]) -> None:
    digest = digest_of_problems(PROBLEMS)
    assert digest_of_problems(PROBLEMS[::-1]) == digest
    changed = [*PROBLEMS[:2], dataclasses.replace(PROBLEMS[2], **change)]  # type: ignore[arg-type]
    assert digest not in (digest_of_problems(changed), digest_of_problems(PROBLEMS[:2]))


def test_limit_takes_the_first_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "p.jsonl", ROWS)
    assert load_problems(source, limit=2) == PROBLEMS[:2]
    assert load_problems(source, limit=99) == PROBLEMS


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    jsonl(tmp_path / "p.jsonl", ROWS)
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "p.jsonl").read_bytes())
    assert load_problems(str(tmp_path / "p.jsonl")) == PROBLEMS


@pytest.mark.parametrize("meta_as_json", [False, True])
def test_parquet(tmp_path: Path, meta_as_json: bool) -> None:
    rows = [{**row, "meta": json.dumps(row["meta"]) if meta_as_json else {"level": 1}} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=2)
    loaded = load_problems(str(tmp_path / "p.parquet"))
    expected = PROBLEMS if meta_as_json else [Problem(**row) for row in rows]
    assert loaded == expected


def test_parquet_errors_name_the_row_and_the_missing_column(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"problem": ["x", None], "answer": ["1", "2"]}), path)
    with pytest.raises(UserError, match=r"p\.parquet:2: problem is null"):
        load_problems(str(path))
    pq.write_table(pa.table({"question": ["x"], "answer": ["1"]}), path)
    with pytest.raises(UserError, match="no column problem; it has question, answer"):
        load_problems(str(path))
    twice = pa.Table.from_arrays([pa.array([cell]) for cell in ("x", "1", "2")], ["problem", "answer", "answer"])
    pq.write_table(twice, path)
    with pytest.raises(UserError, match="several columns called answer"):
        load_problems(str(path))
    path.write_text("not parquet")
    with pytest.raises(UserError, match="not a Parquet file"):
        load_problems(str(path))


def test_a_damaged_parquet_file_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    rows = {"problem": [f"problem {number}" for number in range(500)], "answer": ["1"] * 500}
    pq.write_table(pa.table(rows), path, compression="zstd", use_dictionary=False)
    sound = path.read_bytes()
    path.write_bytes(sound[:4] + b"\xff" * 40 + sound[44:])
    with pytest.raises(UserError, match=r"p\.parquet is missing or damaged"):
        load_problems(str(path))


def test_hugging_face_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the hf-datasets extra is not installed")
    folder = tmp_path / "set"
    folder.mkdir()
    jsonl(folder / "train.jsonl", [{**row, "meta": {"level": 1}} for row in ROWS])
    jsonl(folder / "test.jsonl", [{**ROWS[0], "meta": {"level": 1}}])
    assert [problem.id for problem in load_problems(f"hf:{folder}")] == ["a", "b", "c"]
    assert [problem.id for problem in load_problems(f"hf:{folder}:test")] == ["a"]
    with pytest.raises(UserError, match="split 'nowhere'"):
        load_problems(f"hf:{folder}:nowhere")


def test_a_folder_that_changes_is_read_anew(tmp_path: Path) -> None:
    """The library keeps what it read of a folder, and takes a README that says the same for the same rows."""
    pytest.importorskip("datasets", reason="the hf-datasets extra is not installed")
    configs = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.jsonl"
    (tmp_path / "README.md").write_text(f"---\n{configs}\n---\n")
    for row in ROWS[:2]:
        jsonl(tmp_path / "rows.jsonl", [{**row, "meta": {"level": 1}}])
        assert [problem.id for problem in load_problems(f"hf:{tmp_path}")] == [row["id"]]


@pytest.mark.parametrize(("task", "numbers"), [("countdown", 4), ("countdown3", 3)])
def test_generated_tasks(task: str, numbers: int) -> None:
    test = load_problems(f"{task}:test")
    assert {len(problem.meta["numbers"]) for problem in test} == {numbers}
    assert not {problem.problem for problem in test} & {problem.problem for problem in load_problems(f"{task}:train")}
    assert load_problems(f"{task}:train", limit=7) == load_problems(f"{task}:train")[:7]
    with pytest.raises(UserError, match=f"'{task}:tset': {task} has the splits train, validation, test, hard, demonst"):
        load_problems(f"{task}:tset")


def test_hugging_face_without_datasets_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'rloop-mcore\[hf-datasets\]'"):
        load_problems("hf:some/set")


def test_a_missing_id_becomes_a_content_hash(tmp_path: Path) -> None:
    pairs = [("1 + 1", "2"), ("1 + 1", "3"), ("1 + 2", "2")]
    bare = [{"problem": problem, "answer": answer} for problem, answer in pairs]
    first = [problem.id for problem in load_problems(jsonl(tmp_path / "a.jsonl", bare))]
    other_order = [problem.id for problem in load_problems(jsonl(tmp_path / "b.jsonl", bare[::-1]))]
    assert len(set(first)) == 3
    assert other_order == first[::-1]


def test_repeated_rows_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = [{"problem": f"{n} + 1", "answer": str(n + 1)} for n in range(3)]
    source = jsonl(tmp_path / "p.jsonl", [*bare, *ROWS] * 20)
    assert [problem.problem for problem in load_problems(source)] == [row["problem"] for row in [*bare, *ROWS]]
    assert "114 rows repeat an earlier one and are left out; 6 are left" in caplog.text
    assert len(load_problems(source, limit=5)) == 5


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_dapo_math_17k_as_published(tmp_path: Path, kind: str) -> None:
    """A generated file of that shape, every problem a hundred times in shuffled order."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": DAPO_PROMPT.format(problem=f"What is ${n}^2$?")}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(n * n), "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": f"uuid-{n}"},
        }
        for n in range(170)
    ] * 100
    random.Random(0).shuffle(rows)
    path = tmp_path / f"p.{kind}"
    if kind == "jsonl":
        jsonl(path, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    problems = load_problems(str(path))
    assert len(problems) == len({problem.id for problem in problems}) == 170
    assert {(p.problem, p.answer, p.source) for p in problems} == {
        (f"What is ${n}^2$?", str(n * n), "math_dapo") for n in range(170)
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must be an object with problem and answer, not list"),
        ({"problem": "p", "solution": "s"}, "answer is missing among problem, solution; it must be a string"),
        ({"problem": "p", "answer": None}, "answer is null; it must be a string"),
        ({"problem": "p", "answer": 3}, "answer is int 3; it must be a string"),
        ({"problem": " ", "answer": "3"}, "problem is blank"),
        ({"problem": "p", "answer": "3", "meta": 1}, "meta must be an object, not int"),
        ({"problem": "p", "answer": "3", "meta": "{"}, "meta is a string that is not JSON"),
        ({"problem": "p", "answer": "3", "meta": "[" * 100_000}, "meta is a string that is not JSON"),
        ({"problem": "p", "answer": "3", "id": 7}, "id is int 7"),
        ('{"problem": "\\ud800", "answer": "3"}', "lone surrogate"),
        ({**ROWS[0], "problem": "other"}, r"id 'a' stands already at .*p\.jsonl:1"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, row: object, message: str) -> None:
    source = jsonl(tmp_path / "p.jsonl", [ROWS[0], "", row])  # a blank line counts as a line
    with pytest.raises(UserError, match=rf"p\.jsonl:3: .*{message}"):
        load_problems(source)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"problem": "\xff", "answer": "1"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:1: not UTF-8 \(byte 13"):
        load_problems(str(tmp_path / "p.jsonl"))


def test_all_bad_rows_are_counted_and_the_first_listed(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "p.jsonl", [ROWS[0]] + ["{"] * 25)
    with pytest.raises(UserError) as error:
        load_problems(source)
    text = str(error.value)
    assert "has 25 bad rows" in text
    assert "p.jsonl:11:" in text
    assert "p.jsonl:12:" not in text
    assert "and 15 more" in text


def test_no_problems_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is empty"):
        load_problems(jsonl(tmp_path / "p.jsonl", []))
    with pytest.raises(UserError, match="does not exist"):
        load_problems(str(tmp_path / "q.jsonl"))
    for source in (str(tmp_path / "p.csv"), "hf:", "hf::train"):
        with pytest.raises(UserError, match=r"must be a \.jsonl or \.parquet file, hf:NAME"):
            load_problems(source)
