"""The similarity matrix at the paper's size against a loop over Python sets, and what ten times the problems take:
`python tools/bench/analysis.py`.

30 problems x 32 samples x 20 checkpoints, responses of up to 2,048 tokens. The loop takes minutes over all of it, so it
is timed on a few pairs of the same responses (the sets made beforehand) and taken times the number of pairs. What goes
through all problems one by one should take ten times as long for ten times as many, not a hundred times.
"""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
from common import Metric, arguments, at_least, at_most, report

from rloop_mcore.analysis.answers import Answers, make_answers
from rloop_mcore.analysis.coverage import distinct_solutions
from rloop_mcore.analysis.similarity import similarity_matrix

VOCABULARY, LONGEST, GOAL_S = 152_000, 2048, 30.0


def policy_responses(generator: np.random.Generator, problems: int, samples: int, drift: float) -> Answers:
    """Responses that share phrases, as those of a language model do: Zipf over phrases that move with `drift`."""
    phrases = np.random.default_rng(1).integers(0, VOCABULARY, (4000, 12))
    rows = []
    for problem in range(problems):
        favourites = np.random.default_rng(problem).permutation(len(phrases))
        for _ in range(samples):
            length = int(generator.integers(300, LONGEST))
            ranks = generator.zipf(1.3, length // 8) + int(drift * 40)
            ids = phrases[favourites[ranks % len(phrases)], :8].ravel()
            noise = generator.random(len(ids)) < 0.05
            rows.append(
                (f"p{problem}", np.where(noise, generator.integers(0, VOCABULARY, len(ids)), ids).tolist(), False)
            )
    return make_answers(rows)


def seconds_a_pair(checkpoints: list[Answers]) -> float:
    """Of the loop over sets."""
    sets = []
    for answers in checkpoints[:2]:
        for row in answers.rows_of("p0")[:16]:
            ids = answers.response(row).tolist()
            sets.append(set(pairwise(ids)))
    begun = time.perf_counter()
    for a in sets:
        for b in sets:
            len(a & b) / len(a | b)
    return (time.perf_counter() - begun) / len(sets) ** 2


def seconds_of_distinct(problems: int) -> float:
    """Of the different correct solutions to so many problems, 32 short samples each."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (problems, 32, 4)).tolist()
    answers = make_answers([(f"p{p}", ids, True) for p, samples in enumerate(tokens) for ids in samples])
    begun = time.perf_counter()
    distinct_solutions(answers)
    return time.perf_counter() - begun


def main() -> None:
    options = arguments(__doc__ or "")
    problems, samples, steps = (4, 16, 6) if options.quick else (30, 32, 20)
    generator = np.random.default_rng(0)
    checkpoints = [policy_responses(generator, problems, samples, step / steps) for step in range(steps)]
    begun = time.perf_counter()
    matrix = similarity_matrix(checkpoints, checkpoints[0].problems)
    seconds = time.perf_counter() - begun
    assert matrix.shape == (steps, steps)
    pairs = problems * (samples * steps) * (samples * steps + 1) / 2
    naive = seconds_a_pair(checkpoints) * pairs
    few, many = (seconds_of_distinct(count) for count in (1_000, 10_000))
    size = f"{problems} problems x {samples} samples x {steps} checkpoints"
    metrics = [
        at_least("similarity_vs_sets", naive / seconds, 20.0, f"a loop over Python sets, {naive:.0f} s for {size}"),
        Metric("similarity_s", round(seconds, 2), "s", f"< {GOAL_S:g}", size, seconds < GOAL_S),
        at_most(
            "distinct_growth", many / few, 25.0, f"{many:.1f} s for 10,000 problems x 32 samples, for 1,000 {few:.2f}"
        ),
    ]
    report("analysis", metrics, options.json)


if __name__ == "__main__":
    main()
