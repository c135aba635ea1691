"""The real server under this project's own code: started, synced, verified, stopped. Runs in `make test-sglang`."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from served_model import (
    EOS,
    MODEL,
    REAL,
    ROOT,
    SGLANG_PYTHON,
    TEMPERATURE,
    VOCABULARY,
    Borrowed,
    Channel,
    Endpoint,
    assert_by,
    endpoint_of,
    make_fleet,
    make_model,
    start_server,
    tile_checksum,
    token_logprobs,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3MoeConfig

from rloop_mcore.config import Config, DataConfig, RolloutConfig
from rloop_mcore.main.engines import start_engine
from rloop_mcore.rollout.client import EngineClient, EngineError
from rloop_mcore.rollout.fleet import Fleet
from rloop_mcore.rollout.fp8 import dequantize, quantize
from rloop_mcore.rollout.hashers import TileHasher
from rloop_mcore.rollout.launch import STUBS_VARIABLE, SGLangServer
from rloop_mcore.types import SampleRequest, Sampling

pytestmark = pytest.mark.skipif(not REAL, reason="make test-sglang runs it")

SAMPLING = Sampling(max_tokens=24, temperature=TEMPERATURE)
REQUESTS = [SampleRequest(tuple(range(2, 6 + i)), seed=10 * i + j) for i in range(4) for j in range(3)]


@pytest.fixture
def fleet(server: SGLangServer) -> Iterator[Fleet]:
    with make_fleet([Borrowed(server)], request_timeout_s=120.0) as fleet:
        yield fleet


def _assert_by(model: PreTrainedModel, fleet: Fleet, version: int) -> None:
    assert_by(model, REQUESTS, fleet.generate(REQUESTS, SAMPLING), version)


def test_a_sync_is_verified_by_the_servers_own_checksums(
    fleet: Fleet, reference: PreTrainedModel, other_model: PreTrainedModel
) -> None:
    fleet._sync.buffers.bucket_bytes = 8000
    metrics = fleet.sync(lambda: iter(other_model.named_parameters()), 7)
    assert metrics["sync_bytes"] == sum(p.nbytes for p in other_model.parameters())
    assert metrics["sync_buckets"] > 3
    _assert_by(other_model, fleet, 7)
    fleet.sync(lambda: iter(reference.named_parameters()), 8)  # the group is kept
    _assert_by(reference, fleet, 8)


def test_each_rank_of_a_tensor_parallel_server_is_verified(
    model_path: Path, tmp_path: Path, other_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")  # a core a rank
    monkeypatch.setenv("SGLANG_NCCL_SO_PATH", "/none")  # or it uses NCCL, if torch was built for CUDA
    split = start_server(model_path, tmp_path, "engine", arguments=("--tp-size", "2"))
    with make_fleet([split], request_timeout_s=120.0) as fleet:
        fleet.sync(lambda: iter(other_model.named_parameters()), 7)
        assert [rank for rank, _ in fleet._submit(_connected(fleet).checksums()).result()] == [0, 1]  # type: ignore[attr-defined]
        _assert_by(other_model, fleet, 7)


def test_weights_that_were_not_sent_are_noticed(fleet: Fleet, reference: PreTrainedModel) -> None:
    """The server takes half a model for an update; its checksums tell."""
    client = _connected(fleet)
    half = iter(list(reference.named_parameters())[:5])
    try:
        with pytest.raises(EngineError, match=r"does not hold the weights it was sent: .*that were not sent"):
            fleet._sync.run([client], half, 5, fleet._submit)
    finally:
        fleet._submit(client.leave_group(Channel.group_name)).result()
        fleet._submit(client.resume()).result()


def _connected(fleet: Fleet) -> EngineClient:
    fleet.wait_ready()
    client = fleet._controller.engines[0].client
    assert client is not None
    return client


def test_a_paused_server_is_healthy(fleet: Fleet) -> None:
    """Its /health is not: a token is what it waits for."""
    client = _connected(fleet)
    fleet._submit(client.pause("retract")).result()
    try:
        fleet._submit(client.health()).result()  # raises where it is not
    finally:
        fleet._submit(client.resume()).result()


def test_the_key_is_in_no_command_line_no_log_and_no_open_file(server: SGLangServer, endpoint: Endpoint) -> None:
    processes = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(processes) > 2
    assert all(server.api_key not in " ".join(process.cmdline()) for process in processes)
    assert server.api_key not in server.log.read_text(errors="replace")
    assert server.secrets.stat().st_mode & 0o077 == 0


def _qwen3(folder: Path, experts: int, chosen: int) -> Path:
    """A random Qwen3 in bfloat16, dense or with experts (`chosen` a token): whole FP8 blocks on each of two ranks."""
    make_model(folder, 0)  # its tokenizer
    torch.manual_seed(1)
    kind = Qwen3MoeConfig if experts > 1 else Qwen3Config
    more = {"moe_intermediate_size": 256, "num_experts": experts, "num_experts_per_tok": chosen}
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=EOS,
        **(more if experts > 1 else {}),
    )
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("rollout", "experts", "chosen", "precision", "atol"),
    # Some of the experts in fp32 only: in bfloat16 a near tie of the router gives a token to others here than there.
    [
        (RolloutConfig(quantization="fp8"), 1, 1, "bf16", 0.1),
        (RolloutConfig(tp=2, dp=2), 4, 2, "fp32", 1e-4),
        (RolloutConfig(tp=2, ep=2), 4, 2, "fp32", 1e-4),
        (RolloutConfig(tp=2, ep=2, quantization="fp8"), 4, 4, "bf16", 0.1),
    ],
    ids=["FP8", "data parallel attention", "expert parallel", "FP8 experts"],
)
def test_quantised_weights_and_ranks_with_their_own_part_are_verified(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rollout: RolloutConfig,
    experts: int,
    chosen: int,
    precision: str,
    atol: float,
) -> None:
    """The loaders, layouts, ranks and checksums are SGLang's; what multiplies in FP8, and skips the experts of other
    ranks, is plain torch (tests/sglang_cpu/sitecustomize.py)."""
    monkeypatch.setenv(STUBS_VARIABLE, str(ROOT / "tests/sglang_cpu"))
    if rollout.tp > 1:
        monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
        monkeypatch.setenv("SGLANG_NCCL_SO_PATH", "/none")
    folder, fp8 = _qwen3(tmp_path / "model", experts, chosen), rollout.quantization == "fp8"
    by_name = load_file(folder / "model.safetensors")  # in alphabetical order; a stream has q before k
    tensors = sorted(by_name.items(), key=lambda item: item[0].replace(".q_proj.", ".a_proj."))
    rollout = replace(rollout, engine="sglang", python=str(SGLANG_PYTHON), max_running=64)
    config = Config(data=DataConfig(train="t"), precision=precision, rollout=rollout)
    server = start_engine(config, folder, tmp_path, 0, range(1))
    known = replace(MODEL, experts=experts, fp8=fp8)
    with make_fleet([server], request_timeout_s=120.0, model=known) as fleet:
        metrics = fleet.sync(lambda: iter(tensors), 7)
        answers = fleet.generate(REQUESTS, SAMPLING)
    if fp8:  # what the server then computes with
        assert metrics["sync_bytes"] < 0.6 * sum(tensor.nbytes for tensor in by_name.values())
        rounded = {n: dequantize(*quantize(t)) if n.endswith("_proj.weight") else t for n, t in tensors}
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
    for request, answer in zip(REQUESTS, answers, strict=True):
        ids = [*request.prompt_ids, *answer.response_ids]
        expected = token_logprobs(model, ids, TEMPERATURE)[len(request.prompt_ids) - 1 :]
        np.testing.assert_allclose(answer.logprobs, expected, atol=atol)


_PARENT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from served_model import START_S, start_server
server = start_server(Path(sys.argv[2]), Path(sys.argv[3]), "orphan")
asyncio.run(server.ready(START_S))
print(server.process.pid, flush=True)
sys.stdin.read()
"""


