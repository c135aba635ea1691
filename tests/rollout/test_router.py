"""SGLang's router among the endpoints; its answers are those of sglang-router 0.3.2."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from rloop_mcore.errors import UserError
from rloop_mcore.platform.network import free_port
from rloop_mcore.rollout.router import engines_of


def worker(url: str, **changes: Any) -> dict[str, Any]:
    return {"id": "1", "url": url, "worker_type": "regular", "is_healthy": True, "connection_mode": "HTTP"} | changes


class Router(BaseHTTPRequestHandler):
    workers: list[dict[str, Any]]
    asked: list[str]
    key = "secret"

    def do_GET(self) -> None:
        self.asked.append(self.path)
        known = self.headers["Authorization"] == f"Bearer {self.key}"
        self.send_response(404 if self.path != "/workers" else 200 if known else 401)
        self.end_headers()
        if self.path == "/workers" and known:
            self.wfile.write(json.dumps({"workers": self.workers, "total": len(self.workers)}).encode())

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def router() -> Iterator[str]:
    Router.workers = [worker("http://b:2"), worker("http://a:1", is_healthy=False)]
    Router.asked = []
    with HTTPServer(("127.0.0.1", 0), Router) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_routers_workers_are_the_engines_in_an_order_that_stays(router: str) -> None:
    assert engines_of([f"{router}/", "http://127.0.0.1:1"], "secret") == [
        "http://a:1",
        "http://b:2",
        "http://127.0.0.1:1",
    ]


def test_what_is_no_router_stays_as_it_is(router: str) -> None:
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1', 1)}"
    assert engines_of([f"{router}/v1", nobody], "secret") == [f"{router}/v1", nobody]
    assert engines_of([router], "wrong") == [router]  # the client then says that the key is not taken


@pytest.mark.parametrize(
    ("workers", "words"),
    [
        ([], "no workers yet"),
        ([worker("http://a:1@0")], "http://a:1@0"),
        ([worker("http://a:1", worker_type="prefill")], "prefill"),
        ([worker("grpc://a:1", connection_mode="gRPC")], "gRPC"),
        ([worker("http://a:1"), worker("http://a:1")], "twice"),
    ],
)
def test_workers_that_can_be_no_engines_are_refused(router: str, workers: list[dict[str, Any]], words: str) -> None:
    Router.workers = workers
    with pytest.raises(UserError, match=words):
        engines_of([router], "secret")


@pytest.mark.parametrize("second", ["http://localhost:9", "HTTP://127.0.0.1:9", "http://127.0.0.1:9/"])
def test_a_server_under_two_names_is_refused(second: str) -> None:
    with pytest.raises(UserError, match="leads to a server twice: "):
        engines_of(["http://127.0.0.1:9", second], None)


def test_a_proxy_of_the_site_is_not_asked_and_does_not_see_the_key(
    router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", router)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps the proxies of the first request of the process
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1', 1)}"
    assert engines_of([nobody], "secret") == [nobody]
    assert not Router.asked


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"])
def test_what_does_not_speak_http_stays_as_it_is(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            connection.recv(4096)
            connection.sendall(answer)
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert engines_of([url], None) == [url]
        thread.join()
