"""One /generate call: its samples, the tokens drawn for each so far, and how each ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.params import Sample

_STOP_TAIL = 8  # tokens looked at beyond a stop string's length in bytes: a token may be a byte of a character

RUNNING, LENGTH, STOP_TOKEN, STOP_STRING, ABORTED = range(5)


class Generation:
    """What a call wants and what it has got.

    tokens: int64 [samples, max_new_tokens]; logprobs: float32 the same; lengths, state, cached, waiting: [samples].
    """

    def __init__(self, model: CausalModel, samples: Sequence[Sample]) -> None:
        self.model, self.samples = model, samples
        count = len(samples)
        self.limits = np.array([s.params.max_new_tokens for s in samples])
        self.tokens = np.zeros((count, int(self.limits.max())), dtype=np.int64)
        self.logprobs = np.zeros(self.tokens.shape, dtype=np.float32)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.state = np.full(count, RUNNING, dtype=np.int8)
        self.waiting = np.ones(count, dtype=bool)  # holds no keys and values (yet, or since a retraction)
        self.matched: dict[int, str] = {}  # sample -> the stop string it ended with
        self.cached = np.zeros(count, dtype=np.int64)  # prompt tokens that were not read for this sample
        self.versions: list[tuple[str, np.ndarray]] = []  # weight version, lengths when it began
        self.seeds = np.array([s.seed & (2**64 - 1) for s in samples], dtype=np.uint64)
        self.temperature = np.array([s.params.temperature for s in samples], dtype=np.float32)
        self.top_p = np.array([s.params.top_p for s in samples], dtype=np.float32)
        self.stop_ids = _stop_table(samples, model.eos)
        self.watches_text = np.array([bool(s.params.stop) for s in samples]) & (model.tokenizer is not None)

    @property
    def finished(self) -> bool:
        return not (self.state == RUNNING).any()

    def abort(self, rid: str | None = None) -> None:
        """Finish the running samples, of request `rid` only if given, where they are."""
        asked = np.array([rid in (None, sample.rid) for sample in self.samples])
        self.state[asked & (self.state == RUNNING)] = ABORTED

    def stamp(self, weight_version: str) -> None:
        """Tokens from here on are made by `weight_version`."""
        if not self.versions or self.versions[-1][0] != weight_version:
            self.versions.append((weight_version, self.lengths.copy()))

    def ids(self, row: int) -> tuple[int, ...]:
        """The prompt of sample `row` and what was drawn for it."""
        return self.samples[row].prompt + tuple(self.tokens[row, : self.lengths[row]].tolist())

    def record(self, rows: np.ndarray, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """A token was drawn for each of the samples `rows` ([n] each); those that are finished take none."""
        live = self.state[rows] == RUNNING
        rows, ids = rows[live], ids[live]
        at = self.lengths[rows]
        self.tokens[rows, at] = ids
        self.logprobs[rows, at] = logprobs[live]
        self.lengths[rows] = at + 1
        self.state[rows[at + 1 >= self.limits[rows]]] = LENGTH
        self.state[rows[(self.stop_ids[rows] == ids[:, None]).any(axis=1)]] = STOP_TOKEN
        for row in rows[self.watches_text[rows]]:
            self._watch_text(int(row))

    def _watch_text(self, row: int) -> None:
        if self.state[row] == STOP_TOKEN:
            return
        stops, end = self.samples[row].params.stop, int(self.lengths[row])
        longest = max(len(s.encode()) for s in stops)
        tail = self.tokens[row, max(0, end - _STOP_TAIL - longest) : end]
        assert self.model.tokenizer is not None
        text = self.model.tokenizer.decode(tail.tolist())
        found = next((s for s in stops if s in text), None)
        if found is not None:
            self.state[row] = STOP_STRING
            self.matched[row] = found

    def finish_reason(self, row: int) -> dict[str, Any]:
        state = self.state[row]
        if state == STOP_TOKEN:
            return {"type": "stop", "matched": int(self.tokens[row, self.lengths[row] - 1])}
        if state == STOP_STRING:
            return {"type": "stop", "matched": self.matched[row]}
        if state == LENGTH:
            return {"type": "length", "length": int(self.lengths[row])}
        return {"type": "abort", "message": "aborted"}

    def version_spans(self, row: int) -> list[dict[str, Any]]:
        """Which weight version made which tokens: [{version, start, end}], in order; none if it never ran."""
        starts = [(version, int(lengths[row])) for version, lengths in self.versions]
        ends = [start for _, start in starts[1:]] + [int(self.lengths[row])]
        spans = [{"version": v, "start": s, "end": e} for (v, s), e in zip(starts, ends, strict=False) if e > s]
        return spans or [{"version": v, "start": 0, "end": 0} for v, _ in starts[-1:]]


def _stop_table(samples: Sequence[Sample], eos: tuple[int, ...]) -> np.ndarray:
    """int64 [samples, widest]: the ids that end each sample, padded with -1."""
    per_params = {id(s.params): () if s.params.ignore_eos else (*eos, *s.params.stop_token_ids) for s in samples}
    table = np.full((len(samples), max(1, *map(len, per_params.values()))), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        ids = per_params[id(sample.params)]
        table[row, : len(ids)] = ids
    return table
