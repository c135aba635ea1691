"""Conversions of a model of 2 GB, against `cp` and fsync of the same bytes on the same disk; and what memory they take.

Every repeat runs cp, HF to Megatron, and Megatron to HF, one after another, verification and fsync counted. The source
is in the page cache, as it is for cp. Memory is RssAnon above what the process has after its imports, against three
times the largest tensor and 0.25 GiB; the naive way holds the model whole.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import Metric, arguments, at_least, at_most, memory_of_this_process, report
from safetensors.torch import load_file

from rloop_mcore.weights import hf_to_mcore, mcore_to_hf
from rloop_mcore.weights.digest import digest_of
from rloop_mcore.weights.hf_folder import Plan, TensorWriter
from rloop_mcore.weights.sections import Layout, Model

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SPARE = 1 << 28


def main() -> None:
    options = arguments(__doc__ or "")
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=".") as folder:  # not /tmp, which may be memory
        root = Path(folder)
        source, mcore, back, copy = root / "source", root / "mcore", root / "back", root / "copy"
        peak_memory(lambda: write_model(source, layers=4 if options.quick else 16))

        def to_mcore() -> None:
            hf_to_mcore.plan(source, mcore, Layout(), threads=threads).run(lambda size: None)

        def to_hf() -> None:
            mcore_to_hf.plan(mcore, back, threads=threads).run(lambda size: None)

        def cp() -> None:
            subprocess.run(["cp", "-r", source, copy], check=True)
            for file in copy.iterdir():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())

        # Before this process has done any work, whose memory it would keep and a fork not take anew.
        peaks = {"mcore": peak_memory(to_mcore), "hf": peak_memory(to_hf)}
        naive = peak_memory(lambda: load_all(source, root / "naive"))
        (root / "naive").unlink()
        seconds: dict[str, list[float]] = {"cp": [], "mcore": [], "hf": []}
        works = [("cp", cp, copy), ("mcore", to_mcore, mcore), ("hf", to_hf, back)]
        for number in range(2 if options.quick else 13):
            # By turns: on a virtual machine page cache that was not used before costs several times as much.
            for name, work, result in (works[(number + i) % 3] for i in range(3)):
                kept = result.rename(root / "kept") if result.exists() else None
                os.sync()
                begun = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - begun)
                if kept is not None:
                    shutil.rmtree(kept)
        assert digest_of(back) == digest_of(source)
        # The first round pays for what is not yet in memory.
        median = {name: statistics.median(of_name[1:]) for name, of_name in seconds.items()}
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        largest = hf_to_mcore.plan(source, root / "none", Layout()).largest
    bound = 3 * largest + SPARE
    print(
        f"{size / 1e9:.2f} GB bf16, {threads} threads: cp and fsync {median['cp']:.2f} s, to Megatron "
        f"{median['mcore']:.2f} s, to HF {median['hf']:.2f} s\n"
        f"memory above the imports: to Megatron {peaks['mcore'] / 2**20:.0f} MiB, to HF {peaks['hf'] / 2**20:.0f} MiB, "
        f"all at once {naive / 2**20:.0f} MiB; largest tensor {largest / 2**20:.0f} MiB"
    )
    most = max(peaks.values())
    metrics: list[Metric] = [
        at_least("hf_to_mcore_vs_cp", median["cp"] / median["mcore"], 0.6, "cp and fsync of the same bytes"),
        at_least("mcore_to_hf_vs_cp", median["cp"] / median["hf"], 0.6, "cp and fsync of the same bytes"),
        at_most("memory_vs_bound", most / bound, 1.0, "3x the largest tensor + 0.25 GiB"),
        at_most("memory_vs_naive", most / naive, 1.0, "loading the folder, fusing, saving"),
    ]
    report("convert", metrics, options.json)


def write_model(folder: Path, layers: int) -> None:
    """Random weights of a Llama, one tensor at a time."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}), encoding="utf-8")
    model = Model(folder)
    plan: Plan = {name: (torch.bfloat16, shape) for name, shape in model.family.shapes(model.config).items()}
    torch.manual_seed(0)
    with TensorWriter(folder, plan) as writer:
        for name, (dtype, shape) in plan.items():
            writer.write(name, torch.randn(shape, dtype=dtype))


def load_all(source: Path, target: Path) -> None:
    """What a simple converter does: everything in memory, twice where it is fused."""
    tensors: dict[str, torch.Tensor] = {}
    for file in source.glob("*.safetensors"):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    model = Model(source)
    fused = {
        s.key + str(s.place.index) + str(s.row): s.parameter.shard(tensors.__getitem__, 0, 1) for s in model.sections
    }
    torch.save(fused, target)


def peak_memory(work: Callable[[], object]) -> int:
    """How far a process's anonymous memory rises over `work`, which runs in a fork of this one."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measured, args=(work, sender))
    process.start()
    sender.close()
    peak = int(receiver.recv())
    process.join()
    return peak


def _measured(work: Callable[[], object], sender: multiprocessing.connection.Connection) -> None:
    before, peak, ended = memory_of_this_process("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, memory_of_this_process("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    ended.set()
    watcher.join()
    sender.send(peak - before)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
