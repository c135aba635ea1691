"""Every shipped experiment: legal as it stands, and a step of it, shrunk, on the CPU.

A layout of up to 8 processes runs as it is, a larger one as its kinds of parallelism (shrunk.py). Of experiments that
share a layout one runs in it. The others run on one process: they differ in options that no layout knows of, or in the
family, of which test_bridge_parallel.py has each in every layout. What is the same after shrinking runs once; `tiny` is
small as it is, and runs whole in test_kill.py.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import runs
import shrunk

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config, LayoutConfig, config_folder
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.layouts import broken_rule
from rloop_mcore.planning.nodes import roles
from rloop_mcore.run_config import flat
from rloop_mcore.validate import check_values
from rloop_mcore.weights.digest import digest_of

EXPERIMENTS = sorted(
    (path.stem for path in (config_folder() / "experiment").glob("*.yaml")), key=lambda name: (name[:2] != "rl", name)
)
DRY_RUN_S = 380.0


@functools.cache
def load(name: str, *overrides: str) -> Config:
    """With what a user has to give: the weights, the problems, and an interpreter that has SGLang."""
    given = ("model.path=m", "data.train=countdown:train", f"rollout.python={sys.executable}")
    return load_config([f"experiment={name}", "run.dir=r", *given, *overrides])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_is_legal(name: str) -> None:
    config = load(name)
    check_values(config)
    roles(config)
    assert config.experiment == name
    architecture = config.model.architecture
    assert broken_rule(config.layout, Architecture.of(vars(architecture), name)) is None
    assert config.data.max_prompt_tokens + config.rollout.max_tokens <= architecture.max_position_embeddings


@pytest.fixture(scope="module")
def shipped_models() -> list[Architecture]:
    """Of every shipped model."""
    models = [path.stem for path in (config_folder() / "model").glob("*.yaml")]
    return [Architecture.of(vars(load("tiny", f"model={model}").model.architecture), model) for model in models]


@pytest.mark.parametrize("name", sorted(path.stem for path in (config_folder() / "layout").glob("*.yaml")))
def test_every_shipped_layout_is_legal_for_a_shipped_model(shipped_models: list[Architecture], name: str) -> None:
    layout = load("tiny", f"layout={name}", "layout.dp=4").layout
    assert any(broken_rule(layout, model) is None for model in shipped_models)


@dataclass
class DryRun:
    """What a shrunk run came to."""

    code: int
    errors: str
    folder: Path


_done: dict[str, DryRun] = {}  # by the shrunk configuration
_laid_out: set[str] = set()  # the layouts that have been run in


def dry_run(name: str, folder: Path) -> DryRun:
    config = load(name)
    layout = shrunk.shrunk_layout(config.layout)
    same, overrides = shrink(name, config, layout)
    if same not in _done and str(layout) in _laid_out:
        same, overrides = shrink(name, config, LayoutConfig())
    _laid_out.add(str(layout))
    if same not in _done:
        _done[same] = train(name, overrides, folder)
    return _done[same]


def shrink(name: str, config: Config, layout: LayoutConfig) -> tuple[str, list[str]]:
    """The shrunk configuration without its name, and the overrides that make it."""
    overrides = shrunk.overrides(config, layout)
    values = flat(load(name, *overrides))
    return json.dumps(values | {"run.dir": None, "experiment": None}), overrides


def train(name: str, overrides: list[str], folder: Path) -> DryRun:
    shrunk.write_model(load(name, *overrides), folder / "model")
    places = [f"experiment={name}", f"run.dir={folder / 'run'}", f"model.path={folder / 'model'}"]
    done = subprocess.run(
        runs.command("train", *places, *overrides),
        stderr=subprocess.PIPE,
        text=True,
        timeout=DRY_RUN_S,
        cwd=runs.ROOT,
        env={**runs.environment(), "PYTHONPATH": f"{runs.ROOT}:{Path(__file__).parent}"},
    )
    return DryRun(done.returncode, done.stderr, folder / "run")


def metrics(folder: Path, phase: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["phase"] == phase and "grad_norm" in record]


@pytest.mark.system
@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "tiny"])
def test_a_step_of_every_shipped_experiment_runs_shrunk(name: str, tmp_path: Path) -> None:
    run, config = dry_run(name, tmp_path), load(name)
    assert run.code == 0, run.errors[-3000:]
    state = runs.status(run.folder)
    assert state["state"] == "finished"
    assert state["policy_digest"] != digest_of(run.folder.parent / "model")
    explores = config.algorithm.iterations > 0
    fine_tunes = explores and config.rft.enabled
    assert state["cache"]["trajectories"] == (32 if explores else 0)
    updates = {"explore": explores and config.algorithm.updates_per_step > 0, "exploit": fine_tunes}
    for phase, expected in updates.items():
        found = metrics(run.folder, phase)
        assert bool(found) == expected, phase
        assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in found), found
    assert sum(state["expert"]) > 0 if fine_tunes else not sum(state["expert"])
