"""The models and batches of the parity suite, and the policy update of each in transformers and plain autograd.

The ranks, which take the batches from here, do without transformers: its import would be a tenth of their time.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rloop_mcore.types import Experience, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCABULARY = 53  # no tensor-parallel size divides it
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.3,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": _SIZES | {"model_type": "qwen2", "intermediate_size": 48, "tie_word_embeddings": True},
    "qk norm": _SIZES
    | {
        "model_type": "qwen3",
        "intermediate_size": 48,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    },
    "moe": _SIZES
    | {
        "model_type": "qwen3_moe",
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    # Most experts get no token of a micro-batch.
    "sparse": _SIZES
    | {
        "model_type": "qwen3_moe",
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 32,
        "num_experts_per_tok": 1,
        "head_dim": 16,
        "norm_topk_prob": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    },
}
TEMPERATURE, CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.8, 0.2, 0.28, 10.0
ROWS = 7  # an odd number: replicas and micro-batches get unequal shares


def build(name: str) -> PreTrainedModel:
    """The model of `MODELS`, in fp32, with random weights and biases that are always the same."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**MODELS[name]))
    for key, parameter in model.named_parameters():
        if key.endswith("bias") or "norm" in key:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in key else 0.0, 0.3)
    return model.float()


def write(name: str, folder: Path) -> Path:
    """The model as an HF folder."""
    build(name).save_pretrained(folder)
    return folder


def experiences(seed: int) -> list[Experience]:
    """Random prompts and responses of different lengths; half of the tokens are far off the policy."""
    draw = random.Random(seed)
    batch = []
    for i in range(ROWS):
        response = tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 17)))
        trajectory = Trajectory(
            iteration=0,
            step=0,
            problem_id=str(i),
            sample=0,
            prompt_ids=tuple(draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 9))),
            response_ids=response,
            logprobs=tuple(-draw.uniform(1.0, 8.0) for _ in response),
            finish_reason="stop",
            weight_versions=((0, 1),),
            correct=i % 2 == 0,
            reward=float(i % 2),
            reason="",
        )
        batch.append(Experience(trajectory, (-1.0) ** i * (0.5 + i / 7), trajectory.logprobs))
    return batch


def reference_update(model: PreTrainedModel, batch: list[Experience]) -> tuple[list[list[float]], float]:
    """Logprobs of the responses and DAPO's loss (eq. 12, token mean), row by row; gradients are left in the model."""
    total, tokens, logprobs = torch.zeros(()), 0, []
    for row in batch:
        prompt, response = row.trajectory.prompt_ids, row.trajectory.response_ids
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        chosen = (logits / TEMPERATURE).log_softmax(-1)[range(len(response)), list(response)]
        ratio = (chosen - torch.tensor(row.old_logprobs)).exp()
        surrogate = torch.min(ratio * row.advantage, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * row.advantage)
        if row.advantage < 0:
            surrogate = torch.max(surrogate, torch.tensor(DUAL_CLIP * row.advantage))
        total, tokens = total - surrogate.sum(), tokens + len(response)
        logprobs.append(chosen.tolist())
    loss = total / tokens
    loss.backward()
    return logprobs, loss.item()


def hub_named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers keeps a layer's experts in two tensors; the hub's folders hold each expert's projections."""
    named = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.partition(".mlp.experts.")
        if kind == "gate_up_proj":
            for expert, both in enumerate(tensor):
                gate, up = both.chunk(2)
                named[f"{layer}.mlp.experts.{expert}.gate_proj.weight"] = gate
                named[f"{layer}.mlp.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            named |= {f"{layer}.mlp.experts.{e}.down_proj.weight": part for e, part in enumerate(tensor)}
        else:
            named[name] = tensor
    return named
