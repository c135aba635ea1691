"""The mini-batches of one DAPO step."""

from __future__ import annotations

from rloop_mcore.algorithm.permutation import permutation


def mini_batches(count: int, updates: int, seed: int) -> list[list[int]]:
    """Split `count` trajectories into `updates` mini-batches of indices, shuffled by `seed`.

    The trajectories of a group may fall into different mini-batches: their advantages are known before the split.
    Sizes differ by at most one, larger ones first. Where there are fewer trajectories than updates, there are
    `count` mini-batches of one: none is empty.
    """
    order = permutation(count, seed)
    parts = min(updates, count)
    return [order[part::parts] for part in range(parts)]
