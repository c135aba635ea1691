"""Attention for group sampling: keys and values that many responses share are computed, stored and read once.

A response attends to three segments: the prefix common to all prompts of the batch (few-shot examples), its prompt,
and its own tokens. The first two are shared by many rows, so their scores are one matrix product a segment entry
instead of one a row; the softmax then runs over all segments together, which makes the result exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AttentionInterface

NAME = "rloop_shared_prefix"


class SharedSegment:
    """Keys and values [entries, kv_heads, length, head_dim] a layer; row r of the batch reads entry `owner[r]`."""

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], lengths: np.ndarray, owner: np.ndarray):
        self.keys, self.values, self.lengths = keys, values, lengths
        length = keys[0].shape[2]
        padded = torch.arange(length) >= torch.from_numpy(lengths)[:, None]
        self.mask = None
        if bool(padded.any()):  # [entries, 1, 1, length]: the right padding of shorter prompts
            self.mask = torch.zeros(padded.shape).masked_fill_(padded, -torch.inf)[:, None, None].to(keys[0].device)
        self._assign(owner)

    def _assign(self, owner: np.ndarray) -> None:
        """Give every row a slot among its entry's; entries with fewer rows than the fullest are padded with row 0."""
        entries, device = len(self.lengths), self.keys[0].device
        counts = np.bincount(owner, minlength=entries)
        self.owner, self.width = owner, int(counts.max())
        order = np.argsort(owner, kind="stable")
        rank = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner[order]]
        slot = np.empty(len(owner), dtype=np.int64)
        slot[order] = owner[order] * self.width + rank
        self.in_order = len(owner) == entries * self.width and bool((slot == np.arange(len(owner))).all())
        rows = np.zeros(entries * self.width, dtype=np.int64)
        rows[slot] = np.arange(len(owner))
        self.rows, self.slot = torch.from_numpy(rows).to(device), torch.from_numpy(slot).to(device)

    def keep(self, kept: np.ndarray) -> SharedSegment:
        """The segment for the rows `kept` (indices) of the batch; entries nobody reads go when they are the half."""
        owner = self.owner[kept]
        used = np.unique(owner)
        if 2 * len(used) > len(self.lengths):
            self._assign(owner)
            return self
        index = torch.from_numpy(used).to(self.keys[0].device)
        keys = [k.index_select(0, index) for k in self.keys]
        values = [v.index_select(0, index) for v in self.values]
        return SharedSegment(keys, values, self.lengths[used], np.searchsorted(used, owner))

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, kv, q, x] -> [entries, kv, width * q, x]."""
        kv, q, x = rows.shape[1:]
        if not self.in_order:
            rows = rows.index_select(0, self.rows)
        return rows.view(-1, self.width, kv, q, x).transpose(1, 2).reshape(-1, kv, self.width * q, x)

    def _scatter(self, slots: torch.Tensor, q: int) -> torch.Tensor:
        """[entries, kv, width * q, x] -> [rows, kv, q, x]."""
        kv, x = slots.shape[1], slots.shape[3]
        slots = slots.view(-1, kv, self.width, q, x).transpose(1, 2).reshape(-1, kv, q, x)
        return slots if self.in_order else slots.index_select(0, self.slot)

    def scores(self, layer: int, query: torch.Tensor) -> torch.Tensor:
        """query [rows, kv, q, head_dim] -> [rows, kv, q, length], padding at -inf."""
        scores = torch.matmul(self._gather(query), self.keys[layer].transpose(2, 3)).float()
        if self.mask is not None:
            scores += self.mask
        return self._scatter(scores, query.shape[2])

    def mix(self, layer: int, weights: torch.Tensor) -> torch.Tensor:
        """weights [rows, kv, q, length] -> [rows, kv, q, head_dim]."""
        return self._scatter(torch.matmul(self._gather(weights), self.values[layer]), weights.shape[2])


class OwnSegment:
    """Keys and values of each row's generated tokens, [rows, kv_heads, capacity, head_dim] a layer."""

    def __init__(self, layers: int) -> None:
        self.keys: list[torch.Tensor | None] = [None] * layers
        self.values: list[torch.Tensor | None] = [None] * layers
        self.length = 0  # tokens stored before the current forward

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one token a row, [rows, kv_heads, 1, head_dim] each; returns views of all tokens so far."""
        end = self.length + 1
        return self._put(self.keys, layer, key)[:, :, :end], self._put(self.values, layer, value)[:, :, :end]

    def _put(self, store: list[torch.Tensor | None], layer: int, new: torch.Tensor) -> torch.Tensor:
        old = store[layer]
        if old is None or old.shape[2] == self.length:
            rows, kv, _, dim = new.shape
            grown = new.new_empty(rows, kv, max(16, 2 * self.length), dim)
            if old is not None:
                grown[:, :, : self.length] = old
            store[layer] = old = grown
        old[:, :, self.length] = new[:, :, 0]
        return old

    def keep(self, kept: np.ndarray) -> None:
        if self.length:
            index = torch.from_numpy(kept)
            self.keys = [k.index_select(0, index.to(k.device)) for k in self.keys if k is not None]
            self.values = [v.index_select(0, index.to(v.device)) for v in self.values if v is not None]


class Prefill:
    """Context of a forward over right-padded prompts [entries, length] that follow a common prefix (or none)."""

    def __init__(self, prefix: SharedSegment | None) -> None:
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
    """Context of a forward over one new token a row."""

    def __init__(self, shared: list[SharedSegment], layers: int) -> None:
        self.shared, self.own = shared, OwnSegment(layers)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        rows, heads, _, dim = query.shape
        keys, values = self.own.append(layer, key, value)
        kv = keys.shape[1]
        query = (query * scale).view(rows, kv, heads // kv, dim)
        scores = [segment.scores(layer, query) for segment in self.shared]
        scores.append(torch.matmul(query, keys.transpose(2, 3)).float())
        weights = torch.cat(scores, -1).softmax(-1).to(query.dtype)
        *shared, own = weights.split([s.shape[-1] for s in scores], -1)
        out = torch.matmul(own, values)
        for segment, part in zip(self.shared, shared, strict=True):
            out += segment.mix(layer, part)
        return out.view(rows, heads, 1, dim)

    def keep(self, kept: np.ndarray) -> None:
        """Drop all rows but `kept` (sorted indices)."""
        self.shared = [segment.keep(kept) for segment in self.shared]
        self.own.keep(kept)


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Plain causal attention over whole sequences, [rows, heads, length, head_dim]."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


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
