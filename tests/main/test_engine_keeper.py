"""The keeper of a node's engines, over servers that are none."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, cast

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.main import engine_keeper, train
from rloop_mcore.main.engine_keeper import start_keeper
from rloop_mcore.main.job_folder import FOLDER_VARIABLE, JobFolder
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.watchdog import Watchdog
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.published import Publication
from rloop_mcore.run_config import to_yaml


class Server:
    """failures: what each start ends with, the last one with nothing."""

    def __init__(self, *failures: str) -> None:
        self.failures, self.starts = failures, 1

    async def ready(self, timeout_s: float) -> tuple[str, str]:
        return f"http://h:{self.starts}", "key"

    def failure(self) -> str | None:
        return self.failures[self.starts - 1] if self.starts <= len(self.failures) else None

    async def restart(self) -> None:
        self.starts += 1


async def _kept(folder: Path, server: Server, seconds: float = 20.0) -> None:
    """Keep engine 0 until the job has ended."""
    keeping = engine_keeper._keep_all(JobFolder(folder), {0: cast(Any, server)}, 5.0)
    await asyncio.wait_for(keeping, seconds)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_POLL_S", 0.01), ("_FILES_AGAIN_S", 0.01), ("_BACKOFF_S", (0.01,))):
        monkeypatch.setattr(engine_keeper, name, value)


@pytest.mark.parametrize("route", ["publish", "refused"])
def test_an_engine_is_kept_though_files_fail_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, route: str
) -> None:
    passes, calls = getattr(Publication, route), []

    def fails(publication: Publication, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) <= 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return passes(publication, *arguments)

    monkeypatch.setattr(Publication, route, fails)
    server, publication = Server(), Publication(tmp_path, 0)

    async def work() -> None:
        kept = asyncio.create_task(_kept(tmp_path, server))
        while len(calls) < 5 and not kept.done():
            await asyncio.sleep(0.01)
            if route == "publish" and publication.read() is not None:
                break
        assert server.starts == 1
        publication.refuse(1)
        while publication.read() != ("http://h:2", 2) and not kept.done():
            await asyncio.sleep(0.01)
        (tmp_path / "code").touch()
        await kept

    asyncio.run(work())
    assert server.starts == 2
    assert caplog.text.count("engine 0 cannot be started, published or watched: [Errno 28] No space left") == 3


def test_starts_in_vain_come_ever_later_until_one_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five starts don't answer. The sixth does, is published at the second try, and dies; the seventh lives."""
    waits, slept, sleep, publish = (0.011, 0.012, 0.013, 0.014), list[float](), asyncio.sleep, Publication.publish
    failed = set[str]()

    async def noted(seconds: float) -> None:
        slept.append(seconds)
        await sleep(seconds)

    class Slow(Server):
        async def ready(self, timeout_s: float) -> tuple[str, str]:
            if self.starts <= 5:
                raise EngineError("it does not answer")
            return await super().ready(timeout_s)

        async def restart(self) -> None:
            if "restart" not in failed:
                failed.add("restart")
                raise OSError(errno.EAGAIN, "no process")
            await super().restart()

    def published(publication: Publication, url: str, start: int) -> None:
        if "publish" not in failed:
            failed.add("publish")
            raise OSError(errno.ENOSPC, "no space")
        publish(publication, url, start)

    monkeypatch.setattr(engine_keeper, "_BACKOFF_S", waits)
    monkeypatch.setattr(Publication, "publish", published)
    monkeypatch.setattr(engine_keeper.asyncio, "sleep", noted)
    server, publication = Slow(*["-"] * 5, "it died"), Publication(tmp_path, 0)

    async def work() -> None:
        kept = asyncio.create_task(_kept(tmp_path, server))
        while publication.read() != ("http://h:7", 7) and not kept.done():
            await sleep(0.01)
        (tmp_path / "code").touch()
        await kept

    asyncio.run(work())
    assert publication.read() == ("http://h:7", 7)
    assert [seconds for seconds in slept if seconds in waits] == [waits[i] for i in (1, 2, 3, 3, 3, 0)]


def test_an_engine_that_nobody_keeps_any_more_ends_the_keeper(tmp_path: Path) -> None:
    class Broken(Server):
        async def restart(self) -> None:
            raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        asyncio.run(_kept(tmp_path, Broken("it died")))


def test_signals_to_a_whole_job_do_not_end_who_keeps_its_engines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm warns and cancels each process of a job; the first node heeds it, and finishes a step by its engines."""
    folder = tmp_path / "slurm/1.0"
    folder.mkdir(parents=True)
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    job = JobFolder(folder)
    job.new_key()
    words = ["experiment=tiny", f"run.dir={tmp_path}", "cluster.nodes=2", "layout.dp=2", "rollout.engines=2"]
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(words)))

    def wait_for_starts(count: int) -> None:
        deadline = time.monotonic() + 60.0
        while (log := job.log("engines-0").read_text()).count("is started anew") < count:
            assert time.monotonic() < deadline, log
            assert process.poll() is None, log
            time.sleep(0.05)

    process = start_keeper(tmp_path, job, 0, "127.0.0.1")  # its engine fails, for want of a model
    try:
        wait_for_starts(1)
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            process.send_signal(number)
        wait_for_starts(2)
    finally:
        process.kill()
        process.wait()


def test_a_first_node_whose_engines_nobody_keeps_any_more_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other node does."""
    monkeypatch.setattr(train, "_LOOK_S", 0.05)
    monkeypatch.setattr(train, "_GRACE_S", 0.0)
    run, job, config = RunDirectory(tmp_path), JobFolder(tmp_path), load_config(["experiment=tiny"])
    job.log("engines-0").write_text("its last words\n")
    with subprocess.Popen(["sleep", "60"]) as ranks, subprocess.Popen(["false"]) as dead:
        assert train._watch(run, ranks, dead, Watchdog(run, config), job, 2) == -9
    ending = run.ending()
    assert ending is not None
    assert (ending["code"], ending["message"][:37]) == (1, "the keeper of the engines of node 0 e")
    assert "its last words" in (tmp_path / "fault.txt").read_text()
