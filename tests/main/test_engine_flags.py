"""What SGLang servers are started with, and which of it `rloop evaluate` leaves out."""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path

from rloop_mcore.config import Config, DataConfig, RolloutConfig
from rloop_mcore.main.engines import _sglang_arguments, start_servers
from rloop_mcore.main.evaluate import keys_of
from rloop_mcore.main.policies import Source

PLAIN = ["--tp-size", "4", "--ep-size", "2"]


def flags(**rollout: object) -> list[str]:
    keys = {"engine": "sglang", "tp": 4, "ep": 2} | rollout
    return _sglang_arguments(Config(data=DataConfig(train="t"), rollout=RolloutConfig(**keys)), "cpu", 0)  # type: ignore[arg-type]


def test_data_parallel_attention_is_asked_for_in_words_of_all_versions() -> None:
    assert flags() == PLAIN
    assert flags(dp=2) == [*PLAIN, "--dp-size", "2", "--enable-dp-attention"]


def test_fp8_servers_are_told_of_blocks_and_wait_for_their_weights() -> None:
    found = flags(quantization="fp8")[len(PLAIN) :]
    given = dict(zip(found[::2], found[1::2], strict=True))
    assert json.loads(given.pop("--json-model-override-args")) == {
        "quantization_config": {  # as in config.json of Qwen3-8B-FP8
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    }
    assert given == {"--quantization": "fp8", "--load-format": "dummy"}


def test_an_evaluation_has_no_sync_so_its_engines_read_their_weights(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").touch()  # Megatron's: its config.json is read later
    overrides = ["rollout.engine=sglang", f"rollout.python={sys.executable}", "rollout.quantization=fp8"]
    options = argparse.Namespace(overrides=overrides, samples=None, k=None, json=None)
    assert "dummy" not in _sglang_arguments(keys_of(options, Source(tmp_path)), "cuda", 0)


def test_a_run_may_have_as_many_sockets_as_its_machine_lets_it(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        start_servers(Config(rollout=RolloutConfig(endpoints=["http://127.0.0.1:1"])), tmp_path, tmp_path)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
