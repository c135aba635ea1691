"""The planner's peak against the one that torch measures over whole updates of Qwen2.5's shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rloop_mcore.config import ActorConfig, AlgorithmConfig, Config, DataConfig, RftConfig, RolloutConfig
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.plan import Plan

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "tools" / "bench"
sys.path.insert(0, str(BENCH))

from gpu_actor import MICRO_BATCH_ROWS, MODEL, PROMPT, ROWS, SHAPES, TOKENS  # noqa: E402


@pytest.mark.parametrize(("shape", "precision"), [("0.5B", "bf16"), ("0.5B", "fp8_tensorwise"), ("1.5B", "bf16")])
def test_predicted_peak(shape: str, precision: str) -> None:
    config = Config(
        precision=precision,
        actor=ActorConfig(micro_batch_tokens=MICRO_BATCH_ROWS[shape] * TOKENS),
        algorithm=AlgorithmConfig(prompts_per_step=ROWS, group_size=1, updates_per_step=1),
        rft=RftConfig(enabled=False),
        data=DataConfig(max_prompt_tokens=PROMPT),
        rollout=RolloutConfig(max_tokens=TOKENS + 1 - PROMPT, endpoints=["http://elsewhere:1"]),
    )
    model = Architecture.of(MODEL | SHAPES[shape] | {"model_type": "qwen2"}, shape)
    (stage,) = Plan.of(model, config).stages
    parts = stage.phases["train"]
    predicted = (sum(parts.values()) - parts["runtime"]) / 2**30  # torch counts its own tensors only
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu_actor.py"), shape, "--measure", precision],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    measured = json.loads(done.stdout.splitlines()[-1])["peak_gib"]
    print(f"{shape} {precision}: predicted {predicted:.1f} GiB, measured {measured:.1f}")
    assert predicted == pytest.approx(measured, rel=0.1)
