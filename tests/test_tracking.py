"""What the tracker leaves on disk and on the screen, read back by independent readers."""

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rloop_mcore.config import TrackingConfig
from rloop_mcore.errors import UserError
from rloop_mcore.progress import PLAIN_EVERY_S, ProgressDisplay
from rloop_mcore.tracking import Tracker

QUIET = TrackingConfig(tensorboard=False, progress=False)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step_at_once_on_disk(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, QUIET)
    tracker.log(1, "explore", 3, 13, {"reward_mean": 0.5, "grad_norm": math.inf, "groups_kept": 4}, 10)
    (line,) = lines(tmp_path)
    assert {key: line[key] for key in ("iteration", "phase", "step", "total", "global_step")} == {
        "iteration": 1,
        "phase": "explore",
        "step": 3,
        "total": 10,
        "global_step": 13,
    }
    assert (line["reward_mean"], line["grad_norm"], line["groups_kept"]) == (0.5, None, 4)
    tracker.close()


def test_lines_for_which_there_is_no_space_are_kept_until_there_is(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, QUIET)
    tracker.log(0, "explore", 1, 1, {}, 10)
    file, tracker._file = tracker._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    for step in (2, 3):
        tracker.log(0, "explore", step, step, {}, 10)
    with pytest.raises(OSError, match="No space left on device"):
        tracker.offset()
    tracker._file.close()
    tracker._file = file
    assert [line["step"] for line in lines(tmp_path)] == [1]
    assert tracker.offset() == (tmp_path / "metrics.jsonl").stat().st_size
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    tracker.close()


def test_the_eta_follows_the_pace_of_the_phase(tmp_path: Path) -> None:
    clock = Clock()
    tracker = Tracker(tmp_path, QUIET, clock=clock)
    for step in (5, 6, 7):  # resumed after step 4
        clock.now += 2.0
        tracker.log(0, "explore", step, step, {}, 10)
        tracker.log(0, "evaluate", step, step, {})
    tracker.log(0, "exploit", 1, 7, {}, 3)
    etas = [(line["phase"], line["eta_s"]) for line in lines(tmp_path) if line["phase"] != "evaluate"]
    assert etas == [("explore", None), ("explore", 8.0), ("explore", 6.0), ("exploit", None)]
    tracker.close()


def test_rewind_forgets_what_was_not_committed(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, QUIET)
    tracker.log(0, "explore", 1, 1, {"a": 1.0})
    committed = tracker.offset()
    assert committed == (tmp_path / "metrics.jsonl").stat().st_size
    tracker.log(0, "explore", 2, 2, {"a": 2.0})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"torn": ')  # killed while writing

    resumed = Tracker(tmp_path, QUIET)
    resumed.rewind(committed)
    resumed.log(0, "explore", 2, 2, {"a": 20.0})
    resumed.close()
    assert [line["a"] for line in lines(tmp_path)] == [1.0, 20.0]


def test_a_metrics_file_shorter_than_committed_is_reported(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, QUIET)
    with pytest.raises(UserError, match="holds 0 bytes, but the journal committed 100"):
        tracker.rewind(100)
    tracker.close()


@pytest.mark.parametrize("damage", [b"\x00", b"3", b"{}"])
def test_a_committed_line_that_is_damaged_is_reported(damage: bytes, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = TrackingConfig(tensorboard=True, progress=False)
    tracker = Tracker(tmp_path, config)
    for step in (1, 2):
        tracker.log(0, "explore", step, step, {"a": 1.0})
    committed = tracker.offset()
    tracker.close()
    first, second, _ = (tmp_path / "metrics.jsonl").read_bytes().split(b"\n")
    (tmp_path / "metrics.jsonl").write_bytes(first + b"\n" + damage.ljust(len(second)) + b"\n")
    resumed = Tracker(tmp_path, config)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2, which the journal committed, is damaged"):
        resumed.rewind(committed)
    resumed.close()


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    config = TrackingConfig(tensorboard=True, progress=False)
    tracker = Tracker(tmp_path, config)
    tracker.log(0, "explore", 1, 1, {"entropy": 0.5}, 3)
    committed = tracker.offset()
    tracker.log(0, "explore", 2, 2, {"entropy": 0.25}, 3)
    tracker.close()
    resumed = Tracker(tmp_path, config)
    resumed.rewind(committed)
    for step in (2, 3):
        resumed.log(0, "explore", step, step, {"entropy": step * 1.0}, 3)
    for update in (1, 2):
        resumed.log(0, "exploit", update, 3, {"loss": update * 0.5}, 2)
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("explore/entropy")] == [(1, 0.5), (2, 2.0), (3, 3.0)]
    assert [(event.step, event.value) for event in events.Scalars("exploit_0/loss")] == [(1, 0.5), (2, 1.0)]


