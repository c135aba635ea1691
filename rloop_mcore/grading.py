"""Answers are graded while the engines generate others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from rloop_mcore.protocols import Rewards
from rloop_mcore.types import Completion, Problem, Verdict


class Grading:
    """Of the answers to a batch of requests, each from the moment it is taken. Use it as a context manager.

    Decoding a text and waiting for room among the rewards happen on a thread of its own, not on the engines'.
    """

    def __init__(self, rewards: Rewards, problems: Sequence[Problem], decode: Callable[[Sequence[int]], str]) -> None:
        """problems: of each request."""
        self._problems, self._decode = problems, decode
        self._taken: SimpleQueue[tuple[Sequence[int], Sequence[Completion]] | None] = SimpleQueue()
        self._order: list[int] = []  # the requests of the items, as they came
        self._thread = ThreadPoolExecutor(1, "grading")
        self._verdicts = self._thread.submit(rewards.grade, self._items())

    def __enter__(self) -> Grading:
        return self

    def __exit__(self, *_: object) -> None:
        self._taken.put(None)
        self._thread.shutdown(wait=False)

    def take(self, rows: Sequence[int], completions: Sequence[Completion]) -> None:
        """Completions of the requests `rows`, once each; those that are not finished are passed over. Never blocks."""
        self._taken.put((rows, completions))

    def verdicts(self) -> dict[int, Verdict]:
        """Those on all that was taken, by request, in the requests' order. Waits for them.

        Raises what `decode` or the rewards raised.
        """
        self._taken.put(None)
        return dict(sorted(zip(self._order, self._verdicts.result(), strict=True)))

    def _items(self) -> Iterator[tuple[Problem, str, bool]]:
        for rows, completions in iter(self._taken.get, None):
            for row, completion in zip(rows, completions, strict=True):
                if completion.finish_reason != "abort":
                    self._order.append(row)
                    text = self._decode(completion.response_ids)
                    yield self._problems[row], text, completion.finish_reason == "length"
