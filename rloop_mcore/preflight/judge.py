"""From what the nodes found out to what is wrong, and with which of them. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median_high, median_low
from typing import Any

from rloop_mcore.config import Config
from rloop_mcore.preflight.facts import Facts

OK, USER, BAD_NODE = 0, 2, 69

_IDLE_MIB = 2048  # what a driver and its tools may keep of a GPU's memory
_FEWEST_TO_COMPARE = 4  # links, to call one slow
_SLOW_GPU_LINK = 0.5


@dataclass(frozen=True)
class Problem:
    """`nodes`: whose it is; none where it is everybody's, and so no node's."""

    check: str
    nodes: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class Findings:
    """What was found out, by rank. `names` of all nodes; `lost`: who fell silent in which check; the others' facts and
    what they learned of each other; the results of the collectives."""

    names: Mapping[int, str]
    addresses: Mapping[int, str]
    lost: Mapping[int, str]
    facts: Mapping[int, Facts]
    links: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    rates: Mapping[int, Sequence[Mapping[str, Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    problems: list[Problem]
    warnings: list[Problem]

    @property
    def bad_nodes(self) -> list[str]:
        return list(dict.fromkeys(node for problem in self.problems for node in problem.nodes))

    @property
    def exit_code(self) -> int:
        return BAD_NODE if self.bad_nodes else USER if self.problems else OK


def judge(config: Config, found: Findings) -> Verdict:
    """Everything that is wrong: the nodes that fell silent first."""
    waited = config.preflight.timeout_s
    problems = [
        Problem(
            "present",
            (found.names[rank],),
            f"{found.names[rank]}: "
            + (f"did not come within {waited:g} s" if stage == "facts" else f"fell silent in the check of {stage}"),
        )
        for rank, stage in sorted(found.lost.items())
    ]
    slow, rates = _rates(config, found)
    problems += [*_gpus(config, found), *_versions(found), *_space(config, found), *_links(found)]
    models = {rank: facts.trouble["model"] for rank, facts in found.facts.items() if "model" in facts.trouble}
    problems += [*_of_nodes(found, "model", models, fewest=1), *_clocks(config, found), *rates, *slow]
    return Verdict(problems, _unresolved(found))


def blame(pairs: Iterable[tuple[int, int]]) -> set[int]:
    """The ranks whose being bad explains these bad pairs best: again and again the one in most pairs, or all such."""
    left, blamed = {frozenset(pair) for pair in pairs}, set[int]()
    while left:
        counts = Counter(rank for pair in left for rank in pair)
        worst = {rank for rank, count in counts.items() if count == max(counts.values())}
        blamed |= worst
        left = {pair for pair in left if not pair & worst}
    return blamed


def _of_nodes(found: Findings, check: str, texts: Mapping[int, str], fewest: int = 2) -> list[Problem]:
    """A problem a node; one that all have, and they are `fewest` at least, is no node's."""
    if len(texts) == len(found.facts) >= fewest:
        return [Problem(check, (), f"every node: {texts[min(texts)]}")]
    return [Problem(check, (name := found.names[rank],), f"{name}: {text}") for rank, text in sorted(texts.items())]


def _of_pairs(found: Findings, check: str, texts: Mapping[tuple[int, int], str], fewest: int = 3) -> list[Problem]:
    """The nodes to blame for what is wrong between these pairs, each with one of its pairs' words.

    Of two nodes that can't work together both are bad: two others may.
    """
    blamed = {rank: next(text for pair, text in texts.items() if rank in pair) for rank in blame(texts)}
    return _of_nodes(found, check, blamed, fewest)


def _gpus(config: Config, found: Findings) -> list[Problem]:
    present = found.facts.items()
    wanted, key = config.cluster.gpus_per_node, "cluster.gpus_per_node="
    if not wanted:
        wanted, key = _usual([len(facts.gpus) for _, facts in present]), "the others' "
    texts: dict[int, list[str]] = {}
    usual = _usual([facts.device for _, facts in present if "gpus" not in facts.trouble] or ["none"])
    for rank, facts in present:
        said = texts.setdefault(rank, [])
        if "gpus" in facts.trouble:
            said.append(facts.trouble["gpus"])
        elif facts.device != usual:
            said.append(f"torch runs on {facts.device} here, on {usual} elsewhere")
        elif facts.device == "cuda" and len(facts.gpus) != wanted:
            said.append(f"{len(facts.gpus)} GPUs, not {key}{wanted}")
        for gpu in facts.gpus:
            if gpu.processes or gpu.used_mib > _IDLE_MIB:
                said.append(f"GPU {gpu.index} is in use ({gpu.used_mib} MiB, {gpu.processes} processes)")
    return _of_nodes(found, "gpus", {rank: "; ".join(said) for rank, said in texts.items() if said})


def _versions(found: Findings) -> list[Problem]:
    """A node differs from most of the others; of two, from node 0."""
    texts: dict[int, str] = {}
    for name in sorted({name for facts in found.facts.values() for name in facts.versions}):
        of = {rank: facts.versions.get(name, "absent") for rank, facts in found.facts.items()}
        usual = _usual(list(of.values()))
        for rank, version in of.items():
            if version != usual:
                said = f"{name} {version}, not {usual} as elsewhere"
                texts[rank] = f"{texts[rank]}; {said}" if rank in texts else said
    return _of_nodes(found, "versions", texts)


