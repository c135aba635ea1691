"""What /weights_checker must answer after a sync: the checksums of an engine's tensors, from the stream sent to it.

SGLang keeps some tensors fused (q, k and v; gate and up; the experts of a layer), pads the vocabulary and splits each
tensor over its tensor parallel ranks; its checksums are those of what a rank holds. The stream comes in the order in
which the fused tensors are laid out, so each checksum grows with the stream and nothing is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rloop_mcore.rollout.hashers import Hasher

VOCABULARY_MULTIPLE = 64  # SGLang pads the embedding's rows to a multiple of this


@dataclass(frozen=True)
class KeptWeights:
    """How an engine keeps its weights: what decides which checksums it answers with."""

    hasher: Callable[[], Hasher]
    fused: bool  # SGLang's own tensors; else the HF ones, whole
    tp: int = 1
    experts_split: bool = False  # whole experts on each rank (expert parallel), not a part of each
    query_heads: int = 1
    kv_heads: int = 1
    experts: int = 1


_QKV = re.compile(r"^(.*\.self_attn\.)([qkv])_proj\.(weight|bias)$")
_GATE_UP = re.compile(r"^(.*\.mlp\.)(gate|up)_proj\.(weight|bias)$")
_EXPERT = re.compile(r"^(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$")
_COLUMNS = re.compile(r"\.(o_proj|down_proj)\.weight$")  # what tensor parallel ranks split by columns
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


class ExpectedChecksums:
    """Takes the stream of a sync; tells what each tensor parallel rank of such an engine must answer then."""

    def __init__(self, engine: KeptWeights) -> None:
        self._engine = engine
        self._ranks: list[dict[str, Hasher]] = [{} for _ in range(engine.tp)]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor`: the whole HF tensor, in the dtype the engine keeps."""
        kept = fused_name(name) if self._engine.fused else name
        for rank, hashers in enumerate(self._ranks):
            part = self._part(name, tensor, rank) if self._engine.fused else tensor
            if part is None:
                continue
            if kept not in hashers:
                hashers[kept] = self._engine.hasher()
            hashers[kept].update(part)

    def by_rank(self) -> list[dict[str, str]]:
        """{tensor name of the engine: checksum} of tensor parallel ranks 0 .. tp - 1."""
        return [{name: hasher.hexdigest() for name, hasher in hashers.items()} for hashers in self._ranks]

    def _part(self, name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor | None:
        """What rank `rank` keeps of an HF tensor; None for an expert of another rank."""
        tp = self._engine.tp
        if name in _VOCABULARY:
            rows = -(-tensor.shape[0] // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, rows - tensor.shape[0]))
            return tensor.chunk(tp)[rank]
        if tp == 1:
            return tensor
        expert = _EXPERT.match(name)
        if expert is not None and self._engine.experts_split:
            return tensor if int(expert[2]) * tp // self._engine.experts == rank else None
        attention = _QKV.match(name)
        if attention is not None:
            heads = self._engine.query_heads if attention[2] == "q" else self._engine.kv_heads
            shards = min(tp, heads)  # fewer heads than ranks: several ranks keep the same
            return tensor.chunk(shards)[rank * shards // tp]
        if _COLUMNS.search(name):
            return tensor.chunk(tp, dim=1)[rank]
        return tensor.chunk(tp)[rank] if _GATE_UP.match(name) or expert is not None else tensor


def fused_name(name: str) -> str:
    """The name under which SGLang keeps an HF tensor."""
    if match := _QKV.match(name):
        return f"{match[1]}qkv_proj.{match[3]}"
    if match := _EXPERT.match(name):
        return f"{match[1]}{'w2' if match[3] == 'down' else 'w13'}_weight"
    if match := _GATE_UP.match(name):
        return f"{match[1]}gate_up_proj.{match[3]}"
    return name


def difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """One sentence about the tensors that are wrong, missing or unknown; None where all agree."""
    wrong = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    parts = [
        f"{len(names)} {what} (e.g. {names[0]})"
        for names, what in ((wrong, "with other values"), (missing, "missing"), (unknown, "that were not sent"))
        if names
    ]
    return f"{' and '.join(parts)} of {len(expected)} tensors" if parts else None
