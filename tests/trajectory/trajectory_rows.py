"""Trajectories for the tests: hypothesis strategies and a seeded generator."""

import random

import numpy as np
from hypothesis import strategies as st

from rloop_mcore.types import Trajectory

int32 = st.integers(-(2**31), 2**31 - 1)
float32 = st.floats(width=32, allow_nan=False)


@st.composite
def trajectories(draw, max_size=30):
    """Some trajectories with distinct keys, few problems, few distinct responses."""
    keys = st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(["a", "b", "ü/1", ""]), st.integers(0, 5))
    rows = []
    for iteration, step, problem_id, sample in draw(st.lists(keys, unique=True, max_size=max_size)):
        response = draw(st.sampled_from([(), (1,), (1, 2), (2, 1)]) | st.lists(int32, max_size=3).map(tuple))
        row = Trajectory(
            iteration,
            step,
            problem_id,
            sample,
            prompt_ids=draw(st.lists(int32, max_size=2).map(tuple)),
            response_ids=response,
            logprobs=tuple(draw(st.lists(float32, min_size=len(response), max_size=len(response)))),
            finish_reason=draw(st.sampled_from(["stop", "length"])),
            weight_versions=tuple(draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 99)), max_size=3))),
            correct=draw(st.integers(0, 3)) == 0,
            reward=draw(st.floats(allow_nan=False)),
            reason=draw(st.text(max_size=5)),
        )
        rows.append(row)
    return rows


def phases(seed: int) -> list[Trajectory]:
    """Two iterations of five problems with 4, 8, 10 or 20 samples each, shuffled: rates at, below and above the usual
    thresholds are common, so are equal responses to one problem and to different ones."""
    source = random.Random(seed)
    rows = []
    for iteration in (0, 1):
        for problem in range(5):
            samples = source.choice([4, 8, 10, 20])
            correct = set(source.sample(range(samples), source.randrange(4)))
            for sample in range(samples):
                ids = source.choice([(1, 2), (1, 3), (1,), (2, 1)])
                row = Trajectory(
                    iteration,
                    step=sample // 4,
                    problem_id=f"p{problem}",
                    sample=sample,
                    prompt_ids=(5,),
                    response_ids=ids,
                    logprobs=(-0.5,) * len(ids),
                    finish_reason="stop",
                    weight_versions=((0, 3),),
                    correct=sample in correct,
                    reward=0.0,
                    reason="",
                )
                rows.append(row)
    source.shuffle(rows)
    return rows


def step_rows(iteration: int, step: int, problems: int = 4, group: int = 4) -> list[Trajectory]:
    """A step's groups, the same for the same arguments."""
    source = random.Random(f"{iteration} {step}")
    rows = []
    for problem in range(problems):
        for sample in range(group):
            ids = tuple(source.randrange(100) for _ in range(source.randrange(1, 9)))
            logprobs = tuple(float(np.float32(-source.random())) for _ in ids)
            runs = ((step, len(ids)),)
            correct = source.random() < 0.2
            rows.append(
                Trajectory(
                    iteration, step, f"p{problem}", sample, (5, 6), ids, logprobs, "stop", runs, correct, 0.1, ""
                )
            )
    return rows
