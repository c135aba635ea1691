"""Can the nodes reach each other, do their clocks agree, do they see the same folder?"""

from __future__ import annotations

import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Clock = Callable[[], float]

_CONNECT_S = 5.0
_SEEN_S = 8.0  # a network file system may show another node's file that late
_ASKED = 3  # times for the time: the quickest answer counts
_AT_ONCE = 32


@dataclass(frozen=True)
class Door:
    """Where a node answers, and the word that it answers to."""

    address: str
    port: int
    word: str


def knocking_s(nodes: int) -> float:
    """What `knock` and `unseen` take at most, side by side."""
    return max(_SEEN_S, _CONNECT_S * -(-nodes // _AT_ONCE))


class Porter:
    """Tells whoever knows the word this node's time; nobody else anything. A context manager."""

    def __init__(self, address: str, clock: Clock) -> None:
        word = secrets.token_hex(16)

        class Handler(socketserver.StreamRequestHandler):
            timeout = _CONNECT_S

            def handle(self) -> None:
                with suppress(OSError):
                    while self.rfile.readline(64).decode(errors="replace").strip() == word:
                        self.wfile.write(f"{clock()}\n".encode())

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 1024
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        self._server = Server((address, 0), Handler)
        self.door = Door(address, self._server.server_address[1], word)

    def __enter__(self) -> Porter:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def knock(doors: Mapping[int, Door], clock: Clock) -> dict[int, dict[str, Any]]:
    """What came of asking each node the time: `ahead_s`, how far its clock is ahead of ours, or `error`."""

    def ask(door: Door) -> dict[str, Any]:
        try:
            with socket.create_connection((door.address, door.port), _CONNECT_S) as connection:
                answers = connection.makefile("rb")
                return {"ahead_s": min(_ahead(connection, answers, door.word, clock) for _ in range(_ASKED))[1]}
        except (OSError, ValueError) as error:
            return {"error": f"{door.address}:{door.port}: {error}"}

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(doors, pool.map(ask, doors.values()), strict=True))


def _ahead(connection: socket.socket, answers: Any, word: str, clock: Clock) -> tuple[float, float]:
    """(seconds of the round trip, seconds that the other clock is ahead): its time was read half-way (Cristian)."""
    begin, asked = time.monotonic(), clock()
    connection.sendall(f"{word}\n".encode())
    theirs = float(answers.readline(64))
    trip = time.monotonic() - begin
    return trip, theirs - asked - trip / 2


def leave_a_sign(folder: Path, rank: int) -> str:
    """Write a file that only this node, and only now, can have written; returns its content. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    word = secrets.token_hex(16)
    _sign(folder, rank).write_text(json.dumps(word))
    return word


def unseen(folder: Path, words: Mapping[int, str]) -> list[int]:
    """The nodes whose signs don't show up here."""
    deadline, left = time.monotonic() + _SEEN_S, dict(words)
    while left and time.monotonic() < deadline:
        left = {rank: word for rank, word in left.items() if not _shows(_sign(folder, rank), word)}
        time.sleep(0.2 if left else 0.0)
    return sorted(left)


def remove_signs(folder: Path) -> None:
    for path in folder.glob(f"{_SIGN}*"):
        path.unlink(missing_ok=True)


_SIGN = ".tmp-preflight-"


def _sign(folder: Path, rank: int) -> Path:
    return folder / f"{_SIGN}{rank}"


def _shows(path: Path, word: str) -> bool:
    try:
        return bool(json.loads(path.read_text()) == word)
    except (OSError, ValueError):
        return False
