"""What RFT leaves of its experts, against the definition in a few lines."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rloop_mcore.algorithm.experts import Key, drawn
from rloop_mcore.config import AlgorithmConfig, Config, RftConfig, RunConfig
from rloop_mcore.errors import UserError
from rloop_mcore.run_state import expert_query
from rloop_mcore.types import ExpertQuery
from rloop_mcore.validate import check_values

keys = st.tuples(st.just(0), st.integers(0, 4), st.sampled_from("abc"), st.integers(0, 5))
experts = st.lists(keys, unique=True, max_size=40).map(sorted)


def of(keys: list[Key], query: ExpertQuery) -> list[Key]:
    return [keys[position] for position in drawn(keys, query)]


def test_the_paper_takes_all() -> None:
    found = [(0, step, "a", 0) for step in range(5)]
    assert of(found, expert_query(Config(), 0)) == found


def test_what_is_set_is_asked() -> None:
    rft = RftConfig(deduplicate=False, steps=[2, 4], min_tokens=3, max_per_problem=5, share=0.5, earlier_iterations=1)
    config = Config(rft=rft, algorithm=AlgorithmConfig(hard_threshold=0.2), run=RunConfig(seed=7))
    assert expert_query(config, 3) == ExpertQuery((2, 3), 0.2, False, (2, 4), 3, 5, 0.5, 7)
    assert expert_query(config, 0).iterations == (0,)


@given(found=experts, most=st.integers(1, 4), share=st.floats(0.05, 1.0), seed=st.integers(0, 9))
def test_cap_and_share(found: list[Key], most: int, share: float, seed: int) -> None:
    capped = of(found, ExpertQuery((0,), 0.1, max_per_problem=most, seed=seed))
    before, after = (Counter(problem for _, _, problem, _ in some) for some in (found, capped))
    assert after == {problem: min(count, most) for problem, count in before.items()}
    shared = of(found, ExpertQuery((0,), 0.1, max_per_problem=most, share=share, seed=seed))
    assert len(shared) == math.ceil(Fraction(str(share)) * len(capped))
    assert [key for key in capped if key in shared] == shared


@pytest.mark.parametrize(("share", "count", "left"), [(0.07, 100, 7), (0.55, 100, 55), (0.28, 25, 7), (0.07, 101, 8)])
def test_a_share_is_the_number_as_written(share: float, count: int, left: int) -> None:
    found = [(0, step, "a", 0) for step in range(count)]
    assert len(of(found, ExpertQuery((0,), 0.1, share=share))) == left


def test_draws_are_by_seed_and_stay_when_others_go() -> None:
    found = [(0, step, "abc"[step % 3], sample) for step in range(6) for sample in range(8)]
    one, two = (of(found, ExpertQuery((0,), 0.1, max_per_problem=2, seed=seed)) for seed in (1, 2))
    assert one != two
    left = of([key for key in found if key[2] != "b"], ExpertQuery((0,), 0.1, max_per_problem=2, seed=1))
    assert left == [key for key in one if key[2] != "b"]


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
