"""The checks of one node, in step with those of the others."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import is_disk_full
from rloop_mcore.platform.network import address_of, address_towards
from rloop_mcore.preflight.collectives import Workers, rounds, seconds
from rloop_mcore.preflight.facts import Facts, gather
from rloop_mcore.preflight.judge import Findings
from rloop_mcore.preflight.meeting import Meeting
from rloop_mcore.preflight.place import Place
from rloop_mcore.preflight.reach import Clock, Door, Porter, knock, knocking_s, leave_a_sign, remove_signs, unseen

_MARGIN_S = 7.0
_RESOLVE_S = 5.0


def check(config: Config, place: Place, clock: Clock = time.time) -> Findings:
    """Everything about all nodes, the same on each of them. Raises NoMaster, and Fault on node 0."""
    run_dir, word, trouble = Path(config.run.dir), "", dict[str, str]()
    try:
        word = leave_a_sign(run_dir, place.rank)
    except OSError as error:
        if not is_disk_full(error):  # that is nobody's fault, and the free space will say it
            trouble["run.dir"] = f"run.dir={run_dir} can't be written ({error.strerror})"
    mine = gather(config)
    mine.trouble.update(trouble)
    try:
        with Workers(place, mine.device, max(1, len(mine.gpus))) as workers:
            return _meet(config, place, mine, word, workers, clock)
    finally:
        if place.rank == 0:
            remove_signs(run_dir)


def _meet(config: Config, place: Place, mine: Facts, word: str, workers: Workers, clock: Clock) -> Findings:
    timeout_s, run_dir = config.preflight.timeout_s, Path(config.run.dir)
    meeting = Meeting(place, timeout_s)
    address = meeting.address if place.rank == 0 else address_towards(meeting.address)
    if config.cluster.interface is not None and place.nodes > 1:  # as the run takes it
        try:
            address = address_of(config.cluster.interface)
        except UserError as error:
            mine.trouble["interface"] = str(error)
    with Porter(address, clock) as porter:
        opening = {"facts": asdict(mine), "door": asdict(porter.door), "word": word, "address": address}
        said = meeting.share("facts", opening, timeout_s)
        facts = {rank: Facts.of(values["facts"]) for rank, values in said.items()}
        others = [rank for rank in said if rank != place.rank]
        doors = {rank: Door(**said[rank]["door"]) for rank in others}
        words = {rank: said[rank]["word"] for rank in others if word and said[rank]["word"]}
        with ThreadPoolExecutor(3) as pool:
            asked: dict[str, Future[Any]] = {
                "doors": pool.submit(knock, doors, clock),
                "unseen": pool.submit(unseen, run_dir, words),
                "unknown": pool.submit(_unknown, place.names),
            }
            learned = {what: answer.result() for what, answer in asked.items()}
        links = meeting.share("links", learned, knocking_s(place.nodes) + _MARGIN_S)
    devices = Counter(facts[rank].device for rank in meeting.members if facts[rank].device != "none").most_common(1)
    able = [rank for rank in meeting.members if devices and facts[rank].device == devices[0][0]]
    rates = {}
    apart = any("error" in answer for values in links.values() for answer in values["doors"].values())
    if able and not apart and not any("interface" in each.trouble for each in facts.values()):
        plan, count = rounds(able), max(1, min(len(facts[rank].gpus) for rank in able))
        results = workers.run(plan, (meeting.address, meeting.port), address, count) if place.rank in able else []
        rates = meeting.share("collectives", {"results": results}, seconds(plan))
    meeting.leave()
    return Findings(
        names=_names(place, {rank: each.host for rank, each in facts.items()}),
        addresses={rank: values["address"] for rank, values in said.items()},
        lost=meeting.lost,
        facts=facts,
        links=links,
        rates={rank: values["results"] for rank, values in rates.items()},
    )


def _names(place: Place, hosts: dict[int, str]) -> dict[int, str]:
    """What the nodes are called: as was said, else by their host names."""
    if place.names:
        return dict(enumerate(place.names))
    alike = Counter(hosts.values())
    named = {rank: host if alike[host] == 1 else f"{host}/{rank}" for rank, host in hosts.items()}
    return {rank: named.get(rank, place.name(rank)) for rank in range(place.nodes)}


def _unknown(names: Sequence[str]) -> list[str]:
    """Those that don't resolve here."""

    def resolves(name: str) -> bool:
        try:
            return bool(socket.getaddrinfo(name, None))
        except OSError:
            return False

    pool = ThreadPoolExecutor(max(1, len(names)))
    asked = {name: pool.submit(resolves, name) for name in names}
    wait(asked.values(), _RESOLVE_S)
    pool.shutdown(wait=False, cancel_futures=True)
    return [name for name, answer in asked.items() if not (answer.done() and answer.result())]
