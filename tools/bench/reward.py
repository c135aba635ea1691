"""The reward pool: its throughput against a bare math-verify loop, hostile answers, and what hanging ones cost a step.

- `core_vs_bare`: one worker against a loop of parse and verify in this process, answers all distinct.
- `batch_vs_bare`: the same on groups of 16 answers to a problem, most of them one of few, as a policy gives them.
- `hang_cost`: a rollout step whose groups finish at an engine that is simulated by sleeping, each graded as it comes;
  the share by which it takes longer with 1 % hanging answers than with none. Deadlines are wall time, as on a GPU.
- `adversarial_ungraded`, `workers_lost`: hostile answers (`hostile_answers.py`) without a verdict, and workers missing
  at the end. The wall time must stay under deadline x answers / workers, the memory under its limit.
"""

from __future__ import annotations

import logging
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable

import psutil
from common import Metric, arguments, at_least, at_most, report
from hostile_answers import hostile
from math_verify import parse, verify

from rloop_mcore.config import RewardConfig
from rloop_mcore.grading import Grading
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.types import Completion, Problem

Row = tuple[str, str]  # gold, answer
GROUP = 16
DEADLINE_S = 0.5
HANG = r"9^{9^{9^{9}}}!"


def distinct_rows(count: int, seed: int) -> list[Row]:
    """Golds and answers of the kinds that data sets have, about half right, no two alike."""
    draw = random.Random(f"distinct/{seed}")
    integer = lambda: draw.randint(2, 9999)  # noqa: E731
    kinds: list[Callable[[], Row]] = [
        lambda: (str(n := integer()), str(n + draw.choice([0, 1]))),
        lambda: (
            rf"\frac{{{(n := integer())}}}{{{(d := integer())}}}",
            rf"\frac{{{2 * n}}}{{{2 * d + draw.choice([0, 2])}}}",
        ),
        lambda: (rf"{(n := integer())}\sqrt{{{(r := integer())}}}", rf"\sqrt{{{n * n * r + draw.choice([0, 1])}}}"),
        lambda: (f"x^2+{(n := integer())}x", f"x(x+{n + draw.choice([0, 1])})"),
        lambda: (
            rf"({(n := integer())},\frac{{{integer()}}}{{7}})",
            rf"({n + draw.choice([0, 1])},\frac{{{integer()}}}{{7}})",
        ),
        lambda: (rf"[{(n := -integer())},\infty)", rf"[{n + draw.choice([0, 1])}, \infty)"),
        lambda: (rf"{(n := integer())}\pi", rf"\frac{{{2 * n + draw.choice([0, 1])}\pi}}{{2}}"),
        lambda: (f"{(n := integer())}+{(m := integer())}i", f"{m}i+{n + draw.choice([0, 1])}"),
    ]
    return [kinds[n % len(kinds)]() for n in range(count)]


def grouped_rows(problems: int, seed: int) -> list[Row]:
    """16 answers a problem, as a policy gives them on DAPO-Math-17k, whose golds are integers."""
    draw = random.Random(f"grouped/{seed}")
    rows = []
    for _ in range(problems):
        gold = draw.randint(2, 9999)
        rare = rf"\frac{{{draw.randint(2, 99)}}}{{{draw.randint(2, 99)}}}"
        answers = [str(gold), str(gold + draw.randint(1, 9)), f"x = {draw.randint(2, 9999)}", rare]
        rows += [(str(gold), draw.choices(answers, [6, 6, 3, 1])[0]) for _ in range(GROUP)]
    return rows


def respond(answer: str) -> str:
    """A whole response, about 2,000 characters long."""
    line = r"We have $x_n = \frac{a_n + b_n}{2}$, so that \(x_{n+1} - x_n = 3\). Then the sum is at most 17. "
    return line * 20 + rf"So the answer is \boxed{{{answer}}}."


def bare(rows: list[Row]) -> None:
    for gold, answer in rows:
        one = parse(rf"\boxed{{{gold}}}", parsing_timeout=None)
        verify(one, parse(respond(answer), parsing_timeout=None), timeout_seconds=None)


def items(rows: list[Row]) -> list[tuple[Problem, str, bool]]:
    return [(Problem("p", "", gold), respond(answer), False) for gold, answer in rows]


def against_bare(make: Callable[[int, int], list[Row]], count: int, repeats: int) -> float:
    """Median seconds of the bare loop over ours; every repeat has rows of its own: no cache is warm for them."""
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    with RewardPool(RewardConfig(workers=1)) as pool:
        for repeat in range(repeats + 1):
            rows = make(count, repeat)
            for name in ("ours", "bare") if repeat % 2 else ("bare", "ours"):
                start = time.perf_counter()
                pool.grade(items(rows)) if name == "ours" else bare(rows)
                if repeat:  # the first warms the parsers
                    seconds[name].append(time.perf_counter() - start)
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "bare"))
    print(f"  {make.__name__}: {count} x {repeats}, ours {ours:.2f} s, bare {theirs:.2f} s", flush=True)
    return theirs / ours


