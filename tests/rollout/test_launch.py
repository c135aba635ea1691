"""Starting servers: deadlines, what a failed start says, and that no server outlives its parent."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from served_model import START_S, start_server

from rloop_mcore.errors import UserError
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.launch import EmbeddedServer, _free_port, running_servers

PARENT = """
import asyncio, sys
from pathlib import Path
from rloop_mcore.rollout.launch import EmbeddedServer
model, run_dir = map(Path, sys.argv[1:])
server = EmbeddedServer(model, run_dir, "orphan", max_running=4, threads=1, dtype="float32", device="cpu")
asyncio.run(server.ready(120.0))
print(server.process.pid, flush=True)
sys.stdin.read()
"""


def test_the_server_dies_with_its_parent(model_path: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model_path), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    server = psutil.Process(int(parent.stdout.readline()))
    assert server.is_running()
    parent.kill()
    parent.communicate()
    psutil.wait_procs([server], timeout=20)
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE


def test_a_failed_start_quotes_the_log(tmp_path: Path) -> None:
    server = start_server(tmp_path / "nowhere", tmp_path, "engine")
    try:
        with pytest.raises(EngineError, match=r"(?s)ended with status 1.*engine\.log.*has no config\.json"):
            asyncio.run(server.ready(60.0))
    finally:
        server.stop()


def test_a_start_that_takes_too_long_is_an_error_and_stop_ends_it(model_path: Path, tmp_path: Path) -> None:
    server = start_server(model_path, tmp_path, "engine")
    with pytest.raises(EngineError, match=r"not ready within 0 s"):
        asyncio.run(server.ready(0.0))
    server.stop()
    assert server.process.poll() is not None


def test_the_key_is_in_no_command_line_and_no_log(server: EmbeddedServer) -> None:
    asyncio.run(server.ready(START_S))
    assert len(server.api_key) >= 32
    assert server.api_key not in " ".join(psutil.Process(server.process.pid).cmdline())
    assert server.api_key not in server.log.read_text()


def test_every_server_has_its_own_key(model_path: Path, tmp_path: Path) -> None:
    servers = [start_server(tmp_path, tmp_path, f"engine-{i}") for i in range(2)]
    for server in servers:
        server.stop()
    assert servers[0].api_key != servers[1].api_key


def test_endpoints_must_be_urls() -> None:
    with pytest.raises(UserError, match=r"rollout\.endpoints: 'host:30000'"):
        running_servers(["host:30000"])


def test_a_port_is_none_that_is_taken_nor_one_the_kernel_gives_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        port = _free_port()
        taken.bind(("127.0.0.1", port))
        taken.listen()
        monkeypatch.setattr("rloop_mcore.rollout.launch._PORTS", [port] * 9 + [port + 1])
        assert _free_port() != port
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port < lowest