def _space(config: Config, found: Findings) -> list[Problem]:
    """What lacks in `run.dir` is no node's fault: they share it."""
    asked, run = config.preflight, config.run.dir
    texts: dict[int, str] = {}
    problems = []
    for rank, facts in found.facts.items():
        said = [text for check, text in facts.trouble.items() if check.startswith("/")]
        for folder, needed, key in (("/tmp", asked.tmp_gib, "tmp_gib"), ("/dev/shm", asked.shm_gib, "shm_gib")):
            if (free := facts.free_gib.get(folder, needed)) < needed:
                said.append(f"{free:g} GiB are free in {folder}, not preflight.{key}={needed:g}")
        if said:
            texts[rank] = "; ".join(said)
    unwritable = {rank: facts.trouble["run.dir"] for rank, facts in found.facts.items() if "run.dir" in facts.trouble}
    problems += _of_nodes(found, "space", unwritable, fewest=1)
    free = min((facts.free_gib[run] for facts in found.facts.values() if run in facts.free_gib), default=0.0)
    if free < asked.run_gib and not unwritable:
        message = f"run.dir={run}: {free:g} GiB are free there, not preflight.run_gib={asked.run_gib:g}"
        problems.append(Problem("space", (), message))
    return [*problems, *_of_nodes(found, "space", texts)]


def _links(found: Findings) -> list[Problem]:
    """Who has no such interface, who can't be reached, and who sees another `run.dir`."""
    without = {rank: facts.trouble["interface"] for rank, facts in found.facts.items() if "interface" in facts.trouble}
    unreached = {
        (rank, int(other)): f"cannot be reached, or cannot reach others ({answer['error']})"
        for rank, learned in found.links.items()
        for other, answer in learned["doors"].items()
        if "error" in answer and not {rank, int(other)} & without.keys()
    }
    unseen = {
        (rank, other): "sees another run.dir than the other nodes: it must be on a file system that all share"
        for rank, learned in found.links.items()
        for other in learned["unseen"]
    }
    return [
        *_of_nodes(found, "network", without),
        *_of_pairs(found, "network", unreached),
        *_of_pairs(found, "run.dir", unseen, fewest=2),
    ]


def _clocks(config: Config, found: Findings) -> list[Problem]:
    """Against the median of the clocks; of two, against node 0's."""
    first = min(found.links, default=0)
    doors = found.links[first]["doors"].items() if found.links else ()
    ahead = {first: 0.0} | {int(rank): answer["ahead_s"] for rank, answer in doors if "ahead_s" in answer}
    usual = median_low(ahead.values()) if len(ahead) > 2 else 0.0
    limit = config.preflight.clock_skew_s
    texts = {
        rank: f"its clock is {abs(off - usual):.1f} s {'ahead of' if off > usual else 'behind'} the others', more than "
        f"preflight.clock_skew_s={limit:g}"
        for rank, off in ahead.items()
        if abs(off - usual) > limit
    }
    return _of_nodes(found, "clock", texts)


def _rates(config: Config, found: Findings) -> tuple[list[Problem], list[Problem]]:
    """(Slow links, failed collectives): a link is slow that has less than a share of the median one's bandwidth."""
    failed, everyone = dict[tuple[int, int], str](), ""
    for result in (result for results in found.rates.values() for result in results if "error" in result):
        text = f"a collective failed: {result['error']}"
        if result["round"] == "all" and len(result["nodes"]) > 1:
            everyone = text
        else:
            failed[result["nodes"][0], result["nodes"][-1]] = text
    problems = _of_pairs(found, "collectives", failed)
    if everyone and not problems:
        problems = [Problem("collectives", (), f"every node: {everyone}, over all nodes and no pair of them")]
    speeds = {(a, b): speed for a, b, speed in link_speeds(found)}
    gpus = any(facts.device == "cuda" for facts in found.facts.values())
    share = config.preflight.slow_link
    share = share if share is not None else _SLOW_GPU_LINK * gpus
    if len(speeds) < _FEWEST_TO_COMPARE or not share:
        return [], problems
    usual = median_high(speeds.values())
    slow = {
        pair: f"its links are slow: {speed:.3g} GB/s, less than preflight.slow_link={share:g} of the usual {usual:.3g}"
        for pair, speed in speeds.items()
        if speed < share * usual
    }
    return _of_pairs(found, "slow", slow), problems


def link_speeds(found: Findings) -> list[tuple[int, int, float]]:
    """Of each link of the ring that worked: its ends, GB/s of its all-reduce."""
    results = {tuple(r["nodes"]): r for rs in found.rates.values() for r in rs if r["round"] != "all"}
    return [(ends[0], ends[1], r["all_reduce_gb_s"]) for ends, r in sorted(results.items()) if "error" not in r]


def _unresolved(found: Findings) -> list[Problem]:
    """Names that nodes don't know: nothing fails by it where addresses are used."""
    nodes: dict[tuple[str, ...], list[str]] = {}
    for rank, learned in sorted(found.links.items()):
        nodes.setdefault(tuple(learned["unknown"]), []).append(found.names[rank])
    return [
        Problem("name", tuple(by), f"{', '.join(by)}: {', '.join(unknown)} can't be resolved")
        for unknown, by in nodes.items()
        if unknown
    ]


def _usual(values: list[Any]) -> Any:
    """The most frequent value; of several the first."""
    return Counter(values).most_common(1)[0][0]
