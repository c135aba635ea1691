"""What /weights_checker must answer after a sync: the checksums of an engine's tensors, from the stream sent to it.

SGLang keeps some tensors fused (q, k and v; gate and up; the experts of a layer), pads the vocabulary and splits each
tensor over its tensor parallel ranks; its checksums are those of what a rank holds. Of an FP8 matrix it hashes values
times scales, in bfloat16. The stream comes in the order in which the fused tensors are laid out, so each checksum grows
with the stream and nothing is kept.

How ranks share a tensor: attention and the embedding are split over the ranks of a data parallel group, of which there
may be several; experts are dealt to the expert parallel groups, and each is split over the ranks of its group; the rest
is split over all ranks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rloop_mcore.rollout import fp8
from rloop_mcore.rollout.hashers import Hasher

VOCABULARY_MULTIPLE = 64  # SGLang pads the embedding's rows to a multiple of this


@dataclass(frozen=True)
class KeptWeights:
    """How an engine keeps its weights: what decides which checksums it answers with."""

    hasher: Callable[[], Hasher]
    fused: bool  # SGLang's own tensors; else the HF ones, whole
    tp: int = 1
    dp: int = 1  # groups of the ranks with an attention of their own each (data parallel attention)
    ep: int = 1  # groups of the ranks with experts of their own each (expert parallel)
    head_split: bool = False  # the output layer is split like the embedding (--enable-dp-lm-head)
    query_heads: int = 1
    kv_heads: int = 1
    experts: int = 1


_QKV = re.compile(r"^(.*\.self_attn\.)([qkv])_proj\.(weight|bias)$")
_GATE_UP = re.compile(r"^(.*\.mlp\.)(gate|up)_proj\.(weight|bias)$")
_EXPERT = re.compile(r"^(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$")
_OUTPUT = re.compile(r"\.self_attn\.o_proj\.weight$")
_DOWN = re.compile(r"\.mlp\.down_proj\.weight$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


class ExpectedChecksums:
    """Takes the stream of a sync; tells what each tensor parallel rank of such an engine must answer then."""

    def __init__(self, engine: KeptWeights) -> None:
        self._engine = engine
        self._ranks: list[dict[str, Hasher]] = [{} for _ in range(engine.tp)]

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor`: the whole HF tensor, in the dtype the engine keeps; scales come right behind their FP8 values."""
        if tensor.dtype == fp8.DTYPE:
            self._values = tensor
            return
        if name.endswith(fp8.SCALE_SUFFIX):
            name, tensor = name.removesuffix(fp8.SCALE_SUFFIX), fp8.dequantize(self._values, tensor)
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
        engine = self._engine
        attention_tp = engine.tp // engine.dp
        attention_rank = rank % attention_tp
        if name == _EMBEDDING or (name == _HEAD and engine.head_split):
            return _padded(tensor, attention_tp).chunk(attention_tp)[attention_rank]
        if name == _HEAD:
            return _padded(tensor, engine.tp).chunk(engine.tp)[rank]
        if expert := _EXPERT.match(name):
            ranks = engine.tp // engine.ep  # that share an expert
            if int(expert[2]) * engine.ep // engine.experts != rank // ranks:
                return None
            return tensor.chunk(ranks, dim=1 if expert[3] == "down" else 0)[rank % ranks]
        if attention := _QKV.match(name):
            heads = engine.query_heads if attention[2] == "q" else engine.kv_heads
            shards = min(attention_tp, heads)  # fewer heads than ranks: several ranks keep the same
            return tensor.chunk(shards)[attention_rank * shards // attention_tp]
        if _OUTPUT.search(name):
            return tensor.chunk(attention_tp, dim=1)[attention_rank]
        if _DOWN.search(name):
            return tensor.chunk(engine.tp, dim=1)[rank]
        return tensor.chunk(engine.tp)[rank] if _GATE_UP.match(name) else tensor


def _padded(table: torch.Tensor, shards: int) -> torch.Tensor:
    """The rows of the vocabulary, with zeros up to SGLang's multiple, or `shards` times it where they don't divide."""
    missing = -len(table) % VOCABULARY_MULTIPLE
    if (len(table) + missing) % shards:
        missing = -len(table) % (VOCABULARY_MULTIPLE * shards)
    return torch.nn.functional.pad(table, (0, 0, 0, missing)) if missing else table  # pad() copies by 0 rows too


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
