"""A tiny random Qwen2 with a character tokenizer, servers over it, and bare ends of their HTTP and weight channels.

RLOOP_TEST_ENGINE=sglang makes the servers real ones (`make test-sglang`) from the environment of `make install-sglang`.
"""

from __future__ import annotations

import asyncio
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config

from rloop_mcore.platform.process_group import host_store, join_group, leave_group
from rloop_mcore.protocols import WeightChannel
from rloop_mcore.rollout.fleet import Fleet
from rloop_mcore.rollout.launch import STUBS_VARIABLE, EmbeddedServer, SGLangServer
from rloop_mcore.rollout.served import ServedModel
from rloop_mcore.types import Completion, SampleRequest

ROOT = Path(__file__).parents[2]
REAL = os.environ.get("RLOOP_TEST_ENGINE") == "sglang"
SGLANG_PYTHON = ROOT / ".venv-sglang/bin/python"
CHARACTERS = "0123456789+-*=, QA:\nabcdefghijklmnopqrstuvw"
VOCABULARY = 2 + len(CHARACTERS)  # <pad>, <eos>, then the characters
EOS = 1
TEMPERATURE = 0.9  # at which the fleets of the tests sample
MODEL = ServedModel(VOCABULARY, query_heads=4, kv_heads=2)
START_S = 600.0 if REAL else 120.0


def make_model(folder: Path, seed: int) -> Path:
    """Save a random Qwen2 (GQA 4/2, 2 layers) whose logits are spread enough for sampling to matter."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<eos>": EOS} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    return folder


def token_logprobs(reference: PreTrainedModel, ids: list[int], temperature: float = 1.0) -> list[float]:
    """log_softmax(logits / temperature) of ids[1:], by one plain forward of transformers."""
    with torch.inference_mode():
        logits = reference(input_ids=torch.tensor([ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def tile_checksum(words: np.ndarray) -> str:
    """SGLang's checksum of a CUDA tensor of these 32-bit words, as its formula stands."""
    mask = 0xFFFFFFFF

    def fmix32(x: np.ndarray) -> np.ndarray:
        x = x & mask
        x = (x ^ x >> 16) * 0x85EBCA6B & mask
        x = (x ^ x >> 13) * 0xC2B2AE35 & mask
        return x ^ x >> 16

    total, seed = 0, 0x243F6A88
    lanes = ((seed, 0x27D4EB2D, 15), ((seed * 0x9E3779B1 ^ 0xDEADBEEF) & mask, 0x165667B1, 13))
    for begin in range(0, len(words), 8192):
        tile = words[begin : begin + 8192].astype(np.uint64)
        place = np.arange(begin, begin + len(tile), dtype=np.uint64)
        for (lane_seed, factor, turn), shift in zip(lanes, (32, 0), strict=True):
            scrambled = (place * factor + lane_seed) & mask ^ (place << turn | place >> (32 - turn)) & mask
            lane = fmix32(tile ^ scrambled).sum(dtype=np.uint64)
            total += int(fmix32(lane & mask ^ 4 * len(words))) << shift
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        total &= 2**64 - 1
        total = (total ^ total >> shift) * factor
    return f"{total & 2**64 - 1:016x}"


@dataclass
class Endpoint:
    url: str
    key: str | None

    def request(self, path: str, body: Any = None, key: str | None = None, raw: bytes | None = None) -> tuple[int, Any]:
        """(status, parsed JSON or text). A body makes it a POST; `key` overrides the endpoint's."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {key or self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def generate(self, input_ids: Any, return_logprob: bool = True, **sampling: Any) -> Any:
        """The answer to a /generate call that must succeed; sampling fields as keywords."""
        body = {"input_ids": input_ids, "sampling_params": sampling, "return_logprob": return_logprob}
        status, answer = self.request("/generate", body)
        assert status == 200, answer
        return answer


class Channel:
    """protocols.WeightChannel over a plain gloo group."""

    group_name = "test-weights"

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        self.sends = 0

    def open(self, world_size: int) -> tuple[str, int]:
        self.store, self.world_size = host_store("127.0.0.1", 30.0), world_size
        return "127.0.0.1", self.store.port

    def join(self) -> None:
        self.group = join_group("gloo", "127.0.0.1", self.store.port, self.world_size, 0, self.group_name, 30.0)

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        self.sends += 1
        for tensor in tensors:
            dist.broadcast(tensor, group=self.group, group_src=0)

    def close(self) -> None:
        if self.group is not None:
            leave_group(self.group)
        self.group = None


def start_server(
    model_path: Path, run_dir: Path, name: str, max_running: int = 64, arguments: Sequence[str] = ()
) -> EmbeddedServer | SGLangServer:
    """arguments: further flags of a real server."""
    if REAL:
        os.environ.setdefault(STUBS_VARIABLE, str(ROOT / "tests/sglang_cpu"))
        return SGLangServer(
            model_path,
            run_dir,
            name,
            python=SGLANG_PYTHON,
            max_running=max_running,
            threads=1,
            dtype="float32",
            device="cpu",
            arguments=arguments,
        )
    return EmbeddedServer(model_path, run_dir, name, max_running=max_running, threads=1, dtype="float32", device="cpu")


class Borrowed:
    """A server that outlives the fleet of one test."""

    def __init__(self, server: EmbeddedServer | SGLangServer) -> None:
        self.ready, self.failure, self.restart = server.ready, server.failure, server.restart

    def stop(self) -> None:
        pass


def make_fleet(servers: Sequence[Any], channel: WeightChannel | str | None = "broadcast", **options: Any) -> Fleet:
    """options: those of `Fleet` that are to differ from the tests' usual ones."""
    usual = {"model": MODEL, "bucket_mib": 1, "start_timeout_s": START_S, "request_timeout_s": 30.0}
    return Fleet(servers, Channel() if isinstance(channel, str) else channel, **usual | options)


def assert_by(
    model: PreTrainedModel, requests: Sequence[SampleRequest], answers: Sequence[Completion], version: int
) -> None:
    """Each request has one answer, drawn at TEMPERATURE by these weights alone (at most 30 or so are recomputed)."""
    assert len(answers) == len(requests)
    for request, completion in list(zip(requests, answers, strict=True))[:: max(1, len(requests) // 30)]:
        ids = [*request.prompt_ids, *completion.response_ids]
        expected = token_logprobs(model, ids, TEMPERATURE)[len(request.prompt_ids) - 1 :]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    for completion in answers:
        assert completion.weight_versions == ((version, len(completion.response_ids)),)


def endpoint_of(server: EmbeddedServer | SGLangServer) -> Endpoint:
    return Endpoint(*asyncio.run(server.ready(START_S)))
