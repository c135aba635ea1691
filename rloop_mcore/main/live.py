"""`rloop report --live`: the report on loopback, for who knows its address, made anew when the runs' files change."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

from plotly.offline import get_plotlyjs

from rloop_mcore.analysis.report import read_runs, render
from rloop_mcore.errors import UserError
from rloop_mcore.main.report import words_of
from rloop_mcore.main.run_directory import RunDirectory

_HOST = "127.0.0.1"
_FILES = ("journal.jsonl", "metrics.jsonl", "config.yaml", "cache/manifest.json", "evaluation")


class LiveReport:
    """The page of some runs, made again when their files have changed. Thread-safe."""

    def __init__(self, runs: Sequence[Path]) -> None:
        """Raises UserError where a folder is no run."""
        self._runs = list(runs)
        self._lock = threading.Lock()
        self._made_of: str | None = None
        self._page = ""
        self.page()

    def version(self) -> str:
        """What the runs' files are now: another text once one has changed."""
        return "-".join(_version(run / name) for run in self._runs for name in _FILES)

    def page(self) -> str:
        """The newest page; the one before while a run is replacing what has to be read."""
        with self._lock:
            if (version := self.version()) != self._made_of:
                try:
                    words = [words_of(run) for run in self._runs]
                    self._page, self._made_of = render(read_runs(self._runs), words=words, live=True), version
                except (UserError, FileNotFoundError):
                    if not self._page:
                        raise
            return self._page

    def state(self) -> str:
        working = [run.name for run in self._runs if RunDirectory(run).locked()]
        return f"{', '.join(working)} running" if working else "not running"


def _version(path: Path) -> str:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ""
    return f"{stat.st_mtime_ns:x}.{stat.st_size:x}"


class LiveServer:
    """An HTTP server for a LiveReport at `url`, which holds a token that cannot be guessed; port 0: any free one.

    Raises UserError where the port is taken.
    """

    def __init__(self, report: LiveReport, port: int = 0) -> None:
        token = secrets.token_urlsafe(24)

        class Handler(_Handler):
            live, secret = report, token

        try:
            self._server = ThreadingHTTPServer((_HOST, port), Handler)
        except OSError as error:
            raise UserError(f"--port {port} of {_HOST} cannot be had ({error.strerror}): choose another.") from error
        self._server.daemon_threads = True
        self.url = f"http://{_HOST}:{self._server.server_address[1]}/{token}/"

    def serve(self) -> None:
        """Until `close`, or Ctrl-C."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def serve_live(runs: Sequence[Path], port: int) -> int:
    """Serve until Ctrl-C. Raises UserError."""
    server = LiveServer(LiveReport(runs), port)
    print(f"report: {server.url}\nIt follows the run; Ctrl-C ends it.", flush=True)
    try:
        server.serve()
    except KeyboardInterrupt:
        print()
    return 0


class _Handler(BaseHTTPRequestHandler):
    live: LiveReport
    secret: str
    timeout = 30  # seconds that a connection may be silent

    def do_GET(self) -> None:
        token, _, name = urlsplit(self.path).path.removeprefix("/").partition("/")
        # a page of another site that has its own name point here would ask under that name
        ours = (self.headers.get("Host") or "").rpartition(":")[0] in (_HOST, "localhost")
        if not ours or not hmac.compare_digest(token.encode(), self.secret.encode()):
            self._answer(404, "text/plain", "not found\n")
        elif name in ("", "page"):
            self._answer(200, "text/html", self.live.page())
        elif name == "version":
            now = {"version": self.live.version(), "state": self.live.state()}
            self._answer(200, "application/json", json.dumps(now))
        elif name == "plotly.js":
            self._answer(200, "text/javascript", get_plotlyjs())
        else:
            self._answer(404, "text/plain", "not found\n")

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: the address is a secret."""

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(body)
