"""The client against servers that misbehave: every failure is one sentence that names the endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from rloop_mcore.rollout.client import EngineClient, EngineError, parse_completion
from rloop_mcore.types import Completion, SampleRequest, Sampling

SAMPLING = Sampling(max_tokens=8, temperature=0.7, top_p=0.9, stop=("Q:",))
REQUEST = SampleRequest(prompt_ids=(1, 2), seed=2**64 + 5)
GOOD = {
    "text": "",
    "output_ids": [4, 5],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 5},
        "weight_version": "3",
        "output_token_logprobs": [[-0.5, 4, None], [-1.5, 5, None]],
    },
}


def _ask(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    call: Callable[[EngineClient], Awaitable[Any]],
    timeout_s: float = 30.0,
) -> Any:
    """Serve every path with `handler` and run `call` on a client of it."""

    async def run() -> Any:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            async with EngineClient(url, "key", vocabulary=10, generate_timeout_s=timeout_s) as client:
                return await call(client)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def _generate(client: EngineClient) -> Awaitable[list[Completion]]:
    return client.generate([REQUEST], SAMPLING, "call")


def test_generate_sends_and_reads_the_contract() -> None:
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(await request.json(), path=request.path, key=request.headers["Authorization"])
        return web.json_response([GOOD])

    assert _ask(handler, _generate) == [Completion((4, 5), (-0.5, -1.5), "stop", ((3, 2),))]
    assert seen["path"] == "/generate"
    assert seen["key"] == "Bearer key"
    assert seen["input_ids"] == [[1, 2]]
    settings = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "stop": ["Q:"]}
    assert seen["sampling_params"] == [{**settings, "sampling_seed": 5}]  # seeds are 63 bits there


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'[{"output_ids": [4', "not JSON"),
        (b"[]", "1 prompts were sent"),
        (b'{"output_ids": []}', "not a list"),
    ],
)
def test_answers_that_are_cut_or_of_the_wrong_shape(answer: bytes, words: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=answer, content_type="application/json")

    with pytest.raises(EngineError, match=rf"/generate: .*{words}"):
        _ask(handler, _generate)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("output_ids",), None, "lacks 'output_ids'"),
        (("meta_info",), None, "lacks 'meta_info'"),
        (("meta_info", "output_token_logprobs"), None, "lacks 'output_token_logprobs'"),
        (("meta_info", "output_token_logprobs"), [[-0.5, 4, None]], "2 output_ids and 1 logprobs"),
        (("meta_info", "output_token_logprobs"), [[None, 4, None]], "output_token_logprobs is not"),
        (("meta_info", "output_token_logprobs"), [[-0.5, 4, None], [-0.5, 6, None]], "same tokens"),
        (("meta_info", "weight_version"), "default", "never synced"),
        (("meta_info", "finish_reason"), {}, "lacks 'type'"),
    ],
)
def test_fields_that_are_missing_or_contradict(path: tuple[str, ...], value: Any, words: str) -> None:
    answer = json.loads(json.dumps(GOOD))
    holder = answer
    for name in path[:-1]:
        holder = holder[name]
    if value is None:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    with pytest.raises(EngineError, match=words):
        parse_completion(answer, "here")


@pytest.mark.parametrize("prompt", [(), (1, 10), (-1,)])
def test_bad_ids_are_never_sent(prompt: tuple[int, ...]) -> None:
    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("the request was sent")

    with pytest.raises(EngineError, match=r"empty|vocabulary of 10"):
        _ask(handler, lambda client: client.generate([SampleRequest(prompt, 0)], SAMPLING, "call"))


def test_an_error_status_is_quoted() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"error": {"message": "no such thing"}}, status=400)

    with pytest.raises(EngineError, match=r"/pause_generation: status 400: .*no such thing") as caught:
        _ask(handler, lambda client: client.pause("abort"))
    assert caught.value.status == 400


def test_ok_without_success_is_a_failure() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"success": False, "message": "nothing came"})

    with pytest.raises(EngineError, match=r"/end_weight_update: did not succeed: .*nothing came"):
        _ask(handler, lambda client: client.end_update())


def test_silence_ends_at_the_deadline() -> None:
    async def handler(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    with pytest.raises(EngineError, match=r"/generate: no answer within 0.2 s"):
        _ask(handler, _generate, timeout_s=0.2)


def test_a_lost_connection_is_told_at_once() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    with pytest.raises(EngineError, match=r"/generate: connection failed after .*deadline 30 s"):
        _ask(handler, _generate)


@pytest.mark.parametrize(
    ("version", "expected"), [("0.5.20", False), ("0.5.21", True), ("0.5.23+rloop.embedded", True), ("0.6.0rc1", True)]
)
def test_update_sessions_by_version(version: str, expected: bool) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"version": version})

    assert _ask(handler, lambda client: client.has_update_sessions()) is expected
