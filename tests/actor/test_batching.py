"""Right-padded micro-batches: every response token once, in a place where the token before predicts it."""

from __future__ import annotations

from rloop_mcore.actor.batching import MicroBatch, micro_batches
from rloop_mcore.types import Example, Trajectory


def trajectory(prompt: list[int], response: list[int], logprobs: list[float]) -> Trajectory:
    return Trajectory(0, 0, "p", 0, tuple(prompt), tuple(response), tuple(logprobs), "stop", 0, True, 1.0, "correct")


def test_one_row_is_shifted_and_masked() -> None:
    rows = [trajectory([11, 12, 13], [21, 22], [-0.5, -0.25]), trajectory([14], [23], [-2.0])]
    (batch,) = micro_batches(rows, [1.5, -1.0], rank=0, ranks=1, max_tokens=100)
    assert batch.tokens.tolist() == [[11, 12, 13, 21], [14, 0, 0, 0]]
    assert batch.targets.tolist() == [[12, 13, 21, 22], [23, 0, 0, 0]]
    assert batch.mask.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert batch.old_logprobs.tolist() == [[0.0, 0.0, -0.5, -0.25], [-2.0, 0.0, 0.0, 0.0]]
    assert batch.advantages.tolist() == [[0.0, 0.0, 1.5, 1.5], [-1.0, 0.0, 0.0, 0.0]]


def responses(batches: list[MicroBatch]) -> list[int]:
    return [int(token) for batch in batches for token in batch.targets[batch.mask]]


def test_ranks_and_micro_batches_share_out_every_row_once() -> None:
    rows = [Example((1, 2), tuple(range(100 * i, 100 * i + i % 4 + 1))) for i in range(1, 12)]
    expected = sorted(token for row in rows for token in row.response_ids)
    for ranks in (1, 2, 3, 16):
        for max_tokens in (1, 13, 10_000):
            shares = [micro_batches(rows, None, rank, ranks, max_tokens) for rank in range(ranks)]
            shapes = {tuple(batch.tokens.shape) for share in shares for batch in share}
            assert sorted(token for share in shares for token in responses(share)) == expected
            assert len({len(share) for share in shares}) == 1
            assert len(shapes) == 1
            ((size, length),) = shapes
            assert size == 1 or size * length <= max_tokens


def test_length_is_a_multiple_for_sequence_parallelism() -> None:
    (batch,) = micro_batches([Example((1, 2), (3, 4, 5))], None, 0, 1, 100, multiple=3)
    assert batch.tokens.shape == (1, 6)