def test_plain_lines_are_throttled_but_never_lose_the_end(tmp_path: Path) -> None:
    clock, out = Clock(), io.StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=False, soft_wrap=True), clock)
    tracker = Tracker(tmp_path, TrackingConfig(tensorboard=False), display, clock)
    for step in range(1, 101):
        clock.now += PLAIN_EVERY_S / 5
        tracker.log(0, "explore", step, step, {"reward_mean": 0.25, "success_rate": 0.3, "tokens_per_s": 1234.0}, 100)
    tracker.log(0, "evaluate", 100, 100, {"avg@32": 0.125, "avg@32/amc": 0.5}, checkpoint="i0_explore_000100")
    tracker.message("no experts in iteration 0 [empty]")
    tracker.close()
    printed = out.getvalue().splitlines()
    assert len(printed) == 1 + 19 + 1 + 2  # the first, one in five after it, the last, the messages
    assert "iteration 0 explore  6/100  reward 0.250  success 30.0%  1,234 tokens/s  0:03:08 left" in printed[1]
    assert "100/100" in printed[-3]
    assert printed[-2] == "i0_explore_000100: avg@32 0.125"
    assert printed[-1] == "no experts in iteration 0 [empty]"


def test_an_activity_has_an_estimate_of_its_own(tmp_path: Path) -> None:
    clock, text = Clock(), io.StringIO()
    display = ProgressDisplay(Console(file=text, width=120), clock)
    tracker = Tracker(tmp_path, TrackingConfig(tensorboard=False), display, clock)
    clock.now = 100.0
    tracker.show("evaluation of base", 0, 64)
    clock.now += 30.0
    tracker.show("evaluation of base", 16, 64)
    tracker.close()
    assert "16/64  0:01:30 left" in text.getvalue()


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=True, width=160))
    tracker = Tracker(tmp_path, TrackingConfig(tensorboard=False), display)
    tracker.log(2, "explore", 3, 3, {}, 10)
    tracker.show("evaluation of i1_exploit_000000", 16, 64)  # which need not be of the phase that was last at work
    tracker.show("evaluation of i1_exploit_000000", 64, 64)
    tracker.close()
    assert "evaluation of i1_exploit_000000" in out.getvalue()
    assert "explore evaluation" not in out.getvalue()
    assert "64/64" in out.getvalue()


@pytest.mark.parametrize(
    ("width", "words"),
    [
        (40, ["37/200"]),
        (80, ["37/200", "1:12:01 left", "reward 0.033  success 3.3%"]),
        (160, ["37/200", "1:12:01 left", "entropy 0.68  12,345 tokens/s", "━" * 4]),
    ],
)
def test_a_narrow_terminal_shows_where_a_run_is_first_of_all(width: int, words: list[str]) -> None:
    """Of the usual 80 columns the figures of a step took all: neither the phase nor the step was to be read."""
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=True, color_system=None, width=width))
    figures = {"reward_mean": 0.0331, "success_rate": 0.0331, "loss": 0.01, "response_length": 1234.0, "entropy": 0.68}
    display.show("iteration 0 explore", 37, 200, 4321.0, {**figures, "tokens_per_s": 12345.0})
    display.close()
    *_, line = (each for each in out.getvalue().splitlines() if "iteration" in each)
    assert all(word in line for word in ["iteration 0 explore", *words]), line
    assert "…" not in line


def test_a_bar_may_be_called_anything() -> None:
    out = io.StringIO()
    display = ProgressDisplay(Console(file=out, force_terminal=True, width=160))
    display.show("[/x]", 64, 64, None, {})
    display.close()
    assert "[/x]" in out.getvalue()


def test_a_display_outlives_whoever_read_it() -> None:
    """`rloop train | head -n 1`: rich would end the run by a SystemExit."""
    reading, writing = os.pipe()
    script = (
        "import sys; from rloop_mcore.progress import ProgressDisplay; display = ProgressDisplay(); sys.stdin.read()\n"
        "for step in range(3): display.show('phase', 0, 64, None, {})\n"
        "display.close(); print('unread'); print('went on', file=sys.stderr)"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    os.close(reading)
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said) == (0, "went on\n")
