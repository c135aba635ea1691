"""Drawing tokens: counter-based uniforms and inverse-CDF sampling, vectorised over the rows of a batch."""

from __future__ import annotations

import numpy as np
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 256  # ids summed at once when the CDF is inverted
_NUCLEUS = 512  # candidates tried before the whole vocabulary is sorted for top-p


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) on uint64 [...]."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """float64 [rows] in (0, 1], a pure function of (seed, position): uint64 [rows] each.

    Position t of a sample gets the same number whatever is sampled before, beside or after it.
    """
    with np.errstate(over="ignore"):
        bits = _mix(_mix(seeds + _GOLDEN) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token a row; returns ids [rows] and logprobs [rows], fp32.

    logits: [rows, vocabulary]; temperature, top_p: fp32 [rows]; uniform: float64 [rows] in (0, 1].
    Temperature 0 is greedy (and its logprobs are those of temperature 1). The logprobs are
    log_softmax(logits / temperature) over the whole vocabulary, not renormalised over the top-p nucleus: exactly
    what a trainer recomputes from its own logits.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    normaliser = scaled.logsumexp(-1, keepdim=True)
    if bool(greedy.all()):
        ids = scaled.argmax(-1)
    else:
        probabilities = (scaled - normaliser).exp_()
        ids = _invert_cdf(probabilities, uniform)
        nucleus = top_p < 1
        if bool(nucleus.any()):
            ids = torch.where(nucleus, _draw_nucleus(probabilities, top_p, uniform), ids)
        if bool(greedy.any()):
            ids = torch.where(greedy, scaled.argmax(-1), ids)
    return ids, (scaled.gather(1, ids[:, None]) - normaliser)[:, 0]


def _invert_cdf(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """ids [rows]: the first id whose cumulative probability passes `uniform`; [rows, vocabulary] in.

    Two levels, sums of chunks and then one chunk: no cumulative sum over the whole vocabulary.
    """
    rows, vocabulary = probabilities.shape
    chunks = torch.nn.functional.pad(probabilities, (0, -vocabulary % _CHUNK)).view(rows, -1, _CHUNK)
    by_chunk = chunks.sum(-1).double().cumsum(-1)
    target = uniform * by_chunk[:, -1]
    chunk = (by_chunk <= target[:, None]).sum(-1, keepdim=True).clamp_(max=by_chunk.shape[1] - 1)
    below = torch.where(chunk > 0, by_chunk.gather(1, (chunk - 1).clamp(min=0)), 0.0)
    inside = chunks[torch.arange(rows, device=chunks.device), chunk[:, 0]].double().cumsum(-1) + below
    return _last_possible(chunk * _CHUNK + _first_above(inside, target), probabilities)


def _first_above(cumulative: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """[rows, 1]: index of the first entry of [rows, n] above `target`, n - 1 if rounding left none."""
    return (cumulative <= target[:, None]).sum(-1, keepdim=True).clamp_(max=cumulative.shape[1] - 1)


def _last_possible(ids: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Guard the two levels' different rounding: never an id past the vocabulary or of probability 0."""
    ids = ids.clamp_(max=probabilities.shape[1] - 1)
    impossible = probabilities.gather(1, ids) == 0
    if bool(impossible.any()):
        ids = torch.where(impossible, probabilities.argmax(-1, keepdim=True), ids)
    return ids[:, 0]


def _draw_nucleus(probabilities: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """ids [rows] from the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman 2020)."""
    vocabulary = probabilities.shape[1]
    ordered, ids = probabilities.topk(min(_NUCLEUS, vocabulary), dim=-1)
    cumulative = ordered.double().cumsum(-1)
    if ordered.shape[1] < vocabulary and bool(((cumulative[:, -1] < top_p) & (top_p < 1)).any()):
        ordered, ids = probabilities.sort(-1, descending=True)
        cumulative = ordered.double().cumsum(-1)
    size = _first_above(cumulative, top_p.double() - 1e-12)  # index of the last token of the nucleus
    target = uniform * cumulative.gather(1, size)[:, 0]
    return ids.gather(1, torch.minimum(_first_above(cumulative, target), size))[:, 0]
