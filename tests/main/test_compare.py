"""`rloop compare` against counting by hand."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rloop_mcore.analysis.report import write_report
from rloop_mcore.errors import UserError
from rloop_mcore.main.compare import compare

METRIC = {"mean": 0.5, "low": 0.4, "high": 0.6}


def write_run(path: Path, iterations: int, solved: dict[str, dict[str, int]], samples: int = 4) -> Path:
    """Evaluations {name: {problem: correct samples}}, at RL steps 2 and 4 in all."""
    (path / "evaluation").mkdir(parents=True)
    steps = 4 // iterations
    lines = [
        {"iteration": i, "phase": "explore", "step": s, "global_step": i * steps + s, "success_rate": 0.1}
        for i in range(iterations)
        for s in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "config.yaml").write_text(f"algorithm: {{iterations: {iterations}}}\n")
    for name, counts in solved.items():
        drawn = range(samples)
        rows = [(problem, sample, [1, 2], sample < right) for problem, right in counts.items() for sample in drawn]
        columns = dict(zip(("problem_id", "sample", "response_ids", "correct"), zip(*rows, strict=True), strict=True))
        table = pa.table({key: list(values) for key, values in columns.items()})
        more = {"text": [""] * len(rows), "reason": ["wrong"] * len(rows), "finish_reason": ["stop"] * len(rows)}
        for key, values in more.items():
            table = table.append_column(key, [values])
        pq.write_table(table, path / "evaluation" / f"{name}.parquet")
        record = {"metrics": {f"avg@{samples}": METRIC, "pass@2": METRIC}, "policy": name}
        (path / "evaluation" / f"{name}.json").write_text(json.dumps(record))
    return path


def test_differences_problem_by_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    base, step_2 = {"a": 2, "b": 0, "c": 4}, {"a": 4, "b": 1, "c": 4}
    last = {"dapo": {"a": 0, "b": 0, "c": 4}, "rloop": {"a": 1, "b": 1, "c": 4}}
    solved = {"base": base, "i0_explore_000002": step_2}
    dapo = write_run(tmp_path / "dapo", 1, solved | {"i0_explore_000004": last["dapo"]})
    rloop = write_run(tmp_path / "rloop", 2, solved | {"i1_explore_000002": last["rloop"]})
    assert compare(dapo, rloop, tmp_path / "out.html", tmp_path / "out.json") == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["config"] == {"algorithm.iterations": ["1", "2"]}
    found = result["paired"]["last RL policy"]
    assert found["avg@4"]["mean"] == pytest.approx((1 / 4 + 1 / 4 + 0) / 3)
    assert found["pass@2"]["mean"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)  # 1 - C(3, 2) / C(4, 2)
    assert 0 <= found["avg@4"]["low"] <= found["avg@4"]["mean"] <= found["avg@4"]["high"]
    assert result["paired"]["base"]["avg@4"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0, "problems": 3}
    # base solves {a, c}, step 2 {a, b, c}, step 4 {c} and {a, b, c}: pairs (0,2) within, (0,4) and (2,4) between
    assert result["forgetting"] == [
        {"run": "dapo", "intra": 0.0, "inter": pytest.approx((1 / 3 + 2 / 3) / 2)},
        {"run": "rloop", "intra": 0.0, "inter": 0.0},
    ]
    printed = capsys.readouterr().out
    assert "forgets 0.0 % of the problems within an iteration, 50.0 % between iterations" in printed
    low, high = (100 * found["avg@4"][end] for end in ("low", "high"))
    assert f"+16.7 [{low:+.1f}, {high:+.1f}] p={found['avg@4']['p_value']:.2g}" in printed
    assert "Differential forgetting: dapo − rloop" in (tmp_path / "out.html").read_text()


def test_averages_of_different_numbers_of_samples_are_not_called_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = write_run(tmp_path / "four", 1, {"base": {"a": 2, "b": 0}})
    eight = write_run(tmp_path / "eight", 1, {"base": {"a": 6, "b": 0}}, samples=8)
    assert compare(four, eight, tmp_path / "out.html", tmp_path / "out.json") == 0
    found = json.loads((tmp_path / "out.json").read_text())["paired"]["base"]
    assert list(found) == ["avg", "pass@2"]
    assert found["avg"]["mean"] == pytest.approx((6 / 8 - 2 / 4) / 2)
    assert "avg: of all samples" in " ".join(capsys.readouterr().out.split())


def test_a_run_of_several_iterations_in_its_first_is_no_vanilla_run(tmp_path: Path) -> None:
    solved = {"base": {"a": 2}, "i0_explore_000002": {"a": 0}}
    begun = write_run(tmp_path / "begun", 2, solved)
    rloop = write_run(tmp_path / "rloop", 2, solved | {"i1_explore_000002": {"a": 4}})
    assert compare(begun, rloop, tmp_path / "out.html", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["forgetting"] == []
    assert "Differential forgetting:" not in (tmp_path / "out.html").read_text()


def test_nothing_in_common_is_said(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", 1, {"base": {"a": 1}})
    second = write_run(tmp_path / "second", 1, {"base": {"b": 1}})
    with pytest.raises(UserError, match="no evaluations of the same problems"):
        compare(first, second, None, None)


def test_a_run_is_not_compared_with_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1, {"base": {"a": 1}})
    with pytest.raises(UserError, match="/run is given twice"):
        compare(run, tmp_path / "." / ".." / tmp_path.name / "run", None, None)
    assert not list(run.glob("*.html"))


def test_names_and_values_in_brackets_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, 1, {"base": {"a": 1}}) for name in ("[red]", "[b]")]
    for run, value in zip(runs, ("[/red]", "[bold]"), strict=True):
        (run / "config.yaml").write_text(f"data: {{train: '{value}'}}\n")
    assert compare(*runs, tmp_path / "out.html", None) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("[red]", "[b]", "[/red]", "[bold]", "[b] − [red], problem by problem"))


def test_different_problems_under_one_id_are_not_paired(tmp_path: Path) -> None:
    solved = {"base": {"a": 2, "b": 1}, "i0_explore_000002": {"a": 1, "b": 3}}
    dapo = write_run(tmp_path / "dapo", 1, solved | {"i0_explore_000004": {"a": 1, "b": 1}})
    rloop = write_run(tmp_path / "rloop", 2, solved | {"i1_explore_000002": {"a": 0, "b": 1}})
    assert compare(dapo, rloop, None, None) == 0  # of an older rloop: they don't say what they asked
    for run, digests in ((dapo, {"a": "1", "b": "2"}), (rloop, {"a": "1", "b": "3", "c": "4"})):
        for path in (run / "evaluation").glob("*.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_digests": digests}))
    with pytest.raises(UserError, match=r"different problems under the same ids \(1 of them, 'b'"):
        compare(dapo, rloop, None, None)
    write_report([dapo, rloop], tmp_path / "out.html")
    assert "Differential forgetting" not in (tmp_path / "out.html").read_text()
