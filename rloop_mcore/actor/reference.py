"""The policy that the KL term compares with: theta_i, kept in CPU memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class Reference:
    """A copy of this rank's parameters as they are now."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._tensors = [p.detach().to("cpu", copy=True) for chunk in chunks for p in chunk.parameters()]

    @contextmanager
    def in_place_of(self, chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """The chunks compute with the copy for the while."""
        parameters = [p for chunk in chunks for p in chunk.parameters()]
        originals = [p.data for p in parameters]
        for parameter, tensor in zip(parameters, self._tensors, strict=True):
            parameter.data = tensor.to(parameter.device)
        try:
            yield
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.data = original
