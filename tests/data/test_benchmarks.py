"""The named benchmarks: as files of the project's schema, and as the hub has them."""

import json
from pathlib import Path
from typing import Any

import pytest

from rloop_mcore.data.benchmarks import BENCHMARKS, Benchmark, load_benchmark
from rloop_mcore.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
SIZES = {
    **{"aime24": 30, "aime25": 30, "amc23": 40, "math500": 500},
    **{"minerva_math": 272, "omni_math": 2821, "olympiadbench": 675, "gsm8k": 1319},
}
# The columns that the hub's data sets have, with a row made up for each.
HUB: dict[str, dict[str, Any]] = {
    "aime24": {"id": 60, "problem": "p", "solution": "...", "answer": "204", "url": "u", "year": "2024"},
    "aime25": {"problem": "p", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "p", "answer": 27.0, "url": "u"},
    "math500": {"problem": "p", "answer": "x^2", "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
    "minerva_math": {"question": "p", "answer": "1.6"},
    "omni_math": {"domain": ["A -> B"], "difficulty": 5.5, "problem": "p", "solution": "...", "answer": "3"},
    "olympiadbench": {"id": 1606, "question": "p", "final_answer": ["2", "5"], "subfield": "Combinatorics"},
    "gsm8k": {"question": "p", "answer": "16 - 3 = 13\\nso <<13*2=26>>26\\n#### 1,026"},
}
GOLDS = {
    **{"aime24": "204", "aime25": "70", "amc23": "27", "math500": "x^2"},
    **{"minerva_math": "1.6", "omni_math": "3", "olympiadbench": "2, 5", "gsm8k": "1,026"},
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_from_its_file(name: str) -> None:
    if not SHARED.exists():
        pytest.skip("needs ../shared/data")
    problems = load_benchmark(name, SHARED)
    assert len(problems) == SIZES[name]


def stand_in(name: str, rows: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with these rows in place of the hub."""
    wanted = BENCHMARKS[name]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config, split = wanted.subset or "default", wanted.split
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: rows.jsonl\n---\n"
    )
    here = Benchmark(wanted.file, str(folder), split, wanted.answers, wanted.subset)
    monkeypatch.setitem(BENCHMARKS, name, here)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_with_the_columns_of_the_hub(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by the datasets library itself, from a folder in place of the hub."""
    rows = [HUB[name]]
    if name == "omni_math":
        rows.append({**HUB[name], "answer": ""})
    stand_in(name, rows, tmp_path, monkeypatch)
    (problem,) = load_benchmark(name)
    assert (problem.problem, problem.answer, problem.source) == ("p", GOLDS[name], name)
    assert problem.id.startswith(f"{name}/")
    assert ("level" in problem.meta) == (name in ("math500", "omni_math"))
    assert ("subject" in problem.meta) == (name in ("math500", "omni_math", "olympiadbench"))


def test_an_id_of_two_problems_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in("math500", [HUB["math500"], {**HUB["math500"], "problem": "another"}], tmp_path, monkeypatch)
    with pytest.raises(
        UserError, match=r"benchmark math500 .*several problems have the id 'math500/.*--benchmark-files"
    ):
        load_benchmark("math500")


def test_a_file_of_other_answers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "aime24.jsonl").write_text(json.dumps({"id": "a", "problem": "p", "answer": r"\frac12"}))
    with pytest.raises(UserError, match=r"problem a: the gold answer .* is no integer"):
        load_benchmark("aime24", tmp_path)


def test_mistakes_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'aime23' is none of aime24, .*--data"):
        load_benchmark("aime23")
    with pytest.raises(UserError, match="does not exist"):
        load_benchmark("aime24", tmp_path)
    monkeypatch.setitem(BENCHMARKS, "x", Benchmark("x.jsonl", str(tmp_path / "nothing"), "test", "latex"))
    with pytest.raises(UserError, match=r"benchmark x .* could not be loaded .*--benchmark-files"):
        load_benchmark("x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"rloop-mcore\[hf-datasets\]"):
        load_benchmark("x")
