"""`rloop COMMAND ...`: runs one command; its exit code.

0 done; 2 the user's mistake, told in one sentence; 75 checkpointed and wants to be started again; 69 a bad node
(`rloop preflight` only); 130 Ctrl-C; 141 nobody reads its output any more; 1 a fault.
"""

from __future__ import annotations

import errno
import io
import os
import re
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Any

from rloop_mcore.errors import Fault, Interrupted, UserError

# what a path of the user's can be that keeps it from being read or written
_OF_A_PATH = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)
_UNREAD = 128 + signal.SIGPIPE  # as of a command that the signal ends
# `rloop NAME` is the function NAME of main/NAME.py: what these take of their options; the others take all
_TAKEN = {
    "train": ("overrides", "force"),
    "node": ("overrides", "force"),
    "plan": ("overrides", "json", "search"),
    "status": ("run", "json"),
    "trace": ("run", "out"),
    "compare": ("first", "second", "out", "json"),
    "grade": ("file", "json", "answer_format"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # where a terminal or a pipe has no UTF-8
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except (UserError, Fault) as error:
        print(f"rloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):
            raise
        return _UNREAD  # rich has seen to what is left
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO) and _unread():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left isn't tried again at the exit
            return _UNREAD
        told = _told(error)
        if told is None:
            raise
        code, sentence = told
        print(f"rloop: {sentence}", file=sys.stderr)
        return code
    except Interrupted as why:
        print(f"rloop: {why}; the same command goes on", file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        return 130


def _open_streams() -> None:
    """What the command was started without goes to /dev/null, and its number to no file that is opened later."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)  # for the ranks
            setattr(sys, name, os.fdopen(number, "w"))
    said = sys.__stderr__
    if said is not None and sys.stderr is said:
        sys.stderr = _Messages(said.buffer, encoding=said.encoding, line_buffering=True)


class _Messages(io.TextIOWrapper):
    """Standard error, where a terminal that is gone or a full disk changes neither the work nor the exit code."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _run(arguments: list[str]) -> int:
    from rloop_mcore.main.arguments import parse  # here, as whatever takes time, for Ctrl-C
    from rloop_mcore.platform.process import handling, importing

    options = parse(arguments)
    with ExitStack() as stack:
        if options.command == "train":
            stack.enter_context(handling((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2), _interrupt))
        with importing():  # when it is wanted: `rloop status` must not wait for what training needs
            module = import_module(f"rloop_mcore.main.{options.command}")
        command = getattr(module, options.command)
        taken = [vars(options)[name] for name in _TAKEN.get(options.command, ())]
        return int(command(*(taken or [options])))


def _unread() -> bool:
    """Whether who read the output has seen enough, as `head` does, or was a terminal that is gone."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # 0: errors alone
    return bool(poll.poll(0))


def _interrupt(number: int, frame: Any) -> None:
    """What asks a run to stop, while it is still to be started."""
    raise Interrupted(f"{signal.Signals(number).name} came while no rank was running")


def _without_folder() -> bool:
    """Whether the working directory is gone."""
    try:
        os.getcwd()
    except OSError:
        return True
    return False


def _told(error: OSError) -> tuple[int, str] | None:
    """The exit code and the sentence of what a path or a disk of the user's did; None for any other failure."""
    from rloop_mcore.platform.files import is_disk_full

    if is_disk_full(error):
        return 1, "no space is left on a disk: make some, and run the same command again."
    if not error.filename and _without_folder():
        return 2, "the folder that you are in was removed: go to one that is there."
    if error.errno not in _OF_A_PATH or not error.filename:
        return None
    path = re.sub(r"\.tmp-\d+-", "", str(error.filename2 or error.filename))  # as the user knows it
    return 2, f"{path} can't be read or written: {error.strerror}."


if __name__ == "__main__":
    sys.exit(main())
