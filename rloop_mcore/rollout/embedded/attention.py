"""Attention for group sampling: keys and values that many responses share are computed, stored and read once.

A row of the batch (a response) attends to three segments: a prefix common to the prompts (instructions, few-shot
examples), the rest of its prompt, and its own tokens. The first two are shared by many rows, so their scores are one
matrix product a stored entry instead of one a row; the softmax then runs over all segments together, which makes the
result exact. Rows come and go: `Decode.regroup`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

NAME = "rloop_shared_prefix"
_COLUMNS = 64  # own tokens that a store has room for at first


@dataclass
class Entries:
    """Keys and values of token sequences, right-padded: [entries, kv_heads, length, head_dim] a layer.

    lengths: int64 [entries], without the padding.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: np.ndarray

    def merge(self, kept: np.ndarray, new: Entries | None) -> Entries:
        """The entries `kept` (indices, of which there may be none), then those of `new`."""
        if new is None:
            return Entries(_select(self.keys, kept), _select(self.values, kept), self.lengths[kept])
        if not len(kept):
            return new
        lengths = np.concatenate([self.lengths[kept], new.lengths])
        keys, values = (
            [_stacked(old, kept, added, int(lengths.max())) for old, added in zip(*pair, strict=True)]
            for pair in ((self.keys, new.keys), (self.values, new.values))
        )
        return Entries(keys, values, lengths)


class SharedSegment:
    """Entries that rows share: row r of the batch reads entry `owner[r]`.

    The rows of an entry sit in places, `width` to a copy of it: as many as entries have rows on average. One with more
    rows is copied, so however uneven the groups, there are at most four places a row and two copies an entry in use.
    """

    def __init__(self, entries: Entries, owner: np.ndarray) -> None:
        device = entries.keys[0].device
        count, rows = len(entries.lengths), len(owner)
        counts = np.bincount(owner, minlength=count)
        self.width = -(-rows // int(np.count_nonzero(counts)))
        copies = np.maximum(1, -(-counts // self.width))
        self.keys, self.values, lengths = entries.keys, entries.values, entries.lengths
        if copies.max() > 1:
            copied = np.repeat(np.arange(count), copies)
            self.keys, self.values = _select(self.keys, copied), _select(self.values, copied)
            lengths = lengths[copied]
        padded = np.arange(self.keys[0].shape[2]) >= lengths[:, None]
        self.mask = _mask(padded, device)  # [copies, 1, 1, length]
        order = np.argsort(owner, kind="stable")
        rank = np.arange(rows) - (np.cumsum(counts) - counts)[owner[order]]
        place = np.empty(rows, dtype=np.int64)
        place[order] = (np.cumsum(copies) - copies)[owner[order]] * self.width + rank
        places = len(lengths) * self.width
        self.in_order = rows == places and bool((place == np.arange(rows)).all())
        in_place = np.zeros(places, dtype=np.int64)  # places that no row has are padded with row 0
        in_place[place] = np.arange(rows)
        self.rows, self.place = torch.from_numpy(in_place).to(device), torch.from_numpy(place).to(device)

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, kv, q, x] -> [copies, kv, width * q, x]."""
        kv, q, x = rows.shape[1:]
        if not self.in_order:
            rows = rows.index_select(0, self.rows)
        return rows.view(-1, self.width, kv, q, x).transpose(1, 2).reshape(-1, kv, self.width * q, x)

    def _scatter(self, places: torch.Tensor, q: int) -> torch.Tensor:
        """[copies, kv, width * q, x] -> [rows, kv, q, x]."""
        kv, x = places.shape[1], places.shape[3]
        places = places.view(-1, kv, self.width, q, x).transpose(1, 2).reshape(-1, kv, q, x)
        return places if self.in_order else places.index_select(0, self.place)

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """query [rows, kv, q, head_dim] -> fp32 [rows, kv, q, length], padding at -inf."""
        scores = torch.matmul(self._gather(query), self.keys[layer].transpose(2, 3)).float()
        if self.mask is not None:
            scores += self.mask
        return self._scatter(scores, query.shape[2])

    def mix(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        """weights [rows, kv, q, length] -> [rows, kv, q, head_dim]."""
        return self._scatter(torch.matmul(self._gather(weights), self.values[layer]), weights.shape[2])


class OwnSegment:
    """Keys and values of each row's own tokens, [rows, kv_heads, capacity, head_dim] a layer.

    All rows write the same column at the same time, whenever they joined: row r's tokens begin at column `starts[r]`
    and what stands before is masked. So a row joins in a place another row left without anything being copied, and a
    column is written by one slice assignment.
    """

    def __init__(self, device: torch.device) -> None:
        self.keys: list[torch.Tensor] = []  # none before the first forward, whose keys tell the shape
        self.values: list[torch.Tensor] = []
        self.starts = np.empty(0, dtype=np.int64)
        self.device = device
        self.capacity, self.begin, self.end = _COLUMNS, 0, 0  # columns begin .. end hold tokens of some row
        self.mask: torch.Tensor | None = None  # [rows, 1, 1, capacity]

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token a row, [rows, kv_heads, 1, head_dim] each; returns views of all tokens, this one included."""
        if len(self.keys) == layer:
            for store, new in ((self.keys, key), (self.values, value)):
                store.append(new.new_zeros(*new.shape[:2], self.capacity, new.shape[3]))
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.end], values[:, :, self.end] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, self.begin : self.end + 1], values[:, :, self.begin : self.end + 1]

    def next_column(self) -> None:
        """To be called after every forward."""
        self.end += 1
        if self.end == self.capacity:
            live = self.end - self.begin
            self.capacity = max(_COLUMNS, 2 * live)
            self.keys, self.values = (
                [_moved(old, slice(self.begin, self.end), self.capacity) for old in kv]
                for kv in (self.keys, self.values)
            )
            self.starts -= self.begin
            self.begin, self.end = 0, live
            self._set_mask()

    def regroup(self, source: np.ndarray, joins: np.ndarray) -> None:
        """Row r becomes what was row `source[r]`, or begins anew where `joins[r]`. Copies only if a row moves."""
        moves = len(source) != len(self.starts) or bool((source != np.arange(len(source))).any())
        if moves:
            self.keys, self.values = (_select(kv, source) for kv in (self.keys, self.values))
        starts = np.full(len(source), self.end)
        starts[~joins] = self.starts[source[~joins]]
        self.starts, self.begin = starts, int(starts.min())
        self._set_mask()

    def _set_mask(self) -> None:
        hidden = np.arange(self.capacity) < self.starts[:, None]
        self.mask = _mask(hidden, self.device) if (self.starts > self.begin).any() else None


