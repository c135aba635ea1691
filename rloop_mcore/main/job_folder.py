"""How the nodes of one job find each other: by files in a folder of the run that is new for every start of the job."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rloop_mcore.errors import Fault
from rloop_mcore.main.run_directory import FOLDER_VARIABLE
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.platform.network import address_of, addresses

_SEEN_VARIABLE = "SLURM_LAUNCH_NODE_IPADDR"  # the first node, as a task sees it
_POLL_S = 0.1

T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """Where the first node is reached: address, and port of torchrun's rendezvous."""

    address: str
    port: int


@dataclass(frozen=True)
class JobFolder:
    folder: Path

    @classmethod
    def of_this_job(cls) -> JobFolder | None:
        """Of the start that this process belongs to."""
        folder = os.environ.get(FOLDER_VARIABLE)
        return cls(Path(folder)) if folder else None

    @property
    def stop_flag(self) -> Path:
        """Made by the batch script when Slurm warns it."""
        return self.folder / "stop"

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    # -- what a node says -----------------------------------------------------------------------------------------

    def hello(self, node: int) -> None:
        """This node is there: its name, which machine it is, and how it sees the first node."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        self._write(
            f"node-{node}.json",
            {"host": socket.gethostname(), "boot": boot, "head": os.environ.get(_SEEN_VARIABLE, "")},
        )

    def publish_head(self, head: Head) -> None:
        self._write("head.json", {"address": head.address, "port": head.port})

    def write_failure(self, node: int, failure: dict[str, Any]) -> None:
        """How the first of this node's ranks to fall did so."""
        self._write(f"failed-{node}.json", {"node": node, "host": socket.gethostname(), **failure})

    def ask_for_stacks(self, stamp: str) -> None:
        """The run hangs: every node is to keep its stacks, under this stamp."""
        self._write("stacks.json", {"stamp": stamp})

    def stacks_kept(self, node: int, where: str) -> None:
        self._write(f"stacks-{node}.json", {"where": where})

    def end(self, code: int) -> None:
        """The first node is done, and so is the job: its exit code."""
        write_atomic(self.folder / "code", str(code))

    def new_key(self) -> None:
        """The key of the job's engines, in a file that only the user can read."""
        key = self.folder / "key"
        descriptor = os.open(key.with_suffix(".new"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        key.with_suffix(".new").replace(key)

    # -- what a node hears ----------------------------------------------------------------------------------------

    def ended(self) -> bool:
        return (self.folder / "code").exists()

    def key(self) -> str:
        return (self.folder / "key").read_text()

    def head(self) -> Head:
        return Head(**json.loads((self.folder / "head.json").read_text()))

    def wait_for_head(self, timeout_s: float) -> Head | None:
        """Wait for `publish_head`; None where the first node ends instead. Raises Fault."""
        if not _within(timeout_s, lambda: self.ended() or (self.folder / "head.json").exists()):
            raise Fault(
                f"waited {timeout_s:g} s (cluster.start_timeout_s) for the first node to check the configuration: see "
                f"{self.folder}"
            )
        return None if self.ended() else self.head()

    def wait_for_nodes(self, nodes: int, timeout_s: float) -> list[dict[str, str]]:
        """What nodes 1 .. `nodes` - 1 said in `hello`. Raises Fault that names those that said nothing."""
        files = {node: self.folder / f"node-{node}.json" for node in range(1, nodes)}
        _within(timeout_s, lambda: all(file.exists() for file in files.values()))
        if missing := [str(node) for node, file in files.items() if not file.exists()]:
            raise Fault(
                f"waited {timeout_s:g} s (cluster.start_timeout_s) for nodes {', '.join(missing)} of 0 to {nodes - 1} "
                f"of the job: see their logs in {self.folder}"
            )
        return [json.loads(file.read_text()) for file in files.values()]

    def stacks_asked(self, node: int) -> str | None:
        """The stamp of `ask_for_stacks`, where this node has not answered yet."""
        asked = self.folder / "stacks.json"
        if not asked.exists() or (self.folder / f"stacks-{node}.json").exists():
            return None
        return str(json.loads(asked.read_text())["stamp"])

    def wait_for_stacks(self, nodes: int, timeout_s: float) -> list[str]:
        """What nodes 1 .. `nodes` - 1 say in `stacks_kept`, as far as they do within `timeout_s`."""
        files = [self.folder / f"stacks-{node}.json" for node in range(1, nodes)]
        _within(timeout_s, lambda: all(file.exists() for file in files))
        return [json.loads(file.read_text())["where"] for file in files if file.exists()]

    def failures(self, nodes: int) -> list[dict[str, Any]]:
        """What was written by `write_failure` so far: ranks killed by a signal first, then by time.

        The file system's: the nodes' clocks may be apart.
        """
        files = [self.folder / f"failed-{node}.json" for node in range(nodes)]
        files = sorted((file for file in files if file.exists()), key=lambda file: file.stat().st_mtime_ns)
        return sorted((json.loads(file.read_text()) for file in files), key=lambda failure: failure["code"] >= 0)

    def _write(self, name: str, fields: dict[str, Any]) -> None:
        write_atomic(self.folder / name, json.dumps(fields))


def _within(timeout_s: float, condition: Callable[[], bool]) -> bool:
    """Whether it comes true in that time, which is waited for it."""
    deadline = time.monotonic() + timeout_s
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return true


def head_address(others: list[dict[str, str]], interface: str | None) -> str:
    """The address of this, the first, node at which the others reach it: that of `interface`, else as they see it.

    Where they see it on loopback, they are this machine, or its name leads there by mistake.
    """
    if interface is not None:
        return address_of(interface)
    own = addresses()
    seen = {other["head"] for other in others}
    if len(seen) == 1 and (address := seen.pop()) in own and not address.startswith("127."):
        return address
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if all(other["boot"] == boot for other in others):
        return "127.0.0.1"
    outside = [address for address, name in own.items() if name != "lo"]
    if not outside:
        raise Fault(f"{socket.gethostname()} has no address but loopback, and {len(others)} other nodes to talk to")
    return outside[0]
