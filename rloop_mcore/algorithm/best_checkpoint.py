"""The one rule by which validation prefers checkpoints (RLoop, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

RULE = "the highest validation Avg@N of all evaluated checkpoints, RL and RFT alike; of equals the earlier"


class Measured(Protocol):
    """A checkpoint on the validation problems. `phase` is "base" for theta_0, `average` its Avg@N."""

    @property
    def phase(self) -> str: ...

    @property
    def average(self) -> float: ...


M = TypeVar("M", bound=Measured)

_DIGITS = 12  # means of as many successes, spread otherwise over the problems, differ in the last bits


def best_first(measured: Sequence[M]) -> list[M]:
    """The checkpoints, `measured` in the order of training, from the highest Avg@N down; of equals the earlier first.

    RL and RFT checkpoints are treated alike; theta_0 is not a result of the run and counts only where nothing else was
    evaluated.
    """
    trained = [each for each in measured if each.phase != "base"]
    return sorted(trained or measured, key=lambda each: -round(each.average, _DIGITS))
