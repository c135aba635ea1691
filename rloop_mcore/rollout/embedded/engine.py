"""Continuous batching: up to `max_running` samples, of all calls in flight, are decoded together.

When enough of them have finished, they leave and waiting samples take their places, in the order of the calls and,
within a call, of its samples. Who runs beside whom follows from tokens and lengths alone, never from time. So what a
call returns is, bit for bit, a pure function of the call and the weights when no other call is in flight; beside
others the same seeds draw the same tokens, up to the rounding of floats.

A sample joins with all its tokens but the last read: its `head`, which samples of one prompt share. The last token is
its first step in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from rloop_mcore.rollout.embedded.attention import Decode, Entries
from rloop_mcore.rollout.embedded.generation import RUNNING, Generation
from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.sampling import draw, uniforms

_REFILL = 1 / 16  # share of the places that must be free before waiting samples are read: many at once is cheaper
_COMPACT = 0.9  # with nothing waiting, finished rows leave when this share or less still runs
_SHARED_PREFIX = 16  # a common prefix shorter than this is not worth a forward of its own

Head = tuple[int, ...]
Member = tuple[Generation, int]  # a call and the index of one of its samples


class Engine:
    """The calls in flight and the batch that decodes them. Used by one thread at a time."""

    def __init__(self, model: CausalModel, max_running: int) -> None:
        self.model, self.max_running = model, max_running
        self.calls: list[Generation] = []  # unfinished, in order of arrival
        self.batch: _Batch | None = None  # None: no sample holds keys and values

    def add(self, call: Generation) -> None:
        self.calls.append(call)

    def abort(self, call: Generation, rid: str | None = None) -> None:
        """Finish the call, or its samples of one request id, where it is. It may have finished already."""
        call.abort(rid)
        self._drop_finished()

    def abort_all(self) -> None:
        for call in self.calls:
            call.abort()
        self._drop_finished()

    def retract(self) -> None:
        """Forget keys and values; they are computed anew, under the weights of that time, when generation goes on."""
        self.batch = None
        for call in self.calls:
            call.waiting[:] = True

    def forget_prompts(self) -> None:
        """Samples that join from here on read their prompts anew; those that run keep their keys and values."""
        if self.batch is not None:
            self.batch.prefix_ids = ()
            self.batch.heads = [None] * len(self.batch.heads)

    @torch.inference_mode()
    def advance(self, weight_version: str, interrupted: Callable[[], bool]) -> None:
        """Generate until a call is finished (it then leaves `calls`), none is left, or `interrupted()`."""
        for call in self.calls:
            call.stamp(weight_version)
        count = len(self.calls)
        try:
            while count == len(self.calls) > 0 and not interrupted():
                if self.batch is None:
                    self.batch = self._begin()
                self._regroup(self.batch)
                self._step(self.batch)
                self._drop_finished()
        except BaseException:
            self.retract()  # what a failed forward left half-written is not built upon
            raise

    def _drop_finished(self) -> None:
        self.calls = [call for call in self.calls if not call.finished]
        if self.batch is not None and not self.batch.live().any():
            self.batch = None  # nothing of the past, such as the size of its buffers, reaches the next call

    def _begin(self) -> _Batch:
        """An empty batch. What all waiting samples begin with is read here, once for all that will join."""
        everything = self._waiting(sum(len(call.samples) for call in self.calls))
        ids = _common_prefix({call.ids(row)[:-1] for call, row in everything})
        prefix = self.model.read([ids], None) if ids else None
        return _Batch(ids, prefix, self.model)

    def _waiting(self, room: int) -> list[Member]:
        """The next samples to run, at most `room`."""
        found: list[Member] = []
        for call in self.calls:
            rows = np.flatnonzero(call.waiting & (call.state == RUNNING))[: room - len(found)]
            found += [(call, int(row)) for row in rows]
        return found

    def _regroup(self, batch: _Batch) -> None:
        """Let waiting samples take the places of finished ones, or close the gaps, when either pays."""
        live = batch.live()
        free = self.max_running - int(live.sum())
        waiting = self._waiting(free + 1)
        if waiting and (free >= max(1, _REFILL * self.max_running) or len(waiting) <= free):
            batch.regroup(live, waiting[:free])
        elif not waiting and live.sum() <= _COMPACT * len(live):
            batch.regroup(live, [])

    def _step(self, batch: _Batch) -> None:
        """Draw one token for every row of the batch."""
        device = self.model.device
        drawn = batch.drawn()
        positions = torch.from_numpy(batch.offsets + drawn).to(device)
        logits = self.model.step(torch.from_numpy(batch.last).to(device), positions, batch.context)
        uniform = torch.from_numpy(uniforms(batch.seeds, drawn)).to(device)
        ids, logprobs = draw(logits, batch.temperature, batch.top_p, uniform)
        batch.last, scored = ids.cpu().numpy(), logprobs.float().cpu().numpy()
        for call, places, rows in batch.by_call:
            call.record(rows, batch.last[places], scored[places])


class _Batch:
    """Rows decoded together and what they attend to.

    members: whose row it is; offsets, last, seeds: [rows], the position of its last prompt token, the token to read
    next, its seed. heads: the ids behind each entry of `entries`; None: not to be shared with newcomers.
    """

    def __init__(self, prefix_ids: Head, prefix: Entries | None, model: CausalModel) -> None:
        self.model, self.prefix_ids, self.prefix = model, prefix_ids, prefix
        self.context = Decode(prefix, model.device)
        self.members: list[Member] = []
        self.last = np.empty(0, dtype=np.int64)
        self.owner, self.follows = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
        self.heads: list[Head | None] = []
        self.entries: Entries | None = None
        self._describe()

    def live(self) -> np.ndarray:
        """bool [rows]: whose sample is not finished."""
        live = np.empty(len(self.members), dtype=bool)
        for call, places, rows in self.by_call:
            live[places] = call.state[rows] == RUNNING
        return live

    def drawn(self) -> np.ndarray:
        """int64 [rows]: tokens drawn so far."""
        drawn = np.empty(len(self.members), dtype=np.int64)
        for call, places, rows in self.by_call:
            drawn[places] = call.lengths[rows]
        return drawn

    def regroup(self, live: np.ndarray, new: list[Member]) -> None:
        """Rows that are not `live` make way for `new` samples; places beyond are added at the end, or closed."""
        size = max(len(live), int(live.sum()) + len(new))
        places = np.append(np.flatnonzero(~live), np.arange(len(live), size))
        joins, stays = np.zeros(size, dtype=bool), np.ones(size, dtype=bool)
        joins[places[: len(new)]] = True
        stays[places[len(new) :]] = False
        source = np.append(np.arange(len(live)), np.zeros(size - len(live), dtype=np.int64))[stays]
        joins = joins[stays]

        newcomers = iter(new)
        self.members = [next(newcomers) if joins[i] else self.members[old] for i, old in enumerate(source)]
        ids = [call.ids(row) for call, row in new]
        self.last = _spread(self.last, source, joins, [i[-1] for i in ids])
        heads = [i[:-1] for i in ids]
        self.follows = _spread(self.follows, source, joins, [self._follows(head) for head in heads])
        fresh = self._fresh(new, heads)
        places_of = {head: i for i, head in enumerate([*self.heads, *fresh]) if head is not None}
        self._keep_entries(_spread(self.owner, source, joins, [places_of[head] for head in heads]), fresh)
        assert self.entries is not None  # there is a row, and it has an entry
        self.context.regroup(source, joins, self.follows, self.entries, self.owner)
        self._describe()

    def _follows(self, head: Head) -> bool:
        return bool(self.prefix_ids) and head[: len(self.prefix_ids)] == self.prefix_ids

    def _fresh(self, new: list[Member], heads: list[Head]) -> list[Head]:
        """The heads not stored yet, those that follow the prefix first. Notes what each newcomer is spared."""
        stored: set[Head | None] = set(self.heads)
        fresh: list[Head] = []
        for (call, row), head in zip(new, heads, strict=True):
            call.waiting[row] = False
            spared = len(head)
            if head not in stored:
                # The first of all has the prefix read for it, unlike those that come later.
                spared = len(self.prefix_ids) if self._follows(head) and stored else 0
                stored.add(head)
                fresh.append(head)
            if call.lengths[row] == 0:
                call.cached[row] = spared
        return sorted(fresh, key=self._follows, reverse=True)

    def _keep_entries(self, owner: np.ndarray, fresh: list[Head]) -> None:
        """Read the `fresh` heads, and drop those that no row owns. owner: [rows] index into stored, then fresh ones."""
        stored = len(self.heads)
        kept = np.unique(owner[owner < stored])
        if fresh or 2 * len(kept) <= stored:
            new = self._read(fresh)
            self.entries = new if self.entries is None else self.entries.merge(kept, new)
            kept = np.append(kept, np.arange(stored, stored + len(fresh)))
            heads = [*self.heads, *fresh]
            self.heads = [heads[i] for i in kept]
            owner = np.searchsorted(kept, owner)
        self.owner = owner

    def _read(self, heads: list[Head]) -> Entries | None:
        following = [head[len(self.prefix_ids) :] for head in heads if self._follows(head)]
        others = heads[len(following) :]
        parts = [self.model.read(h, p) for h, p in ((following, self.prefix), (others, None)) if h]
        return parts[0].merge(np.arange(len(following)), parts[1]) if len(parts) == 2 else next(iter(parts), None)

    def _describe(self) -> None:
        """What a step needs of the members, as arrays."""
        of_call: dict[int, list[int]] = {}
        for place, (call, _) in enumerate(self.members):
            of_call.setdefault(id(call), []).append(place)
        rows = np.array([row for _, row in self.members], dtype=np.int64)
        # Of each call: the places of its samples in the batch, and the indices of these samples in the call.
        self.by_call = [(self.members[p[0]][0], np.array(p), rows[p]) for p in of_call.values()]
        self.offsets = np.array([len(call.samples[row].prompt) - 1 for call, row in self.members], dtype=np.int64)
        self.seeds = np.array([call.seeds[row] for call, row in self.members], dtype=np.uint64)
        temperature = np.array([call.temperature[row] for call, row in self.members], dtype=np.float32)
        top_p = np.array([call.top_p[row] for call, row in self.members], dtype=np.float32)
        self.temperature, self.top_p = (torch.from_numpy(of).to(self.model.device) for of in (temperature, top_p))


def _spread(old: np.ndarray, source: np.ndarray, joins: np.ndarray, new: list[Any]) -> np.ndarray:
    """[rows]: `old[source[r]]`, and where `joins[r]` the values of `new` in order."""
    out = np.empty(len(source), dtype=old.dtype)
    out[~joins] = old[source[~joins]]
    out[joins] = new
    return out


def _common_prefix(heads: Collection[Head]) -> Head:
    """What two or more heads all begin with, each having something left; empty when it is not worth a forward."""
    shortest = min(map(len, heads)) - 1
    if len(heads) < 2 or shortest < _SHARED_PREFIX:
        return ()
    table = np.array([head[:shortest] for head in heads])
    differs = (table != table[0]).any(axis=0)
    length = int(differs.argmax()) if differs.any() else shortest
    return tuple(table[0, :length].tolist()) if length >= _SHARED_PREFIX else ()
