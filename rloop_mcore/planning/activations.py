"""What a micro-batch leaves in memory for its backward pass, layer by layer (Korthikanti et al., arXiv 2205.05198).

Their counting (section 4: what autograd keeps, without the 1-byte masks of dropout, which we don't use) of grouped
queries, SwiGLU, RMSNorm and flash attention; their eq. 4 divides by tp what lies between the matrices too, which is
sequence parallelism. The two sets of modules of `platform/layer_spec.py` don't keep the same, so `Modules` says which:
the CPU's is checked against autograd, Transformer Engine's against peaks (docs/planning.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from rloop_mcore.config import Config, LayoutConfig
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.parameters import Chunk, vocabulary_rows
from rloop_mcore.planning.workload import longest_row, rows_of_update
from rloop_mcore.platform import CHUNK_LOGITS, KEPT_LOGITS
from rloop_mcore.platform.precision import RECIPES, element_bytes, token_multiple

_FP32 = 4
_INDEX = 8
_OF_THE_LOSS = 4 * 9 + 2 * _INDEX + 1  # bytes of a response token: logprobs, entropy, ratios, weights; two indices


@dataclass(frozen=True)
class Modules:
    """element: bytes of an activation; fused: Transformer Engine's modules; fp8: its matrices read FP8."""

    element: int
    fused: bool
    fp8: bool

    @classmethod
    def of(cls, config: Config) -> Modules:
        """Those of the configuration's device; auto is CUDA here."""
        fused = config.cluster.device != "cpu"
        return cls(element_bytes(config.precision), fused, fused and config.precision in RECIPES)

    @property
    def operand(self) -> int:
        """Bytes of an element of what a matrix keeps of its input, where that is a tensor of its own."""
        return 1 if self.fp8 else self.element


def micro_batch_tokens(config: Config) -> int:
    """Tokens of a rank in its largest micro-batch: the budget, or one longest sequence, but no more than there are."""
    layout, longest = config.layout, longest_row(config)
    rows = max(rows_of_update(config), config.rft.batch_size if config.rft.enabled else 0)
    tokens = min(max(config.actor.micro_batch_tokens * layout.cp, longest), rows * longest)
    multiple = token_multiple(config.precision) * (layout.tp if layout.sp else 1) * (2 if layout.cp > 1 else 1)
    return -(-tokens // (layout.cp * multiple)) * multiple


def layer_bytes(model: Architecture, layout: LayoutConfig, tokens: int, recompute: str, modules: Modules) -> int:
    """Kept of one layer for `tokens` tokens of a rank, at `recompute`: none, selective or full."""
    between = _between(layout, tokens)
    if recompute == "full":
        return between * model.hidden * modules.element  # the layer's input
    norms = 2 * between * _FP32  # 1 / rms of each
    inputs = 2 * between * model.hidden * (modules.element + modules.operand)  # of both norms, and what they make
    kept = norms + inputs + _attention(model, layout.tp, tokens, recompute == "selective", modules)
    if model.experts:
        return kept + _experts(model, layout, between, modules)
    # [gate, up], their product; on the CPU silu(gate) too.
    ffn = tokens * model.ffn // layout.tp
    return kept + ffn * (2 * modules.element + modules.operand + (0 if modules.fused else modules.element))


def _between(layout: LayoutConfig, tokens: int) -> int:
    """A rank's tokens outside of the tensor-parallel matrices."""
    return tokens // layout.tp if layout.sp else tokens


def _attention(model: Architecture, tp: int, tokens: int, recomputed: bool, modules: Modules) -> int:
    """From the fused projection to the output projection's input. A value is a view of the projection: that stays."""
    queries, keys = model.queries // tp, model.keys // tp
    kept = tokens * (queries + 2 * keys + queries + keys) * modules.element  # the projection; rotated queries and keys
    if not modules.fused:
        kept += 4 * tokens * (model.head_dim // 2) * modules.element  # cosines and sines of both
    if model.qk_norm:
        if modules.fused or model.kv_heads > tp:  # else the queries too are a view of the projection
            kept += tokens * (queries + (keys if modules.fused else 0)) * modules.element
        kept += tokens * (model.heads + model.kv_heads) // tp * _FP32
    context = tokens * queries
    if recomputed:
        return kept + context * modules.operand
    kept += tokens * model.heads // tp * _FP32  # the logarithm of softmax's denominators
    if modules.fused and not modules.fp8:
        return kept + context * modules.element  # one tensor for attention and the projection behind it
    return kept + context * (modules.element + modules.operand)


def _experts(model: Architecture, layout: LayoutConfig, between: int, modules: Modules) -> int:
    """Of a layer with experts to which equally many tokens come."""
    received = between * model.top_k * layout.etp
    ffn = model.expert_ffn // layout.etp
    router = between * (model.top_k * (_INDEX + _FP32) + model.experts * _INDEX)
    kept = router + received * (model.hidden * modules.operand + _FP32)  # tokens; their weights
    if modules.fused:
        return kept + received * ffn * (2 * modules.element + modules.operand) + between * model.experts * _FP32
    return kept + received * 5 * ffn * modules.element + between * model.top_k * _INDEX


def chunk_bytes(
    model: Architecture, layout: LayoutConfig, chunk: Chunk, tokens: int, recompute: str, modules: Modules
) -> int:
    """Kept of a pipeline chunk: its layers; token ids and, behind the last layer, the loss of `tokens` responses."""
    kept = chunk.layers * layer_bytes(model, layout, tokens, recompute, modules)
    between = _between(layout, tokens)
    if chunk.first:
        kept += tokens * (_INDEX + (layout.tp > 1))
    if chunk.last:
        kept += between * (model.hidden * modules.element + _FP32)  # the final norm's input
        kept += tokens * (model.hidden * modules.element + _OF_THE_LOSS)
        kept += _kept_logits(model, layout.tp, tokens)
    return kept


def _kept_logits(model: Architecture, tp: int, tokens: int) -> int:
    logits = tokens * vocabulary_rows(model, tp)
    return logits * _FP32 if logits <= KEPT_LOGITS else 0


def layer_working_bytes(
    model: Architecture, layout: LayoutConfig, tokens: int, recompute: str, modules: Modules
) -> int:
    """What a layer's backward pass needs beside what is kept: its gradients, and all of the layer where recomputed."""
    if model.experts:
        received = _between(layout, tokens) * model.top_k * layout.etp
        widest = received * (3 * model.expert_ffn // layout.etp + 2 * model.hidden)
    else:
        widest = tokens * (3 * model.ffn // layout.tp + 2 * model.hidden)
    again = layer_bytes(model, layout, tokens, "none", modules) if recompute == "full" else 0
    return again + widest * modules.element


def loss_working_bytes(model: Architecture, layout: LayoutConfig, tokens: int, modules: Modules) -> int:
    """What the logprobs' backward pass needs beside what is kept (actor/logprobs.py).

    Two chunks of fp32 logits and one of their gradients, the gradient of the output layer's shard in fp32 and once more
    in the parameters' dtype, that of the hidden states.
    """
    rows = vocabulary_rows(model, layout.tp)
    chunk = tokens * rows
    if chunk > KEPT_LOGITS:
        chunk = min(chunk, max(rows, CHUNK_LOGITS["cuda" if modules.fused else "cpu"] // rows * rows))
    logits = chunk * (2 * _FP32 + modules.element)
    weight = rows * model.hidden * _FP32
    return (
        max(logits + weight, weight + rows * model.hidden * modules.element) + tokens * model.hidden * modules.element
    )
