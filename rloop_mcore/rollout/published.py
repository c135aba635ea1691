"""An engine of another node of the job: its keeper there says in a file of the run where it is, and starts it anew."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rloop_mcore.platform.files import write_atomic
from rloop_mcore.rollout.client import EngineError

_POLL_S = 0.1


@dataclass(frozen=True)
class Publication:
    """What trainer and keeper tell each other of one engine: `engine-K.json` and `engine-K.restart` in `folder`.

    Each start of the engine has a number, from 1 on; a restart is asked for by the number of the start that failed.
    """

    folder: Path
    number: int

    @property
    def _place(self) -> Path:
        return self.folder / f"engine-{self.number}.json"

    @property
    def _request(self) -> Path:
        return self.folder / f"engine-{self.number}.restart"

    def publish(self, url: str, start: int) -> None:
        """The engine answers at `url`, started for the `start`-th time."""
        write_atomic(self._place, json.dumps({"url": url, "start": start}))

    def read(self) -> tuple[str, int] | None:
        """(URL, start) of the last publication."""
        try:
            place = json.loads(self._place.read_text())
        except FileNotFoundError:
            return None
        return place["url"], place["start"]

    def refuse(self, start: int) -> None:
        """Ask for another start than this one, which may still run."""
        write_atomic(self._request, str(start))

    def refused(self) -> int:
        """The newest start that the trainer wants no more of; 0 where there is none."""
        try:
            return int(self._request.read_text())
        except FileNotFoundError:
            return 0


class PublishedServer:
    """`controller.Server` over a publication."""

    def __init__(self, publication: Publication, api_key: str) -> None:
        self._publication, self._api_key = publication, api_key
        self._start = self._unwanted = 0  # the one in use; the newest that failed

    async def ready(self, timeout_s: float) -> tuple[str, str]:
        """(URL, key) once a start that was not refused is published. Raises EngineError."""
        deadline = time.monotonic() + timeout_s
        while True:
            problem = ""
            try:
                refused = self._publication.refused()
                if self._unwanted > refused:
                    self._publication.refuse(self._unwanted)
                place = self._publication.read()
                if place is not None and place[1] > max(self._unwanted, refused):
                    break
            except OSError as error:  # a full disk, a file server that is away
                problem = f" ({error})"
            if time.monotonic() > deadline:
                raise EngineError(
                    f"engine {self._publication.number} was not published within {timeout_s:g} s{problem}: see the "
                    f"logs of its node in {self._publication.folder}"
                )
            await asyncio.sleep(_POLL_S)
        self._start = place[1]
        return place[0], self._api_key

    def failure(self) -> str | None:
        """Its keeper knows, and starts it anew."""
        return None

    async def restart(self) -> None:
        self._unwanted = self._start  # `ready` says so to the keeper

    def stop(self) -> None:
        """Its keeper does, when the run has ended."""
