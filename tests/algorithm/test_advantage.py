"""Advantages against NumPy in extended precision."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rloop_mcore.algorithm.advantage import group_advantages

KINDS = ("group_std", "group_mean", "leave_one_out")


def numpy_advantages(rewards, kind):
    rewards = np.array(rewards, dtype=np.longdouble)
    if kind == "group_std":
        return (rewards - rewards.mean()) / rewards.std(ddof=1)
    if kind == "group_mean":
        return rewards - rewards.mean()
    return np.array([reward - np.delete(rewards, i).mean() for i, reward in enumerate(rewards)])


@pytest.mark.parametrize("kind", KINDS)
@given(rewards=st.lists(st.floats(-2, 1, width=32), min_size=2, max_size=16))
@example(rewards=[0.1] * 7)
def test_advantages_match_numpy(kind, rewards):
    advantages = group_advantages(rewards, kind)
    if len(set(rewards)) == 1:
        assert advantages == [0.0] * len(rewards)
        return
    np.testing.assert_allclose(advantages, numpy_advantages(rewards, kind), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("group_std", [1.5, -0.5, -0.5, -0.5]),
        ("group_mean", [0.75, -0.25, -0.25, -0.25]),
        ("leave_one_out", [1.0, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_one_success_in_four_by_hand(kind, expected):
    assert group_advantages([1.0, 0.0, 0.0, 0.0], kind) == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_of_one_has_no_advantage(kind):
    assert group_advantages([1.0], kind) == [0.0]


def test_leave_one_out_baseline_does_not_depend_on_the_own_reward():
    others = [0.3, -0.5, 1.0]
    baselines = [reward - group_advantages([reward, *others], "leave_one_out")[0] for reward in (-1.0, 0.0, 7.0)]
    assert baselines == pytest.approx([np.mean(others)] * 3)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="median"):
        group_advantages([1.0, 0.0], "median")
