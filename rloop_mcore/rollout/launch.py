"""Embedded servers as child processes: started at once, awaited later, never outliving the run."""

from __future__ import annotations

import asyncio
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.embedded import KEY_VARIABLE

_POLL_S = 0.05
_STOP_S = 10.0
_LOG_LINES = 15


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

    def restart(self) -> None:
        """It is not ours to start anew; it may come back by itself."""

    def stop(self) -> None:
        """It is not ours to stop."""


class EmbeddedServer:
    """A `python -m rloop_mcore.rollout.embedded` process of this run.

    Make it on the thread that lives as long as the run (the main thread): the kernel ends the server with it.
    """

    def __init__(
        self, model_path: Path, run_dir: Path, name: str, *, max_running: int, threads: int, dtype: str, device: str
    ) -> None:
        """Start the process; does not wait. Logs to `run_dir/{name}.log`. dtype: float32 or bfloat16."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.api_key = secrets.token_urlsafe(32)
        self.log = run_dir / f"{name}.log"
        self.port_file = run_dir / f".{name}.port"
        self.port_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "rloop_mcore.rollout.embedded", "--model-path", str(model_path)]
        command += ["--port-file", str(self.port_file), "--parent", str(os.getpid()), "--max-running", str(max_running)]
        self.command = [*command, "--threads", str(threads), "--dtype", dtype, "--device", device]
        self.environment = {**os.environ, KEY_VARIABLE: self.api_key, "HF_HUB_OFFLINE": "1"}
        if threads:
            self.environment["OMP_NUM_THREADS"] = str(threads)
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to the trainer, which stops its servers when it is done with them
            )

    async def ready(self, timeout_s: float) -> tuple[str, str]:
        """(URL, key) once the server answers. Raises EngineError when it dies or is not there in time."""
        deadline = time.monotonic() + timeout_s
        while not self.port_file.exists():
            failure = self.failure()
            if failure is not None:
                raise EngineError(failure)
            if time.monotonic() > deadline:
                raise EngineError(f"the embedded engine was not ready within {timeout_s:g} s; {self._last_lines()}")
            await asyncio.sleep(_POLL_S)
        return f"http://127.0.0.1:{int(self.port_file.read_text())}", self.api_key

    def failure(self) -> str | None:
        """None while the process lives, else how it ended and the end of its log."""
        status = self.process.poll()
        return None if status is None else f"the embedded engine ended with status {status}; {self._last_lines()}"

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return f"the end of {self.log}:\n" + "\n".join(f"  {line}" for line in lines)

    def restart(self) -> None:
        """Start the process anew, with the model folder it had; kills what is left of it first."""
        self.process.kill()
        self.process.wait()
        self.port_file.unlink(missing_ok=True)
        self.process = self._start()

    def stop(self) -> None:
        """End the process and wait until it is gone."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.port_file.unlink(missing_ok=True)


def running_servers(urls: list[str]) -> list[RunningServer]:
    """The servers of `rollout.endpoints`; their key comes from the environment. Raises UserError for a bad URL."""
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"rollout.endpoints: {url!r} is not a URL like http://host:30000")
    return [RunningServer(url, os.environ.get(KEY_VARIABLE)) for url in urls]
