"""Metrics: a line of JSON a step, TensorBoard, W&B if asked for, and the progress display.

metrics.jsonl is the one the project itself reads; the others are views of it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rloop_mcore.config import TrackingConfig
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import is_disk_full, json_object, passing_over_a_full_disk
from rloop_mcore.platform.heartbeat import beat
from rloop_mcore.progress import ProgressDisplay, seconds_left
from rloop_mcore.wandb_run import WandbRun

_STEPS_FOR_ETA = 20  # the pace of the last steps foretells the next ones

_NOT_METRICS = {"iteration", "phase", "step", "total", "global_step", "eta_s", "time"}


class Tracker:
    """The metrics of one run directory; only one process writes them.

    Raises UserError where `tracking.wandb_project` is set and W&B has no key.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrackingConfig,
        display: ProgressDisplay | None = None,
        clock: Callable[[], float] = time.monotonic,
        keys: Mapping[str, Any] | None = None,
    ) -> None:
        """keys: the whole configuration, for the views that show it."""
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self._file = self.path.open("ab", buffering=0)
        self._unwritten = b""
        self._lines = self.path.read_bytes().count(b"\n")
        self._tensorboard_dir = run_dir / "tensorboard" if config.tensorboard else None
        self._tensorboard: Any = None
        self._display = (display or ProgressDisplay()) if config.progress else None
        self._wandb: WandbRun | None = None
        if config.wandb_project:
            self._wandb = WandbRun(config.wandb_project, run_dir, keys or {}, self.message)
        self._clock = clock
        self._place = ""
        self._marks: deque[tuple[int, float]] = deque(maxlen=_STEPS_FOR_ETA + 1)
        self._begun = clock()  # the activity that `show` shows

    def log(
        self,
        iteration: int,
        phase: str,
        step: int,
        global_step: int,
        metrics: Mapping[str, float],
        total: int = 0,
        checkpoint: str = "",
    ) -> None:
        """Record the metrics of the step-th step (from 1) of a phase of `total` steps (0: of a `checkpoint` by name).

        The line also holds `total`, `eta_s` (seconds to the end of the phase, null while unknown) and `time` (Unix
        seconds). Numbers that are not finite are written as null.
        """
        beat()
        place = f"iteration {iteration} {phase}"
        eta_s = self._eta(place, step, total) if total else None
        values = {key: _plain(value) for key, value in metrics.items()}
        line = {
            "iteration": iteration,
            "phase": phase,
            "step": step,
            "total": total,
            "global_step": global_step,
            "eta_s": eta_s,
            "time": round(time.time(), 3),
            **values,
        }
        self._unwritten += json.dumps(line, allow_nan=False).encode() + b"\n"
        with passing_over_a_full_disk():  # the line is kept, and the next commit waits for space
            self._write_out()
        self._lines += 1
        try:
            if self._tensorboard_dir is not None:
                self._write_tensorboard(line)
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._tensorboard_dir = None
            self.message("TensorBoard's files end here, for lack of space; a resume writes them anew")
        if self._wandb is not None:
            self._wandb.log(*_curve(line), _metrics(line), self._lines)
        if self._display is None:
            return
        if total:
            self._display.show(place, step, total, eta_s, values)
        else:
            self._display.message(f"{checkpoint}: {_words(values)}")

    def show(self, activity: str, done: int, total: int) -> None:
        """Show how far an activity between two steps is (an evaluation, say), from its 0 on; nothing is recorded."""
        if done == 0:
            self._begun = self._clock()
        if self._display is not None:
            eta_s = seconds_left(self._clock() - self._begun, done, total - done)
            self._display.show(activity, done, total, eta_s, {})

    def message(self, text: str) -> None:
        """Tell the person who watches."""
        if self._display is not None:
            self._display.message(text)

    def offset(self) -> int:
        """Size of metrics.jsonl in bytes, after an fsync: what the journal commits. Raises OSError on a full disk."""
        self._write_out()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def rewind(self, offset: int) -> None:
        """Drop whatever was logged after a commit at `offset`.

        TensorBoard's files are written anew from what is left; W&B ignores the lines that it already has. Raises
        UserError where the file is shorter than what was committed, or holds something else.
        """
        size = self._file.seek(0, os.SEEK_END)
        if size < offset:
            raise UserError(
                f"{self.path} holds {size} bytes, but the journal committed {offset}: "
                "it was cut or replaced; restore it, or start a new run.dir"
            )
        self._file.truncate(offset)
        self._file.seek(offset)
        os.fsync(self._file.fileno())
        committed = self.path.read_bytes().splitlines()
        self._lines = len(committed)
        if self._tensorboard_dir is not None:
            self._close_tensorboard()
            shutil.rmtree(self._tensorboard_dir, ignore_errors=True)
            for number, line in enumerate(committed, start=1):
                self._write_tensorboard(_committed(self.path, number, line))

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._close_tensorboard()
        if self._wandb is not None:
            self._wandb.finish()
        if self._display is not None:
            self._display.close()

    def _eta(self, place: str, step: int, total: int) -> float | None:
        if place != self._place:
            self._place = place
            self._marks.clear()
        self._marks.append((step, self._clock()))
        (first_step, first_time), (last_step, last_time) = self._marks[0], self._marks[-1]
        if last_step <= first_step:
            return None
        return round((last_time - first_time) / (last_step - first_step) * (total - step), 1)

    def _write_out(self) -> None:
        while self._unwritten:
            written = self._file.write(self._unwritten)
            self._unwritten = self._unwritten[written:]

    def _write_tensorboard(self, line: Mapping[str, Any]) -> None:
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import: only where it is wanted

            self._tensorboard = SummaryWriter(str(self._tensorboard_dir), flush_secs=10)
        curve, x = _curve(line)
        for key, value in _metrics(line).items():
            self._tensorboard.add_scalar(f"{curve}/{key}", value, x, walltime=line["time"])

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            with suppress(OSError):  # of a disk that was full: what there is can be written anew
                self._tensorboard.close()
            self._tensorboard = None


def _committed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    """A line that was logged before. Raises UserError where it is none."""
    line: dict[str, Any] = {}
    with suppress(ValueError):
        line = json_object(text)
    if not {"iteration", "phase", "step", "global_step", "time"} <= line.keys():
        raise UserError(
            f"{path}, line {number}, which the journal committed, is damaged: restore the file, or start a new run.dir"
        )
    return line


def _curve(line: Mapping[str, Any]) -> tuple[str, int]:
    """RL curves run over RL steps; every fine-tuning is a curve of its own over its updates."""
    if line["phase"] in ("sft", "exploit"):
        return f"{line['phase']}_{line['iteration']}", line["step"]
    return line["phase"], line["global_step"]


def _metrics(line: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key not in _NOT_METRICS and value is not None}


def _plain(value: Any) -> float | int | None:
    if isinstance(value, int):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else None


def _words(values: Mapping[str, float | None]) -> str:
    """Those of all problems; of single sources (METRIC/SOURCE) there may be dozens."""
    return "  ".join(f"{key} {value:.4g}" for key, value in values.items() if value is not None and "/" not in key)
