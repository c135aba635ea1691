"""Which of a job's nodes this is, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rloop_mcore.errors import UserError
from rloop_mcore.platform.network import usual_port

_ITEM = re.compile(r"[^,\[\]]*(?:\[[^\[\]]*\][^,\[\]]*)*")


@dataclass(frozen=True)
class Place:
    """Node `rank` of `nodes`; node 0 listens at `host`:`port`. `names`: by rank, () where nobody has given them."""

    nodes: int
    rank: int
    host: str
    port: int
    names: tuple[str, ...]

    def name(self, rank: int) -> str:
        return self.names[rank] if self.names else f"node {rank}"


def place_of(
    nodes: int | None, rank: int | None, master: str | None, names: str | None, environment: Mapping[str, str]
) -> Place:
    """From the options, else from the variables that srun sets, else a world of one. Raises UserError."""
    step, job = environment.get("SLURM_STEP_NUM_NODES"), environment.get("SLURM_JOB_NUM_NODES", "1")
    if nodes is None and step is None and job != "1":
        raise UserError(f"the job has {job} nodes: write `srun --ntasks-per-node=1 rloop preflight ...`, or --nodes 1.")
    nodes = nodes if nodes is not None else int(step or 1)
    rank = rank if rank is not None else int(environment.get("SLURM_NODEID", 0))
    listed = names if names is not None else environment.get("SLURM_STEP_NODELIST", "")
    known = tuple(expand(listed)) if listed else ()
    if nodes < 1:
        raise UserError(f"--nodes {nodes} must be at least 1.")
    if not 0 <= rank < nodes:
        raise UserError(f"--node-rank {rank} must be from 0 to {nodes - 1}: --nodes is {nodes}.")
    if known and len(known) != nodes:
        if names is not None:
            raise UserError(f"--names {names} are {len(known)} names; --nodes is {nodes}.")
        known = ()  # of the whole step, and only some of it is asked about
    if len(set(known)) != len(known):
        raise UserError(f"--names {names} names a node twice.")
    if nodes == 1 and master is None:
        return Place(1, 0, "127.0.0.1", 0, known)
    if master is None:
        if not (known and "SLURM_JOB_ID" in environment):
            raise UserError(f"--nodes {nodes} needs --master HOST:PORT, where node 0 can be reached.")
        return Place(nodes, rank, known[0], usual_port(int(environment["SLURM_JOB_ID"])), known)
    host, _, port = master.rpartition(":")
    if not (host and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--master {master}: write HOST:PORT, e.g. {known[0] if known else 'n1'}:29411.")
    return Place(nodes, rank, host.strip("[]"), int(port), known)


def expand(text: str) -> list[str]:
    """The names of a list as Slurm writes it: `n[01-03,7],m1` is n01, n02, n03, n7, m1. Raises UserError."""
    items = _ITEM.findall(text)
    if ",".join(item for item in items if item) != text.replace(" ", ""):
        raise UserError(f"--names {text}: write n1,n2 or n[1-2,5].")
    return [name for item in items if item for name in _expand_item(item, text)]


def _expand_item(item: str, whole: str) -> list[str]:
    head, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, tail = rest.partition("]")
    tails = _expand_item(tail, whole) if tail else [""]
    return [f"{head}{number}{end}" for part in inside.split(",") for number in _numbers(part, whole) for end in tails]


def _numbers(part: str, whole: str) -> list[str]:
    """`08-10` is 08, 09, 10."""
    first, dash, last = part.partition("-")
    if not first.isdigit() or (dash and not (last.isdigit() and int(first) <= int(last))):
        raise UserError(f"--names {whole}: {part!r} is no number and no range of numbers.")
    return [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
