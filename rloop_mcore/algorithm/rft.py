"""The batches of supervised fine-tuning: RFT on the experts, SFT on demonstrations."""

from __future__ import annotations

from rloop_mcore.algorithm.permutation import permutation
from rloop_mcore.algorithm.seeds import derive_seed


def update_count(examples: int, batch_size: int, epochs: int) -> int:
    """Updates of `epochs` passes over the examples; the last, shorter batch of a pass counts."""
    return epochs * -(-examples // batch_size)


def batch_indices(update: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """The examples of update 0, 1, ...: each epoch is a new permutation of all of them, cut into batches.

    A pure function of the update's number, so that a resumed phase goes on where the journal says it stopped.
    """
    epoch, batch = divmod(update, update_count(examples, batch_size, epochs=1))
    order = permutation(examples, derive_seed(seed, "epoch", epoch))
    return order[batch * batch_size : (batch + 1) * batch_size]
