"""Megatron's pipeline schedules: which micro-batches a stage holds at once, and how long it waits for others."""

from __future__ import annotations

from collections.abc import Sequence

from rloop_mcore.config import LayoutConfig


def micro_batches(tokens: int, longest: int, budget: int, layout: LayoutConfig) -> int:
    """Micro-batches of a replica in an update of `tokens` tokens in rows up to `longest`; `budget`: tokens of a device.

    As actor/packing.py counts them; the interleaved schedule takes multiples of pp.
    """
    multiple = layout.pp if layout.vpp > 1 else 1
    count = multiple * layout.dp
    return multiple * -(-tokens // (max(budget * layout.cp, longest) * count))


def bubble(micro_batches: int, layout: LayoutConfig) -> float:
    """The share of a step that a stage waits: (pp - 1) / (vpp m + pp - 1) (Narayanan et al., arXiv 2104.04473, 2.2)."""
    waiting = layout.pp - 1
    return waiting / (layout.vpp * micro_batches + waiting)


def most_held(chunks: Sequence[int], stage: int, micro_batches: int, pp: int) -> int:
    """The most that a stage holds at once, where a micro-batch in flight costs `chunks[v]` in its chunk v.

    1F1B holds min(m, pp - stage) micro-batches. The interleaved schedule goes forward through each chunk for pp
    micro-batches in turn and backward likewise from the last chunk; it is followed step by step.
    """
    count = len(chunks)
    if count == 1:
        return chunks[0] * min(micro_batches, pp - stage)
    total = min(micro_batches, 4 * pp) * count  # it repeats itself from there on
    forward = [(step // pp) % count for step in range(total)]
    backward = [count - 1 - chunk for chunk in forward]
    warm_up = min(total, 2 * (pp - stage - 1) + (count - 1) * pp)
    held = most = sum(chunks[chunk] for chunk in forward[:warm_up])
    for going, coming in zip(forward[warm_up:], backward, strict=False):
        held += chunks[going]
        most = max(most, held)
        held -= chunks[coming]
    return most