def step(pool: RewardPool, rows: list[Row], finish_s: list[float]) -> float:
    """Seconds of a step: a group's answers come when the engine is done with them, and are graded as `RLStep` does."""
    texts = [respond(answer) for _, answer in rows]
    start = time.perf_counter()
    with Grading(pool, [Problem("p", "", gold) for gold, _ in rows], lambda ids: texts[ids[0]]) as grading:
        for at_s, group in sorted(zip(finish_s, range(len(finish_s)), strict=True)):
            time.sleep(max(0.0, start + at_s - time.perf_counter()))
            come = range(GROUP * group, GROUP * (group + 1))
            grading.take(come, [Completion((row,), (), "stop", ()) for row in come])
        reasons = Counter(verdict.reason for verdict in grading.verdicts().values())
    assert reasons["timeout"] == sum(answer == HANG for _, answer in rows), reasons
    return time.perf_counter() - start


def hang_cost(problems: int, step_s: float, repeats: int) -> float:
    ratios = []
    with RewardPool(RewardConfig(workers=2, deadline_s=DEADLINE_S), deterministic=False) as pool:
        for repeat in range(repeats):
            draw = random.Random(repeat)
            rows = grouped_rows(problems, 1000 + repeat)
            hanging = set(draw.sample(range(len(rows)), max(1, len(rows) // 100)))
            some = [(gold, HANG if n in hanging else answer) for n, (gold, answer) in enumerate(rows)]
            # Response lengths: most groups are done early, each by its longest answer; the last at the token limit.
            finish_s = [step_s * min(1.0, draw.betavariate(4, 2)) for _ in range(problems - 1)] + [step_s]
            seconds = []
            for kind in (rows, some) if repeat % 2 else (some, rows):
                seconds.append((kind is some, step(pool, kind, finish_s)))
            with_hangs, without = dict(seconds)[True], dict(seconds)[False]
            ratios.append(with_hangs / without - 1)
            print(f"  step of {len(rows)} answers, {len(hanging)} hanging: {with_hangs:.2f} s, without {without:.2f} s")
        print(f"  verdicts: {dict(pool.counts)}", flush=True)
    return statistics.median(ratios)


def adversarial(count: int, workers: int) -> list[Metric]:
    rows = hostile(count)
    with RewardPool(
        RewardConfig(workers=workers, deadline_s=DEADLINE_S, max_failure_share=1.0), deterministic=False
    ) as pool:
        start = time.perf_counter()
        future = pool.submit([(Problem(kind, "", gold), response, False) for kind, gold, response in rows])
        peak = 0
        while not future.done():
            time.sleep(0.05)
            for process in psutil.Process().children(recursive=True):
                try:
                    peak = max(peak, process.memory_info().rss)
                except psutil.Error:
                    continue
        verdicts, seconds = future.result(), time.perf_counter() - start
        alive = [worker for worker in psutil.Process().children() if worker.is_running() and worker.children()]
        replaced = pool.replaced
    bound = DEADLINE_S * count / workers
    by_kind = Counter((kind, verdict.reason) for (kind, _, _), verdict in zip(rows, verdicts, strict=True))
    for kind in dict.fromkeys(kind for kind, _, _ in rows):
        reasons = {reason: n for (k, reason), n in sorted(by_kind.items()) if k == kind}
        print(f"  {kind:22} {reasons}")
    wrong = [(kind, gold, answer[:80]) for (kind, gold, answer), v in zip(rows, verdicts, strict=True) if v.correct]
    print(
        f"  {count} hostile answers, {workers} workers: {seconds:.0f} s (bound {bound:.0f} s), peak memory of a "
        f"process {peak / 2**20:.0f} MiB, {replaced} graders replaced, called correct: {wrong or 'none'}",
        flush=True,
    )
    return [
        at_most("adversarial_ungraded", count - len(verdicts), 0, f"{count} hostile answers"),
        at_most("workers_lost", workers - len(alive), 0, f"{workers} workers"),
        at_most("adversarial_wall", seconds / bound, 1.0, "deadline x answers / workers"),
        at_most("adversarial_memory", peak / 2**20 / 2500, 1.0, "2,500 MiB a process"),
    ]


def main() -> None:
    options = arguments(__doc__ or "")
    logging.disable(logging.WARNING)
    quick = options.quick
    metrics = [
        at_least(
            "core_vs_bare", against_bare(distinct_rows, 200 if quick else 600, 3 if quick else 7), 0.9, "bare loop"
        ),
        at_least("batch_vs_bare", against_bare(grouped_rows, 20 if quick else 60, 3 if quick else 7), 5.0, "bare loop"),
        at_most(
            "hang_cost",
            hang_cost(32 if quick else 64, 20 if quick else 30, 1 if quick else 3),
            0.05,
            "no hanging answer",
        ),
        *adversarial(220 if quick else 1000, 2),
    ]
    report("reward", metrics, options.json, {"sizes": "quick" if quick else "full"})


if __name__ == "__main__":
    main()
