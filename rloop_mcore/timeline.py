"""When what happened: spans of work, for `rloop trace`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rloop_mcore.platform.files import json_object, passing_over_a_full_disk
from rloop_mcore.platform.heartbeat import beat

FILE = "timeline.jsonl"
_SPAN: dict[str, type | tuple[type, ...]] = {"track": str, "name": str, "begin": (int, float), "seconds": (int, float)}


class Timeline:
    """Appends a line a span to `timeline.jsonl`. May be called from several threads; without a folder it does nothing.

    A line: {"track", "name", "begin", "seconds", ...facts}; `begin` is Unix time in seconds. Lines of a killed run may
    describe steps that its resume repeats: they did take that time.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file = None if folder is None else (folder / FILE).open("a", encoding="utf-8")
        self._lock = threading.Lock()

    @contextmanager
    def span(self, track: str, name: str, **facts: Any) -> Iterator[None]:
        """Record the block as `name` on `track`, also where it raises."""
        begin, clock = time.time(), time.monotonic()  # a clock may be set meanwhile
        try:
            yield
        finally:
            self.add(track, name, begin, time.monotonic() - clock, **facts)

    def add(self, track: str, name: str, begin: float, seconds: float, **facts: Any) -> None:
        """Record a span that has passed."""
        beat()
        if self._file is None:
            return
        line = {"track": track, "name": name, "begin": round(begin, 6), "seconds": round(seconds, 6), **facts}
        with self._lock, passing_over_a_full_disk():  # nobody waits for these lines
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # of a full disk, as in `add`
                self._file.close()
            self._file = None


def read_spans(path: Path) -> list[dict[str, Any]]:
    """The lines of a `timeline.jsonl`, without what is none, such as the line that a kill cut short."""
    spans = []
    for text in path.read_bytes().splitlines():
        with suppress(ValueError):
            line = json_object(text)
            if all(isinstance(line.get(key), kind) for key, kind in _SPAN.items()):
                spans.append(line)
    return spans


def chrome_trace(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The spans as a Chrome trace (JSON object format), which Perfetto and chrome://tracing open: a row a track.

    Spans of one track that overlap without one holding the other get rows of their own.
    """
    first = min((line["begin"] for line in lines), default=0.0)
    events: list[dict[str, Any]] = []
    rows: list[tuple[str, float]] = []  # of each row: its track, and when its last span ended
    for line in sorted(lines, key=lambda line: (line["begin"], -line["seconds"])):
        row = next((n for n, (track, end) in enumerate(rows) if track == line["track"] and end <= line["begin"]), None)
        if row is None:
            row = len(rows)
            rows.append((line["track"], 0.0))
        rows[row] = (line["track"], line["begin"] + line["seconds"])
        facts = {key: value for key, value in line.items() if key not in ("track", "name", "begin", "seconds")}
        events.append(
            {
                "name": line["name"],
                "ph": "X",
                "ts": (line["begin"] - first) * 1e6,
                "dur": line["seconds"] * 1e6,
                "pid": 1,
                "tid": row + 1,
                "args": facts,
            }
        )
    order = sorted(range(len(rows)), key=lambda row: rows[row][0])
    names = [
        {"name": kind, "ph": "M", "pid": 1, "tid": row + 1, "args": {key: value}}
        for place, row in enumerate(order)
        for kind, key, value in (("thread_name", "name", rows[row][0]), ("thread_sort_index", "sort_index", place))
    ]
    return {"traceEvents": names + events, "displayTimeUnit": "ms"}
