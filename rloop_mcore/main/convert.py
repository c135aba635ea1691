"""`rloop convert SRC DST`: a Hugging Face folder to a Megatron checkpoint, or back."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import torch
from rich.filesize import decimal

from rloop_mcore.errors import Fault, UserError
from rloop_mcore.main.policies import Source
from rloop_mcore.main.run_directory import check_not_removed
from rloop_mcore.platform.files import remove_abandoned
from rloop_mcore.platform.process import allow_many_files, handling
from rloop_mcore.progress import ProgressDisplay
from rloop_mcore.weights import hf_to_mcore, mcore_to_hf
from rloop_mcore.weights.conversion import Conversion
from rloop_mcore.weights.sections import Layout

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_THREADS = 8
_LONGEST_NAME = 200  # what is unfinished has a longer one
_MB = 1e6


def convert(options: argparse.Namespace) -> int:
    """Plan, say what the plan is, convert. Raises UserError before anything is written, Fault where it goes wrong."""
    source, target = options.source, options.target
    check_not_removed(source)
    if not source.is_dir():
        raise UserError(f"{source} is not a folder; give a Hugging Face folder or a Megatron checkpoint.")
    torch.set_num_threads(1)  # the threads are the conversion's own
    allow_many_files()  # every file of a checkpoint is open at once
    try:
        conversion = _plan(options, options.to or _other_than(source))
        _check_target(target, conversion.bytes)
    except OSError as error:
        raise UserError(f"{error.filename or source} cannot be read: {error.strerror or error}.") from error
    display = ProgressDisplay()
    for warning in conversion.warnings:
        display.message(f"warning: {warning}")
    if options.dry_run:
        display.message(describe(conversion))
        return 0
    meter = _Meter(display, 2 * conversion.bytes)
    try:
        with handling(_ending(), signal.default_int_handler):
            remove_abandoned(target)
            conversion.run(meter.add)
            remove_abandoned(target)  # what was killed less than a minute before this began
    except OSError as error:
        raise Fault(f"{target} was not written: {error}.") from error
    finally:
        display.close()
    seconds = time.monotonic() - meter.begun
    display.message(
        f"{target}: {conversion.tensors} tensors, {decimal(conversion.bytes)} in {seconds:.1f} s, verified."
    )
    return 0


def _ending() -> list[int]:
    """The signals that end a process by default, as Ctrl-C does, and would leave what is unfinished."""
    return [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]


def _check_target(target: Path, size: int) -> None:
    """Raises UserError where `target` cannot be made, or `size` bytes have no room there."""
    if os.path.lexists(target):
        raise UserError(f"{target} exists already: remove it, or choose another.")
    parent = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir() or not os.access(parent, os.W_OK) or target.name in ("", ".."):
        raise UserError(f"{target} cannot be made: {parent} is no folder that can be written to.")
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise UserError(f"{target}: its name is longer than {_LONGEST_NAME} bytes.")
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(f"{target}: {decimal(size)} are to be written, and {decimal(free)} are free there.")


def _plan(options: argparse.Namespace, to: str) -> Conversion:
    dtype = _DTYPES.get(options.dtype)
    threads = options.threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    if not 1 <= threads <= 256:
        raise UserError(f"--threads {threads}: it is a number from 1 to 256.")
    if to == "mcore":
        if options.config or options.trust:
            raise UserError("--config and --trust are for conversions to a Hugging Face folder.")
        layout = Layout(options.tp, options.pp, options.ep)
        return hf_to_mcore.plan(options.source, options.target, layout, dtype, threads, options.family)
    if (options.tp, options.pp, options.ep) != (1, 1, 1):
        raise UserError("--tp, --pp and --ep are for conversions to a Megatron checkpoint: a folder has no layout.")
    return mcore_to_hf.plan(
        options.source, options.target, dtype, threads, options.config, options.trust, options.family
    )


def _other_than(source: Path) -> str:
    """mcore for an HF folder, hf for a checkpoint. Raises UserError for neither."""
    if Source(source).is_checkpoint:
        return "hf"
    if (source / "config.json").exists():
        return "mcore"
    raise UserError(
        f"{source} has neither config.json nor metadata.json: it is no Hugging Face folder and no Megatron checkpoint."
    )


def describe(conversion: Conversion) -> str:
    """What would be written, and what that takes."""
    files = [f"  {name}  {decimal(size)}" for name, size in conversion.files.items()]
    return "\n".join(
        [
            f"{conversion.source} -> {conversion.target}: {conversion.tensors} tensors, {decimal(conversion.bytes)} in "
            f"{len(files)} files",
            *files,
            f"largest tensor {decimal(conversion.largest)}; copies of tensors take about {decimal(conversion.memory)}",
        ]
    )


class _Meter:
    """Shows how far a conversion is; its threads tell."""

    def __init__(self, display: ProgressDisplay, total: int) -> None:
        self._display, self._total, self._done, self._shown = display, math.ceil(total / _MB), 0, -1
        self._bytes = total
        self._lock = threading.Lock()
        self.begun = time.monotonic()
        self.add(0)

    def add(self, size: int) -> None:
        with self._lock:
            self._done += size
            shown = int(self._done / _MB) if self._done < self._bytes else self._total
            if shown == self._shown:
                return
            self._shown = shown
            speed = self._done / max(time.monotonic() - self.begun, 1e-6)
            left = (self._bytes - self._done) / speed if speed else None
            self._display.show(
                "MB written and checked", shown, self._total, left, {"mb_per_s": speed / _MB} if speed else {}
            )
