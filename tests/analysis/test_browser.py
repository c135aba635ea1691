"""The browser's content against the trajectories that the cache was made of."""

from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table
from run_with_samples import SAMPLES, THRESHOLD, add_samples, decode

from rloop_mcore.analysis import browser as browser_module
from rloop_mcore.analysis.browser import Words, browser
from rloop_mcore.analysis.maths import MARK, Formulas
from rloop_mcore.analysis.read_run import read_run
from rloop_mcore.errors import UserError
from rloop_mcore.types import Trajectory

EVALUATIONS = ["base", "i0_explore_000004", "i1_explore_000004"]


@pytest.fixture
def rows(rloop_run: Path) -> list[Trajectory]:
    return add_samples(rloop_run, 2, EVALUATIONS, seed=3)


def rl_step(row: Trajectory) -> int:
    return 4 * row.iteration + row.step + 1


def plain(text: str, formulas: Formulas) -> str:
    return "".join(formulas.table[int(part)][0] if i % 2 else part for i, part in enumerate(text.split(MARK)))


def test_problems_say_what_the_trajectories_say(rloop_run: Path, rows: list[Trajectory]) -> None:
    held = browser(read_run(rloop_run), Words(decode), Formulas(100), 10**6)
    assert held["trajectories"] == len(rows)
    of_problem = defaultdict(list)
    for row in rows:
        of_problem[row.problem_id].append(row)
    listed = {each["id"]: each for each in held["problems"] if each["kind"] == "train"}
    assert listed.keys() == of_problem.keys()
    for name, mine in of_problem.items():
        rights = [rl_step(row) for row in mine if row.correct]
        hard = []
        for iteration in range(2):
            verdicts = [row.correct for row in mine if row.iteration == iteration]
            if 0 < sum(verdicts) < THRESHOLD * len(verdicts):
                hard.append(iteration + 1)
        found = listed[name]
        assert (found["asked"], found["right"]) == (len(mine), len(rights))
        assert found["hard"] == found["rft"] == hard
        assert found["first"] == (min(rights) if rights else None)
        last = [row.correct for row in mine if rl_step(row) == 8]
        assert found["lost"] == (bool(rights) and not any(last))
        assert [right for _, right, _ in found["history"]] == [rights.count(step) for step in range(1, 9)]
        assert {asked for _, _, asked in found["history"]} == {SAMPLES}


def test_responses_are_the_trajectories_themselves(rloop_run: Path, rows: list[Trajectory]) -> None:
    formulas = Formulas(100)
    held = browser(read_run(rloop_run), Words(decode), formulas, 10**6)
    copies = Counter((row.problem_id, row.iteration, row.response_ids) for row in rows)
    by_key = {(row.problem_id, rl_step(row), row.sample): row for row in rows}
    shown = [each for each in held["responses"] if held["problems"][each["problem"]]["kind"] == "train"]
    assert len(shown) == 9 * 8 * 4
    for each in shown:
        problem = held["problems"][each["problem"]]
        row = by_key[problem["id"], held["visits"][each["visit"]]["step"], each["sample"]]
        assert plain(each["text"], formulas) == decode(row.response_ids)
        assert plain(problem["prompt"], formulas) == decode(row.prompt_ids)
        expected = (row.correct, len(row.response_ids), row.finish_reason)
        assert (each["correct"], each["tokens"], each["finish"]) == expected
        trained = row.correct and row.iteration + 1 in problem["hard"]
        if copies[row.problem_id, row.iteration, row.response_ids] == 1:  # of equal responses, RFT takes one
            assert each["rft"] == (row.iteration + 1 if trained else 0)


def test_the_budget_keeps_breadth(rloop_run: Path, rows: list[Trajectory]) -> None:
    """Enough for one response a visit: each problem keeps all its steps."""
    lengths = sum(4 * len(row.response_ids) for row in rows) / len(rows)
    held = browser(read_run(rloop_run), Words(decode), Formulas(100), int(2 * 9 * 8 * lengths))
    visits = {(each["problem"], each["visit"]) for each in held["responses"] if each["visit"] < 8}
    assert len(visits) > 0.7 * 9 * 8
    assert len([each for each in held["responses"] if each["visit"] < 8]) < 1.3 * 9 * 8


def test_few_steps_of_many(rloop_run: Path, rows: list[Trajectory], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser_module, "VISITS", 3)
    held = browser(read_run(rloop_run), Words(decode), Formulas(100), 10**6)
    assert {each["visit"] for each in held["responses"] if each["visit"] < 8} == {0, 4, 7}


def test_validation_problems_across_checkpoints(rloop_run: Path, rows: list[Trajectory]) -> None:
    held = browser(read_run(rloop_run), Words(None, {"validation/0": "What is $x$?"}), Formulas(100), 10**6)
    labels = [visit["label"] for visit in held["visits"] if visit["kind"] == "validation"]
    assert labels == ["θ0", "RL, iteration 1, step 4", "RL, iteration 2, step 4"]
    first = next(each for each in held["problems"] if each["id"] == "validation/0")
    assert first["asked"] == 12
    assert first["prompt"].startswith("What is ")
    assert first["right"] == sum(right for _, right, _ in first["history"])
    training = next(each for each in held["responses"] if each["visit"] == 0)
    assert training["text"].startswith("token ids ")  # no tokenizer at hand


def test_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    held = browser(read_run(tmp_path), Words(), Formulas(100), 10**6)
    assert (held["problems"], held["responses"], held["trajectories"]) == ([], [], 0)


def test_damaged_responses_are_a_sentence(rloop_run: Path, rows: list[Trajectory]) -> None:
    path = rloop_run / "evaluation" / "base.parquet"
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(UserError, match=r"base\.parquet is missing or damaged"):
        browser(read_run(rloop_run), Words(decode), Formulas(100), 10**6)
    write_table(pa.table({"problem_id": ["a"]}), path)
    with pytest.raises(UserError, match="no column correct, response_ids"):
        browser(read_run(rloop_run), Words(decode), Formulas(100), 10**6)
