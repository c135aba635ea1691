"""From facts to the bad nodes: pure functions, checked by hand-made clusters and by brute force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.preflight.collectives import rounds
from rloop_mcore.preflight.facts import Facts, Gpu
from rloop_mcore.preflight.judge import Findings, blame, judge

VERSIONS = {"python": "3.12.1", "torch": "2.14.1", "driver": "570.1"}


def configure(*overrides: str) -> Config:
    return load_config(["run.dir=/run", "model.path=m", "data.train=d", *overrides])


def gpus(count: int, **changes: Any) -> list[Gpu]:
    return [replace(Gpu(i, f"GPU-{i}", "H100", used_mib=3, processes=0), **changes) for i in range(count)]


def cluster(changes: Mapping[int, Mapping[str, Any]], nodes: int = 4, device: str = "cuda") -> Findings:
    """Fit nodes, and those with `changes` of their facts."""
    free = {"/run": 100.0, "/tmp": 50.0, "/dev/shm": 8.0}
    fit = Facts("h", device, gpus(8 if device == "cuda" else 0), VERSIONS, free)
    facts = {rank: replace(fit, **changes.get(rank, {})) for rank in range(nodes)}
    doors = {rank: {str(o): {"ahead_s": 0.0} for o in facts if o != rank} for rank in facts}
    links = {rank: {"doors": doors[rank], "unseen": [], "unknown": []} for rank in facts}
    return Findings({rank: f"n{rank}" for rank in facts}, {}, {}, facts, links)


def said(config: Config, found: Findings) -> list[str]:
    return [problem.message for problem in judge(config, found).problems]


def test_a_fit_cluster_has_no_problem() -> None:
    verdict = judge(configure("cluster.gpus_per_node=8"), cluster({}))
    assert (verdict.problems, verdict.bad_nodes, verdict.exit_code) == ([], [], 0)


def test_gpus_that_are_missing_or_in_use() -> None:
    found = cluster({1: {"gpus": gpus(7)}, 2: {"gpus": gpus(8, used_mib=40000, processes=1)[:1] + gpus(8)[1:]}})
    assert said(configure("cluster.gpus_per_node=8"), found) == [
        "n1: 7 GPUs, not cluster.gpus_per_node=8",
        "n2: GPU 0 is in use (40000 MiB, 1 processes)",
    ]
    assert said(configure(), found)[0] == "n1: 7 GPUs, not the others' 8"
    blind = cluster({3: {"device": "cpu", "gpus": []}})
    assert said(configure(), blind) == ["n3: torch runs on cpu here, on cuda elsewhere"]
    hung = cluster({3: {"gpus": [], "trouble": {"gpus": "nvidia-smi did not answer within 30 s"}}})
    assert judge(configure(), hung).bad_nodes == ["n3"]


def test_too_few_gpus_everywhere_are_the_users() -> None:
    verdict = judge(configure("cluster.gpus_per_node=16"), cluster({}))
    assert [p.message for p in verdict.problems] == ["every node: 8 GPUs, not cluster.gpus_per_node=16"]
    assert (verdict.bad_nodes, verdict.exit_code) == ([], 2)
    alone = judge(configure("cluster.gpus_per_node=16"), cluster({}, nodes=1))
    assert (alone.bad_nodes, alone.exit_code) == (["n0"], 69)


def test_versions_are_held_against_most_nodes_or_node_0() -> None:
    other = {"versions": VERSIONS | {"driver": "550.2"}}
    assert said(configure(), cluster({0: other})) == ["n0: driver 550.2, not 570.1 as elsewhere"]
    assert said(configure(), cluster({1: other}, nodes=2)) == ["n1: driver 550.2, not 570.1 as elsewhere"]
    without = {"versions": {k: v for k, v in VERSIONS.items() if k != "torch"}}
    assert said(configure(), cluster({2: without})) == ["n2: torch absent, not 2.14.1 as elsewhere"]


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_space_in_run_dir_is_nobodys_and_in_tmp_a_nodes(nodes: int) -> None:
    full = {"free_gib": {"/run": 0.01, "/tmp": 50.0, "/dev/shm": 8.0}}
    verdict = judge(configure(), cluster(dict.fromkeys(range(nodes), full), nodes))
    assert [p.message for p in verdict.problems] == ["run.dir=/run: 0.01 GiB are free there, not preflight.run_gib=1"]
    assert verdict.exit_code == 2
    small = cluster({0: {"free_gib": {"/run": 100.0, "/tmp": 0.5, "/dev/shm": 0.06}}}, nodes=4)
    assert said(configure(), small) == [
        "n0: 0.5 GiB are free in /tmp, not preflight.tmp_gib=1; "
        "0.06 GiB are free in /dev/shm, not preflight.shm_gib=0.25"
    ]


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_run_dir_that_nobody_can_write_is_the_users_and_that_one_cannot_is_its_nodes(nodes: int) -> None:
    unwritable = {"trouble": {"run.dir": "run.dir=/run can't be written (File exists)"}}
    verdict = judge(configure(), cluster(dict.fromkeys(range(nodes), unwritable), nodes))
    assert [p.message for p in verdict.problems] == ["every node: run.dir=/run can't be written (File exists)"]
    assert verdict.exit_code == 2
    assert said(configure(), cluster({1: unwritable}, nodes=4)) == ["n1: run.dir=/run can't be written (File exists)"]


def test_clocks() -> None:
    def ahead(*seconds: float) -> list[str]:
        found = cluster({}, nodes=len(seconds))
        doors = {str(r): {"ahead_s": s - seconds[0]} for r, s in enumerate(seconds) if r}
        return said(configure(), replace(found, links={**found.links, 0: {**found.links[0], "doors": doors}}))

    assert ahead(0.0, 0.5, -0.5, 1.9) == []
    assert ahead(0.0, 0.0, 60.0) == ["n2: its clock is 60.0 s ahead of the others', more than preflight.clock_skew_s=2"]
    assert ahead(-60.0, 0.0, 0.0)[0].startswith("n0: its clock is 60.0 s behind")
    assert ahead(-60.0, 0.0)[0].startswith("n1: its clock is 60.0 s ahead")  # of two, node 0 is right


def test_a_node_that_nobody_reaches_is_bad_and_its_neighbours_are_not() -> None:
    found = cluster({})
    error = {"error": "10.0.0.2:4: timed out"}
    doors = {r: {o: error if "2" in (str(r), o) else a for o, a in v["doors"].items()} for r, v in found.links.items()}
    found = replace(found, links={r: {**v, "doors": doors[r]} for r, v in found.links.items()})
    verdict = judge(configure(), found)
    assert (verdict.bad_nodes, verdict.exit_code) == (["n2"], 69)
    assert verdict.problems[0].message == "n2: cannot be reached, or cannot reach others (10.0.0.2:4: timed out)"


def rates(found: Findings, answer: Any) -> Findings:
    """With the results of the ring's collectives: `answer(a, b)` is a dict."""
    plan = rounds(sorted(found.facts))
    results: dict[int, list[dict[str, Any]]] = {rank: [] for rank in found.facts}
    for step in plan:
        for group in step.groups:
            for rank in group:
                ends = (group[0], group[-1])
                results[rank].append({"round": step.name, "nodes": list(group), **answer(*ends)})
    return replace(found, rates=results)


