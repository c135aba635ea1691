"""The pool under fire: whatever one answer does, the others get their verdicts, in order, in bounded time."""

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from rloop_mcore.config import RewardConfig
from rloop_mcore.errors import UserError
from rloop_mcore.reward import canaries as canaries_module
from rloop_mcore.reward import pool as pool_module
from rloop_mcore.reward.child import Child
from rloop_mcore.reward.pool import RewardPool, TooManyFailures
from rloop_mcore.types import Problem

BAD = "tests.reward.bad_verifiers:misbehave"
TROUBLE = {
    "loop": "timeout",
    "loop and catch": "timeout",
    "loop in C": "timeout",
    "wait": "timeout",
    "exit": "crashed",
    "sys.exit": "crashed",
    "abort": "crashed",
    "kill": "crashed",
    "memory": "crashed",
    "raise": "crashed",
    "nonsense": "crashed",
    "print": "wrong",
}


def item(response: str, gold: str = "right", truncated: bool = False) -> tuple[Problem, str, bool]:
    return Problem("p", "", gold), response, truncated


def config(verifier: str = BAD, **settings: object) -> RewardConfig:
    return RewardConfig(**{"verifier": verifier, "workers": 2, "deadline_s": 0.3, "memory_mib": 512, **settings})


@pytest.fixture(autouse=True)
def short_wall_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "WALL_PER_CPU_SECOND", 10.0)


def test_one_bad_answer_costs_only_itself() -> None:
    responses, reasons = [], []
    for number, (trouble, reason) in enumerate(TROUBLE.items()):
        for kind, expected in [("right", "correct")] * 7 + [(f"no {number}", "wrong")] * 6 + [(trouble, reason)]:
            responses.append(kind)
            reasons.append(expected)
    start = time.monotonic()
    with RewardPool(config()) as pool:
        verdicts = pool.grade([item(response) for response in responses])
        assert pool.replaced == 8  # the four that hang, one that exits, one that aborts, one that kills itself twice
        assert pool.counts == Counter(reasons)
        assert [v.reason for v in pool.grade([item("right")] * 50)] == ["correct"] * 50
    assert [v.reason for v in verdicts] == reasons
    assert [v.correct for v in verdicts] == [reason == "correct" for reason in reasons]
    assert time.monotonic() - start < 60


def test_wall_deadline_without_determinism() -> None:
    with RewardPool(config(deadline_s=0.5), deterministic=False) as pool:
        start = time.monotonic()
        verdicts = pool.grade([item("wait"), *[item("right")] * 20])
        assert verdicts[0].seconds >= 0.5
        assert time.monotonic() - start < 10
    assert [v.reason for v in verdicts] == ["timeout"] + ["correct"] * 20


def test_order_and_verdicts_do_not_depend_on_the_number_of_workers() -> None:
    items = [item(str(n % 7), gold=str(n % 3)) for n in range(500)]
    expected = [n % 7 == n % 3 for n in range(500)]
    for workers in (1, 3):
        with RewardPool(config(workers=workers)) as pool:
            assert [v.correct for v in pool.grade(items)] == expected


