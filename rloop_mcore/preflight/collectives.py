"""A small all-reduce and broadcast over every link of a ring of the nodes, then over all of them, and how fast.

They run in processes of their own, one a GPU (one a node without): a collective that hangs can only be killed. A bad
link of the ring tells which node it is that the others can't talk with.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import psutil

from rloop_mcore import platform
from rloop_mcore.platform.process import die_with_parent
from rloop_mcore.preflight.place import Place

_GROUP_S = 20.0  # for a group to form, and for each of its collectives
_MARGIN_S = 10.0
_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}  # fp32: 4 MiB, 256 MiB
_REPEATS = 5  # the quickest counts: the first ones open connections


@dataclass(frozen=True)
class Round:
    """Groups of nodes that work at the same time; each node is in one at most."""

    name: str
    groups: tuple[tuple[int, ...], ...]


def rounds(members: Sequence[int]) -> list[Round]:
    """Every link of the ring of `members`, in two rounds (three where they are odd), then all of them at once."""
    count = len(members)
    links = [(members[i], members[(i + 1) % count]) for i in range(count if count > 2 else count - 1)]
    even = count - count % 2
    parts = (links[:even:2], links[1:even:2], links[even:])
    ring = [Round(f"ring{number}", tuple(part)) for number, part in enumerate(parts) if part]
    return [*ring, Round("all", (tuple(members),))]


class Workers:
    """This node's processes. Make them before threads are, and before CUDA is touched. A context manager."""

    def __init__(self, place: Place, device: str, count: int) -> None:
        """count: GPUs that this node has; 1 on a CPU."""
        context = multiprocessing.get_context("fork")  # torch is imported already: nothing has to start anew
        self._place, self._children = place, []
        for local in range(count):
            ours, theirs = context.Pipe()
            parent = os.getpid()
            child = context.Process(target=_work, args=(theirs, parent, place, device, local), daemon=True)
            child.start()
            theirs.close()
            self._children.append((child, ours))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for child, pipe in self._children:
            pipe.close()
            child.kill()
            child.join()

    def run(self, plan: Sequence[Round], store: tuple[str, int], address: str, count: int) -> list[dict[str, Any]]:
        """What became of each round that this node is in: {"round", "nodes", "all_reduce_gb_s", ...} or {..., "error"}.

        store: address and port of a rendezvous store; address: this node's, of the interface that gloo takes; count:
        GPUs that every node gives.
        """
        mine = [(step.name, group) for step in plan for group in step.groups if self._place.rank in group]
        message = {"store": store, "interface": _interface(address), "rounds": mine, "count": count}
        children = self._children[:count]
        for _, pipe in children:
            pipe.send_bytes(json.dumps(message).encode())
        deadline = time.monotonic() + seconds(plan)
        results = []
        for name, group in mine:
            answers = [_answer(pipe, deadline) for _, pipe in children]
            errors = [answer["error"] for answer in answers if "error" in answer]
            results.append({"round": name, "nodes": group, **({"error": errors[0]} if errors else answers[0])})
        return results


def seconds(plan: Sequence[Round]) -> float:
    """A plan takes no longer."""
    return _MARGIN_S + 2 * _GROUP_S * len(plan)


def _answer(pipe: Connection, deadline: float) -> dict[str, Any]:
    try:
        if pipe.poll(max(0.0, deadline - time.monotonic())):
            return dict(json.loads(pipe.recv_bytes()))
    except (EOFError, OSError):
        return {"error": "the process that took part in it died"}
    return {"error": "it did not end"}


def _interface(address: str) -> str | None:
    """The name of the interface that has this address."""
    addresses = psutil.net_if_addrs().items()
    return next((name for name, entries in addresses if any(e.address == address for e in entries)), None)


def _work(pipe: Connection, parent: int, place: Place, device: str, local: int) -> None:
    """The process of GPU `local` of this node."""
    die_with_parent(parent)
    with suppress(EOFError):
        message = json.loads(pipe.recv_bytes())
        count = message["count"]
        if message["interface"]:
            for library in ("GLOO", "NCCL"):
                os.environ.setdefault(f"{library}_SOCKET_IFNAME", message["interface"])
        os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")  # as in training: it takes a switch's own sums (NVLS) away
        for name, group in message["rounds"]:
            rank = group.index(place.rank) * count + local
            answer: dict[str, Any]
            try:
                answer = _measure(f"{name}/{group[0]}", message["store"], device, local, rank, len(group) * count)
            except Exception as error:  # whatever a driver or a network says
                answer = {"error": str(error).strip().partition("\n")[0]}
            pipe.send_bytes(json.dumps(answer).encode())


def _measure(group: str, at: tuple[str, int], device: str, local: int, rank: int, world: int) -> dict[str, float]:
    """Bus bandwidths in GB/s, as nccl-tests counts them: bytes sent over a link a second."""
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=_GROUP_S)
    where = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if where.type == "cuda":
        torch.cuda.set_device(where)
    store = dist.TCPStore(*at, is_master=False, timeout=timeout, wait_for_workers=False)
    backend = platform.backend(device)
    dist.init_process_group(backend, store=dist.PrefixStore(group, store), rank=rank, world_size=world, timeout=timeout)
    try:
        values = torch.full((_ELEMENTS[device],), float(rank + 1), device=where)
        dist.all_reduce(values)
        if not bool((values == world * (world + 1) / 2).all()):
            raise ArithmeticError("an all-reduce gave a wrong sum")
        dist.broadcast(values.fill_(float(rank)), 0)
        if not bool((values == 0).all()):
            raise ArithmeticError("a broadcast gave wrong values")
        if world == 1:
            return {"all_reduce_gb_s": 0.0, "broadcast_gb_s": 0.0}
        gigabytes = values.numel() * values.element_size() / 1e9
        return {
            "all_reduce_gb_s": gigabytes * 2 * (world - 1) / world / _quickest(lambda: dist.all_reduce(values), where),
            "broadcast_gb_s": gigabytes / _quickest(lambda: dist.broadcast(values, 0), where),
        }
    finally:
        dist.destroy_process_group()


def _quickest(collective: Callable[[], Any], where: Any) -> float:
    """Seconds of the best of a few."""
    import torch

    def timed() -> float:
        begin = time.perf_counter()
        collective()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        return time.perf_counter() - begin

    return min(timed() for _ in range(_REPEATS))
