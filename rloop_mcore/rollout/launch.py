"""Servers as child processes: started at once, awaited later, never outliving the run."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from rloop_mcore.errors import UserError
from rloop_mcore.platform.network import free_port
from rloop_mcore.platform.process import OWN_PATH
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.controller import Server
from rloop_mcore.rollout.embedded import KEY_VARIABLE

log = logging.getLogger(__name__)

_POLL_S = 0.05
_STOP_S = 10.0
_KILL_S = 60.0  # for the kernel to end a process, and a driver to free its memory
_ANSWER_S = 10.0
_LOG_LINES = 15
_PORTS = itertools.count(secrets.randbits(32))  # seeds of ports: servers that this process starts get different ones

STUBS_VARIABLE = "RLOOP_SGLANG_STUBS"  # a folder with a stub of sgl_kernel, for SGLang on a CPU (tests/sglang_cpu)

# Starts `python -m sglang.launch_server` and ends it with its parent (argument 1). SGLang's own helpers end with it as
# soon as they are up, but those that are still importing would stay: hence the whole process group.
_LAUNCH = """
import ctypes, os, signal, sys
prctl, watcher = ctypes.CDLL(None).prctl, os.getpid()
for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm's warnings reach every process; they are for the trainer
    signal.signal(number, signal.SIG_IGN)
server = os.fork()
if server == 0:
    prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG, which exec keeps
    if os.getppid() != watcher:
        os._exit(1)
    os.execv(sys.executable, [sys.executable, "-m", "sglang.launch_server", *sys.argv[2:]])