def test_no_process_of_a_server_outlives_its_parent(model_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PARENT, str(Path(__file__).parent), str(model_path), str(tmp_path)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))
    family = [server, *server.children(recursive=True)]
    parent.kill()
    parent.communicate()
    _assert_gone(family)


def test_a_restart_and_a_stop_leave_no_process_behind(model_path: Path, tmp_path: Path) -> None:
    server = start_server(model_path, tmp_path, "engine")
    assert isinstance(server, SGLangServer)
    first = endpoint_of(server)
    family = _family(server)
    asyncio.run(server.restart())
    _assert_gone(family)
    second = endpoint_of(server)
    assert first.url != second.url
    family = _family(server)
    assert second.generate([5], max_new_tokens=1)["output_ids"]
    server.stop()
    _assert_gone(family)
    assert not server.secrets.exists()


def _family(server: SGLangServer) -> list[psutil.Process]:
    process = psutil.Process(server.process.pid)
    return [process, *process.children(recursive=True)]


def _assert_gone(family: list[psutil.Process]) -> None:
    assert len(family) > 2
    deadline = time.monotonic() + 20
    while left := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


_KERNEL = """
import sys, numpy, torch
from sglang.kernels.ops.memory import gpu_tensor_hash as h
words = torch.from_numpy(numpy.load(sys.argv[1]))
seed, tiles = 0x243F6A88, -(-words.numel() // 8192)
sums = torch.empty(tiles, dtype=torch.uint64)
h.hash_tiles32_kernel_blocked[(tiles,)](
    words, sums, words.numel(), seed1=seed, seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF, FM_C1=h.FMIX32_C1,
    FM_C2=h.FMIX32_C2, POS_A=h.POS_C1, POS_B=h.POS_C2, TILE=8192, BLOCK=256, USE_CG=False)
total = torch.empty(1, dtype=torch.uint64)
h.add_tree_reduce_u64_kernel[(1,)](sums, total, tiles, CHUNK=1024)
print(f"{h._final_splitmix64(int(total.item())):016x}")
"""


@pytest.mark.parametrize("count", [100, 20_000])
def test_the_tile_hash_is_that_of_sglangs_kernel(tmp_path: Path, count: int) -> None:
    words = np.random.default_rng(0).integers(0, 2**32, count, dtype=np.uint32)
    np.save(tmp_path / "words.npy", words)
    environment = {"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "1"}
    command = [str(SGLANG_PYTHON), "-c", _KERNEL, str(tmp_path / "words.npy")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    hasher = TileHasher()
    hasher.update(torch.from_numpy(words.view(np.int32)))
    assert ran.stdout.split()[-1] == hasher.hexdigest() == tile_checksum(words)
