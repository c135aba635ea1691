"""Batched generation: one /generate call is one `Generation`.

A call's samples are cut, in order, into batches of at most `max_running` rows, decoded one batch after another. So
what a call returns is a pure function of the call and the weights, whatever else the server is asked meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rloop_mcore.rollout.embedded.attention import Decode
from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.params import Sample
from rloop_mcore.rollout.embedded.sampling import draw, uniforms

_COMPACT = 0.8  # finished rows leave the batch when this share or less still runs
_STOP_TAIL = 8  # tokens looked at beyond a stop string's length in characters

RUNNING, LENGTH, STOP_TOKEN, STOP_STRING, ABORTED = range(5)


class Generation:
    """The samples of one call and how far they are. Advanced on one thread; may be interrupted between tokens.

    tokens: int64 [samples, max_new_tokens]; logprobs: float32 the same; lengths, state: [samples].
    """

    def __init__(self, model: CausalModel, samples: Sequence[Sample], max_running: int) -> None:
        self.model, self.samples, self.max_running = model, samples, max_running
        count = len(samples)
        self.limits = np.array([s.params.max_new_tokens for s in samples])
        self.tokens = np.zeros((count, int(self.limits.max())), dtype=np.int64)
        self.logprobs = np.zeros(self.tokens.shape, dtype=np.float32)
        self.lengths = np.zeros(count, dtype=np.int64)
        self.state = np.full(count, RUNNING, dtype=np.int8)
        self.matched: dict[int, str] = {}  # sample -> the stop string it ended with
        self.cached = np.zeros(count, dtype=np.int64)
        self.versions: list[tuple[str, np.ndarray]] = []  # weight version, lengths when it began
        self.seeds = np.array([s.seed & (2**64 - 1) for s in samples], dtype=np.uint64)
        self.temperature = np.array([s.params.temperature for s in samples], dtype=np.float32)
        self.top_p = np.array([s.params.top_p for s in samples], dtype=np.float32)
        self.stop_ids = _stop_table(samples, model.eos)
        self.watches_text = np.array([bool(s.params.stop) for s in samples]) & (model.tokenizer is not None)
        self.batch: _Batch | None = None

    @torch.inference_mode()
    def advance(self, weight_version: str, interrupted: Callable[[], bool]) -> None:
        """Generate until all samples are finished, or until `interrupted()` between two tokens."""
        if not self.versions or self.versions[-1][0] != weight_version:
            self.versions.append((weight_version, self.lengths.copy()))
        while not self.finished and not interrupted():
            if self.batch is None:
                self.batch = self._next_batch()
            self._take(self.batch)
            if len(self.batch.rows):
                self._step(self.batch)
            else:
                self.batch = None

    @property
    def finished(self) -> bool:
        return not (self.state == RUNNING).any()

    def abort(self) -> None:
        """Finish every running sample where it is."""
        self.state[self.state == RUNNING] = ABORTED
        self.batch = None

    def drop_cache(self) -> None:
        """Forget keys and values; they are recomputed, under the weights of that time, when generation goes on."""
        self.batch = None

    def _next_batch(self) -> _Batch:
        first = int(np.argmax(self.state == RUNNING)) // self.max_running * self.max_running
        window = np.arange(first, min(first + self.max_running, len(self.samples)))
        rows = window[self.state[window] == RUNNING]
        distinct: dict[tuple[int, ...], int] = {}
        owner, repeated = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=bool)
        for place, row in enumerate(rows):
            ids = self.samples[row].prompt + tuple(self.tokens[row, : self.lengths[row]].tolist())
            repeated[place] = ids in distinct
            owner[place] = distinct.setdefault(ids, len(distinct))
        prompts = list(distinct)
        logits, context, common = self.model.start(prompts, owner)
        lengths = np.array([len(p) for p in prompts])[owner]
        self.cached[rows] = np.where(repeated, lengths, np.where(owner == 0, 0, common))
        return _Batch(rows, lengths, context, logits, last=torch.empty(0))

    def _take(self, batch: _Batch) -> None:
        """Draw a token for every row of the batch, finish rows, and drop finished ones when they are many."""
        device = self.model.device
        rows, at = batch.rows, self.lengths[batch.rows]
        ids, logprobs = draw(
            batch.logits,
            torch.from_numpy(self.temperature[rows]).to(device),
            torch.from_numpy(self.top_p[rows]).to(device),
            torch.from_numpy(uniforms(self.seeds[rows], at)).to(device),
        )
        batch.last = ids
        new = ids.cpu().numpy()
        live = self.state[rows] == RUNNING
        writing = rows[live]
        self.tokens[writing, at[live]] = new[live]
        self.logprobs[writing, at[live]] = logprobs.float().cpu().numpy()[live]
        self.lengths[writing] += 1
        self.state[writing[self.lengths[writing] >= self.limits[writing]]] = LENGTH
        self.state[writing[(self.stop_ids[writing] == new[live, None]).any(axis=1)]] = STOP_TOKEN
        for row in writing[self.watches_text[writing]]:
            self._watch_text(int(row))
        running = self.state[rows] == RUNNING
        if running.sum() <= _COMPACT * len(rows):
            batch.keep(np.flatnonzero(running))

    def _watch_text(self, row: int) -> None:
        if self.state[row] == STOP_TOKEN:
            return
        stops, end = self.samples[row].params.stop, int(self.lengths[row])
        tail = self.tokens[row, max(0, end - _STOP_TAIL - max(map(len, stops))) : end]
        assert self.model.tokenizer is not None
        text = self.model.tokenizer.decode(tail.tolist())
        found = next((s for s in stops if s in text), None)
        if found is not None:
            self.state[row] = STOP_STRING
            self.matched[row] = found

    def _step(self, batch: _Batch) -> None:
        device = self.model.device
        positions = torch.from_numpy(batch.positions).to(device)
        batch.logits = self.model.step(batch.last, positions, batch.context)
        batch.positions += 1

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
        """Which weight version made which tokens: [{version, start, end}], in order."""
        starts = [(version, int(lengths[row])) for version, lengths in self.versions]
        ends = [start for _, start in starts[1:]] + [int(self.lengths[row])]
        spans = [{"version": v, "start": s, "end": e} for (v, s), e in zip(starts, ends, strict=True) if e > s]
        return spans or [{"version": self.versions[-1][0], "start": 0, "end": 0}] if self.versions else []


@dataclass
class _Batch:
    """Rows being decoded together. rows: indices into the call's samples; positions: of the next token to read."""

    rows: np.ndarray
    positions: np.ndarray
    context: Decode
    logits: torch.Tensor  # [rows, vocabulary] of the token to draw next
    last: torch.Tensor  # [rows] drawn last

    def keep(self, kept: np.ndarray) -> None:
        self.rows, self.positions = self.rows[kept], self.positions[kept]
        if len(kept):
            self.context.keep(kept)
            self.last = self.last[torch.from_numpy(kept).to(self.last.device)]


def _stop_table(samples: Sequence[Sample], eos: tuple[int, ...]) -> np.ndarray:
    """int64 [samples, widest]: the ids that end each sample, padded with -1."""
    per_params = {id(s.params): () if s.params.ignore_eos else (*eos, *s.params.stop_token_ids) for s in samples}
    table = np.full((len(samples), max(1, *map(len, per_params.values()))), -1, dtype=np.int64)
    for row, sample in enumerate(samples):
        ids = per_params[id(sample.params)]
        table[row, : len(ids)] = ids
    return table
