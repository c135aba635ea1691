"""The schedule's values."""

from __future__ import annotations

import pytest

from rloop_mcore import platform

platform.setup("cpu", 1)  # before Megatron is imported

from rloop_mcore.actor.optimizer import learning_rate  # noqa: E402
from rloop_mcore.config import OptimizerConfig  # noqa: E402


def test_warm_up_then_constant() -> None:
    config = OptimizerConfig(lr=4.0, warmup_updates=4)
    assert [learning_rate(config, update, 100) for update in (0, 1, 3, 4, 99)] == [1.0, 2.0, 4.0, 4.0, 4.0]


def test_warm_up_then_cosine_to_zero() -> None:
    config = OptimizerConfig(lr=2.0, schedule="cosine", warmup_updates=2)
    values = [learning_rate(config, update, 10) for update in (0, 1, 2, 6, 10, 11)]
    assert values == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0, 0.0])
