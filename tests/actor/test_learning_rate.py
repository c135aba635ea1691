"""The schedule's values, and which updates are skipped."""

from __future__ import annotations

from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

from rloop_mcore import platform

platform.setup("cpu", 1)  # before Megatron is imported

from rloop_mcore.actor.optimizer import PolicyOptimizer, learning_rate  # noqa: E402
from rloop_mcore.config import OptimizerConfig  # noqa: E402


def test_warm_up_then_constant() -> None:
    config = OptimizerConfig(lr=4.0, warmup_updates=4)
    assert [learning_rate(config, update, 100) for update in (0, 1, 3, 4, 99)] == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_warm_up_then_cosine_to_zero() -> None:
    config = OptimizerConfig(lr=2.0, schedule="cosine", warmup_updates=2)
    values = [learning_rate(config, update, 10) for update in (0, 1, 2, 6, 10, 11)]
    assert values == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("loss", "norm", "skip_grad", "skipped"),
    [
        (0.5, 2.0, None, False),
        (0.5, 2.0, 2.0, False),
        (0.5, 2.1, 2.0, True),
        (0.5, inf, None, True),
        (0.5, nan, None, True),
        (inf, 2.0, None, True),
        (nan, 2.0, None, True),
    ],
)
def test_a_loss_or_a_norm_alone_is_enough_to_skip_an_update(
    loss: float, norm: float, skip_grad: float | None, skipped: bool
) -> None:
    stepped, group = list[float](), {"wd_mult": 1.0}
    optimizer: Any = PolicyOptimizer.__new__(PolicyOptimizer)
    optimizer._config = OptimizerConfig(lr=4.0, warmup_updates=2, clip_grad=0.0, skip_grad=skip_grad)
    optimizer._total_updates, optimizer.update, optimizer.steps = 4, 0, 0
    optimizer.megatron = SimpleNamespace(
        param_groups=[group],
        prepare_grads=lambda: None,
        get_grad_norm=lambda: norm,
        step_with_ready_grads=lambda: stepped.append(group["lr"]),
    )
    result = optimizer.step(loss)
    assert (result.skipped, result.lr) == (skipped, 2.0)
    assert stepped == [2.0] * (not skipped)
    assert (optimizer.update, optimizer.steps) == (1, len(stepped))
