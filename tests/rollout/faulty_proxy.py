"""A reverse proxy in front of an engine that spoils what it is told to spoil, as a `controller.Server`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

Forward = Callable[[Any], Awaitable[Any]]  # sends a body to the engine; returns the parsed answer
Fault = Callable[[web.Request, Any, Forward], Awaitable[web.StreamResponse]]  # (request, body, forward)


class FaultyProxy:
    """`faults`: what is done with the calls of a path; all other calls go through.

    Its engine outlives it: a restart is counted, and does nothing.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.target, self.key = url, key
        self.faults: dict[str, Fault] = {}
        self.calls: list[str] = []  # paths, as they came
        self.restarts = 0
        self.url = ""
        self._stopped = False
        self._session: aiohttp.ClientSession | None = None
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()

    async def ready(self, timeout_s: float) -> tuple[str, str | None]:
        return self.url, self.key

    def failure(self) -> str | None:
        return None

    async def restart(self) -> None:
        self.restarts += 1

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _listen(self) -> None:
        self._session = aiohttp.ClientSession()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        assert self._session is not None
        await self._session.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        raw = await request.read()
        path = "" if request.method == "OPTIONS" else request.path  # "": the check that a route is there
        self.calls.append(path)
        fault = self.faults.get(path, self.faults.get("*"))
        if fault is None:
            return await self._pass_on(request, raw)

        async def forward(body: Any) -> Any:
            return json.loads((await self._pass_on(request, json.dumps(body).encode())).body)  # type: ignore[arg-type]

        return await fault(request, json.loads(raw) if raw else None, forward)

    async def _pass_on(self, request: web.Request, raw: bytes) -> web.Response:
        assert self._session is not None
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        timeout = aiohttp.ClientTimeout(total=300)
        async with self._session.request(
            request.method, self.target + request.path, data=raw or None, headers=headers, timeout=timeout
        ) as answer:
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)


def times(count: int, fault: Fault) -> Fault:
    """The fault for the first `count` calls; those after it go through."""
    left = [count]

    async def spoil(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        if left[0] == 0:
            return web.json_response(await forward(body))
        left[0] -= 1
        return await fault(request, body, forward)

    return spoil


async def answer_500(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
    return web.json_response({"error": {"message": "CUDA error: an illegal memory access"}}, status=500)


async def answer_400(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
    """As SGLang answers where a broadcast breaks, whoever broke it."""
    return web.json_response({"success": False, "message": "Failed to receive weights: closed by peer"}, status=400)


async def cut_the_json(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
    text = json.dumps(await forward(body))
    return web.Response(text=text[: len(text) // 2], content_type="application/json")


async def reset_the_connection(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def succeed_without_doing(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
    return web.json_response({"success": True, "message": "done, it says"})


def after(seconds: float) -> Fault:
    """A slow engine: its answer comes later."""

    async def wait(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return web.json_response(await forward(body))

    return wait
