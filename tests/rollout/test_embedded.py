"""What the embedded engine does beyond SGLang's contract (docs/sglang.md lists these differences)."""

from __future__ import annotations

import base64
import math
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from served_model import VOCABULARY, Endpoint
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rloop_mcore.rollout.embedded.params import BadRequest
from rloop_mcore.rollout.embedded.weights import WeightReceiver

PROMPT = [12, 13, 2, 5, 6, 7, 20]


def test_one_seed_one_sample_whatever_else_is_asked(endpoint: Endpoint) -> None:
    def ask(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        settings = [{"max_new_tokens": 16, "sampling_seed": seed} for seed in seeds]
        return [
            a["output_ids"]
            for a in endpoint.request("/generate", {"input_ids": prompts, "sampling_params": settings})[1]
        ]

    prompts = [PROMPT, PROMPT, PROMPT[:4], [5, 6, 7]]
    together = ask(prompts, [1, 2, 3, 4])
    assert together[0] != together[1]
    assert ask(prompts[::-1], [4, 3, 2, 1]) == together[::-1]

    alone: dict[int, list[list[int]]] = {}
    threads = [
        threading.Thread(target=lambda i=i: alone.update({i: ask([prompts[i]], [i + 1])})) for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [alone[i][0] for i in range(len(prompts))] == together


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "empty"),
        ({"input_ids": [VOCABULARY]}, "vocabulary"),
        ({"input_ids": [-1]}, "vocabulary"),
        ({"input_ids": ["5"]}, "integers"),
        ({"text": "hello"}, "input_ids"),
        ({"input_ids": [5], "sampling_params": {"temprature": 1}}, "temprature"),
        ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [5], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [5], "sampling_params": {"max_new_tokens": "many"}}, "max_new_tokens"),
        ({"input_ids": [5], "sampling_params": {"max_new_tokens": None}}, "max_new_tokens"),
        ({"input_ids": [5], "sampling_params": {"temperature": math.inf}}, "temperature"),
        ({"input_ids": [5], "sampling_params": {"regex": "a+"}}, "regex"),
        ({"input_ids": [5], "sampling_params": {"top_k": 5}}, "top_k"),
        ({"input_ids": [5], "sampling_params": {"stop_token_ids": 5}}, "stop_token_ids"),
        ({"input_ids": [[5], [6]], "sampling_params": [{}]}, "sampling_params"),
    ],
)
def test_what_sglang_takes_or_dies_of_is_refused(endpoint: Endpoint, body: dict, words: str) -> None:
    status, answer = endpoint.request("/generate", body)
    assert status == 400, answer
    assert words in answer["error"]["message"]
    assert endpoint.generate([5], max_new_tokens=1)["output_ids"]


def test_released_weights_take_no_memory_and_come_back_under_the_same_names() -> None:
    """A mixture's experts are views of one parameter, which is a new one afterwards."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "vocab_size": 40}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=4, num_experts_per_tok=2))
    receiver = WeightReceiver(model, group_timeout_s=1.0)
    shapes = {name: tensor.shape for name, tensor in receiver.tensors.items()}
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in shapes
    receiver.release()
    assert sum(p.untyped_storage().nbytes() for p in model.parameters()) == 0
    with pytest.raises(BadRequest, match="released already"):
        receiver.release()
    receiver.restore()
    assert {name: tensor.shape for name, tensor in receiver.tensors.items()} == shapes
    assert receiver.broken is not None
    receiver.begin("all")
    for name, shape in shapes.items():
        receiver._write(name, torch.full(shape, 2.0))
    receiver.end()
    assert receiver.broken is None
    assert all((p == 2.0).all() for p in model.parameters())


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch /tmp/rloop_evil_was_here",)


@pytest.mark.parametrize("what", [Evil(), [("a", Evil())], [1, 2], [("a", 1)], None])
def test_handles_that_are_no_tensors_are_refused(endpoint: Endpoint, model_path: Path, what: object) -> None:
    text = base64.b64encode(pickle.dumps(what)).decode() if what is not None else "not base64!"
    assert endpoint.request("/begin_weight_update", {})[0] == 200
    try:
        status, answer = endpoint.request("/update_weights_from_tensor", {"serialized_named_tensors": [text]})
        assert status == 400
        assert "serialized_named_tensors" in answer["message"]
        assert endpoint.request("/end_weight_update", {})[0] == 400
        assert endpoint.request("/health_generate")[0] == 503  # whichever bucket of a sync it was
    finally:
        endpoint.request("/end_weight_update", {})
        assert endpoint.request("/update_weights_from_disk", {"model_path": str(model_path)})[0] == 200
    assert endpoint.request("/health_generate")[0] == 200
    assert not Path("/tmp/rloop_evil_was_here").exists()
