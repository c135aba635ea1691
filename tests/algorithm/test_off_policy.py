"""Importance weights and the off-policy mask against NumPy, token by token and sequence by sequence."""

import math

import numpy as np
import pytest
import torch

from rloop_mcore.algorithm.clip import policy_loss
from rloop_mcore.algorithm.importance import importance_weights
from rloop_mcore.algorithm.off_policy_mask import keep_sequences


def numpy_weight(ratio, kind, cap):
    if kind == "truncate":
        return min(ratio, cap)
    return ratio if 1 / cap <= ratio <= cap else 0.0


@pytest.mark.parametrize("kind", ["truncate", "mask"])
@pytest.mark.parametrize("cap", [1.1, 2.0, 5.0])
def test_weights_match_numpy(kind, cap):
    random = np.random.default_rng(0)
    engine = random.normal(-2, 1, (4, 100))
    trainer = engine + random.normal(0, 1, engine.shape)
    expected = [[numpy_weight(ratio, kind, cap) for ratio in row] for row in np.exp(trainer - engine)]
    weights = importance_weights(torch.tensor(trainer), torch.tensor(engine), kind, cap)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_weights_are_finite_constants_for_absurd_ratios(kind):
    trainer = torch.tensor([-1e4, 0.0, -1.0], requires_grad=True)
    weights = importance_weights(trainer, torch.tensor([0.0, -1e4, -1.0]), kind, 2.0)
    expected = {"truncate": [0.0, 2.0, 1.0], "mask": [0.0, 0.0, 1.0]}
    assert weights.tolist() == expected[kind]
    assert not weights.requires_grad


def test_the_mask_is_symmetric_around_one():
    ratios = torch.tensor([0.49, 0.51, 1.99, 2.01], dtype=torch.float64)
    weights = importance_weights(ratios.log(), torch.zeros_like(ratios), "mask", 2.0)
    assert (weights > 0).tolist() == [False, True, True, False]


def test_a_mask_without_room_keeps_what_is_exactly_equal():
    equal = torch.tensor([-0.7, -1.3])
    assert importance_weights(equal, equal, "mask", 1.0).tolist() == [1.0, 1.0]


def test_a_weight_scales_the_gradient_of_its_token_and_nothing_else():
    engine, trainer = torch.tensor([-1.0, -1.0]), torch.tensor([-0.5, -1.0])
    logprobs = trainer.clone().requires_grad_()
    loss, _ = policy_loss(logprobs, trainer, torch.ones(2), 0.2, 0.28, 0.0)
    weighted = loss * importance_weights(trainer, engine, "truncate", 2.0)
    (gradient,) = torch.autograd.grad(weighted.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([-math.exp(0.5), -1.0])


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="sequence"):
        importance_weights(torch.zeros(1), torch.zeros(1), "sequence", 2.0)


def test_masked_sequences_are_the_bad_ones_the_policy_has_left():
    random = np.random.default_rng(1)
    old = [random.normal(-2, 1, length) for length in random.integers(1, 30, 200)]
    new = [row + random.normal(-0.1, 0.5, len(row)) for row in old]
    advantages = random.normal(0, 1, len(old))
    advantages[:20] = 0.0
    delta = 0.1
    expected = [
        not (advantage < 0 and sum(o - n for o, n in zip(before, after, strict=True)) / len(before) > delta)
        for before, after, advantage in zip(old, new, advantages, strict=True)
    ]
    means = torch.tensor([(before - after).mean() for before, after in zip(old, new, strict=True)])
    assert keep_sequences(means, torch.tensor(advantages), delta).tolist() == expected
    assert 20 < expected.count(False) < 150
