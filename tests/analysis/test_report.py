"""The report's file: whole, offline, escaped."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_with_samples import add_samples

from rloop_mcore.analysis.checkpoints import rl_checkpoints
from rloop_mcore.analysis.figures import sections
from rloop_mcore.analysis.read_run import Run, read_run
from rloop_mcore.analysis.report import write_report


def figures(html: str) -> list[dict[str, Any]]:
    found = re.search(r'<script id="figures" type="application/json">(.*?)</script>', html, re.DOTALL)
    assert found
    return list(json.loads(found[1]))


def titles(html: str) -> list[str]:
    return re.findall(r"<figcaption><h3>(.*?)</h3>", html)


@pytest.fixture
def page(rloop_run: Path, dapo_run: Path, tmp_path: Path) -> Path:
    out = tmp_path / "report.html"
    arm = {"avg@32": {"mean": 0.2, "low": 0.1, "high": 0.3}}
    write_report([rloop_run, dapo_run], out, {"arms": {"base": arm, "rloop": arm | {"label": "<script>bad()"}}})
    return out


def test_stages_are_told_apart_however_many_there_are(tmp_path: Path) -> None:
    line = {"iteration": 0, "phase": "explore", "step": 1, "global_step": 1}
    run = Run("run", tmp_path, "", {}, [line | {f"seconds_{number}": 1.0 for number in range(9)}], [], [])
    (bars,) = [each.spec["data"] for each in sections([run])[-1].figures if each.title == "Seconds by stage"]
    assert len({json.dumps(bar["marker"]) for bar in bars}) == 9


def test_a_path_whose_bytes_were_no_text_in_the_locale_is_shown_as_utf_8(rloop_run: Path, tmp_path: Path) -> None:
    spelled = "caf\N{LATIN SMALL LETTER E WITH ACUTE}"
    folder = rloop_run.rename(tmp_path / spelled)
    out = tmp_path / "report.html"
    write_report([folder.with_name(spelled.encode().decode("ascii", "surrogateescape"))], out)
    assert spelled in out.read_text(encoding="utf-8")


def test_figures_hold_the_runs_numbers(page: Path) -> None:
    html = page.read_text()
    by_title = dict(zip(titles(html), figures(html), strict=True))
    rloop, dapo = by_title["Training success"]["data"]
    assert (rloop["name"], dapo["name"]) == ("rloop", "dapo")
    assert dapo["x"] == list(range(1, 9))
    assert dapo["y"] == pytest.approx([0.1 + 0.9 * step / 8 for step in range(1, 9)])
    validation = by_title["Validation avg@32"]["data"][0]
    assert validation["y"] == [0.06, 0.10, 0.14, None, 0.08, 0.20, None, 0.12]
    assert [symbol for symbol in validation["marker"]["symbol"] if symbol in ("diamond", "star")] == [
        "diamond",
        "diamond",
        "star",
        "diamond",
    ]
    assert by_title["Expert trajectories"]["data"][0]["y"] == [30, 12]
    assert by_title["Problems of the experts"]["data"][0]["y"] == [15, 6]
    assert [stage["name"] for stage in by_title["Seconds by stage"]["data"]] == ["generate", "update"]


def test_a_point_without_neighbours_is_drawn(page: Path, make_run: Callable[..., Path], tmp_path: Path) -> None:
    html = page.read_text()
    modes = {title: spec["data"][0].get("mode") for title, spec in zip(titles(html), figures(html), strict=True)}
    assert modes["Gradient norm"] == "lines+markers"  # 0.3, null, 0.3, 0.3 ...
    assert modes["Token entropy"] == "lines"
    write_report([make_run(tmp_path / "begun", {"base": 0.1}, 1, 1)], tmp_path / "begun.html")
    begun = (tmp_path / "begun.html").read_text()
    assert {spec["data"][0]["mode"] for spec in figures(begun) if spec["data"][0]["type"] == "scatter"} == {
        "lines+markers"
    }


def test_the_page_needs_nothing_from_elsewhere(page: Path) -> None:
    html = page.read_text()
    assert not re.search(r'<(script|img|iframe)[^>]+src=|<link[^>]+href=|@import|url\("?http', html)
    assert html.count("plotly.js v") == 1
    assert re.search(r'content="default-src \'none\';[^"]*connect-src \'none\'"', html)
    assert len(html) < 8_000_000


def test_what_comes_from_data_is_text(page: Path) -> None:
    html = page.read_text()
    assert "<script>alert(1)" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script>bad()" not in html


def test_runs_of_different_numbers_of_samples_are_all_there(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, {"base": 0.11, "i0_explore_000004": 0.26}) for name in ("of32", "of8")]
    for path in (runs[1] / "evaluation").iterdir():
        path.write_text(path.read_text().replace("avg@32", "avg@8"))
    write_report(runs, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    drawn = {
        title: [each["name"] for each in spec["data"]] for title, spec in zip(titles(html), figures(html), strict=True)
    }
    assert (drawn["Validation avg@32"], drawn["Validation avg@8"]) == (["of32"], ["of8"])
    assert drawn["Overfitting gap"] == ["of32", "of8"]
    assert html.count("11.0% → 26.0%") == 2  # in the overview
    assert html.count(">26.0 <") == 4  # in the table: picked, last RL policy


def test_runs_of_the_same_name_are_told_apart(make_run: Callable[..., Path], tmp_path: Path) -> None:
    paths = [make_run(tmp_path / parent / "run", {"base": 0.1}) for parent in ("seed0", "seed1")]
    write_report(paths, tmp_path / "report.html")
    data = figures((tmp_path / "report.html").read_text())[0]["data"]
    assert [trace["name"] for trace in data] == ["seed0/run", "seed1/run"]


def test_places_of_matrices_are_steps_of_their_iteration_also_where_responses_are_gone(rloop_run: Path) -> None:
    kept = ["base", "i0_explore_000002", "i1_explore_000004"]  # not of the last checkpoint of iteration 0, at step 4
    add_samples(rloop_run, 2, kept, seed=1)
    assert rl_checkpoints(read_run(rloop_run)).names == ["θ0", "1 · 2", "2 · 4"]


def test_a_run_without_anything_yet_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    write_report([tmp_path], tmp_path / "report.html")
    assert figures((tmp_path / "report.html").read_text()) == []


def test_torch_is_not_needed() -> None:
    code = "import sys, rloop_mcore.analysis.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