class Prefill:
    """Context of a forward over right-padded sequences [entries, length] that follow a common prefix (or none)."""

    def __init__(self, prefix: Entries | None) -> None:
        self.prefix = prefix
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.keys.append(key)
        self.values.append(value)
        if self.prefix is None:
            return causal(query, key, value, scale)
        before_k, before_v = self.prefix.keys[layer], self.prefix.values[layer]
        entries, length, before = query.shape[0], query.shape[2], before_k.shape[2]
        mask = torch.ones(length, before + length, dtype=torch.bool, device=query.device).tril(before)
        key = torch.cat([before_k.expand(entries, -1, -1, -1), key], 2)
        value = torch.cat([before_v.expand(entries, -1, -1, -1), value], 2)
        return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


class Decode:
    """Context of forwards over one new token a row.

    prefix: one entry, read by the rows of `follows` (bool [rows]) before their entry of `prompts`.
    """

    def __init__(self, prefix: Entries | None, device: torch.device) -> None:
        self.prefix, self.own = prefix, OwnSegment(device)

    def regroup(
        self, source: np.ndarray, joins: np.ndarray, follows: np.ndarray, prompts: Entries, owner: np.ndarray
    ) -> None:
        """Row r becomes what was row `source[r]`, or begins anew where `joins[r]`; the rest is of the new rows."""
        self.own.regroup(source, joins)
        self.shared = [SharedSegment(prompts, owner)]
        self.strangers = None  # [rows, 1, 1, 1]
        if self.prefix is not None and follows.any():
            self.shared.append(SharedSegment(self.prefix, np.zeros(len(owner), dtype=np.int64)))
            self.strangers = _mask(~follows[:, None], self.own.device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        rows, heads, _, dim = query.shape
        keys, values = self.own.append(layer, key, value)
        kv = keys.shape[1]
        query = (query * scale).view(rows, kv, heads // kv, dim)
        own = torch.matmul(query, keys.transpose(2, 3)).float()
        if self.own.mask is not None:
            own += self.own.mask[..., self.own.begin : self.own.end + 1]
        scores = [own, *(segment.scores(layer, query) for segment in self.shared)]
        if self.strangers is not None:
            scores[-1] += self.strangers
        weights = torch.cat(scores, -1).softmax(-1).to(query.dtype).split([s.shape[-1] for s in scores], -1)
        out = torch.matmul(weights[0], values)
        for segment, part in zip(self.shared, weights[1:], strict=True):
            out += segment.mix(layer, part)
        return out.view(rows, heads, 1, dim)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain causal attention over whole sequences, [rows, heads, length, head_dim]."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def _mask(hidden: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """bool [n, columns] -> fp32 [n, 1, 1, columns] to add to scores, or None when nothing is hidden."""
    if not hidden.any():
        return None
    return torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))[:, None, None].to(device)


def _select(tensors: list[torch.Tensor], index: np.ndarray) -> list[torch.Tensor]:
    return [t.index_select(0, torch.from_numpy(index).to(t.device)) for t in tensors]


def _stacked(old: torch.Tensor, kept: np.ndarray, new: torch.Tensor, length: int) -> torch.Tensor:
    """[len(kept) + new entries, kv, length, d]: `old[kept]` and `new`, cut or padded to `length` columns."""
    out = old.new_zeros(len(kept) + len(new), old.shape[1], length, old.shape[3])
    columns = min(length, old.shape[2])
    out[: len(kept), :, :columns] = old[torch.from_numpy(kept).to(old.device), :, :columns]
    out[len(kept) :, :, : new.shape[2]] = new
    return out


def _moved(old: torch.Tensor, columns: slice, capacity: int) -> torch.Tensor:
    out = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
    out[:, :, : columns.stop - columns.start] = old[:, :, columns]
    return out


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """The function transformers calls; `key_values` travels through the model's keyword arguments."""
    context: Prefill | Decode | None = kwargs.get("key_values")
    if context is None:
        out = causal(query, key, value, scaling)
    else:
        out = context.attend(module.layer_idx, query, key, value, scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
