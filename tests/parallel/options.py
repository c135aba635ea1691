"""The options of the policy update and of fine-tuning, and the loss of each in transformers and plain autograd."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from parity_model import TEMPERATURE, experiences, reference_update

from rloop_mcore.types import Example, Experience

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TOKENS = 20
KL, ENTROPY, CAP, MASKED_ABOVE = 0.3, 0.2, 1.5, 0.2
UPDATES: dict[str, dict[str, Any]] = {
    "sequence mean": {"aggregation": "sequence_mean"},
    "Dr. GRPO": {"aggregation": "dr_grpo"},
    "k1": {"kl_coefficient": KL, "kl_estimator": "k1"},
    "k2": {"kl_coefficient": KL, "kl_estimator": "k2"},
    "k3": {"kl_coefficient": KL, "kl_estimator": "k3"},
    "entropy": {"entropy_coefficient": ENTROPY},
    "truncated importance": {"importance": "truncate", "importance_cap": CAP},
    "masked importance": {"importance": "mask", "importance_cap": CAP},
    "off-policy mask": {"off_policy_mask": MASKED_ABOVE},
    "no dual clip": {"dual_clip": 0.0},
    "all": {
        "aggregation": "sequence_mean",
        "kl_coefficient": KL,
        "kl_estimator": "k3",
        "entropy_coefficient": ENTROPY,
        "importance": "mask",
        "importance_cap": CAP,
        "off_policy_mask": MASKED_ABOVE,
    },
}
# eps far above the rounding errors of the gradients, of which Adam would make steps
ADAM: dict[str, Any] = {"lr": 1e-2, "weight_decay": 1.0, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "clip_grad": 0.5}


def off_policy() -> list[Experience]:
    """A batch whose trainer, engine and reference logprobs all differ."""
    draw = random.Random(7)

    def near(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value + draw.uniform(-0.8, 0.8) for value in values)

    return [
        replace(row, old_logprobs=near(row.old_logprobs), reference_logprobs=near(row.old_logprobs))
        for row in experiences(0)
    ]


def examples() -> list[Example]:
    """Supervised examples whose rewards differ."""
    rows = [row.trajectory for row in experiences(1)]
    return [Example(t.prompt_ids, t.response_ids, 0.25 + i / 4) for i, t in enumerate(rows)]


def token_logprobs(
    model: PreTrainedModel, prompt: tuple[int, ...], response: tuple[int, ...], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies [response] of one row."""
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    log_p = (logits / temperature).log_softmax(-1)
    return log_p[range(len(response)), list(response)], -(log_p.exp() * log_p).sum(-1)


def update_reference(model: PreTrainedModel, options: dict[str, Any]) -> dict[str, float]:
    """The loss of docs/algorithm.md, row by row; returns metrics and leaves the gradients in the model."""
    batch = off_policy()
    lengths = [len(row.trajectory.response_ids) for row in batch]
    loss = torch.zeros(())
    sums = dict.fromkeys(("entropy", "ratio_mean", "importance_mean", "off_policy_kept", "kl"), 0.0)
    sums |= dict.fromkeys(("clip_fraction", "mismatch_mean", "mismatch_k3"), 0.0)
    maxima = {"ratio_max": 0.0, "mismatch_max": 0.0}
    for row, length in zip(batch, lengths, strict=True):
        trajectory, advantage = row.trajectory, row.advantage
        old, engine, reference = (
            torch.tensor(values) for values in (row.old_logprobs, trajectory.logprobs, row.reference_logprobs)
        )
        new, entropy = token_logprobs(model, trajectory.prompt_ids, trajectory.response_ids, TEMPERATURE)
        ratio = (new - old).exp()
        policy = -torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        dual = options.get("dual_clip", 10.0)
        if advantage < 0 and dual:
            policy = policy.clamp(max=-dual * advantage)
        # tokens whose gradient the clips remove
        flat = (ratio > 1.28) if advantage > 0 else (ratio < 0.8) | (ratio > (dual or math.inf))
        weight, cap = (old - engine).exp(), options.get("importance_cap", 0.0)
        match options.get("importance"):
            case "truncate":
                weight = weight.clamp(max=cap)
            case "mask":
                weight = weight * ((weight <= cap) & (weight >= 1 / cap))
            case None:
                weight = torch.ones(length)
        limit = options.get("off_policy_mask", math.inf)
        kept = advantage >= 0 or (engine - new).mean().item() <= limit
        away = new - reference
        divergence = {"k1": away, "k2": away**2 / 2, "k3": (-away).exp() - 1 + away}[options.get("kl_estimator", "k1")]
        token_loss = policy * weight * kept + options.get("kl_coefficient", 0.0) * divergence
        token_loss = token_loss - options.get("entropy_coefficient", 0.0) * entropy
        match options.get("aggregation"):
            case "sequence_mean":
                loss = loss + token_loss.mean() / len(batch)
            case "dr_grpo":
                loss = loss + token_loss.sum() / (len(batch) * MAX_TOKENS)
            case None:
                loss = loss + token_loss.sum() / sum(lengths)
        of_row = {"entropy": entropy, "ratio_mean": ratio, "importance_mean": weight, "kl": divergence}
        apart = new - engine  # the engine drew the tokens: E[exp(apart)] = 1, and E[-apart] is KL(engine || trainer)
        of_row |= {"clip_fraction": flat, "mismatch_mean": apart.abs(), "mismatch_k3": apart.exp() - 1 - apart}
        for name, values in {"ratio_max": ratio, "mismatch_max": apart.abs()}.items():
            maxima[name] = max(maxima[name], values.max().item())
        for name, values in (of_row | {"off_policy_kept": torch.full((length,), float(kept))}).items():
            sums[name] += values.sum().item() / sum(lengths)
    loss.backward()
    return sums | maxima | {"loss": loss.item(), "tokens": sum(lengths)}


def adam_reference(model: PreTrainedModel) -> tuple[list[float], list[float]]:
    """Three updates by torch's AdamW, of which norms and biases do not decay, over half a cosine.

    Returns gradient norms and learning rates.
    """
    decays = {True: ADAM["weight_decay"], False: 0.0}
    groups = [{"params": [p], "weight_decay": decays[p.dim() > 1]} for p in model.parameters()]
    adam = torch.optim.AdamW(groups, ADAM["lr"], (ADAM["beta1"], ADAM["beta2"]), ADAM["eps"])
    norms, rates = [], [ADAM["lr"] * share for share in (1.0, 0.75, 0.25)]
    for seed, rate in enumerate(rates):
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        reference_update(model, experiences(seed))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAM["clip_grad"])))
        adam.step()
    return norms, rates


def fine_tuning_reference(model: PreTrainedModel, kind: str) -> float:
    """The mean over tokens, or RLoop's eq. 6: the mean over trajectories of R(tau) log pi(tau)."""
    total, tokens, rows = torch.zeros(()), 0, examples()
    for row in rows:
        logprobs, _ = token_logprobs(model, row.prompt_ids, row.response_ids, 1.0)
        total = total - logprobs.sum() * (row.reward if kind == "reward_weighted" else 1.0)
        tokens += len(row.response_ids)
    loss = total / (len(rows) if kind == "reward_weighted" else tokens)
    loss.backward()
    return loss.item()
