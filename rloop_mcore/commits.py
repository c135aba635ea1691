"""Commits: a checkpoint becomes durable, then the journal names it. One may be written while training goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rloop_mcore.errors import DiskFull
from rloop_mcore.journal import Journal
from rloop_mcore.platform.files import fsync_path
from rloop_mcore.protocols import Actor
from rloop_mcore.space import Space, bytes_of
from rloop_mcore.timeline import Timeline


@dataclass
class Commits:
    """The checkpoints of a run, in the order of its commits; the last `keep` stay."""

    directory: Path
    journal: Journal
    actor: Actor
    space: Space
    timeline: Timeline
    keep: int
    _bytes: int = field(default=0, init=False)  # of the last checkpoint; 0: none was written yet
    _pending: Mapping[str, Any] | None = field(default=None, init=False)  # the commit whose checkpoint is being written

    def take(self, commit: Mapping[str, Any], wait: bool) -> None:
        """Write the checkpoint that `commit` names and journal that; without `wait`, by the next `settle`."""
        name = commit["checkpoint"]
        if wait:
            self.space.write(name, lambda: self._write(name), self._bytes)
            self._record(commit)
        else:
            self.space.write(name, lambda: self._start(name), self._bytes)
            self._pending = commit

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if one is, and journal it as of when it was started."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._finish(pending["checkpoint"])
        except DiskFull as error:  # the state it is of is gone: the commit that follows covers it
            self.space.tell(str(error))
        else:
            self._record(pending)

    def _start(self, name: str) -> None:
        with self.timeline.span("trainer", "start of the checkpoint", checkpoint=name):
            self.actor.start_save(self.directory / name)

    def _finish(self, name: str) -> None:
        with self.timeline.span("trainer", "end of the checkpoint", checkpoint=name):
            self.actor.finish_save()
        self._bytes = bytes_of((self.directory / name).iterdir())

    def _write(self, name: str) -> None:
        self._start(name)
        self._finish(name)

    def _record(self, commit: Mapping[str, Any]) -> None:
        """Journal a commit, and remove the checkpoint that it makes obsolete."""
        self.space.write("the journal", lambda: self.journal.record("commit", **commit))
        names = [commit["checkpoint"] for commit in self.journal.commits()]
        for obsolete in names[: -self.keep][-1:]:
            remove(self.directory / obsolete)


def remove(path: Path) -> None:
    """Remove a file or a directory."""
    if path.is_dir():
        # A kill amid the removal must leave nothing that the journal names (and `checkpoint.keep` may be raised then).
        nameless = path.with_name(f".tmp-removed-{path.name}")
        os.replace(path, nameless)
        fsync_path(path.parent)
        shutil.rmtree(nameless)
    else:
        path.unlink(missing_ok=True)
