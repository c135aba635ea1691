"""The run's memory: an append-only, fsynced, checksummed JSONL file. Where a run stands is a function of it alone.

A line is one record, a JSON object whose last key is its checksum:

    {"n":12,"event":"commit","iteration":0,...,"time":1730000000.0,"check":"<16 hex digits>"}

`n` counts lines from 0; `check` is BLAKE2b-64 over the line without it (`...,"time":1730000000.0}`); `time` (Unix
seconds) is for people, nothing is decided by it. Events with a meaning here, others are free:

    policy  iteration, path, digest      theta_iteration, an HF folder; `path` is relative to the journal's folder
    commit  iteration, phase, step, shards, ...  everything up to this step of the phase is durable; the newest counts
    done    iteration, phase, ...        the phase is finished
    measured  name, path, metrics, ...   a policy was saved and, where there is validation, evaluated
    removed paths                        policies that earlier records name and that are gone (`checkpoint.keep_best`)
    started previous, host, job, environment   a process of the run begins, after one that ended so, or without a word
    changed keys, forced                 what a resume has changed of the configuration, and which keys by force

A record is on disk before `record` returns, and what it names must be on disk before it is recorded. So a crash can
damage the last line only, and that line was never relied on: it is dropped. A bad line before it is damage by
something else and is refused. (Such damage to the last line itself can't be told from a crash: the run then resumes
from the commit before, if `checkpoint.keep` has left its checkpoint, and else says how to begin the phase anew.)
"""

from __future__ import annotations

import io
import json
import os
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import fsync_path
from rloop_mcore.types import Policy, PolicyName

PHASES = ("base", "sft", "explore", "select", "exploit", "evaluate")
_OWN_KEYS = {"n", "event", "time", "check"}


class Journal:
    """The journal at `path`; `records` are its records so far, oldest first, without their checksums.

    Opening only reads (`rloop status` does so beside a running writer); a torn last line is cut off by the first
    `record`. There must be one writer at a time: the run directory's lock sees to that.
    """

    def __init__(self, path: Path) -> None:
        """Replay the journal; a missing file is an empty one. Raises UserError naming a corrupt line."""
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        self.records, self._size = _replay(path, content)

    def record(self, event: str, **fields: Any) -> None:
        """Append one record durably. `fields` are JSON values; NaN and infinity are refused with a ValueError."""
        if taken := _OWN_KEYS & fields.keys():
            raise ValueError(f"journal fields {sorted(taken)} are the journal's own")
        record = {"n": len(self.records), "event": event, **fields, "time": round(time.time(), 3)}
        body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
        line = _with_check(body)
        self._write(line)
        self._size += len(line)
        self.records.append(json.loads(body))

    def done(self, iteration: int, phase: str) -> bool:
        """Whether the phase (one of PHASES) of the iteration is finished."""
        return self.newest("done", iteration, phase) is not None

    def finished(self, iterations: int) -> bool:
        """Whether a run of so many iterations has come to its end."""
        return self.done(iterations - 1, "evaluate") if iterations else self.done(0, "base")

    def commits(self) -> list[dict[str, Any]]:
        """Those of all phases, oldest first."""
        return [record for record in self.records if record["event"] == "commit"]

    def places(self) -> list[dict[str, Any]]:
        """Where the run has been: commits and ends of phases, oldest first."""
        return [record for record in self.records if record["event"] in ("commit", "done")]

    def shards(self) -> list[str]:
        """The names of the cache's shards that commits made part of the run, oldest first."""
        return [shard for commit in self.commits() for shard in commit["shards"]]

    def make_durable(self) -> None:
        """Bring what was replayed to disk, before anything that it makes obsolete is removed.

        A killed writer may have written its last line and not synced it: a power cut could still take it back.
        """
        if self.path.exists():
            fsync_path(self.path)
            fsync_path(self.path.parent)

    def start_policy(self, iteration: int) -> Policy:
        """theta_iteration. Raises LookupError when it is not recorded yet."""
        for record in reversed(self.records):
            if record["event"] == "policy" and record["iteration"] == iteration:
                return Policy(path=self.path.parent / record["path"], digest=record["digest"])
        raise LookupError(f"{self.path} records no policy for iteration {iteration}")

    def endpoint(self, iteration: int) -> Policy:
        """The RL policy at the end of an exploration. Raises LookupError before that is done."""
        done = self.newest("done", iteration, "explore")
        if done is None:
            raise LookupError(f"{self.path} records no end of exploration {iteration}")
        name = str(PolicyName(iteration, "explore", done["step"]))
        record = next(record for record in self.records if record["event"] == "measured" and record["name"] == name)
        return Policy(path=self.path.parent / record["path"], digest=record["digest"])

    def newest(self, event: str, iteration: int, phase: str) -> dict[str, Any] | None:
        """The newest `commit` or `done` of a phase (one of PHASES) of an iteration; None before the first."""
        if phase not in PHASES:
            raise ValueError(f"phase {phase!r} is none of {', '.join(PHASES)}")
        for record in reversed(self.records):
            if record["event"] == event and record["iteration"] == iteration and record["phase"] == phase:
                return record
        return None

    def _write(self, line: bytes) -> None:
        """Write after the last good line; what a crash or a failed write left there goes first."""
        created = 0 if self._size else os.O_CREAT  # one that is gone meanwhile would be made of zeros
        fd = os.open(self.path, os.O_WRONLY | created, 0o644)
        try:
            os.ftruncate(fd, self._size)
            os.lseek(fd, 0, os.SEEK_END)
            with open(fd, "wb", closefd=False) as file:
                file.write(line)
            os.fsync(fd)
        finally:
            os.close(fd)
        if self._size == 0:
            fsync_path(self.path.parent)


def _with_check(body: bytes) -> bytes:
    """The line of a record's JSON object: the checksum becomes its last key."""
    check = blake2b(body, digest_size=8).hexdigest()
    return b'%s,"check":"%s"}\n' % (body[:-1], check.encode())


def _replay(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The good records and the bytes they take. Only the last line may be torn."""
    lines = io.BytesIO(content).readlines()
    records: list[dict[str, Any]] = []
    size = 0
    for number, line in enumerate(lines):
        record = _parse(line)
        if record is None and number == len(lines) - 1:
            break
        if record is None or record["n"] != number:
            raise UserError(
                f"{path} line {number + 1} is corrupt (its checksum or its number is wrong) and no crash can have "
                "done it: restore the file from a copy, or cut it before that line to go on from there."
            )
        records.append(record)
        size += len(line)
    return records, size


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, without its checksum; None when the line is not exactly what was written."""
    body = line.rpartition(b',"check":"')[0] + b"}"
    return json.loads(body) if _with_check(body) == line else None
