"""What makes a step bad, and when bad steps in a row are enough."""

from __future__ import annotations

import math

import pytest

from rloop_mcore.algorithm.guard import Streak, what_is_wrong

NAN = math.nan


def rl_step(skipped: float, updates: float, norm: float = 0.3, entropy: float = 1.0) -> dict[str, float]:
    figures = {"loss": 0.1, "grad_norm": 0.2, "grad_norm_max": norm, "entropy": entropy} if updates else {}
    return {"skipped": skipped, "updates": updates, **figures}


@pytest.mark.parametrize(
    ("metrics", "bounds", "reason"),
    [
        (rl_step(0, 16), (None, None), ""),
        (rl_step(7, 16), (None, None), ""),
        (rl_step(8, 16, norm=61.2), (None, None), "8 of 16 updates skipped, loss 0.1, gradient norm 61.2"),
        (rl_step(16, 16, norm=NAN), (None, None), "16 of 16 updates skipped, loss 0.1, gradient norm nan"),
        (rl_step(16, 0), (0.5, 2.0), ""),  # no informative group: nothing to train on
        (rl_step(0, 4, entropy=0.5), (0.5, 2.0), ""),
        (rl_step(0, 4, entropy=2.0), (0.5, 2.0), ""),
        (rl_step(0, 4, entropy=0.49), (0.5, 2.0), "entropy 0.49 below guard.entropy_low=0.5"),
        (rl_step(0, 4, entropy=2.01), (0.5, 2.0), "entropy 2.01 above guard.entropy_high=2"),
        (rl_step(0, 4, entropy=0.49), (None, 2.0), ""),
        (rl_step(0, 4, entropy=2.01), (0.5, None), ""),
        (rl_step(1, 4, entropy=NAN), (0.5, 2.0), ""),  # one update of four was broken, the others were sound
        # a fine-tuning update
        ({"skipped": 0.0, "loss": 0.1, "grad_norm": 0.2}, (0.5, 2.0), ""),
        (
            {"skipped": 1.0, "loss": NAN, "grad_norm": 0.2},
            (None, None),
            "1 of 1 updates skipped, loss nan, gradient norm 0.2",
        ),
    ],
)
def test_a_step_is_bad_for_a_reason(
    metrics: dict[str, float], bounds: tuple[float | None, float | None], reason: str
) -> None:
    assert what_is_wrong(metrics, *bounds) == reason


def test_only_bad_steps_in_a_row_count() -> None:
    streak, due = Streak(), []
    for step, reason in enumerate(["a", "b", "", "c", "d", "e", "f", "g", "h", ""]):
        streak = streak.then(reason)
        if streak.is_due(3):
            due.append((step, streak.length, streak.reason))
    assert due == [(5, 3, "e"), (8, 6, "h")]
    assert streak == Streak()


def test_with_a_patience_of_one_every_bad_step_is_enough() -> None:
    assert [Streak(length, "a").is_due(1) for length in range(4)] == [False, True, True, True]
