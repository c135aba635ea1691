"""Figures as files: the CSV says what the figure shows, and the drawings are drawings."""

import csv
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image
from run_with_samples import add_samples

from rloop_mcore.analysis.checkpoints import rl_checkpoints
from rloop_mcore.analysis.export import export
from rloop_mcore.analysis.figures import sections
from rloop_mcore.analysis.forgetting import forgetting_matrix
from rloop_mcore.analysis.report import read_runs
from rloop_mcore.errors import Fault

CHROME = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
CHECKPOINTS = ["base", "i0_explore_000002", "i0_explore_000004", "i1_explore_000004"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_holds_the_numbers(rloop_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rloop_mcore.analysis.export.find_spec", lambda name: None)
    add_samples(rloop_run, 2, CHECKPOINTS, seed=2)
    runs = read_runs([rloop_run])
    count, missing = export(runs, tmp_path / "out")
    assert "Kaleido is not installed" in missing
    assert count == len(list((tmp_path / "out").iterdir())) == sum(len(section.figures) for section in sections(runs))
    validation = rows_of(tmp_path / "out" / "validation_avg@32.csv")
    assert [(row["x"], row["label"]) for row in validation][:2] == [("0", "θ0"), ("2", "RL, iteration 1, step 2")]
    assert [float(row["y"]) for row in validation] == [0.06, 0.10, 0.14, 0.08, 0.20, 0.12]
    assert [float(row["low"]) for row in validation] == pytest.approx([0.02, 0.06, 0.10, 0.04, 0.16, 0.08])
    success = rows_of(tmp_path / "out" / "training_success.csv")
    assert [float(row["y"]) for row in success] == pytest.approx([0.325, 0.55, 0.775, 1.0] * 2)
    forgotten = rows_of(tmp_path / "out" / "forgetting_rloop.csv")
    matrix = forgetting_matrix(rl_checkpoints(runs[0]).solved)
    names = ["θ0", "1 · 2", "1 · 4", "2 · 4"]
    expected = {(names[i], names[j]): matrix[i, j] for i in range(4) for j in range(i + 1, 4)}
    assert {(row["i"], row["j"]): float(row["value"]) for row in forgotten} == pytest.approx(expected, abs=1e-5)


def test_runs_of_like_names_have_files_of_their_own(
    rloop_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rloop_mcore.analysis.export.find_spec", lambda name: None)
    add_samples(rloop_run, 2, CHECKPOINTS, seed=2)
    paths = [tmp_path / name for name in ("a/seed1/rloop", "b/seed1/rloop", "r-1", "r_1")]
    for path in paths:
        shutil.copytree(rloop_run, path)
    runs = read_runs(paths)
    assert [run.name for run in runs] == ["a/seed1/rloop", "b/seed1/rloop", "r-1", "r_1"]
    count, _ = export(runs, tmp_path / "out")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(written) == count
    assert {"forgetting_a_seed1_rloop.csv", "forgetting_r_1.csv", "forgetting_r_1_2.csv"} <= written


def test_a_source_may_be_called_anything(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rloop_mcore.analysis.export.find_spec", lambda name: None)
    names = ["../amc", "<b>" * 200, "<b>" * 200 + "?"]
    run = make_run(tmp_path / "run", {"base": 0.1}, sources=dict.fromkeys(names, 0.3))
    export(read_runs([run]), tmp_path / "out")
    drawn = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("validation_pass@32_")}
    long = f"validation_pass@32_{'b_' * 50}"[:100]
    assert drawn == {"validation_pass@32_amc.csv", f"{long}.csv", f"{long}_2.csv"}


@pytest.mark.skipif(CHROME is None or find_spec("kaleido") is None, reason="no Chromium (apt-get install chromium)")
def test_drawings(dapo_run: Path, tmp_path: Path) -> None:
    count, missing = export(read_runs([dapo_run]), tmp_path)
    assert missing == ""
    assert count > 3
    names = sorted(path.name for path in tmp_path.iterdir() if path != dapo_run)
    assert len(names) == 3 * count
    root = ElementTree.parse(tmp_path / "training_success.svg").getroot()
    assert root.tag.endswith("svg")
    assert "Training success" in "".join(root.itertext())
    with Image.open(tmp_path / "training_success.png") as image:
        assert image.size == (760, 480)
        assert len(image.convert("RGB").getcolors(1_000_000) or []) > 10


@pytest.mark.skipif(find_spec("kaleido") is None, reason="Kaleido draws, and is not installed")
def test_drawings_that_fail_leave_nothing(dapo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(jobs: list[dict[str, Any]], kopts: dict[str, Any]) -> list[str]:
        Path(jobs[0]["path"]).touch()
        return ["no space is left"]

    monkeypatch.setattr("kaleido.write_fig_from_object_sync", fail)
    with pytest.raises(Fault, match="the first: no space is left"):
        export(read_runs([dapo_run]), tmp_path / "out")
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".csv"}
