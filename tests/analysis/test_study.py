"""The study's records, and the tables made of them."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import study_tables  # noqa: E402
from run_with_samples import add_samples  # noqa: E402
from study_record import record_of  # noqa: E402
from study_tables import Study  # noqa: E402

EVALUATED = {"base": 0.1, "i0_explore_000002": 0.2, "i0_exploit_000000": 0.1, "i1_explore_000002": 0.3}


def test_the_tables_in_docs_are_those_of_the_records() -> None:
    written = (ROOT / "docs" / "study" / "tables.md").read_text(encoding="utf-8")
    assert written == study_tables.tables(study_tables.read_study(ROOT / "docs" / "study"))
    quoted = (ROOT / "docs" / "study.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in quoted if line.startswith("|")]
    assert rows
    assert set(rows) <= set(written.splitlines())


def test_a_record_holds_what_the_run_did(make_run: Callable[..., Path], tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", EVALUATED, iterations=2, steps=4, experts=(30, 12))
    trajectories = add_samples(path, 2, list(EVALUATED), seed=3)
    (path / "config.yaml").write_text("algorithm: {group_size: 8}\n")
    sampled = {"groups_sampled": 9, "sampled_tokens": 50.0}
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    lines = [line | sampled if line["phase"] == "explore" else line for line in lines]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads(json.dumps(record_of(path)))
    assert [each["name"] for each in record["checkpoints"]] == list(EVALUATED)
    assert [each["rl_steps"] for each in record["checkpoints"]] == [0, 2, 4, 6]
    for each in record["checkpoints"]:
        rows = pq.read_table(path / "evaluation" / f"{each['name']}.parquet").to_pylist()
        right = [sum(row["correct"] for row in rows if row["problem_id"] == f"validation/{n}") for n in range(6)]
        assert (each["right"], each["samples"]) == (right, 4)
    assert record["experts"] == {"trajectories": [30, 12], "problems": [15, 6]}
    assert record["steps"]["entropy"] == [pytest.approx(0.5 / step, rel=1e-3) for step in range(1, 9)]
    assert record["steps"]["grad_norm"][1] is None
    expected = {"sampled": 8 * 9 * 8, "sampled_tokens": 400.0, "rl_tokens": 2400.0, "rft_tokens": 200.0}
    assert record["cost"] == expected | {"seconds": 8 * 3.0 + 2 * 1.0}
    assert len(trajectories) == record["cost"]["sampled"]
    assert np.shape(record["similarity"]["matrix"]) == (3, 3)


def test_the_interval_is_students() -> None:
    for freedom, quantile in enumerate(study_tables.T_95, start=1):
        inside = mpmath.betainc(freedom / 2, 0.5, freedom / (freedom + quantile**2), 1, regularized=True)
        assert float(inside) == pytest.approx(0.95, abs=1e-4)
    values = [1.0, 2.0, 4.0, 7.0]
    expected = 3.182 * statistics.stdev(values) / 2
    assert study_tables.half_width(np.array(values)) == pytest.approx(expected)
    assert study_tables.spread(values) == f"3.5 ± {expected:.1f}"
    assert [study_tables.spread([2.0], sign="+"), study_tables.spread([float("nan")])] == ["+2.0", "–"]


def run(right: list[int]) -> dict[str, Any]:
    """A record whose picked checkpoint has so many right of 32 to each problem."""
    return {"held_out": {"picked": {"checkpoint": "x", "samples": 32, "test": right}}}


def test_differences_are_paired_by_seed() -> None:
    dapo = {0: run([8, 0]), 1: run([16, 16]), 2: run([0, 0])}
    rloop = {1: run([18, 16]), 0: run([8, 4])}  # of seed 2 there is none yet
    study = Study({}, {(200, "dapo"): dapo, (200, "rloop"): rloop})
    (_, row) = study_tables.differences(study, 200, "test")
    gains = [100 * 4 / 64, 100 * 2 / 64]
    half = 12.706 * statistics.stdev(gains) / 2**0.5
    assert row[:3] == ["RLoop", "picked by validation", f"+{statistics.mean(gains):.1f} ± {half:.1f} (2 of 2)"]


def test_one_long_phase_is_cut_like_three() -> None:
    """Solved by checkpoint: 0 1 | 1 0 | 0 1 over steps 0 2 | 4 6 | 8 12, two problems, phases of 4 steps."""
    checkpoints = [
        {"phase": "explore" if steps else "base", "rl_steps": steps, "right": right}
        for steps, right in ((0, [0, 0]), (2, [1, 1]), (4, [1, 0]), (6, [0, 1]), (8, [1, 0]), (12, [0, 0]))
    ]
    record = {"checkpoints": checkpoints, "steps": {"success_rate": [0.0] * 12}}
    window = [0, 0, 0, 1, 1, 2]
    shares: dict[bool, list[float]] = {True: [], False: []}
    for i, before in enumerate(checkpoints):
        for j in range(i + 1, len(checkpoints)):
            lost = sum(a > 0 and b == 0 for a, b in zip(before["right"], checkpoints[j]["right"], strict=True))
            shares[window[i] == window[j]].append(100 * lost / 2)
    expected = statistics.mean(shares[True]), statistics.mean(shares[False])
    assert study_tables.forgetting(record) == pytest.approx(expected)
