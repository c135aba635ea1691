"""`rloop plan` as a user meets it: without weights, GPU, data or run.dir."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rloop_mcore import validate
from rloop_mcore.compose import load_config
from rloop_mcore.data.countdown_model import CONFIG
from rloop_mcore.errors import UserError
from rloop_mcore.main.cli import main
from rloop_mcore.main.plan import _parts_table, plan
from rloop_mcore.planning.plan import Plan

SIZES = {
    "model_type": "qwen2",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
}
GPU = {"memory_gib": 79.1, "memory_gb_s": 3350, "bf16_tflops": 989, "node_gb_s": 450, "network_gb_s": 50}
ROLLOUT = {"engine": "sglang", "engines": 8, "sleep": "true", "memory_fraction": 0.4}
SEVEN_B = [
    *(f"model.architecture.{key}={value}" for key, value in SIZES.items()),
    *(f"cluster.gpu.{key}={value}" for key, value in GPU.items()),
    *(f"rollout.{key}={value}" for key, value in ROLLOUT.items()),
    "cluster.gpus_per_node=8",
]
WIDE = [  # 41 B parameters in two layers: more than a GPU has, and few layouts to look at
    *(
        f"model.architecture.{key}={value}"
        for key, value in {"hidden_size": 32768, "intermediate_size": 200_000}.items()
    ),
    *(f"model.architecture.num_{key}={value}" for key, value in {"hidden_layers": 2, "attention_heads": 4}.items()),
]
DOCS = Path(__file__).parents[2] / "docs"
FITS = ["layout.tp=4", "layout.dp=2", "layout.sp=true"]


def as_json(capsys: pytest.CaptureFixture[str], *overrides: str, search: bool = False) -> Any:
    assert plan([*SEVEN_B, *overrides], as_json=True, search=search) == 0
    return json.loads(capsys.readouterr().out)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *FITS)
    assert found["parameters"] == sum(found["parameters_by_tensor"].values()) == 7_615_616_512
    assert found["chosen"]["layout"] in found["layouts"]
    memory = found["chosen"]["memory_gib"]
    assert memory["total"] == pytest.approx(sum(size for part, size in memory.items() if part != "total"), abs=0.01)
    assert found["fits"] is found["chosen"]["fits"] is True
    assert found["chosen"]["margin_gib"] == pytest.approx(79.1 - memory["total"], abs=0.01)
    assert found["chosen"]["times"]["step_s"] > 0


def test_search_ranks_what_fits_first(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *FITS, search=True)
    fits = [layout["fits"] for layout in found["layouts"]]
    assert fits == sorted(fits, reverse=True)
    seconds = [layout["times"]["step_s"] for layout in found["layouts"] if layout["fits"]]
    assert seconds == sorted(seconds)
    assert found["chosen"]["times"]["step_s"] >= seconds[0]


def test_text_names_the_fullest_gpu_and_what_fills_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan([*SEVEN_B, *FITS], as_json=False, search=False) == 0
    text = capsys.readouterr().out
    assert "7.62 B parameters" in text
    assert "GiB to spare: the fullest GPU is one of stage 0, most of it" in text
    assert "a step takes about" in text


def test_the_memory_is_whole_on_a_terminal_of_80_columns() -> None:
    config = load_config(["experiment=qwen2.5_72b", "cluster=h100_64"], absent="?")
    chosen = Plan.of(validate.check_sizes(config, *validate.stated_sizes(config.model)), config)
    found = {}
    for width in (80, 150):
        out = StringIO()
        console = Console(width=width, file=out)
        console.print(_parts_table(chosen.worst, console))
        table = out.getvalue()
        assert "…" not in table
        found[width] = sorted(re.findall(r"\d+\.\d\d", table))
    assert found[80] == found[150]
    assert len(found[80]) == 30


def test_what_does_not_fit_is_shown_and_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"the run needs .* GiB .*; the nearest that fits has layout\.tp=\d layout\.dp"):
        plan([*SEVEN_B, "layout.dp=8"], as_json=True, search=False)
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert plan([*SEVEN_B, *found["nearest"]], as_json=True, search=False) == 0


def test_config_json_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    small = [
        f"model.path={tmp_path}",
        "rollout.max_tokens=24",
        "data.max_prompt_tokens=16",
        "algorithm.overlong_buffer=0",
    ]
    assert plan(small, as_json=True, search=False) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["hidden"] == CONFIG["hidden_size"]
    assert found["fits"] is None
    with pytest.raises(UserError, match="hidden_size"):
        plan([*small, "model.architecture.hidden_size=97"], as_json=True, search=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.seed=1"], r"model.path=\(not given\) holds no config.json and model.architecture is empty: give"),
        (["model.architecture.hidden_size=96"], r"model.architecture has no num_hidden_layers"),
        ([*SEVEN_B, "model.architecture.num_hidden_layers=0"], r"model.architecture has no num_hidden_layers above 0"),
        ([*SEVEN_B, "model.architecture.vocab_size=0"], r"model.architecture has no vocab_size above 0"),
        ([*SEVEN_B, "layout.dp=16"], r"layout.tp x pp x cp x dp is 16 processes, and the trainer has 8 GPUs"),
        (
            ["model=qwen2.5_32b", "cluster=h100_8"],
            r"no layout of up to 64 GPUs would: the embedded engine has the whole",
        ),
        ([*SEVEN_B, *WIDE, "rollout.engines=1"], r"no layout of up to 64 GPUs would: raise rollout.tp"),
        ([*SEVEN_B, "precision=fp8_delayed", "fp8.first_bf16_layers=1"], r"fp8_delayed keeps no layers in bf16"),
    ],
)
def test_mistakes(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(overrides, as_json=True, search=False)


def test_no_torch_and_exit_code_2_in_one_sentence() -> None:
    code = "import sys, rloop_mcore.main.plan; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    command = [sys.executable, "-m", "rloop_mcore.main.cli", "plan", *SEVEN_B, "layout.tp=8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("rloop: layout.tp=8 does not divide num_attention_heads=28")
    assert done.stderr.count("\n") == 1


def test_the_plans_of_the_documentation_are_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "planning.md").read_text(encoding="utf-8")
    shown = re.findall(r"^`rloop (plan [^`]+)`[^`]*\n```\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == 3
    for command, expected in shown:
        main(shlex.split(command))
        printed = [line.strip() for stream in capsys.readouterr() for line in stream.splitlines() if line.strip()]
        assert printed == [line.strip() for line in expected.splitlines()]


def test_the_layouts_that_the_documentation_advises_fit(capsys: pytest.CaptureFixture[str]) -> None:
    advised = re.findall(r"`rloop (plan [^`]+=[^`]+)`", (DOCS / "howto.md").read_text(encoding="utf-8"))
    assert len(advised) == 7
    for command in advised:
        assert main(shlex.split(command)) == 0, command
        assert "\nfits, with" in capsys.readouterr().out
