"""Who does what on the nodes of a job."""

from __future__ import annotations

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.errors import UserError
from rloop_mcore.planning.nodes import Roles, on_one_node, roles


def of(*overrides: str) -> Roles:
    return roles(load_config(["experiment=tiny", "run.dir=x", *overrides]))


def shares(found: Roles) -> list[list[int]]:
    """The engines of each node."""
    return [list(found.engines_of(node)) for node in range(found.nodes)]


def test_one_node_keeps_its_engines_beside_rank_0() -> None:
    found = of("layout.dp=4", "rollout.engines=3")
    assert (found.trainers, found.ranks, shares(found)) == (1, 4, [[]])
    assert not found.hosts


def test_all_nodes_train_and_generate() -> None:
    found = of("cluster.nodes=2", "layout.dp=4", "rollout.engines=4")
    assert (found.trainers, found.ranks, shares(found)) == (2, 2, [[0, 1], [2, 3]])


def test_the_last_nodes_have_engines_only() -> None:
    found = of("cluster.nodes=5", "rollout.nodes=3", "layout.tp=2", "layout.dp=2", "rollout.engines=6")
    assert (found.trainers, found.ranks, shares(found)) == (2, 2, [[], [], [0, 1], [2, 3], [4, 5]])


def test_engines_that_run_already_are_nobodys() -> None:
    endpoints = ("rollout.engine=sglang", "rollout.endpoints=['http://h:1']")
    assert not of("cluster.nodes=2", "layout.dp=2", *endpoints).hosts


def test_one_node_has_the_engines_of_a_node() -> None:
    for apart in (0, 2):
        job = load_config(["experiment=tiny", "run.dir=x", "cluster.nodes=4", f"rollout.nodes={apart}"])
        job.layout.dp, job.rollout.engines = 4, 8
        alone = on_one_node(job)
        assert (alone.cluster.nodes, alone.rollout.nodes, alone.rollout.engines) == (1, 0, 8 // (apart or 4))
        assert alone.layout.dp == 1  # nothing is trained there
    assert on_one_node(alone) == alone


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.nodes=1"], "rollout.nodes=1 leaves the trainer none of cluster.nodes=1"),
        (["cluster.nodes=2", "layout.dp=3", "rollout.engines=2"], "asks for 3 processes, which 2 nodes"),
        (["cluster.nodes=3", "rollout.nodes=2", "rollout.engines=3"], "must be a multiple of the 2 nodes"),
        (
            ["cluster.nodes=2", "layout.dp=18", "rollout.engines=2", "cluster.gpus_per_node=8"],
            "18 processes, and",
        ),
        (["cluster.nodes=2", "rollout.nodes=1", "rollout.endpoints=['http://h:1']"], "both say where the engines are"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        of(*overrides)
    assert words in str(caught.value)