def test_a_slow_node_is_the_one_with_two_slow_links() -> None:
    def speed(a: int, b: int) -> dict[str, float]:
        return {"all_reduce_gb_s": 4.0 if 3 in (a, b) else 40.0, "broadcast_gb_s": 1.0}

    slow = rates(cluster({}, nodes=6), speed)
    assert said(configure(), slow) == [
        "n3: its links are slow: 4 GB/s, less than preflight.slow_link=0.5 of the usual 40"
    ]
    assert said(configure("preflight.slow_link=0"), slow) == []
    on_cpu = rates(cluster({}, nodes=6, device="cpu"), speed)
    assert said(configure(), on_cpu) == []
    assert judge(configure("preflight.slow_link=0.2"), on_cpu).bad_nodes == ["n3"]


def test_a_collective_that_fails() -> None:
    def failing(bad: int) -> Any:
        return lambda a, b: {"error": "connect timed out"} if bad in (a, b) or a == 0 else {"all_reduce_gb_s": 1.0}

    verdict = judge(configure(), rates(cluster({}, nodes=5), failing(2)))
    assert "n2" in verdict.bad_nodes
    two = judge(configure(), rates(cluster({}, nodes=2), failing(1)))
    assert (two.bad_nodes, two.exit_code) == (["n0", "n1"], 69)  # one of them, and two others may do


def test_blame_is_as_small_as_it_can_be_where_one_node_explains_all() -> None:
    for nodes in range(3, 7):
        for bad in range(nodes):
            pairs = [(a, b) for a, b in combinations(range(nodes), 2) if bad in (a, b)]
            assert blame(pairs) == {bad}
    assert blame([]) == set()
    assert blame([(1, 2)]) == {1, 2}
    assert blame([(0, 1), (1, 2), (4, 4)]) == {1, 4}


@pytest.mark.parametrize("nodes", range(1, 9))
def test_rounds_are_the_links_of_a_ring_none_at_once_with_its_neighbour(nodes: int) -> None:
    plan = rounds(range(nodes))
    links = [group for step in plan[:-1] for group in step.groups]
    ring = {frozenset((i, (i + 1) % nodes)) for i in range(nodes)} if nodes > 1 else set()
    assert {frozenset(link) for link in links} == ring
    assert len(links) == len(ring)
    for step in plan:
        members = [rank for group in step.groups for rank in group]
        assert len(members) == len(set(members))
    assert plan[-1].groups == (tuple(range(nodes)),)
    assert len(plan) <= 4
