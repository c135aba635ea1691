"""Seeds, permutations and batches: pure functions, and the same numbers for ever."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rloop_mcore.algorithm.minibatch import mini_batches
from rloop_mcore.algorithm.permutation import permutation
from rloop_mcore.algorithm.rft import batch_indices, update_count
from rloop_mcore.algorithm.seeds import derive_seed

GOLDEN = Path(__file__).parents[1] / "golden"


def test_golden_numbers():
    """Regenerate with `python tests/golden/make_algorithm.py`: that changes every run that is to be repeated."""
    spec = importlib.util.spec_from_file_location("make_algorithm", GOLDEN / "make_algorithm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.values() == json.loads((GOLDEN / "algorithm.json").read_text())


def test_seeds_differ_in_every_argument_and_fit_31_bits():
    names = [
        (run, purpose, iteration, step, problem, sample)
        for run in (0, 1)
        for purpose in ("rollout", "evaluation")
        for iteration in range(3)
        for step in range(10)
        for problem in ("1", "11", "1,1")
        for sample in range(16)
    ]
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert abs(sum(seeds) / len(seeds) / 2**31 - 0.5) < 0.02
    assert derive_seed(0, "a", "1", 1) != derive_seed(0, "a", 1, "1")


@given(st.integers(0, 50), st.integers(0, 2**31 - 1))
def test_permutation_has_every_number_once(count, seed):
    assert sorted(permutation(count, seed)) == list(range(count))


def test_permutations_of_four_are_all_about_as_frequent():
    counts = Counter(tuple(permutation(4, seed)) for seed in range(4800))
    assert len(counts) == 24
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260


@given(st.integers(0, 60), st.integers(1, 20), st.integers(0, 1000))
def test_mini_batches_share_out_everything_evenly(count, updates, seed):
    batches = mini_batches(count, updates, seed)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert len(batches) == min(count, updates)
    sizes = [len(batch) for batch in batches]
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_the_papers_batch_makes_16_mini_batches_of_512_over_which_groups_are_split():
    groups, group_size, updates = 512, 16, 16
    batches = mini_batches(groups * group_size, updates, seed=0)
    assert [len(batch) for batch in batches] == [512] * updates
    homes = Counter(group for batch in batches for group in {index // group_size for index in batch})
    independent = updates * (1 - (1 - 1 / updates) ** group_size)  # mini-batches a group falls into, about 10.3
    assert sum(homes.values()) / groups == pytest.approx(independent, rel=0.05)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000))
def test_every_epoch_takes_each_example_once_and_only_its_last_batch_is_short(examples, batch_size, epochs, seed):
    updates = update_count(examples, batch_size, epochs)
    batches = [batch_indices(update, examples, batch_size, seed) for update in range(updates)]
    per_epoch = updates // epochs
    for epoch in range(epochs):
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(index for batch in mine for index in batch) == list(range(examples))
        assert all(len(batch) == batch_size for batch in mine[:-1])


def test_epochs_have_different_orders():
    assert batch_indices(0, 50, 50, seed=3) != batch_indices(1, 50, 50, seed=3)


@pytest.mark.parametrize(("examples", "batch_size", "epochs", "updates"), [(10, 4, 1, 3), (8, 4, 2, 4), (0, 4, 1, 0)])
def test_update_count(examples, batch_size, epochs, updates):
    assert update_count(examples, batch_size, epochs) == updates
