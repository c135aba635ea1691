"""An engine of another node: what its trainer sees of its starts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

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
    server.restart()
    assert publication.refused() == 1
    with pytest.raises(EngineError, match=r"engine 0 was not published within 0\.3 s"):
        asyncio.run(server.ready(0.3))
    publication.publish("http://h:2", 2)
    assert asyncio.run(server.ready(20))[0] == "http://h:2"


def test_a_start_that_came_by_itself_meanwhile_is_not_refused(tmp_path: Path) -> None:
    """Its keeper was faster than the trainer's notice: the new engine must not be killed."""
    publication = Publication(tmp_path, 0)
    server = PublishedServer(publication, "key")
    publication.publish("http://h:1", 1)
    asyncio.run(server.ready(20))
    publication.publish("http://h:2", 2)
    server.restart()
    assert publication.refused() == 1
    assert asyncio.run(server.ready(20))[0] == "http://h:2"
