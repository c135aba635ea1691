"""Starting servers: deadlines, what a failed start says, and that no server outlives its parent."""

from __future__ import annotations

import asyncio
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from aiohttp import web
from served_model import START_S, make_fleet, start_server
from transformers import PreTrainedModel

from rloop_mcore.compose import load_config
from rloop_mcore.errors import UserError
from rloop_mcore.main.engines import meeting_address, start_servers, with_engines_for_routers
from rloop_mcore.platform.network import address_towards, free_port
from rloop_mcore.rollout import launch
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.embedded import KEY_VARIABLE
from rloop_mcore.rollout.launch import EmbeddedServer, RunningServer, SGLangServer
from rloop_mcore.types import SampleRequest, Sampling
from rloop_mcore.weights.channel import BroadcastChannel

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


def test_how_a_server_ended_is_said_though_its_log_is_gone(model_path: Path, tmp_path: Path) -> None:
    """An error here would leave the engine as lost, and never restarted."""
    server = start_server(model_path, tmp_path, "engine")
    server.log.unlink()
    server.process.kill()
    server.process.wait()
    assert re.search(r"ended with status -9; its log cannot be read \(.*No such file", str(server.failure()))
    server.stop()


def test_a_start_that_takes_too_long_is_an_error_and_stop_ends_it(model_path: Path, tmp_path: Path) -> None:
    server = start_server(model_path, tmp_path, "engine")
    with pytest.raises(EngineError, match=r"not ready within 0 s"):
        asyncio.run(server.ready(0.0))
    server.stop()
    assert server.process.poll() is not None


class Held:
    """A process that the kernel does not end for a while."""

    def __init__(self, process: subprocess.Popen[bytes], seconds: float) -> None:
        self.process, self.pid, self.until = process, process.pid, time.monotonic() + seconds

    def poll(self) -> int | None:
        return self.process.poll() if time.monotonic() > self.until else None

    def wait(self, timeout: float = math.inf) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("held", timeout)
            time.sleep(0.01)
        return status

    def terminate(self) -> None:
        self.process.terminate()


@pytest.mark.parametrize("ends", [True, False])
def test_a_process_that_does_not_end_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ends: bool
) -> None:
    monkeypatch.setattr(launch, "_KILL_S", 30.0 if ends else 1.0)
    monkeypatch.setattr(launch, "_STOP_S", 0.2)
    server = start_server(tmp_path / "nowhere", tmp_path, "engine")
    held: Any = Held(server.process, 1.0 if ends else 3600.0)
    server.process = held

    async def longest_gap() -> float:
        longest, restarting = 0.0, asyncio.create_task(server.restart())
        while not restarting.done():
            begun = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - begun)
        await restarting
        return longest

    if ends:
        assert asyncio.run(longest_gap()) < 0.7
        assert server.process is not held
    else:
        with pytest.raises(OSError, match=r"the embedded engine \(process \d+\) has not ended 1 s after SIGKILL"):
            asyncio.run(longest_gap())
    server.stop()
    assert ("has not ended 0.2 s after SIGKILL" in caplog.text) is not ends
    held.process.wait()


def test_the_key_is_in_no_command_line_and_no_log(server: EmbeddedServer) -> None:
    asyncio.run(server.ready(START_S))
    assert len(server.api_key) >= 32
    assert server.api_key not in " ".join(psutil.Process(server.process.pid).cmdline())
    assert server.api_key not in server.log.read_text()


def test_a_key_in_a_servers_log_is_not_quoted(tmp_path: Path) -> None:
    """As SGLang logs it with `rollout.server_args=[--log-level,info]`."""
    server = start_server(tmp_path / "nowhere", tmp_path, "engine")
    server.process.wait()
    with open(server.log, "a") as log:
        log.write(f"server_args=ServerArgs(api_key={server.api_key!r})\n")
    failure = server.failure()
    server.stop()
    assert failure is not None
    assert "ServerArgs" in failure
    assert server.api_key not in failure


def test_every_server_has_its_own_key(model_path: Path, tmp_path: Path) -> None:
    servers = [start_server(tmp_path, tmp_path, f"engine-{i}") for i in range(2)]
    for server in servers:
        server.stop()
    assert servers[0].api_key != servers[1].api_key


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("secret", ""),
        ("secret\n", ""),
        ("sec\nret", "holds a character that cannot be sent"),
        ("schl\u00fcssel", "holds a character that cannot be sent"),
        ('sec"ret', "could not be kept out of the logs"),  # json.dumps writes it otherwise
        ("sec\\ret", "could not be kept out of the logs"),
        ("sec&ret", "could not be kept out of the logs"),
    ],
)
def test_a_key_that_no_header_can_hold_or_no_log_can_hide_is_one_sentence(
    key: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, key)
    overrides = ["run.dir=r", "model.path=m", "data.train=d", "rollout.engine=sglang"]
    config = load_config([*overrides, "rollout.endpoints=['http://127.0.0.1:1']"])
    if not words:
        (server,) = start_servers(config, Path("m"), Path("r"))
        assert asyncio.run(server.ready(1.0)) == ("http://127.0.0.1:1", "secret")
        return
    for use in (with_engines_for_routers, lambda config: start_servers(config, Path("m"), Path("r"))):
        with pytest.raises(UserError, match=f"^{KEY_VARIABLE} .*{words}") as caught:
            use(config)
        assert key not in str(caught.value)


