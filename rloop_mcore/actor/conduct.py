"""Rank 0 conducts: its call of a `@collective` method is repeated on every other rank, in the same order."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch.distributed as dist

from rloop_mcore.errors import DiskFull

log = logging.getLogger(__name__)

_CALLS = 24  # collective timeouts

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Conducted")


class Conducted:
    """An object that exists on every rank and is called on rank 0 only; the others are in `follow`."""

    def __init__(self, timeout_s: float) -> None:
        """timeout_s: for a collective; between two calls (an evaluation, say) rank 0 may be silent much longer."""
        self._timeout_s = timeout_s
        self._followed = dist.get_world_size() > 1
        # Calls travel on a CPU group of their own: a wait between two steps is no stuck collective of the device.
        self._calls: dist.ProcessGroup | None = None
        if self._followed:
            self._calls = dist.new_group(backend="gloo", timeout=timedelta(seconds=_CALLS * timeout_s))  # type: ignore[assignment]

    def announce(self, name: str, arguments: tuple[Any, ...]) -> None:
        """Rank 0: have every follower call method `name` with the same arguments."""
        if self._followed:
            dist.broadcast_object_list([(name, arguments)], src=0, group=self._calls)

    def follow(self) -> None:
        """Ranks above 0: repeat rank 0's calls until it calls `close`."""
        while True:
            name, arguments = self._next_call()
            if name == "close":
                return
            try:
                result = getattr(type(self), name).__wrapped__(self, *arguments)
                if isinstance(result, Iterator):
                    for _ in result:
                        pass
            except DiskFull:  # as on rank 0, which may call again
                log.warning("%s: the disk is full", name)

    def close(self) -> None:
        """Rank 0: release the followers."""
        self.announce("close", ())

    def _next_call(self) -> tuple[str, tuple[Any, ...]]:
        call: list[Any] = [None]
        try:
            dist.broadcast_object_list(call, src=0, group=self._calls)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {dist.get_rank()} got no call from rank 0 (it died, or was silent for {_CALLS} times "
                f"cluster.collective_timeout_s={self._timeout_s:.0f} s)"
            ) from error
        return call[0]


def collective(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that rank 0 calls and every rank runs. Arguments are positional."""

    @functools.wraps(method)
    def conducted(self: S, *args: P.args, **kwargs: P.kwargs) -> R:
        if kwargs:
            raise TypeError(f"{method.__name__} is collective: pass its arguments by position")
        self.announce(method.__name__, args)
        return method(self, *args, **kwargs)

    return conducted
