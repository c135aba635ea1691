"""DAPO's pieces against the formulas of the paper, written anew in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rloop_mcore.algorithm.clip import policy_loss
from rloop_mcore.algorithm.dynamic_sampling import informative_groups, is_informative
from rloop_mcore.algorithm.overlong import overlong_penalty
from rloop_mcore.types import Group, Trajectory


def numpy_policy_loss(ratio, advantages, low, high, dual_clip):
    surrogate = np.minimum(ratio * advantages, np.clip(ratio, 1 - low, 1 + high) * advantages)
    if dual_clip:
        surrogate = np.where(advantages < 0, np.maximum(surrogate, dual_clip * advantages), surrogate)
    return -surrogate


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
def test_policy_loss_and_its_mask_match_numpy_and_the_gradient(dual_clip):
    random = np.random.default_rng(0)
    old, advantages = random.normal(-2, 1, (8, 50)), random.normal(0, 1, (8, 1))
    new = old + random.normal(0, 1, old.shape)
    logprobs = torch.tensor(new, requires_grad=True)
    loss, clipped = policy_loss(logprobs, torch.tensor(old), torch.tensor(advantages), 0.2, 0.28, dual_clip)
    expected = numpy_policy_loss(np.exp(new - old), advantages, 0.2, 0.28, dual_clip)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-12)

    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    step = 1e-6
    slope = (
        numpy_policy_loss(np.exp(new + step - old), advantages, 0.2, 0.28, dual_clip)
        - numpy_policy_loss(np.exp(new - step - old), advantages, 0.2, 0.28, dual_clip)
    ) / (2 * step)
    np.testing.assert_allclose(gradient.numpy(), slope, atol=1e-6, rtol=1e-6)
    assert torch.equal(clipped, gradient == 0)
    assert 0 < clipped.float().mean() < 1


def test_clip_higher_leaves_more_room_above_than_below():
    ratio = torch.tensor([[0.79, 0.81, 1.0, 1.27, 1.29]], dtype=torch.float64)
    zeros = torch.zeros_like(ratio)
    for advantage, expected in (
        (1.0, [False, False, False, False, True]),
        (-1.0, [True, False, False, False, False]),
    ):
        _, clipped = policy_loss(ratio.log(), zeros, torch.tensor([[advantage]]), 0.2, 0.28, 10.0)
        assert clipped.tolist() == [expected]


def test_an_absurd_ratio_gives_finite_loss_and_gradient():
    logprobs = torch.tensor([[-1e4, 0.0, 1e4]], requires_grad=True)
    for advantage in (1.0, -1.0):
        loss, _ = policy_loss(logprobs, torch.zeros(1, 3), torch.tensor([[advantage]]), 0.2, 0.28, 10.0)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_without_the_dual_clip_a_ratio_counts_up_to_e_to_the_20():
    logprobs = torch.tensor([[19.5, 20.5, 30.0]], dtype=torch.float64)
    loss, _ = policy_loss(logprobs, torch.zeros_like(logprobs), torch.tensor([[-1.0]]), 0.2, 0.28, 0.0)
    np.testing.assert_allclose(loss.log().numpy(), [[19.5, 20.0, 20.0]])


def group(problem_id: str, correct: list[bool]) -> Group:
    rows = [
        Trajectory(0, 0, problem_id, i, (1,), (2,), (-0.5,), "stop", ((0, 1),), c, float(c), "")
        for i, c in enumerate(correct)
    ]
    return Group(problem_id, tuple(rows))


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=12), st.integers(0, 6))
def test_informative_groups_are_the_first_with_mixed_outcomes(outcomes, limit):
    groups = [group(str(number), correct) for number, correct in enumerate(outcomes)]
    expected = [g for g, correct in zip(groups, outcomes, strict=True) if 0 < np.mean(correct) < 1][:limit]
    assert informative_groups(groups, limit) == expected
    assert all(is_informative([t.correct for t in g.trajectories]) for g in expected)


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=12), st.integers(0, 6))
def test_without_dynamic_sampling_the_first_groups_are_taken_as_they_come(outcomes, limit):
    groups = [group(str(number), correct) for number, correct in enumerate(outcomes)]
    assert informative_groups(groups, limit, dynamic_sampling=False) == groups[:limit]


def test_overlong_penalty_follows_the_three_cases_of_the_paper():
    longest, buffer = 100, 20
    for length in range(1, 121):
        if length <= longest - buffer:
            expected = 0.0
        elif length <= longest:
            expected = ((longest - buffer) - length) / buffer
        else:
            expected = -1.0
        assert overlong_penalty(length, longest, buffer) == pytest.approx(expected)
    assert overlong_penalty(100, 100, buffer=0) == 0.0
