"""Peak memory of logprobs and entropy at Qwen2.5's vocabulary."""

from __future__ import annotations

from pathlib import Path

from gpu_jobs import relative, run, write_model


def test_chunked_logprobs_take_a_quarter_of_the_memory_at_most(tmp_path: Path) -> None:
    folder = write_model("dense", tmp_path / "dense")
    probe = {"name": "probe", "task": "logprob_memory", "folder": str(folder), "tokens": 8192}
    result = run([probe], folder)["probe"]
    peak = result["peak"]
    print(f"{peak['chunked'] / 2**30:.2f} GiB, naive {peak['naive'] / 2**30:.2f} GiB")
    assert peak["chunked"] <= 0.25 * peak["naive"]
    for name, wanted in result["naive"].items():  # bf16 gradients of each
        assert relative({name: result["chunked"][name]}, {name: wanted}) < 0.01, name
