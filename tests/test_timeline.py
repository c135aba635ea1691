"""What is recorded of a run, and the Chrome trace of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rloop_mcore.errors import UserError
from rloop_mcore.main.trace import trace
from rloop_mcore.timeline import Timeline, chrome_trace, read_spans


def test_a_trace_holds_every_span_once_on_its_track(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path)
    timeline.add("engines", "generate", 100.0, 2.0, step=0)
    timeline.add("trainer", "update", 101.0, 0.5, step=0)
    with pytest.raises(ValueError, match="x"), timeline.span("trainer", "sync", version=2):
        raise ValueError("x")  # a span that fails is recorded too
    timeline.close()
    with (tmp_path / "timeline.jsonl").open("ab") as file:
        file.write(
            b'3\n[1]\nnull\n{}\n{"track": 1, "name": "a", "begin": "b", "seconds": 0}\n' + b"[" * 100_000 + b"\n"
        )
        file.write(b'{"track": "eng\xc3')  # a kill in mid-line
    assert trace(tmp_path, None) == 0
    found = json.loads((tmp_path / "trace.json").read_text())
    spans = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert [(s["name"], s["args"]) for s in spans] == [
        ("generate", {"step": 0}),
        ("update", {"step": 0}),
        ("sync", {"version": 2}),
    ]
    assert (spans[0]["ts"], spans[0]["dur"], spans[1]["ts"], spans[1]["dur"]) == (0.0, 2e6, 1e6, 0.5e6)
    names = {e["tid"]: e["args"]["name"] for e in found["traceEvents"] if e["name"] == "thread_name"}
    assert [names[span["tid"]] for span in spans] == ["engines", "trainer", "trainer"]


def test_a_clock_that_is_set_meanwhile_lengthens_no_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(tmp_path)
    with timeline.span("trainer", "update"):
        monkeypatch.setattr(time, "time", lambda: 0.0)
    timeline.close()
    (span,) = read_spans(tmp_path / "timeline.jsonl")
    assert 0 <= span["seconds"] < 60


def test_overlapping_spans_of_a_track_get_rows_of_their_own() -> None:
    spans = [{"track": "engines", "name": str(n), "begin": float(n), "seconds": 1.5} for n in range(4)]
    rows = [event["tid"] for event in chrome_trace(spans)["traceEvents"] if event["ph"] == "X"]
    assert rows == [1, 2, 1, 2]


def test_a_folder_without_a_timeline_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"timeline\.jsonl does not exist"):
        trace(tmp_path, None)
