"""Real preflights of several nodes on this host: a process a node, forked from a server that has imported torch."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rloop_mcore.main.arguments import parse

DEADLINE_S = 100.0
_SERVER = get_context("forkserver")
_SERVER.set_forkserver_preload(["torch.distributed", "rloop_mcore.main.preflight"])


@dataclass(frozen=True)
class Node:
    """What is special about a node: overrides of its own, seconds that its clock is ahead, a folder of fake packages,
    variables of its environment, seconds that it comes late."""

    overrides: Sequence[str] = ()
    ahead_s: float = 0.0
    site: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    late_s: float = 0.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(
    folder: Path, nodes: Sequence[Node | None], *overrides: str, options: Sequence[str] | None = None
) -> list[BaseProcess | None]:
    """Start the nodes, but for those that are None; node R writes to `folder/R.log`. options: instead of the usual."""
    usual = ["--nodes", str(len(nodes)), "--master", f"127.0.0.1:{free_port()}", "--names", f"n[0-{len(nodes) - 1}]"]
    started: list[BaseProcess | None] = []
    for rank, node in enumerate(nodes):
        if node is None:
            started.append(None)
            continue
        words = ["preflight.timeout_s=20", "preflight.run_gib=0.0001", "preflight.tmp_gib=0"]
        words += [f"run.dir={folder / 'run'}", *overrides, *node.overrides]
        words += [*usual, "--node-rank", str(rank)] if options is None else options
        process = _SERVER.Process(target=_be, args=(node, words, folder / f"{rank}.log"))
        process.start()
        started.append(process)
    return started


def finish(folder: Path, started: Sequence[BaseProcess | None]) -> tuple[list[int | None], dict[str, Any], str]:
    """Exit codes by rank, the report, and what all nodes have printed."""
    deadline = time.monotonic() + DEADLINE_S
    for process in started:
        if process is not None:
            process.join(max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, f"a node hangs: {printed(folder)}"
    codes = [None if process is None else process.exitcode for process in started]
    return codes, json.loads((folder / "run" / "preflight.json").read_text()), printed(folder)


def run(folder: Path, nodes: Sequence[Node | None], *overrides: str) -> tuple[list[int | None], dict[str, Any], str]:
    return finish(folder, start(folder, nodes, *overrides))


def printed(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("*.log")))


def _be(node: Node, words: list[str], log: Path) -> None:
    """The life of a node."""
    from rloop_mcore.main.preflight import preflight

    if node.site is not None:
        sys.path.insert(0, str(node.site))
    os.environ.update(node.environment)
    time.sleep(node.late_s)
    options = parse(["preflight", *words])
    with open(log, "w", buffering=1) as file, redirect_stdout(file), redirect_stderr(file):
        code = preflight(options, clock=lambda: time.time() + node.ahead_s)
    os._exit(code)
