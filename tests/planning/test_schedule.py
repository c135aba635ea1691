from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore import platform
from rloop_mcore.actor.packing import Row, Share
from rloop_mcore.actor.packing import micro_batches as packed
from rloop_mcore.config import LayoutConfig
from rloop_mcore.planning.schedule import bubble, micro_batches, most_held

platform.setup("cpu", 1)

from megatron.core.pipeline_parallel.schedules import get_schedule_table  # noqa: E402


def most_held_by_megatron(chunks: list[int], stage: int, count: int, pp: int) -> int:
    """Its order of forward and backward passes, played with a ledger."""
    virtual = len(chunks)
    table = [chunk for _, chunk in get_schedule_table(count, virtual, pp)]
    ahead = (pp - stage - 1) * 2 + (virtual - 1) * pp if virtual > 1 else pp - stage - 1
    ahead = min(ahead, len(table))
    order = [(+1, k) for k in range(ahead)]
    for k in range(ahead, len(table)):
        order += [(+1, k), (-1, k - ahead)]
    order += [(-1, k) for k in range(len(table) - ahead, len(table))]
    ledger, most = 0, 0
    for sign, k in order:
        ledger += sign * chunks[table[k] if sign > 0 else virtual - 1 - table[k]]
        most = max(most, ledger)
    assert ledger == 0
    return most


@given(
    st.integers(2, 6),
    st.data(),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 9),
)
@settings(max_examples=150)
def test_in_flight_as_in_megatrons_order(pp: int, data: st.DataObject, chunks: list[int], groups: int) -> None:
    stage = data.draw(st.integers(0, pp - 1))
    count = groups * pp if len(chunks) > 1 else groups
    assert most_held(chunks, stage, count, pp) == most_held_by_megatron(chunks, stage, count, pp)


@given(
    st.lists(st.integers(2, 60), min_size=1, max_size=40),
    st.integers(10, 200),
    st.sampled_from([1, 2]),
    st.integers(1, 3),
    st.sampled_from([1, 2, 4]),
)
@settings(max_examples=100)
def test_no_more_micro_batches_than_the_packing_makes(
    lengths: list[int], budget: int, cp: int, dp: int, pp: int
) -> None:
    """As many where rows fill them evenly; the packing adds some where they don't."""
    layout = LayoutConfig(cp=cp, dp=dp, pp=pp, vpp=2 if pp > 1 else 1)
    share = Share(ranks=dp, cp=cp, max_tokens=budget, count_multiple=pp if pp > 1 else 1)
    made = len(packed([Row([1], [1] * n) for n in lengths], share))
    unit = 2 * cp if cp > 1 else 1
    padded = [-(-n // unit) * unit for n in lengths]
    assert micro_batches(sum(padded), max(padded), budget, layout) <= made


def test_the_interleaved_schedule_takes_multiples_of_the_stages() -> None:
    assert micro_batches(500, 10, 100, LayoutConfig(pp=4)) == 5
    assert micro_batches(500, 10, 100, LayoutConfig(pp=4, vpp=2)) == 8
    assert micro_batches(500, 10, 100, LayoutConfig(pp=4, vpp=2, dp=2)) == 4


def test_bubble() -> None:
    assert bubble(8, LayoutConfig()) == 0
    assert bubble(8, LayoutConfig(pp=4)) == 3 / 11
    assert bubble(8, LayoutConfig(pp=4, vpp=3)) == 3 / 27
