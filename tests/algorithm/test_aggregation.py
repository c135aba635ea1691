"""The weighted sum over N tokens against each mean written as it is defined."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rloop_mcore.algorithm.aggregation import sequence_weights, trajectory_weights

MAX_TOKENS = 40
LENGTHS = st.lists(st.integers(0, MAX_TOKENS), max_size=12)


def aggregate(losses, weights):
    """What Megatron makes of weighted token losses: their sum by the number of tokens."""
    tokens = sum(len(row) for row in losses)
    return sum(weight * row.sum() for weight, row in zip(weights, losses, strict=True)) / tokens


def token_losses(lengths, seed):
    random = np.random.default_rng(seed)
    return [random.normal(size=length) for length in lengths]


def defined_mean(losses, kind):
    losses = [row for row in losses if len(row)]
    if kind == "token_mean":
        return np.concatenate(losses).mean()
    if kind == "sequence_mean":
        return np.mean([row.mean() for row in losses])
    return np.mean([row.sum() / MAX_TOKENS for row in losses])


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "dr_grpo"])
@given(lengths=LENGTHS.filter(any), seed=st.integers(0, 1000))
def test_weights_give_the_mean_they_are_named_after(kind, lengths, seed):
    losses = token_losses(lengths, seed)
    weights = sequence_weights(lengths, kind, MAX_TOKENS)
    assert aggregate(losses, weights) == pytest.approx(defined_mean(losses, kind), rel=1e-9, abs=1e-12)
    assert [weight for weight, length in zip(weights, lengths, strict=True) if length == 0] == [0.0] * lengths.count(0)


@given(lengths=LENGTHS.filter(any), seed=st.integers(0, 1000))
def test_trajectory_weights_give_equation_6(lengths, seed):
    losses = token_losses(lengths, seed)
    rewards = np.random.default_rng(seed + 1).normal(size=len(lengths)).tolist()
    expected = np.mean([reward * row.sum() for reward, row in zip(rewards, losses, strict=True) if len(row)])
    assert aggregate(losses, trajectory_weights(lengths, rewards)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_left_weighs_nothing(lengths):
    for kind in ("token_mean", "sequence_mean", "dr_grpo"):
        assert sequence_weights(lengths, kind, MAX_TOKENS) == [0.0] * len(lengths)
    assert trajectory_weights(lengths, [1.0] * len(lengths)) == [0.0] * len(lengths)


def test_equal_lengths_make_token_and_sequence_mean_the_same():
    assert sequence_weights([7, 7, 7], "sequence_mean", MAX_TOKENS) == [1.0, 1.0, 1.0]


def test_dr_grpo_gives_a_token_the_same_share_in_every_batch():
    short, long = [3, 4], [3, 40]
    shares = [sequence_weights(lengths, "dr_grpo", MAX_TOKENS)[0] / sum(lengths) for lengths in (short, long)]
    assert shares == pytest.approx([1 / (2 * MAX_TOKENS)] * 2)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="median"):
        sequence_weights([1], "median", MAX_TOKENS)
    with pytest.raises(ValueError, match="shorter"):
        trajectory_weights([1, 2], [1.0])
