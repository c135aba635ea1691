"""The off-policy mask over sequences of a micro-batch, of which some have few tokens; maxima over micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rloop_mcore import platform

platform.setup("cpu", 1)  # before Megatron is imported

from rloop_mcore.actor.losses import policy_update_loss  # noqa: E402
from rloop_mcore.actor.metrics import _combine  # noqa: E402
from rloop_mcore.actor.packing import Row, Share, micro_batches  # noqa: E402
from rloop_mcore.config import AlgorithmConfig  # noqa: E402


class Alone:
    """The context-parallel group of one process."""

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("tokens", [1, 2, 5])
@pytest.mark.parametrize(("drift", "kept"), [(0.3, False), (0.1, True)])
def test_a_drift_is_the_mean_over_the_tokens_that_a_sequence_has(tokens: int, drift: float, kept: bool) -> None:
    policy = (-1.0,) * tokens
    engine = (drift - 1.0,) * tokens
    rows = [Row((1,), (2,) * tokens, 1.0, advantage, policy, engine) for advantage in (-1.0, 1.0)]
    (batch,) = micro_batches(rows, Share())
    group: Any = Alone()
    loss = policy_update_loss(AlgorithmConfig(off_policy_mask=0.2), group)
    total, report = loss(batch, torch.tensor(policy * 2), torch.zeros(2 * tokens))
    assert float(report.sums["off_policy_kept"]) == tokens * (1 + kept)
    assert float(total) == tokens * (kept - 1)


@pytest.mark.parametrize("values", [[1.0, math.nan, 3.0], [math.nan, 1.0], [1.0, math.nan], [1.0, 3.0], [3.0, 1.0]])
def test_a_maximum_is_nan_where_one_is(values: list[float]) -> None:
    total = _combine([{"tokens": 2, "sums": {"loss": value}, "maxima": {"mismatch_max": value}} for value in values])
    assert total["tokens"] == 2 * len(values)
    assert str(total["maxima"]["mismatch_max"]) == str(3.0 if sum(values) == 4 else math.nan)
