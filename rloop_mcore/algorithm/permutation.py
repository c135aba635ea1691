"""A seeded permutation that stays the same across NumPy versions."""

from __future__ import annotations

import numpy as np


def permutation(count: int, seed: int) -> list[int]:
    """The numbers 0 .. count - 1 in an order fixed by `seed` (>= 0).

    Sorts the raw words of Philox: NumPy promises bit generators' streams to stay, but not what `shuffle` makes of them.
    """
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(words, kind="stable").tolist()
