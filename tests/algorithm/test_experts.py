"""What RFT leaves of its experts, against the definition in a few lines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rloop_mcore.algorithm.experts import narrowed
from rloop_mcore.config import Config, RftConfig
from rloop_mcore.errors import UserError
from rloop_mcore.types import Trajectory
from rloop_mcore.validate import check_values


def expert(step: int, problem: int, sample: int, tokens: int) -> Trajectory:
    ids = tuple(range(tokens))
    return Trajectory(0, step, f"p{problem}", sample, (1,), ids, (-1.0,) * tokens, "stop", (), True, 1.0, "correct")


keys = st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 5))
experts = st.lists(keys, unique_by=lambda key: key[:3], max_size=40).map(
    lambda found: [expert(*key) for key in sorted(found)]
)


def test_the_paper_takes_all() -> None:
    rows = [expert(step, 0, 0, 3) for step in range(5)]
    assert narrowed(rows, Config().rft, seed=0) == rows


@given(rows=experts, first=st.integers(0, 3), length=st.integers(0, 3), tokens=st.integers(0, 5))
def test_steps_and_lengths(rows: list[Trajectory], first: int, length: int, tokens: int) -> None:
    found = narrowed(rows, RftConfig(steps=[first, first + length], min_tokens=tokens), seed=0)
    assert found == [r for r in rows if first <= r.step <= first + length and len(r.response_ids) >= tokens]


@given(rows=experts, most=st.integers(1, 4), share=st.floats(0.05, 1.0), seed=st.integers(0, 9))
def test_cap_and_share(rows: list[Trajectory], most: int, share: float, seed: int) -> None:
    capped = narrowed(rows, RftConfig(max_per_problem=most), seed)
    before, after = (Counter(r.problem_id for r in some) for some in (rows, capped))
    assert after == {problem: min(count, most) for problem, count in before.items()}
    shared = narrowed(rows, RftConfig(max_per_problem=most, share=share), seed)
    assert len(shared) == math.ceil(share * len(capped))
    assert [r for r in rows if r in shared] == shared
    assert [r for r in capped if r in shared] == shared


def test_draws_are_by_seed_and_stay_when_others_go() -> None:
    rows = [expert(step, step % 3, sample, 2) for step in range(6) for sample in range(8)]
    rft = RftConfig(max_per_problem=2)
    one, two = narrowed(rows, rft, seed=1), narrowed(rows, rft, seed=2)
    assert one != two
    assert narrowed([r for r in rows if r.problem_id != "p1"], rft, seed=1) == [r for r in one if r.problem_id != "p1"]


def steps(rft: RftConfig) -> None:
    rft.steps = [4, 2]


def share(rft: RftConfig) -> None:
    rft.share = 0.0


@pytest.mark.parametrize(("mistake", "words"), [(steps, r"rft\.steps=\[4, 2\] must be"), (share, r"rft\.share=0\.0")])
def test_a_mistake_names_the_key(mistake: Callable[[RftConfig], None], words: str) -> None:
    config = Config()
    config.run.dir, config.model.path, config.data.train = "x", "x", "x"
    mistake(config.rft)
    with pytest.raises(UserError, match=words):
        check_values(config)
