"""The batches of an exploration phase, collected while the policy trains: at most `max_lag` steps ahead of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from rloop_mcore.protocols import Rollout

_CANCEL_AGAIN_S = 0.1

B = TypeVar("B")


class Feed(Generic[B]):
    """Collects the batches of steps `first` .. `last` - 1, one after the other, on a thread of its own.

    The batch of step t is begun once the engines hold the weights of step t - max_lag, by `take(t - max_lag)`: no token
    is older than that, but for groups that `rollout.overprovision` carried over. With max_lag 0 nothing overlaps. With
    max_lag 1 (one step off) and `partial` off, the batch of step t is sampled by the weights of step t - 1 alone, so
    that the run is as deterministic as with 0. Use it as a context manager: what is under way at the end is given up.
    """

    def __init__(
        self, collect: Callable[[int], B], rollout: Rollout, first: int, last: int, max_lag: int, partial: bool
    ) -> None:
        """collect: gives the batch of a step; its calls come in the order of the steps. partial: see `settle`."""
        self._collect, self._rollout = collect, rollout
        self._next, self._last, self._max_lag, self._partial = first, last, max_lag, partial
        self._batches: dict[int, Future[B]] = {}
        self._thread = ThreadPoolExecutor(1, "feed")

    def __enter__(self) -> Feed[B]:
        return self

    def __exit__(self, *_: object) -> None:
        running = [batch for batch in self._batches.values() if not batch.cancel()]
        while not all(batch.done() for batch in running):
            self._rollout.cancel()
            wait(running, _CANCEL_AGAIN_S)  # a batch that was between two sampling rounds begins the next one
        self._thread.shutdown()

    def settle(self, version: int) -> None:
        """Before the engines get other weights: wait for what is being collected.

        With `partial` nothing is waited for: generation goes on under the new weights, and trajectories span versions.
        version: of the weights the actor holds.
        """
        if not self._partial:
            for batch in self._batches.values():
                self._rollout.wait(batch, version)

    def take(self, step: int) -> B:
        """The batch of `step`, whose weights the engines hold now. Raises what `collect` raised."""
        while self._next < min(step + self._max_lag + 1, self._last):
            self._batches[self._next] = self._thread.submit(self._collect, self._next)
            self._next += 1
        batch = self._batches[step]
        self._rollout.wait(batch)
        return self._batches.pop(step).result()
