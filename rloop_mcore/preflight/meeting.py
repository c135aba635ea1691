"""Where the nodes meet: a store that node 0 hosts. No node waits for another longer than it says."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from rloop_mcore.errors import Fault
from rloop_mcore.platform.network import address_towards
from rloop_mcore.platform.process_group import host_store
from rloop_mcore.preflight.place import Place

_GRACE_S = 15.0  # for what node 0 knows to reach the others
_POLL_S = 0.05


class NoMaster(Exception):
    """Node 0 can't be reached, or fell silent, or went on without this node; says which."""


class Meeting:
    """The nodes that are still there (`members`), and those that fell silent, with what was waited for (`lost`)."""

    def __init__(self, place: Place, timeout_s: float) -> None:
        """Raises NoMaster, and on node 0 Fault where the address can't be listened on."""
        self.place = place
        self.members = list(range(place.nodes))
        self.lost: dict[int, str] = {}
        try:
            self.address = str(socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)[0][4][0])
        except OSError as error:
            raise NoMaster(f"its name {place.host} does not resolve ({error.strerror})") from error
        if place.rank == 0:
            if place.names[1:] and self.address.startswith("127."):
                self.address = _seen_by(place.names[1]) or self.address
            try:
                self._store = host_store(self.address, timeout_s, place.port)
            except OSError as error:
                raise Fault(f"node 0 can't listen at {place.host}:{place.port} ({error}): choose another.") from error
            self.port = self._store.port
            return
        self.port = place.port
        self._knock(timeout_s)
        try:
            self._store = self.connect(_GRACE_S)
        except (dist.DistError, RuntimeError) as error:
            raise NoMaster(f"is no preflight at {place.host}:{place.port} ({self.address})") from error

    def connect(self, timeout_s: float) -> dist.TCPStore:
        """Another connection to the store."""
        timeout = timedelta(seconds=timeout_s)
        return dist.TCPStore(self.address, self.port, is_master=False, timeout=timeout, wait_for_workers=False)

    def _knock(self, timeout_s: float) -> None:
        """Wait until somebody listens at node 0's address."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                left = max(deadline - time.monotonic(), _POLL_S)
                return socket.create_connection((self.address, self.port), left).close()
            except OSError as error:
                if time.monotonic() > deadline:
                    where = f"{self.place.host}:{self.port} ({self.address})"
                    raise NoMaster(f"can't be reached at {where} within {timeout_s:g} s ({error})") from error
            time.sleep(_POLL_S)

    def share(self, stage: str, mine: dict[str, Any], timeout_s: float) -> dict[int, dict[str, Any]]:
        """What every member has to say, by rank. Those that say nothing within `timeout_s` are members no more."""
        try:
            self._store.set(f"{stage}/{self.place.rank}", json.dumps(mine))
            if self.place.rank == 0:
                self._publish(stage, timeout_s)
            self._store.wait([stage], timedelta(seconds=timeout_s + _GRACE_S))
            everyone = {int(rank): values for rank, values in json.loads(self._store.get(stage)).items()}
        except (dist.DistError, RuntimeError) as error:
            raise NoMaster(f"fell silent in the check of {stage}") from error
        self.lost |= {rank: stage for rank in self.members if rank not in everyone}
        self.members = sorted(everyone)
        if self.place.rank not in everyone:
            raise NoMaster(f"did not wait longer than {timeout_s:g} s for {self.place.name(self.place.rank)}")
        return everyone

    def leave(self) -> None:
        """Node 0 stays until the others have read everything."""
        with suppress(dist.DistError, RuntimeError):
            self._store.set(f"left/{self.place.rank}", "")
            if self.place.rank == 0:
                self._wait_for([f"left/{rank}" for rank in self.members], _GRACE_S)

    def _publish(self, stage: str, timeout_s: float) -> None:
        keys = [f"{stage}/{rank}" for rank in self.members]
        self._wait_for(keys, timeout_s)
        said = {
            rank: json.loads(self._store.get(key))
            for rank, key in zip(self.members, keys, strict=True)
            if self._store.check([key])
        }
        self._store.set(stage, json.dumps(said))

    def _wait_for(self, keys: list[str], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def _seen_by(name: str) -> str | None:
    """Where another node finds this one, whose own name leads to loopback, as Debian has it; None: there, too."""
    with suppress(OSError):  # the name is unknown
        if not (address := address_towards(name)).startswith("127."):
            return address
    return None