def test_a_port_is_none_that_is_taken_nor_one_the_kernel_gives_away() -> None:
    with socket.socket() as taken:
        port = free_port("127.0.0.1", 9)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert free_port("127.0.0.1", 9) != port
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert port < lowest


def test_an_engine_on_another_address_is_adopted_and_meets_the_trainer_there(
    model_path: Path, tmp_path: Path, reference: PreTrainedModel
) -> None:
    """As an engine of another host: neither end listens on loopback."""
    own = next((a.address for a in addresses() if a.address != "127.0.0.1"), None)
    if own is None:
        pytest.skip("this machine has no address but loopback")
    assert address_towards(own) == own
    assert address_towards("localhost") in ("127.0.0.1", "::1")
    port_file = tmp_path / "port"
    command = [sys.executable, "-m", "rloop_mcore.rollout.embedded", "--model-path", str(model_path), "--host", own]
    command += ["--port-file", str(port_file), "--threads", "1", "--parent", str(os.getpid())]
    process = subprocess.Popen(command, env={**os.environ, KEY_VARIABLE: "secret"})
    try:
        while not port_file.exists():
            assert process.poll() is None
            time.sleep(0.05)
        url = f"http://{own}:{port_file.read_text().strip()}"
        overrides = ["run.dir=r", "model.path=m", "data.train=d", "rollout.engine=sglang"]
        address = meeting_address(load_config([*overrides, f"rollout.endpoints=['{url}']"]))
        assert address == own
        adopted = RunningServer(url, "secret")
        with make_fleet([adopted], BroadcastChannel("gloo", "weights", 30.0, address)) as fleet:
            fleet.sync(lambda: iter(reference.named_parameters()), 1)
            (completion,) = fleet.generate([SampleRequest((5, 6), 0)], Sampling(max_tokens=4))
            assert completion.weight_versions == ((1, len(completion.response_ids)),)
    finally:
        process.kill()
        process.wait()


def addresses() -> list[Any]:
    """This machine's IPv4 addresses."""
    found = [a for of_interface in psutil.net_if_addrs().values() for a in of_interface]
    return [a for a in found if a.family == socket.AF_INET]


STANDIN = """
import os, pathlib, subprocess, sys
helper = subprocess.Popen(["sleep", "1000"])  # one that does not watch over its parent (yet)
settings = pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).read_text()
pathlib.Path("pids").write_text(f"{os.getpid()} {helper.pid}\\n{settings}")
helper.wait()
"""
HANGS = "import time; time.sleep(1000)"


def _sglang(folder: Path, name: str, gpus: Sequence[int] = ()) -> SGLangServer:
    common: dict[str, Any] = {"max_running": 4, "threads": 1, "dtype": "float32", "device": "cuda"}
    return SGLangServer(folder, folder, name, python=Path(sys.executable), gpus=gpus, **common)


@pytest.fixture
def standin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SGLangServer]]:
    """For servers that take their time to start; those that are put into the list are stopped."""
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/launch_server.py").write_text(HANGS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    started: list[SGLangServer] = []
    yield started
    launch.stop_all(started)


def test_a_server_that_has_taken_the_port_is_not_taken_for_ones_own(
    tmp_path: Path, standin: list[SGLangServer]
) -> None:
    """SGLang binds its port half a minute after it was chosen."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=200 if request.path == "/health" else 401)

    async def answers() -> str | None:
        app = web.Application()
        app.router.add_get("/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", server.port).start()
        try:
            return await server._answers()
        finally:
            await runner.cleanup()

    server = _sglang(tmp_path, "late")
    standin.append(server)
    assert asyncio.run(answers()) is None


def test_servers_of_one_process_choose_different_ports(
    tmp_path: Path, standin: list[SGLangServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.randbits", lambda bits: 7)  # a collision by chance
    standin += [_sglang(tmp_path, f"engine-{number}") for number in range(2)]
    assert standin[0].port != standin[1].port


def test_devices_are_counted_over_those_that_the_job_has(
    tmp_path: Path, standin: list[SGLangServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch counts the trainer's: where Slurm hides a node's devices by the variable alone, 1 is another job's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    standin.append(_sglang(tmp_path, "whole", [2, 1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7c,6")
    standin.append(_sglang(tmp_path, "part", [2, 1]))
    assert [server.environment["CUDA_VISIBLE_DEVICES"] for server in standin] == ["2,1", "6,GPU-7c"]
    with pytest.raises(UserError, match=r"device 3, and CUDA_VISIBLE_DEVICES=4,GPU-7c,6 has 3\."):
        _sglang(tmp_path, "none", [1, 3])


SGLANG_PARENT = """
import sys
from pathlib import Path
from rloop_mcore.rollout.launch import SGLangServer
folder = Path(sys.argv[1])
python = Path(sys.executable)
SGLangServer(folder, folder, "x", python=python, max_running=4, threads=1, dtype="float32", device="cuda")
sys.stdin.read()
"""


def test_sglangs_helpers_die_with_the_trainer_even_while_they_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sglang").mkdir()
    (tmp_path / "sglang/launch_server.py").write_text(STANDIN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    parent = subprocess.Popen([sys.executable, "-c", SGLANG_PARENT, str(tmp_path)], stdin=subprocess.PIPE, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pids").exists() or "\n" not in (tmp_path / "pids").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids, settings = (tmp_path / "pids").read_text().split("\n", 1)
    assert re.fullmatch(r'api-key: "[0-9a-f]{64}"\n', settings)
    family = [psutil.Process(int(pid)) for pid in pids.split()]
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
