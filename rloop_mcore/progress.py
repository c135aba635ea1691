"""What a person sees while a run goes on: a live bar on a terminal, one line every so often elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_EVERY_S = 10.0
_BAR = 24  # columns of the terminal
_CLOCK, _GAPS = 8, 5  # of the time since the start, up to a day; between the parts

_FIGURES = {
    "reward_mean": "reward {:.3f}",
    "success_rate": "success {:.1%}",
    "loss": "loss {:.3f}",
    "response_length": "length {:.0f}",
    "entropy": "entropy {:.2f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "mb_per_s": "{:,.0f} MB/s",
}


def seconds_left(elapsed_s: float, done: int, left: int) -> float | None:
    """For the `left` that are still to do, at the pace of the `done`; None while none is."""
    return elapsed_s / done * left if done else None


class ProgressDisplay:
    """Where a run is, and a few live figures.

    On a terminal a bar that is redrawn in place; elsewhere plain lines, at most one every `PLAIN_EVERY_S` seconds
    beside the first and the last of a phase.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._clock = clock
        self._last_line = float("-inf")
        self._bar: Progress | None = None
        self._bar_column = BarColumn()
        self._task: TaskID | None = None

    def show(self, place: str, done: int, total: int, eta_s: float | None, metrics: Mapping[str, float | None]) -> None:
        """Show `done` of `total` of the phase named `place`, the seconds left (None: unknown) and the metrics."""
        figures = figures_text(metrics)
        left = left_text(eta_s)
        if self._console.is_terminal:
            self._redraw(place, done, total, left, figures)
        elif done in (0, total) or self._clock() - self._last_line >= PLAIN_EVERY_S:
            self._last_line = self._clock()
            self.message(plain_line(place, done, total, figures, left))

    def message(self, text: str) -> None:
        """Print a line of its own, above the bar where there is one."""
        with _whoever_reads():
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Leave the terminal as it should be; the last state stays readable."""
        if self._bar is not None:
            with _whoever_reads():
                self._bar.stop()
            self._bar = None

    def _redraw(self, place: str, done: int, total: int, left: str, figures: str) -> None:
        left, figures, self._bar_column.bar_width = self._fitting(place, total, left, figures)
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False, style="bold"),
                self._bar_column,
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}", markup=False, style="cyan"),
                TextColumn("{task.fields[figures]}", markup=False, style="dim"),
                console=self._console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task(place, completed=done, total=total, left=left, figures=figures)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, description=place, completed=done, total=total, left=left, figures=figures)

    def _fitting(self, place: str, total: int, left: str, figures: str) -> tuple[str, str, int]:
        """What the terminal's width has room for beside the place and how far it is: the time left, then so many whole
        figures, then the bar, of so many columns. Else all would be cut, these two first."""
        room = self._console.width - len(place) - (2 * len(str(total)) + 1) - _CLOCK - _GAPS - 1
        left = left if len(left) <= room else ""
        room -= len(left)
        whole = figures.split("  ")
        while whole and len("  ".join(whole)) > room:
            whole.pop()
        figures = "  ".join(whole)
        return left, figures, max(1, min(_BAR, 1 + room - len(figures)))


@contextmanager
def _whoever_reads() -> Iterator[None]:
    """A log on a full disk, a terminal that is gone, a pipe that nobody reads: not what a run should end by.

    Of the last rich makes a SystemExit, and writes to /dev/null from then on.
    """
    with suppress(OSError, SystemExit):
        yield


def figures_text(metrics: Mapping[str, float | None]) -> str:
    """The few figures worth a glance, in words."""
    known = [(metrics[key], form) for key, form in _FIGURES.items() if key in metrics]
    return "  ".join(form.format(value) for value, form in known if value is not None)


def plain_line(place: str, done: int, total: int, figures: str, left: str) -> str:
    """A line of a log that says how far something is; what is empty is left out."""
    words = [time.strftime("%H:%M:%S"), place, f"{done}/{total}", figures, left]
    return "  ".join(word for word in words if word)


def left_text(eta_s: float | None) -> str:
    return f"{duration(eta_s)} left" if eta_s is not None else ""


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss, after the days where there are any."""
    return str(timedelta(seconds=round(seconds)))
