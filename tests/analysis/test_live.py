"""The served report: who gets it, and what it does while a run goes on."""

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from run_with_samples import add_samples

from rloop_mcore.errors import UserError
from rloop_mcore.main.live import LiveReport, LiveServer


@pytest.fixture
def run(rloop_run: Path) -> Path:
    add_samples(rloop_run, 2, ["base", "i0_explore_000004"], seed=1)
    return rloop_run


@pytest.fixture
def server(run: Path) -> Iterator[LiveServer]:
    serving = LiveServer(LiveReport([run]))
    thread = threading.Thread(target=serving.serve, daemon=True)
    thread.start()
    yield serving
    serving.close()
    thread.join(10)
    assert not thread.is_alive()


def get(url: str, **headers: str) -> tuple[int, str]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request("GET", parts.path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_only_who_has_the_address_gets_it(server: LiveServer) -> None:
    parts = urlsplit(server.url)
    assert parts.hostname == "127.0.0.1"
    token = parts.path.strip("/")
    assert len(token) >= 32
    root = f"http://{parts.netloc}"
    status, page = get(server.url)
    assert status == 200
    assert "RLoop report" in page
    for wrong in ("/", "/version", f"/{token[:-1]}/", f"/{token}x/", f"/{token}/../../etc/passwd", f"/{token}/nothing"):
        assert get(f"{root}{wrong}")[0] == 404, wrong
    assert get(server.url, Host=f"evil.example:{parts.port}")[0] == 404
    assert get(server.url, Host=f"localhost:{parts.port}")[0] == 200


def test_a_file_that_goes_while_it_is_read_leaves_the_page_before(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = LiveReport([run])
    page = report.page()
    read = Path.read_text

    def gone(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.parent.name == "evaluation":
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", gone)
        (run / "metrics.jsonl").touch()
        assert report.page() == page
    exists = Path.exists

    def goes(path: Path) -> bool:
        there = exists(path)
        path.unlink(missing_ok=True)
        return there

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: goes(path) if path.name == "metrics.jsonl" else exists(path))
        assert report.version()


def test_the_version_changes_with_the_runs_files(server: LiveServer, run: Path) -> None:
    first = json.loads(get(server.url + "version")[1])
    assert first["state"] == "not running"
    assert json.loads(get(server.url + "version")[1]) == first
    with (run / "metrics.jsonl").open("a") as file:
        line = {"iteration": 1, "phase": "explore", "step": 5, "global_step": 9, "total": 5, "success_rate": 0.123456}
        file.write(json.dumps(line) + "\n")
    assert json.loads(get(server.url + "version")[1])["version"] != first["version"]
    assert "0.123456" in get(server.url + "page")[1]


def test_a_moment_in_which_files_are_being_replaced_shows_the_page_before(run: Path) -> None:
    live = LiveReport([run])
    before = live.page()
    manifest = run / "cache" / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text("{")
    assert live.page() == before
    manifest.write_text(whole)
    assert "RLoop report" in live.page()


def test_mistakes_are_said_at_the_start(tmp_path: Path, server: LiveServer) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        LiveReport([tmp_path])
    port = urlsplit(server.url).port
    assert port is not None
    with pytest.raises(UserError, match=rf"--port {port} of 127\.0\.0\.1 cannot be had"):
        LiveServer(LiveReport.__new__(LiveReport), port)
