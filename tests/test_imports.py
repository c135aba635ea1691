"""The direction of the arrows: types <- protocols <- {algorithm, rooms} <- loop <- main."""

from __future__ import annotations

import ast
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "rloop_mcore"
ROOMS = {"actor", "rollout", "weights", "trajectory", "reward", "data", "evaluation", "analysis", "planning"}
ROOMS |= {"preflight", "slurm"}
SHARED = {"types", "protocols", "config", "errors", "algorithm", "platform"}
RUN = {
    "commits",
    "feed",
    "grading",
    "journal",
    "kept_policies",
    "timeline",
    "tracking",
    "progress",
    "rl_step",
    "run_state",
}
RUN |= {"space"}
ALLOWED = {
    "errors": set(),
    "types": set(),
    "config": set(),
    "platform": {"errors"},
    "protocols": {"types", "config"},
    "algorithm": {"types"},
    **dict.fromkeys(ROOMS, SHARED),
    "evaluation": SHARED | {"grading"},
    "journal": SHARED,
    "kept_policies": SHARED | {"journal"},
    "commits": SHARED | {"journal", "space", "timeline"},
    "progress": set(),
    "tracking": SHARED | {"progress", "wandb_run"},
    "wandb_run": {"errors"},
    "run_config": {"config", "errors"},
    "compose": {"config", "errors", "run_config"},
    "hf_config": {"errors", "platform"},
    "validate": {"algorithm", "config", "errors", "hf_config", "planning", "platform", "run_config", "weights"},
    "feed": SHARED,
    "grading": SHARED,
    "timeline": {"platform"},
    "space": {"errors", "platform"},
    "rl_step": SHARED | {"feed", "grading", "timeline"},
    "run_state": SHARED | RUN,
    "loop": SHARED | RUN,
}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            names = [node.module] if node.module != "rloop_mcore" else [f"rloop_mcore.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("rloop_mcore.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows_point_one_way(path: Path) -> None:
    own = unit(path)
    if own in ("main", "__init__"):
        return
    wrong = imported_units(path) - ALLOWED[own] - {own}
    assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_config_needs_no_torch() -> None:
    modules = "rloop_mcore.config, rloop_mcore.validate, rloop_mcore.main.status, rloop_mcore.main.report"
    modules += ", rloop_mcore.main.evaluate, rloop_mcore.main.worker"  # they start engines before they import it
    code = f"import sys, {modules}; assert not {{'torch', 'sympy'}} & set(sys.modules)"  # sympy is the graders'
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_only_overrides_need_hydra() -> None:
    """Its import would take a fifth of a second of each `rloop --help`, `rloop status` and rank."""
    modules = "rloop_mcore.main.arguments, rloop_mcore.main.status, rloop_mcore.main.worker"
    code = f"import sys, {modules}; assert 'hydra' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(find_library("cuda") is not None, reason="torch is asked where there is a driver")
def test_the_supervisor_of_a_run_needs_no_torch_without_a_gpu(tmp_path: Path) -> None:
    """Its import would take a second of each start, and half a GB as long as the run."""
    code = """
import sys
from ctypes.util import find_library
from pathlib import Path
from rloop_mcore.compose import load_config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.main import train
write_model(Path("model"), seed=0)
assert train._check_inputs(load_config(["experiment=tiny", "run.dir=run"]), Path("model"))[0] == 48
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=tmp_path)