signal.signal(signal.SIGTERM, lambda *_: os.kill(server, signal.SIGTERM))
signal.signal(signal.SIGHUP, lambda *_: os.killpg(watcher, signal.SIGKILL))
prctl(1, signal.SIGHUP, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    os.killpg(watcher, signal.SIGKILL)
code = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
sys.exit(code if code >= 0 else 128 - code)
"""
_SGLANG_ON_CPU = (
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--disable-cuda-graph", "--disable-overlap-schedule"),
    *("--mem-fraction-static", "0.8", "--max-total-tokens", "32768"),
)


@dataclass(frozen=True)
class RunningServer:
    """A server somebody else started (`rollout.endpoints`)."""

    url: str
    api_key: str | None

    async def ready(self, timeout_s: float) -> tuple[str, str | None]:
        """(URL, key). Whether it answers is for the client to find out."""
        return self.url, self.api_key

    def failure(self) -> str | None:
        return None

    async def restart(self) -> None:
        """It is not ours to start anew; it may come back by itself."""

    def stop(self) -> None:
        """It is not ours to stop."""


class _ChildServer:
    """A server process of this run, in a session of its own, which logs to `run_dir/{name}.log`.

    Make it on the thread that lives as long as the run (the main thread): the kernel ends the server with it.
    """

    kind: str  # how messages call it
    process: subprocess.Popen[bytes]

    def __init__(self, run_dir: Path, name: str, host: str, api_key: str) -> None:
        """host: the address to listen on; api_key: one of its own where empty."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.host = host
        self.api_key = api_key or secrets.token_hex(32)  # no "-" to begin with: SGLang would read it as a flag
        self.log = run_dir / f"{name}.log"

    def _start(self) -> subprocess.Popen[bytes]:
        raise NotImplementedError

    async def _answers(self) -> str | None:
        """The URL once the server answers."""
        raise NotImplementedError

    def _clean_up(self) -> None:
        """Remove what the server leaves behind; called when its process has ended."""

    def _spawn(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with open(self.log, "ab", opener=_private) as log:
            return subprocess.Popen(
                command,
                env={**environment, **OWN_PATH},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the trainer, which stops its servers when it is done with them
            )

    async def ready(self, timeout_s: float) -> tuple[str, str]:
        """(URL, key) once the server answers. Raises EngineError when it dies or is not there in time."""
        deadline = time.monotonic() + timeout_s
        while (url := await self._answers()) is None:
            failure = self.failure()
            if failure is not None:
                raise EngineError(failure)
            if time.monotonic() > deadline:
                raise EngineError(f"{self.kind} was not ready within {timeout_s:g} s; {self._last_lines()}")
            await asyncio.sleep(_POLL_S)
        return url, self.api_key

    def failure(self) -> str | None:
        """None while the process lives, else how it ended and the end of its log."""
        status = self.process.poll()
        return None if status is None else f"{self.kind} ended with status {status}; {self._last_lines()}"

    def _last_lines(self) -> str:
        try:
            text = self.log.read_text(errors="replace")
        except OSError as error:  # run.dir is gone, or its file server: no reason to leave the engine lost for ever
            return f"its log cannot be read ({error})"
        # SGLang tells the key at other log levels than the one it is started with (rollout.server_args).
        lines = text.replace(self.api_key, "(the key)").splitlines()[-_LOG_LINES:]
        return f"the end of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)

    async def restart(self) -> None:
        """Start the process anew, with the model folder it had; kills what is left of it first.

        Raises OSError where no process is to be had, or the old one does not end: a driver may hold it. The new one
        ends with the thread that calls this.
        """
        self._kill()
        deadline = time.monotonic() + _KILL_S
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise OSError(f"{self.kind} (process {self.process.pid}) has not ended {_KILL_S:g} s after SIGKILL")
            await asyncio.sleep(_POLL_S)
        self._clean_up()
        self.process = self._start()

    def stop(self) -> None:
        """End the process and those it started, and wait until it is gone, or is not to be ended."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_S)
        self._kill()
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            log.warning("%s (process %d) has not ended %g s after SIGKILL", self.kind, self.process.pid, _STOP_S)
        self._clean_up()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # its session is its process group: helpers end with it
            os.killpg(self.process.pid, signal.SIGKILL)


class EmbeddedServer(_ChildServer):
    """A `python -m rloop_mcore.rollout.embedded` process of this run."""

    kind = "the embedded engine"

    def __init__(
        self,
        model_path: Path,
        run_dir: Path,
        name: str,
        *,
        max_running: int,
        threads: int,
        dtype: str,
        device: str,
        host: str = "127.0.0.1",
        api_key: str = "",
    ) -> None:
        """Start the process; does not wait. dtype: float32 or bfloat16."""
        super().__init__(run_dir, name, host, api_key)
        self.port_file = run_dir / f".{name}.port"
        self.port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "rloop_mcore.rollout.embedded", "--model-path", str(model_path)]
        command += ["--port-file", str(self.port_file), "--parent", str(os.getpid()), "--max-running", str(max_running)]
        command += ["--host", host, "--threads", str(threads), "--dtype", dtype, "--device", device]
        self.command = command
        self.environment = {**os.environ, KEY_VARIABLE: self.api_key, "HF_HUB_OFFLINE": "1"}
        if threads:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return self._spawn(self.command, self.environment)

    async def _answers(self) -> str | None:
        return f"http://{self.host}:{int(self.port_file.read_text())}" if self.port_file.exists() else None

    def _clean_up(self) -> None:
        self.port_file.unlink(missing_ok=True)


class SGLangServer(_ChildServer):
    """A `python -m sglang.launch_server` process of this run, with the helpers that it starts."""

    kind = "SGLang"

    def __init__(
        self,
        model_path: Path,
        run_dir: Path,
        name: str,
        *,
        python: Path,
        max_running: int,
        threads: int,
        dtype: str,
        device: str,
        arguments: Sequence[str] = (),
        gpus: Sequence[int] = (),
        host: str = "127.0.0.1",
        api_key: str = "",
    ) -> None:
        """Start the process; does not wait.

        python: the interpreter that has SGLang; dtype: float32 or bfloat16; device: cpu or cuda; arguments: further
        flags, which win; gpus: the devices it may see, counted over those that this process may; all of them where
        empty.
        """
        super().__init__(run_dir, name, host, api_key)
        self.secrets = run_dir / f".{name}.yaml"
        command = [str(python), "-c", _LAUNCH, str(os.getpid()), "--config", str(self.secrets)]
        command += ["--model-path", str(model_path), "--host", host, "--dtype", dtype, "--device", device]
        command += ["--max-running-requests", str(max_running), "--skip-server-warmup"]
        command += ["--log-level", "warning"]  # below it SGLang logs all of its settings, the key among them
        self.command = [*command, *(_SGLANG_ON_CPU if device == "cpu" else ()), *arguments]
        # torchrun's variables are the trainer's: older torch takes its store for that of any group.
        torchrun = ("TORCHELASTIC_", "MASTER_", "RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(torchrun)} | {"HF_HUB_OFFLINE": "1"}
        if device == "cpu":
            self.environment |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(threads)}
            self.environment["TORCHDYNAMO_DISABLE"] = "1"  # as in the trainer, which has it of the shim
            if STUBS_VARIABLE in os.environ:
                self.environment["PYTHONPATH"] = os.environ[STUBS_VARIABLE]
        if gpus:
            self.environment["CUDA_VISIBLE_DEVICES"] = _devices(gpus)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # SGLang binds it half a minute later, so it is none that the kernel gives away
        self.port = free_port(self.host, next(_PORTS))
        with open(self.secrets, "w", opener=_private) as file:
            file.write(f'api-key: "{self.api_key}"\n')
        return self._spawn([*self.command, "--port", str(self.port)], self.environment)

    async def _answers(self) -> str | None:
        url, headers = f"http://{self.host}:{self.port}", {"Authorization": f"Bearer {self.api_key}"}
        try:  # by a route that wants the key: somebody else may have taken the port meanwhile
            async with (
                aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=_ANSWER_S)) as session,
                session.get(f"{url}/model_info") as response,
            ):
                return url if response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    def _clean_up(self) -> None:
        self.secrets.unlink(missing_ok=True)


def stop_all(servers: Sequence[Server]) -> None:
    """Stop servers at once: each may take its time."""
    with ThreadPoolExecutor(max(1, len(servers))) as threads:
        for stopped in [threads.submit(server.stop) for server in servers]:
            stopped.result()


def _devices(gpus: Sequence[int]) -> str:
    """CUDA's names of these devices: Slurm may give a job some of a node's only. Raises UserError."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return ",".join(map(str, gpus))
    names = given.split(",")
    if missing := [gpu for gpu in gpus if gpu >= len(names)]:
        raise UserError(f"rollout.gpus names device {missing[0]}, and CUDA_VISIBLE_DEVICES={given} has {len(names)}.")
    return ",".join(names[gpu] for gpu in gpus)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