def test_an_item_is_graded_while_the_next_is_waited_for(tmp_path: Path) -> None:
    def items() -> Iterator[tuple[Problem, str, bool]]:
        for number in range(5):
            graded = tmp_path / str(number)
            yield item("touch", gold=str(graded))
            deadline = time.monotonic() + 60
            while not graded.exists():
                assert time.monotonic() < deadline, "not graded before the next item is given"
                time.sleep(0.01)

    with RewardPool(config()) as pool:
        assert [v.reason for v in pool.grade(items())] == ["correct"] * 5
        with pytest.raises(ZeroDivisionError):  # what the items raise reaches the caller, and harms no other call
            pool.grade(item(str(1 // (2 - n))) for n in range(3))
        assert [v.correct for v in pool.grade([item("right")])] == [True]


def test_a_share_of_failures_is_of_all_the_items_and_not_of_those_that_came_first() -> None:
    with RewardPool(config(max_failure_share=0.5)) as pool:
        responses = ["raise"] * 10 + ["right"] * 10
        assert [v.correct for v in pool.grade(item(r) for r in responses)] == [r == "right" for r in responses]


def test_a_call_whose_items_are_still_to_come_ends_with_the_pool() -> None:
    closed, first, second = threading.Event(), item("right"), item("right")

    def items() -> Iterator[tuple[Problem, str, bool]]:
        yield first
        assert closed.wait(60)
        yield second

    with ThreadPoolExecutor(1) as thread:
        with RewardPool(config(workers=1)) as pool:
            begun = thread.submit(pool.grade, items())
        closed.set()
        with pytest.raises(RuntimeError, match="closed"):
            begun.result(60)


def test_an_answer_that_is_being_graded_ends_with_the_pool(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    with RewardPool(config(workers=1, deadline_s=60.0)) as pool:
        verdicts = pool.submit([item("wait, the first time", gold=str(begun))])
        while not begun.exists():
            time.sleep(0.01)
    with pytest.raises(RuntimeError, match="closed"):
        verdicts.result(10)


def test_odd_texts_arrive_whole() -> None:
    odd = ["\0", "\ud800", "\u0665\u2028\r\n", "x" * 300_000, ""]
    with RewardPool(config()) as pool:
        assert all(v.correct for v in pool.grade([item(text, gold=text) for text in odd]))


@pytest.mark.parametrize("victim", ["grader", "worker"])
def test_an_answer_whose_grader_somebody_else_killed_is_graded_once_more(tmp_path: Path, victim: str) -> None:
    begun = tmp_path / "begun"
    with RewardPool(config(workers=1, deadline_s=6.0)) as pool:
        verdicts = pool.submit([item("right"), item("wait, the first time", gold=str(begun)), item("right")])
        deadline = time.monotonic() + 60
        while not (begun.exists() and begun.read_text()):
            assert time.monotonic() < deadline, "the answer was never begun"
            time.sleep(0.01)
        grader = psutil.Process(int(begun.read_text()))
        (grader if victim == "grader" else grader.parent()).kill()
        assert [v.reason for v in verdicts.result(60)] == ["correct"] * 3
        assert pool.replaced == 1


@pytest.mark.parametrize("heard_s", [0.0, 1.0])
@pytest.mark.parametrize(("deterministic", "reason"), [(True, "correct"), (False, "timeout")])
def test_what_a_dead_grader_left_in_its_pipe_is_nobody_elses_answer(
    deterministic: bool, reason: str, heard_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before it reads what it was sent: by another's kill, or by the pool's own at the wall deadline.

    A pool that hears of it `heard_s` seconds late hears the next grader's answers with it.
    """
    receive, waits = Child.receive, [heard_s]

    def late(child: Child) -> list[object]:
        if child.jobs and waits:
            time.sleep(waits.pop())
        return receive(child)

    monkeypatch.setattr(Child, "receive", late)
    before = set(psutil.Process().children())
    kinds = ["right" if number * 7919 % 13 < 5 else "wrong" for number in range(300)]
    expected = ["correct" if kind == "right" else "wrong" for kind in kinds]
    items = [item(kind) for kind in kinds]
    with RewardPool(config(workers=1, deadline_s=1.0), deterministic) as pool:
        (worker,) = set(psutil.Process().children()) - before
        (grader,) = worker.children()
        grader.suspend()
        verdicts = pool.submit(items)
        time.sleep(0.5)  # they are in the pipe, as far as it takes them
        if deterministic:
            grader.kill()
        assert [v.reason for v in verdicts.result(60)] == [reason, *expected[1:]]
        for _ in range(3):
            assert [v.reason for v in pool.grade(items)] == expected
        assert pool.replaced == 1


def test_a_job_that_is_suspended_times_no_answer_out() -> None:
    code = (
        "from rloop_mcore.config import RewardConfig\n"
        "from rloop_mcore.reward.pool import RewardPool\n"
        "from rloop_mcore.types import Problem\n"
        "items = [(Problem('p', '', 'right'), response, False) for response in ['nap', 'nap', 'right']]\n"
        f"with RewardPool(RewardConfig(verifier={BAD!r}, workers=2, deadline_s=3.0), deterministic=False) as pool:\n"
        "    verdicts = pool.submit(items)\n"
        "    print('begun', flush=True)\n"
        "    print(*[verdict.reason for verdict in verdicts.result()])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "begun\n"
        processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        for process in processes:
            process.suspend()
        time.sleep(6)
        for process in processes:
            process.resume()
        assert job.communicate(timeout=60)[0].split() == ["wrong", "wrong", "correct"]


def test_a_worker_killed_while_idle_is_replaced_and_blames_nobody() -> None:
    before = set(psutil.Process().children())
    with RewardPool(config(workers=1)) as pool:
        (worker,) = set(psutil.Process().children()) - before
        (grader,) = worker.children()  # the kernel ends it with the worker, a moment later
        worker.kill()
        psutil.wait_procs([worker, grader], 10)
        assert pool.grade([item("right")])[0].correct


def test_a_grader_makes_room_for_a_fresh_one_after_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "RECYCLE_AFTER", 100)
    before = set(psutil.Process().children())
    with RewardPool(config(workers=1)) as pool:
        (worker,) = set(psutil.Process().children()) - before
        first = {grader.pid for grader in worker.children()}
        for _ in range(4):
            assert all(v.correct for v in pool.grade([item("right")] * 70))
        assert first.isdisjoint(grader.pid for grader in worker.children())
        assert pool.replaced == 0  # none was lost


def test_calls_are_graded_side_by_side_and_a_failed_one_harms_no_other() -> None:
    with RewardPool(config(max_failure_share=0.25)) as pool:
        bad = pool.submit([item("raise")] * 40)
        good = [pool.submit([item("right" if n % 2 else "no")] * 10) for n in range(20)]
        with pytest.raises(TooManyFailures):
            bad.result(60)
        for n, future in enumerate(good):
            assert [v.correct for v in future.result(60)] == [n % 2 == 1] * 10
        assert pool.submit([]).result(60) == []
        assert [v.correct for v in pool.grade([item("right")])] == [True]


def test_asyncio_goes_on_while_answers_hang() -> None:
    async def run(pool: RewardPool) -> list[str]:
        hanging = asyncio.wrap_future(pool.submit([item("loop")]))
        ticks = 0
        while not hanging.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 5
        return [v.reason for v in await hanging]

    with RewardPool(config()) as pool:
        assert asyncio.run(run(pool)) == ["timeout"]


def test_back_pressure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "MOST_PENDING", 30)
    with RewardPool(config(workers=1)) as pool:
        slow = pool.submit([item("loop")] * 1 + [item("right")] * 39)
        start = time.monotonic()
        assert pool.grade([item("right")])[0].correct  # waited for room
        assert time.monotonic() - start > 0.1
        assert Counter(v.reason for v in slow.result(60)) == {"timeout": 1, "correct": 39}


def test_workers_are_children_without_torch_and_end_with_the_pool() -> None:
    before = set(psutil.Process().children())
    with RewardPool(config()) as pool:
        workers = set(psutil.Process().children()) - before
        assert len(workers) == 2
        graders = [grader.pid for worker in workers for grader in worker.children()]
        assert pool.grade([(Problem("p", "", "", meta={"graders": graders}), "pid", False)])[0].reason == "correct"
        assert not pool.grade([item("torch")])[0].correct
    assert not any(worker.is_running() for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade([item("right")])


def test_workers_of_a_killed_trainer_die() -> None:
    code = (
        "import os, psutil, signal\n"
        "from rloop_mcore.config import RewardConfig\n"
        "from rloop_mcore.reward.pool import RewardPool\n"
        f"RewardPool(RewardConfig(verifier={BAD!r}, workers=2)).__enter__()\n"
        "print(*[p.pid for p in psutil.Process().children(recursive=True)], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 4, run.stderr  # a worker and its grader, twice
    for pid in pids:
        try:
            process = psutil.Process(pid)
        except psutil.NoSuchProcess:
            continue
        assert process.status() == psutil.STATUS_ZOMBIE or process.wait(10) is None


def test_too_many_failures_stop_the_run() -> None:
    with RewardPool(config(max_failure_share=0.5)) as pool:
        assert pool.grade([item("raise")])[0].reason == "crashed"  # a single answer is no share
        half = pool.grade([item("raise"), item("right")] * 10)
        assert Counter(v.reason for v in half) == {"crashed": 10, "correct": 10}
        with pytest.raises(TooManyFailures, match=r"max_failure_share=0.5.*ValueError: no verdict"):
            pool.grade([item("raise")] * 11 + [item("right")] * 9)


@pytest.mark.parametrize(
    ("verifier", "message"),
    [
        ("maths", "no known verifier: use math, exact, choice, countdown or"),
        ("no_such_package.verifier:fn", "cannot import 'no_such_package.verifier'"),
        ("tests.reward.bad_verifiers:absent", "has no function 'absent'"),
        ("tests.reward.bad_verifiers:NOT_A_FUNCTION", "has no function 'NOT_A_FUNCTION'"),
        (":fn", "no known verifier"),
    ],
)
def test_a_verifier_that_cannot_be_loaded(verifier: str, message: str) -> None:
    before = psutil.Process().children()
    with pytest.raises(UserError, match=message), RewardPool(config(verifier)):
        pass
    assert psutil.Process().children() == before


def test_math_in_the_pool_with_its_canaries() -> None:
    bomb = r"\boxed{9^{9^{9^{9}}}!}"
    with RewardPool(config("math", workers=1, deadline_s=1.0, memory_mib=2048)) as pool:
        assert not pool.counts  # the canaries are not counted
        responses = [r"\boxed{\sqrt{12}}", r"\boxed{12}", "12", bomb]
        verdicts = pool.grade([item(response, gold=r"2\sqrt{3}") for response in responses])
    assert [v.reason for v in verdicts] == ["correct", "wrong", "no_answer", "timeout"]


def test_a_wrong_canary_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = [("1", "1", True), ("1", "2", True)]
    monkeypatch.setattr(canaries_module, "CANARIES", canaries)
    with (
        pytest.raises(UserError, match=r"math verifier is broken here: .*'2'.*'1'.*wrong, not correct"),
        RewardPool(config("math", workers=1, deadline_s=5.0, memory_mib=2048)),
    ):
        pass


def test_canaries_are_graded_again_as_the_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "CANARIES_EVERY", 50)
    right = (Problem("p", "", "1"), r"\boxed{1}", False)
    with RewardPool(config("math", workers=1, deadline_s=5.0, memory_mib=2048)) as pool:
        for _ in range(3):
            assert all(v.correct for v in pool.grade([right] * 60))
        assert pool.counts == {"correct": 180}
        # as if the verifier had begun to call it correct
        monkeypatch.setattr(canaries_module, "CANARIES", [*canaries_module.CANARIES[:-1], ("1", "1", False)])

        def go_on() -> None:
            for _ in range(20):
                pool.grade([right] * 60)

        with pytest.raises(UserError, match=r"math verifier is broken here: it calls the answer '1'"):
            go_on()
