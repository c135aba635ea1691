"""Drawing tokens against NumPy's formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rloop_mcore.rollout.embedded.sampling import draw, uniforms

DRAWS = 8_000


def _draw(logits: np.ndarray, temperature: float = 1.0, top_p: float = 1.0, seed: int = 0) -> tuple[np.ndarray, ...]:
    """DRAWS tokens from one row of logits; returns (ids, logprobs)."""
    rows = torch.from_numpy(np.tile(logits.astype(np.float32), (DRAWS, 1)))
    uniform = uniforms(np.arange(DRAWS, dtype=np.uint64) + np.uint64(seed), np.zeros(DRAWS, dtype=np.int64))
    ids, logprobs = draw(
        rows, torch.full((DRAWS,), temperature), torch.full((DRAWS,), top_p), torch.from_numpy(uniform)
    )
    return ids.numpy(), logprobs.numpy()


def _softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max())
    return exp / exp.sum()


def _assert_distributed(ids: np.ndarray, expected: np.ndarray) -> None:
    """Pearson's chi-squared; its mean is df, its deviation sqrt(2 df): 6 deviations above are a 1e-7 event."""
    likely = expected * len(ids) >= 5
    counts = np.bincount(ids, minlength=len(expected))
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * len(ids)
    if wanted[-1] < 5:
        observed, wanted = observed[:-1], wanted[:-1]
    freedom = len(wanted) - 1
    assert ((observed - wanted) ** 2 / wanted).sum() < freedom + 6 * np.sqrt(2 * freedom)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    seeds = np.arange(300, dtype=np.uint64)  # consecutive seeds and positions: the worst case for a weak mix
    table = np.stack([uniforms(seeds, np.full(300, t)) for t in range(300)])
    assert table.min() > 0
    assert table.max() < 1
    counts = np.histogram(table, bins=100, range=(0, 1))[0]
    assert ((counts - 900) ** 2 / 900).sum() < 99 + 6 * np.sqrt(2 * 99)
    # The correlation of n pairs of independent uniforms has deviation 1 / sqrt(n).
    bound = 6 / np.sqrt(table.size)
    assert abs(np.corrcoef(table[1:].ravel(), table[:-1].ravel())[0, 1]) < bound
    assert abs(np.corrcoef(table[:, 1:].ravel(), table[:, :-1].ravel())[0, 1]) < bound


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    seeds, positions = np.array([7, 2**63, 9], dtype=np.uint64), np.array([0, 3, 12])
    together = uniforms(seeds, positions)
    alone = [uniforms(seeds[i : i + 1], positions[i : i + 1])[0] for i in (2, 0, 1)]
    assert together[[2, 0, 1]].tolist() == alone
    assert len(set(together)) == 3


@pytest.mark.parametrize("vocabulary", [47, 256, 1000])  # below, at and above one chunk of the inverted CDF
def test_frequencies_match_the_softmax(vocabulary: int) -> None:
    logits = np.random.default_rng(vocabulary).normal(size=vocabulary) * 2
    ids, logprobs = _draw(logits, temperature=0.7)
    expected = _softmax(logits / 0.7)
    _assert_distributed(ids, expected)
    np.testing.assert_allclose(logprobs, np.log(expected)[ids], atol=1e-5)


@pytest.mark.parametrize("vocabulary", [40, 800])  # 800 flat logits need the whole sort
@pytest.mark.parametrize("top_p", [0.3, 0.7, 0.95])
def test_top_p_is_the_smallest_nucleus(vocabulary: int, top_p: float) -> None:
    logits = np.random.default_rng(1).normal(size=vocabulary).astype(np.float32)
    probabilities = _softmax(logits.astype(np.float64))
    order = np.argsort(-probabilities)
    size = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    expected = np.zeros(vocabulary)
    expected[order[:size]] = probabilities[order[:size]] / probabilities[order[:size]].sum()

    ids, logprobs = _draw(logits, top_p=top_p)
    assert (expected[ids] > 0).all()
    _assert_distributed(ids, expected)
    np.testing.assert_allclose(logprobs, np.log(probabilities)[ids], atol=1e-5)  # not renormalised


def test_impossible_tokens_are_never_drawn_even_at_the_ends() -> None:
    logits = torch.full((3, 600), -torch.inf)
    logits[:, [10, 300, 520]] = 0.0
    uniform = torch.tensor([1e-17, 0.5, 1 - 1e-16], dtype=torch.float64)
    ids, logprobs = draw(logits, torch.ones(3), torch.ones(3), uniform)
    assert ids.tolist() == [10, 300, 520]
    np.testing.assert_allclose(logprobs, np.log(1 / 3), rtol=1e-6)


def test_rows_keep_their_own_settings() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]]).repeat(3, 1)
    uniform = torch.full((3,), 1e-9, dtype=torch.float64)  # the lower end of the CDF
    ids, logprobs = draw(logits, torch.tensor([1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 0.1]), uniform)
    assert ids.tolist() == [0, 2, 2]  # first by id, greedy, nucleus of one
    expected = [logits[0].log_softmax(-1)[0], logits[0].log_softmax(-1)[2], (logits[0] / 2).log_softmax(-1)[2]]
    np.testing.assert_allclose(logprobs, expected, rtol=1e-6)
