"""Where things are in a run directory, its lock, and how a run's processes tell each other how it ended."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rloop_mcore.config import GENERATED_MODEL, Config
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.journal import Journal
from rloop_mcore.kept_policies import best, removed
from rloop_mcore.platform.files import json_object, passing_over_a_full_disk, try_lock, write_atomic
from rloop_mcore.run_config import read_config

FOLDER_VARIABLE = "RLOOP_JOB_FOLDER"  # of a start of a Slurm job: the batch script makes the folder and names it
SUPERVISOR_VARIABLE = "RLOOP_SUPERVISOR"  # its pid, for the ranks
_LOCK_WAIT_S = 15.0  # a killed run's processes need a moment to go
_FOLDERS = {"cache", "checkpoints", "evaluation", "experts", "model", "policies", "tensorboard"}
_FILES = {"lock", "lock.rank0", "heartbeat", "stop"}
_FILE_KINDS = {".json", ".jsonl", ".log", ".txt", ".yaml"}  # its other files: one of every engine, say


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def cache(self) -> Path:
        return self.path / "cache"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def log(self) -> Path:
        return self.path / "ranks.log"

    @property
    def jobs(self) -> Path:
        """Of its Slurm jobs: their script and logs, and how their nodes find each other."""
        return self.path / "slurm"

    @property
    def heartbeat(self) -> Path:
        return self.path / "heartbeat"

    @property
    def inputs(self) -> Path:
        """Digests of what is in the files that its configuration names."""
        return self.path / "inputs.json"

    @property
    def golds(self) -> Path:
        """Which gold answers don't verify against themselves."""
        return self.path / "golds.json"

    @property
    def preflight(self) -> Path:
        return self.path / "preflight.json"

    def create(self) -> None:
        """Make the directory. Raises UserError where that is impossible, or where it holds something that is no run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={self.path} cannot be created ({error.strerror}): choose another.") from error
        if not os.access(self.path, os.W_OK):
            raise UserError(f"run.dir={self.path} is not writable: make it so, or choose another.")
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(".tmp-")}
        if names and not names & {"config.yaml", "lock", "model", "slurm", "preflight.json"}:  # what a run makes first
            raise UserError(f"run.dir={self.path} holds other files ({min(names)}): choose an empty or new folder.")
        of_files = {name for name in names if name in _FILES or Path(name).suffix in _FILE_KINDS}
        for name in sorted(of_files | (names & _FOLDERS)):
            if (self.path / name).is_dir() != (name in _FOLDERS):
                kind = "folder" if name in _FOLDERS else "file"
                raise UserError(
                    f"{self.path / name} has to be a {kind} of the run's: move what is there out of its way."
                )
        self.open_journal()

    def open_journal(self) -> Journal:
        """Its journal. Raises UserError where it is damaged, or gone from a run that has left policies."""
        journal = Journal(self.journal)
        if any((self.path / "policies").glob("*")) and not journal.records:
            raise UserError(
                f"{self.journal} is gone or holds no record, and policies/ is there: restore it, or choose another "
                "run.dir."
            )
        return journal

    def read_config(self) -> Config:
        """What the run was started with. Raises UserError where there is no run."""
        if not self.config.is_file():
            raise UserError(f"{self.path} is not a run directory, or its run has not begun: it holds no config.yaml.")
        return read_config(self.config)

    def model(self, config: Config) -> Path:
        """The folder of model.path; the generated task's untrained model is a folder of the run."""
        return self.path / "model" if config.model.path == GENERATED_MODEL else Path(config.model.path)

    @contextmanager
    def lock(self, name: str = "lock") -> Iterator[None]:
        """Hold the directory: one run at a time; the file says whose. Raises UserError where another has it."""
        self.create()
        descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT)
        try:
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not try_lock(descriptor):
                if time.monotonic() > deadline:
                    raise UserError(f"run.dir={self.path} is in use by another run: wait for it, or choose another.")
                time.sleep(0.1)
            with passing_over_a_full_disk():
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _this_start().encode())
            yield
        finally:
            os.close(descriptor)

    def locked(self) -> bool:
        """Is a run working in the directory now?"""
        if not (self.path / "lock").exists():
            return False
        descriptor = os.open(self.path / "lock", os.O_RDONLY)
        try:
            return not try_lock(descriptor, shared=True)  # others may ask at the same moment
        finally:
            os.close(descriptor)

    def request_stop(self, why: str) -> None:
        """Raises OSError where not even an empty file can be made. On a full disk the reason may be left out."""
        (self.path / "stop").touch()
        with suppress(OSError):
            (self.path / "stop").write_text(why)

    def stop_requested(self) -> bool:
        return (self.path / "stop").exists()

    def stop_reason(self) -> str:
        """Why, as far as a full disk has taken it."""
        return (self.path / "stop").read_text() if self.stop_requested() else "it was to stop"

    def write_ending(self, code: int, message: str, report: str = "") -> None:
        """How the run ended; `report` (a traceback) makes it a fault that people can read about.

        Nothing is said where the disk is full, and none of a later start by a node of a job that was cut off.
        """
        if self._is_of_a_later_start():
            return
        with passing_over_a_full_disk():
            write_atomic(self.path / "ending.json", json.dumps({"code": code, "message": message}))
            if report:
                write_atomic(self.path / "fault.txt", report)

    def write_error(self, error: BaseException, where: str = "") -> None:
        """That the run ended with `error`, which was just caught: a mistake of the user's, else a fault."""
        if isinstance(error, UserError):
            self.write_ending(2, f"{where}{error}")
        else:
            kind = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
            self.write_ending(1, f"{where}{kind}{error}", traceback.format_exc())

    def _is_of_a_later_start(self) -> bool:
        """Whether another start has taken the directory from the one that this process is of."""
        with suppress(FileNotFoundError):
            return (self.path / "lock").read_text(errors="replace") not in ("", _this_start())
        return False

    def ending(self) -> dict[str, Any] | None:
        found = read_if_sound(self.path / "ending.json")
        return found if found is not None and {"code", "message"} <= found.keys() else None

    def previous_ending(self) -> dict[str, Any] | None:
        """How the process before this one ended; None where it left no word."""
        return read_if_sound(self.path / "previous_ending.json")

    def clear_ending(self) -> None:
        """Make way for this process's ending; the one before it is the previous one."""
        (self.path / "previous_ending.json").unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            os.replace(self.path / "ending.json", self.path / "previous_ending.json")
        for name in ("stop", "fault.txt"):
            (self.path / name).unlink(missing_ok=True)


def _this_start() -> str:
    """A start of a job has a folder of its own; outside of jobs nothing outlives its supervisor."""
    return os.environ.get(FOLDER_VARIABLE, "no job")


def output_in(run: Path, name: str) -> Path:
    """The file `name` of a run directory, where a command writes unless told otherwise.

    Raises UserError where that takes no file, before the work: another's run, or a copy that is read-only.
    """
    if run.is_dir() and not os.access(run, os.W_OK):
        raise UserError(f"{run} can't be written to: say with --out where {name} is to go.")
    return run / name


def read_if_sound(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no file, or a damaged one."""
    try:
        return json_object(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def log_tail(log: Path) -> str:
    """The last 20 lines of a log; nothing where there is none."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.exists() else ""


def check_not_removed(policy: Path) -> None:
    """Raises UserError where `policy` is the folder of a policy that its run has not kept."""
    run = RunDirectory(policy.absolute().parent.parent)
    if policy.exists() or not run.journal.exists():
        return
    records = Journal(run.journal).records
    if f"policies/{policy.name}" in removed(records):
        picked = best(records)
        raise UserError(
            f"{policy} was removed: checkpoint.keep_best of that run kept better ones"
            + (f", the best is {run.path / picked.path}." if picked else ".")
        )
