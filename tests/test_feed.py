"""How far collecting runs ahead of the policy, and by which weights each batch is sampled."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest

from rloop_mcore.feed import Feed

STEPS = 6


class Weights:
    """The engines, as far as a feed knows them: they hold the weights of the last sync."""

    def __init__(self) -> None:
        self.version = -1
        self.waits: list[int | None] = []
        self.cancelled = threading.Event()

    def wait(self, future: Future[Any], version: int | None = None) -> Any:
        self.waits.append(version)
        return future.result(timeout=30)

    def cancel(self) -> None:
        self.cancelled.set()


def explore(
    max_lag: int, partial: bool, collect_s: float = 0.02, train_s: float = 0.02
) -> tuple[list[tuple[int, int, int]], Weights]:
    """Go through a phase as `loop.py` does; returns (step, version at the batch's begin, and at its end) of each."""
    weights, collecting = Weights(), threading.Lock()

    def collect(step: int) -> tuple[int, int, int]:
        assert collecting.acquire(blocking=False), "two batches at once"
        begun = weights.version
        time.sleep(collect_s)
        collecting.release()
        return step, begun, weights.version

    taken = []
    with Feed(collect, weights, 0, STEPS, max_lag, partial) as feed:  # type: ignore[arg-type]
        for step in range(STEPS):
            feed.settle(step)
            weights.version = step
            taken.append(feed.take(step))
            time.sleep(train_s)
        feed.settle(STEPS)
    return taken, weights


def test_without_lag_every_batch_is_by_the_policy_it_updates() -> None:
    taken, weights = explore(max_lag=0, partial=False)
    assert taken == [(step, step, step) for step in range(STEPS)]
    assert weights.waits.count(None) == STEPS  # while it is waited for, the rollout looks after its engines


@pytest.mark.parametrize(("collect_s", "train_s"), [(0.0, 0.04), (0.04, 0.0), (0.01, 0.01)])
def test_one_step_off_every_batch_is_wholly_by_the_policy_before(collect_s: float, train_s: float) -> None:
    taken, _ = explore(1, False, collect_s, train_s)
    assert taken == [(0, 0, 0)] + [(step, step - 1, step - 1) for step in range(1, STEPS)]


@pytest.mark.parametrize("max_lag", [1, 2, 4])
def test_partial_batches_span_syncs_and_are_never_older_than_max_lag(max_lag: int) -> None:
    taken, weights = explore(max_lag, True, collect_s=0.05, train_s=0.02)
    assert [step for step, _, _ in taken] == list(range(STEPS))
    assert all(step - max_lag <= begun <= ended for step, begun, ended in taken)
    assert any(begun < ended for _, begun, ended in taken)
    assert None not in weights.waits[STEPS:]  # at the end nothing is left to settle


def test_what_is_under_way_is_waited_for_under_the_actors_version() -> None:
    """An engine that comes back during `settle` gets weights that the actor has, by their right name."""
    _, weights = explore(1, False, collect_s=0.03, train_s=0.0)
    assert [version for version in weights.waits if version is not None] == list(range(1, STEPS))


def test_a_failed_batch_is_told_when_it_is_taken_and_the_next_are_not_begun() -> None:
    begun = []

    def collect(step: int) -> int:
        begun.append(step)
        raise RuntimeError(f"step {step} broke")

    with (
        pytest.raises(RuntimeError, match="step 0 broke"),
        Feed(collect, Weights(), 0, STEPS, 0, False) as feed,  # type: ignore[arg-type]
    ):
        feed.take(0)
    assert begun == [0]


def test_leaving_gives_up_what_is_under_way() -> None:
    weights, steps, second = Weights(), list[int](), threading.Event()

    def collect(step: int) -> int:
        steps.append(step)
        if step == 1:
            second.set()
            weights.cancelled.wait(30)
            raise CancelledError
        return step

    begun = time.monotonic()
    with Feed(collect, weights, 0, STEPS, 3, True) as feed:  # type: ignore[arg-type]
        assert feed.take(0) == 0
        second.wait(30)
        thread = next(thread for thread in threading.enumerate() if thread.name.startswith("feed"))
    assert time.monotonic() - begun < 10
    assert steps == [0, 1]
    assert not thread.is_alive()


def test_leaving_gives_up_the_sampling_rounds_that_begin_meanwhile() -> None:
    weights, grading = Weights(), threading.Event()

    def collect(step: int) -> int:
        if step == 1:
            grading.set()
            weights.cancelled.wait(30)
            weights.cancelled.clear()
            if weights.cancelled.wait(10):  # the next round
                raise CancelledError
        return step

    with Feed(collect, weights, 0, STEPS, 1, False) as feed:  # type: ignore[arg-type]
        assert feed.take(0) == 0
        grading.wait(30)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("max_lag", [0, 1])
def test_one_step_off_the_next_batch_is_collected_while_a_step_trains(max_lag: int) -> None:
    begun = [threading.Event() for _ in range(STEPS)]
    weights = Weights()
    with Feed(lambda step: begun[step].set(), weights, 0, STEPS, max_lag, False) as feed:  # type: ignore[arg-type]
        for step in range(STEPS - 1):
            feed.settle(step)
            weights.version = step
            feed.take(step)
            assert begun[step + 1].wait(30 if max_lag else 0.05) == bool(max_lag)
