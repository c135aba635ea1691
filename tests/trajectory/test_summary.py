"""What `rloop cache` says of a cache, against plain Python over the same trajectories."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from trajectory_rows import phases, step_rows, trajectories

from rloop_mcore.compose import load_config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.journal import Journal
from rloop_mcore.main.cache import summary
from rloop_mcore.main.cli import main
from rloop_mcore.run_config import to_yaml
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.writer import stored_order
from rloop_mcore.types import ExpertQuery, Trajectory, Visit


def sealed(directory: Path, rows: list[Trajectory], cut: int) -> TrajectoryCache:
    cache = TrajectoryCache(directory)
    for part in (rows[:cut], rows[cut:]):
        cache.append(part)
        cache.seal()
    return TrajectoryCache(directory)


@pytest.mark.parametrize("option", [[], ["--verify"]])
def test_a_cache_without_what_the_journal_names_is_not_sound(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(["experiment=tiny", f"run.dir={tmp_path}"])))
    Journal(tmp_path / "journal.jsonl").record("commit", shards=["shard-000000.parquet"])
    assert main(["cache", str(tmp_path), *option]) == 2
    assert "lacks shard-000000.parquet, which the journal names" in capsys.readouterr().err


@settings(max_examples=60)
@given(rows=trajectories(), cut=st.integers(0, 30))
def test_phases_are_counted(rows: list[Trajectory], cut: int) -> None:
    with TemporaryDirectory() as folder:
        found = sealed(Path(folder), rows, cut).phases()
    assert [phase.iteration for phase in found] == sorted({row.iteration for row in rows})
    for phase in found:
        mine = [row for row in rows if row.iteration == phase.iteration]
        assert (phase.trajectories, phase.steps) == (len(mine), {row.step for row in mine})
        assert phase.correct == sum(row.correct for row in mine)
        assert phase.truncated == sum(row.finish_reason == "length" for row in mine)


@settings(max_examples=60)
@given(rows=trajectories(), cut=st.integers(0, 30))
def test_visits_are_counted_whichever_shard_a_row_is_in(rows: list[Trajectory], cut: int) -> None:
    with TemporaryDirectory() as folder:
        found = sealed(Path(folder), rows, cut).visits()
    keys = sorted({(row.iteration, row.step, row.problem_id) for row in rows})
    verdicts = {key: [row.correct for row in rows if row.key[:3] == key] for key in keys}
    wanted = [(key[2], Visit(*key[:2], len(verdicts[key]), sum(verdicts[key]))) for key in keys]
    assert found == wanted


@settings(max_examples=60)
@given(
    rows=trajectories(),
    cut=st.integers(0, 30),
    iteration=st.none() | st.integers(0, 2),
    problem=st.none() | st.sampled_from(["a", "ü/1", ""]),
)
def test_rows_are_those_of_the_iteration_and_the_problem(
    rows: list[Trajectory], cut: int, iteration: int | None, problem: str | None
) -> None:
    def key(row: Trajectory) -> tuple[int, int, str, int]:
        return row.iteration, row.step, row.problem_id, row.sample

    with TemporaryDirectory() as folder:
        found = list(sealed(Path(folder), rows, cut).rows(iteration, problem))
    wanted = [r for r in rows if iteration in (None, r.iteration) and problem in (None, r.problem_id)]
    assert sorted(found, key=key) == sorted(wanted, key=key)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory that stands after two steps of the first iteration."""
    folder = tmp_path / "run"
    write_model(folder / "model", seed=0)
    (folder / "config.yaml").write_text(to_yaml(load_config(["experiment=tiny"])))
    sealed(folder / "cache", step_rows(0, 0) + step_rows(0, 1), 16)
    return folder


def test_the_summary_has_a_line_a_phase(tmp_path: Path) -> None:
    rows = phases(seed=3)
    cache, config = sealed(tmp_path, rows, 20), load_config(["experiment=tiny", "algorithm.hard_threshold=0.3"])
    console = Console(width=100)
    with console.capture() as capture:
        console.print(summary(cache, config))
    lines = [line.split() for line in capture.get().splitlines()[2:]]
    for iteration, line in enumerate(lines):
        mine = [row for row in rows if row.iteration == iteration]
        assert line[:2] == [str(iteration), str(len({row.step for row in mine}))]
        assert line[2:4] == [str(len(mine)), "5"]
        assert line[4] == f"{sum(row.correct for row in mine) / len(mine):.1%}"
        assert line[6] == str(cache.count_experts(ExpertQuery((iteration,), 0.3)))
        verdicts = [[row.correct for row in mine if row.problem_id == f"p{problem}"] for problem in range(5)]
        places = Counter(min(10 * sum(right) // len(right), 9) for right in verdicts)
        heights = [math.ceil(8 * places[place] / max(places.values())) for place in range(10)]
        assert line[7] == "".join("·▁▂▃▄▅▆▇█"[height] for height in heights)
    assert len(lines) == 2


def test_rows_as_text_and_as_json_lines(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    assert main(["cache", str(run), "--show", "1", "--export", str(out), "--problem", "p2"]) == 0
    printed = capsys.readouterr().out
    wanted = [row for step in (0, 1) for row in stored_order(step_rows(0, step)) if row.problem_id == "p2"]
    assert f"iteration 0, step 0, p2, sample {wanted[0].sample}" in printed
    assert f"{out}: {len(wanted)} trajectories" in printed
    exported = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [{name: value for name, value in asdict(row).items() if name != "times"} for row in wanted]
    assert exported == json.loads(json.dumps(expected))
    assert main(["cache", str(run), "--export", str(out), "--iteration", "7"]) == 0
    assert f"{out}: 0 trajectories" in capsys.readouterr().out
    assert out.read_text() == ""


def test_a_narrow_terminal_cuts_no_figure_and_no_verdict(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["cache", str(run)]) == 0
    title, heading, line = capsys.readouterr().out.splitlines()
    assert " ".join(heading.split()) == "iteration steps sampled problems correct truncated experts success"
    assert line.split()[:3] == ["0", "2", title.split()[0]]
    assert main(["cache", str(run), "--show", "1"]) == 0
    row = next(TrajectoryCache(run / "cache").rows())
    said = f"sample {row.sample}: {row.reason}, {len(row.response_ids)} tokens, {row.finish_reason}"
    assert said in capsys.readouterr().out.splitlines()[0]


def test_a_choice_of_rows_without_a_use_and_an_empty_one_are_said(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for choice in (["--iteration", "0"], ["--problem", "p2"]):
        assert main(["cache", str(run), *choice]) == 2
        assert "--show" in capsys.readouterr().err
    assert main(["cache", str(run), "--show", "2", "--problem", "nobody"]) == 0
    assert "no trajectory" in capsys.readouterr().out


def test_a_damaged_shard_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", str(run), "--verify"]) == 0
    shard = run / "cache" / "shard-000001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert main(["cache", str(run), "--verify"]) == 2
    assert "shard-000001.parquet has another content than was sealed" in capsys.readouterr().err
