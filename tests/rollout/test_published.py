"""An engine of another node: what its trainer sees of its starts."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from rloop_mcore.rollout import published
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.published import Publication, PublishedServer


def test_an_engine_is_ready_once_it_is_published(tmp_path: Path) -> None:
    publication = Publication(tmp_path, 3)
    server = PublishedServer(publication, "key")

    async def later() -> tuple[str, str]:
        ready = asyncio.create_task(server.ready(20))
        await asyncio.sleep(0.3)
        assert not ready.done()
        publication.publish("http://h:1", 1)
        return await ready

    assert asyncio.run(later()) == ("http://h:1", "key")


def test_a_start_that_failed_is_not_used_again(tmp_path: Path) -> None:
    publication = Publication(tmp_path, 0)
    server = PublishedServer(publication, "key")
    publication.publish("http://h:1", 1)
    asyncio.run(server.ready(20))
    asyncio.run(server.restart())
    with pytest.raises(EngineError, match=r"engine 0 was not published within 0\.3 s: "):
        asyncio.run(server.ready(0.3))
    assert publication.refused() == 1
    publication.publish("http://h:2", 2)
    assert asyncio.run(server.ready(20))[0] == "http://h:2"


def test_a_start_that_came_by_itself_meanwhile_is_not_refused(tmp_path: Path) -> None:
    """Its keeper was faster than the trainer's notice: the new engine must not be killed."""
    publication = Publication(tmp_path, 0)
    server = PublishedServer(publication, "key")
    publication.publish("http://h:1", 1)
    asyncio.run(server.ready(20))
    publication.publish("http://h:2", 2)
    asyncio.run(server.restart())
    assert asyncio.run(server.ready(20))[0] == "http://h:2"
    assert publication.refused() == 1


def test_a_disk_that_is_full_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publication = Publication(tmp_path, 0)
    server = PublishedServer(publication, "key")
    publication.publish("http://h:1", 1)
    asyncio.run(server.ready(20))
    with monkeypatch.context() as patch:
        patch.setattr(published, "write_atomic", no_space)
        asyncio.run(server.restart())
        with pytest.raises(EngineError, match=r"not published within 0\.3 s \(\[Errno 28\] No space left on device\)"):
            asyncio.run(server.ready(0.3))
    with pytest.raises(EngineError, match=r"not published within 0\.3 s: "):
        asyncio.run(server.ready(0.3))
    assert publication.refused() == 1


def no_space(path: Path, text: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
