"""Which problems an exploration phase found hard (RLoop, arXiv 2511.04285, section 4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def is_hard(successes: int | np.ndarray, samples: int | np.ndarray, threshold: float) -> bool | np.ndarray:
    """Whether the success rate over all samples of the phase is below `threshold` (0.1 in the paper).

    Of a problem, or of each of several; `samples` > 0.

    The quotient is compared, not `threshold * samples`: a division rounds correctly, so 7 / 25 is the very double that
    0.28 is written as, whereas 0.28 * 25 rounds to more than 7 and would call that problem hard.
    """
    return successes / samples < threshold


def samples_needed(threshold: float) -> int:
    """The least number of samples at which one success still leaves a problem hard: 11 for 0.1.

    With fewer samples a phase, no hard problem has a success and the expert set is empty. 0 < `threshold` <= 1.
    """
    samples = int(1.0 / threshold)
    while not is_hard(1, samples, threshold):
        samples += 1
    return samples
