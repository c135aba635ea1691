"""Packed micro-batches: every response token once, in a place where the token before predicts it."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rloop_mcore.actor.packing import Row, Share, micro_batches, padding_share, partition


def rows_of(lengths: list[tuple[int, int]]) -> list[Row]:
    """Rows of (prompt, response) lengths whose tokens are all different; a logprob is minus its token."""
    rows, token = [], 1
    for prompt, response in lengths:
        ids = tuple(range(token, token + prompt + response))
        token += len(ids)
        logprobs = [-float(i) for i in ids[prompt:]]
        rows.append(Row(ids[:prompt], ids[prompt:], 2.0, 3.0, logprobs, logprobs, logprobs))
    return rows


def test_sequences_lie_end_to_end_longest_first() -> None:
    rows = [Row((14,), (23,), 2.0, -1.0, (-2.0,)), Row((11, 12, 13), (21, 22), 1.0, 1.5, (-0.5, -0.25))]
    (batch,) = micro_batches(rows, Share(multiple=4))
    assert batch.tokens.tolist() == [11, 12, 13, 21, 14, 0, 0, 0]
    assert batch.places.tolist() == [1, 2, 3, 4, 0, -1, -1, -1]
    assert batch.lengths == (4, 1, 3)
    assert batch.positions.tolist() == [2, 3, 4]
    assert batch.targets.tolist() == [21, 22, 23]
    assert batch.slots.tolist() == [1, 2, 0]
    assert batch.sequences.tolist() == [0, 0, 1]
    assert batch.weights.tolist() == [1.0, 1.0, 2.0]
    assert batch.advantages.tolist() == [1.5, 1.5, -1.0]
    assert batch.old_logprobs.tolist() == [-0.5, -0.25, -2.0]
    assert batch.reference_logprobs.tolist() == [0.0, 0.0, 0.0]


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=30)


@given(
    lengths=lengths,
    ranks=st.integers(1, 5),
    cp=st.integers(1, 3),
    max_tokens=st.integers(1, 200),
    multiple=st.integers(1, 5),
    count_multiple=st.integers(1, 3),
)
def test_every_response_token_is_somewhere_once(
    lengths: list[tuple[int, int]], ranks: int, cp: int, max_tokens: int, multiple: int, count_multiple: int
) -> None:
    rows = rows_of(lengths)
    shares = [
        Share(rank, ranks, cp_rank, cp, max_tokens, multiple, count_multiple)
        for rank in range(ranks)
        for cp_rank in range(cp)
    ]
    packed = [micro_batches(rows, share) for share in shares]
    batches = [batch for own in packed for batch in own]
    (size,) = {batch.tokens.numel() for batch in batches}
    (count,) = {len(own) for own in packed}
    assert size % multiple == 0
    assert count % count_multiple == 0
    unit = 2 * cp if cp > 1 else 1
    longest = max(-(-len(row) // unit) * unit for row in rows)
    assert size * cp < max(max_tokens * cp, longest) + cp * max(multiple, 2) * multiple * unit
    expected = [(token, slot) for slot, token in enumerate(t for row in rows for t in row.response_ids)]
    found = [pair for batch in batches for pair in zip(batch.targets.tolist(), batch.slots.tolist(), strict=True)]
    assert sorted(found) == sorted(expected)
    for batch in batches:
        assert batch.tokens[batch.positions].add(1).tolist() == batch.targets.tolist()  # the token before predicts it
        assert batch.old_logprobs.tolist() == [-float(token) for token in batch.targets.tolist()]
        assert sum(batch.lengths) == size * cp
        assert all(length % unit == 0 for length in batch.lengths)
    tokens = sum(map(len, rows))
    inputs = [token for row in rows for token in (*row.prompt_ids, *row.response_ids)[:-1]]
    placed = [pair for batch in batches for pair in zip(batch.places.tolist(), batch.tokens.tolist(), strict=True)]
    assert sorted(pair for pair in placed if pair[0] >= 0) == list(enumerate(inputs))
    assert padding_share(rows, packed[0], shares[0]) == pytest.approx(1 - tokens / (size * count * cp * ranks))


def test_context_ranks_hold_the_two_chunks_that_make_causal_work_even() -> None:
    (row,) = rows_of([(1, 8)])
    held = [micro_batches([row], Share(cp_rank=rank, cp=2))[0].tokens.tolist() for rank in range(2)]
    assert held == [[1, 2, 7, 8], [3, 4, 5, 6]]


def test_a_rank_without_a_sequence_gets_padding_only() -> None:
    batches = micro_batches(rows_of([(2, 3)]), Share(rank=1, ranks=2))
    assert [(len(b.positions), b.lengths) for b in batches] == [(0, (4,))]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=7), st.integers(1, 3))
def test_parts_are_within_four_thirds_of_the_best(lengths: list[int], parts: int) -> None:
    """Graham's bound for the longest-first rule, against every way there is."""
    ways = itertools.product(range(parts), repeat=len(lengths))
    optimum = min(
        max(sum(n for n, p in zip(lengths, way, strict=True) if p == k) for k in range(parts)) for way in ways
    )
    assert max(sum(lengths[i] for i in part) for part in partition(lengths, parts)) <= (4 / 3) * optimum + 1e-9


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 8))
@example([6, 6, 6, 11, 11, 11, 11], 5)
def test_what_came_last_to_a_part_found_it_the_emptiest(lengths: list[int], parts: int) -> None:
    """So without it no part is above the mean of the others' lengths."""
    found = partition(lengths, parts)
    assert sorted(i for part in found for i in part) == list(range(len(lengths)))
    for part in filter(None, found):
        total, last = sum(lengths[i] for i in part), lengths[part[-1]]
        assert total - last <= (sum(lengths) - last) / parts + 1e-9


def test_padding_at_the_papers_spread_of_lengths() -> None:
    """512 responses of up to 2048 tokens to prompts of 60-300, on 8 replicas, 16k tokens a micro-batch: under 3 %."""
    draw = random.Random(0)
    spread = [(draw.randint(60, 300), min(2048, max(20, int(draw.lognormvariate(6.5, 0.6))))) for _ in range(512)]
    rows = [Row(range(prompt), range(response)) for prompt, response in spread]
    share = Share(ranks=8, multiple=16)
    assert padding_share(rows, micro_batches(rows, share), share) < 0.03
