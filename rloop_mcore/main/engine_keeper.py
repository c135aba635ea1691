"""The engines of one node of a job: started, published for the trainer, started anew when they fail."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from rloop_mcore.config import Config
from rloop_mcore.main.engines import start_engine
from rloop_mcore.main.job_folder import JobFolder
from rloop_mcore.main.ranks import work_for
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.planning.nodes import roles
from rloop_mcore.platform.network import interface_of
from rloop_mcore.platform.process import OWN_PATH
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.launch import EmbeddedServer, SGLangServer, stop_all
from rloop_mcore.rollout.published import Publication

_POLL_S = 0.3
_FILES_AGAIN_S = 2.0
_BACKOFF_S = (1.0, 5.0, 15.0, 60.0)  # after so many starts in a row that never answered

log = logging.getLogger(__name__)


def _keep_engines(config: Config, run: RunDirectory, job: JobFolder, node: int, address: str) -> None:
    """Run the engines of `node`, reached at `address`, until the job has ended. Call it on the main thread."""
    interface = interface_of(address)  # for the weight broadcast
    os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    here, key = roles(config).engines_of(node), job.key()
    servers = [start_engine(config, run.model(config), job.folder, k, here, address, key) for k in here]
    try:
        asyncio.run(_keep_all(job, dict(zip(here, servers, strict=True)), config.rollout.start_timeout_s))
    finally:
        stop_all(servers)


def start_keeper(run: Path, job: JobFolder, node: int, address: str) -> subprocess.Popen[bytes]:
    """Keep the engines of `node`, reached at `address`, in a process that ends with this one."""
    parent = os.getpid()
    command = [sys.executable, "-m", "rloop_mcore.main.engine_keeper", str(run), str(node), address]
    with open(job.log(f"engines-{node}"), "ab") as output:
        return subprocess.Popen(
            command,
            env={**os.environ, **OWN_PATH},
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: work_for(parent),
        )


async def _keep_all(job: JobFolder, servers: dict[int, EmbeddedServer | SGLangServer], timeout_s: float) -> None:
    tasks = [asyncio.create_task(_keep(s, Publication(job.folder, k), timeout_s)) for k, s in servers.items()]
    try:
        while not job.ended():
            done, _ = await asyncio.wait(tasks, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # none returns: an engine that nobody keeps would be missed for ever
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _keep(server: EmbeddedServer | SGLangServer, publication: Publication, timeout_s: float) -> None:
    """Publish each start of one engine, and start it anew when it dies or the trainer wants it so."""
    start, in_vain, dead = 1, 0, False
    while True:
        try:
            if dead:
                await server.restart()
                start, dead = start + 1, False
            url, _ = await server.ready(timeout_s)
            publication.publish(url, start)
            in_vain = 0
            while server.failure() is None and publication.refused() < start:
                await asyncio.sleep(_POLL_S)
            reason = server.failure() or "the trainer got no good answer from it"
        except EngineError as error:
            reason, in_vain = str(error), in_vain + 1
        except OSError as error:  # a full disk, a file server that is away; no process is to be had
            log.warning("engine %d cannot be started, published or watched: %s", publication.number, error)
            await asyncio.sleep(_FILES_AGAIN_S)
            continue
        log.warning("engine %d is started anew (start %d failed: %s)", publication.number, start, reason)
        await asyncio.sleep(_BACKOFF_S[min(in_vain, len(_BACKOFF_S) - 1)])
        dead = True


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)  # of a cancelled job: the ranks end, and this with them
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    run, job = RunDirectory(Path(sys.argv[1])), JobFolder.of_this_job()
    assert job is not None
    _keep_engines(run.read_config(), run, job, int(sys.argv[2]), sys.argv[3])


if __name__ == "__main__":
    main()
