"""tools/bench/gpu_loop.py as far as a machine without a GPU can tell: nothing refuses the run that it starts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import Qwen2Config

from rloop_mcore import validate
from rloop_mcore.compose import load_config
from rloop_mcore.planning.plan import Plan
from rloop_mcore.planning.search import check_fit

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

from gpu_loop import MODEL, SETTINGS, SHAPES

SGLANG = ["rollout.engine=sglang", f"rollout.python={sys.executable}", "rollout.memory_fraction=0.3"]


@pytest.mark.parametrize(
    "more", [[], SGLANG, [*SGLANG, "rollout.sleep=true"]], ids=["embedded", "sglang", "that sleeps"]
)
def test_no_check_of_a_gpu_machine_refuses_the_run(tmp_path: Path, more: list[str]) -> None:
    """docs/gpu.md has its time counted in minutes: a refusal there is found out too late."""
    Qwen2Config(**(MODEL | SHAPES["0.5B"]), architectures=["Qwen2ForCausalLM"]).save_pretrained(tmp_path)
    config = load_config([*SETTINGS, f"model.path={tmp_path}", f"run.dir={tmp_path / 'run'}", *more])
    validate.check_values(config)
    validate.check_device(config, "cuda")
    check_fit(Plan.of(validate.check_model(config, tmp_path), config))
