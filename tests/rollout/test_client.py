"""The client against servers that misbehave: every failure is one sentence that names the endpoint."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from served_model import VOCABULARY, Endpoint

from rloop_mcore.errors import UserError
from rloop_mcore.rollout import client as client_module
from rloop_mcore.rollout.buckets import Bucket
from rloop_mcore.rollout.client import EngineClient, EngineError
from rloop_mcore.rollout.hashers import embedded_hasher
from rloop_mcore.rollout.served import ServedModel
from rloop_mcore.rollout.sync import WeightSync
from rloop_mcore.types import Completion, SampleRequest, Sampling

SAMPLING = Sampling(max_tokens=8, temperature=0.7, top_p=0.9, stop=("Q:",))
REQUEST = SampleRequest(prompt_ids=(1, 2), seed=2**64 + 2**62 + 5)
GOOD = {
    "text": "",
    "output_ids": [4, 5],
    "meta_info": {
        "id": "call-0",
        "finish_reason": {"type": "stop", "matched": 5},
        "weight_version": "3",
        "output_token_logprobs": [[-0.5, 4, None], [-1.5, 5, None]],
    },
}


def _spans(*places: tuple[int, int]) -> list[dict[str, object]]:
    return [{"version": str(3 + number), "start": start, "end": end} for number, (start, end) in enumerate(places)]


@asynccontextmanager
async def closing(client: EngineClient) -> AsyncIterator[EngineClient]:
    try:
        yield client
    finally:
        await client.close()


def _ask(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    call: Callable[[EngineClient], Awaitable[Any]],
    timeout_s: float = 30.0,
    partial: bool = False,
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
            async with closing(EngineClient(url, "key", 10, timeout_s, partial)) as client:
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
    assert seen["sampling_params"] == [{**settings, "sampling_seed": 2**62 + 5}]  # seeds are 63 bits there


def test_a_response_that_was_begun_goes_on_with_other_draws() -> None:
    seen: dict[str, Any] = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(await request.json())
        return web.json_response([GOOD])

    begun = SampleRequest((1, 2), 2**63 - 1, Completion((6, 7, 8), (-0.25,) * 3, "abort", ((2, 1), (3, 2))))
    answer = _ask(handler, lambda client: client.generate([begun], SAMPLING, "call"))
    whole = Completion((6, 7, 8, 4, 5), (-0.25, -0.25, -0.25, -0.5, -1.5), "stop", ((2, 1), (3, 4)))
    assert answer == [whole]
    assert seen["input_ids"] == [[1, 2, 6, 7, 8]]
    (sampling,) = seen["sampling_params"]
    assert (sampling["max_new_tokens"], sampling["sampling_seed"]) == (5, 2)  # 63 bits: 2**63 - 1 + 3


def test_as_many_calls_are_under_way_as_are_made_and_none_on_a_connection_that_was_used() -> None:
    calls, peers, all_came = 101, set[object](), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        if len(peers) == calls:
            all_came.set()
        await all_came.wait()
        return web.json_response({})

    async def call(client: EngineClient) -> None:
        await asyncio.gather(*(client.health(20.0) for _ in range(calls)))
        await client.health()

    _ask(handler, call)
    assert len(peers) == calls + 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'[{"output_ids": [4', "not JSON"),
        (b"[]", "1 prompts were sent"),
        (b'{"output_ids": []}', "not a list"),
        (b"[" * 200_000, "not JSON"),
    ],
)
def test_answers_that_are_cut_or_of_the_wrong_shape(answer: bytes, words: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=answer, content_type="application/json")

    with pytest.raises(EngineError, match=rf"/generate: .*{words}"):
        _ask(handler, _generate)


def test_answers_to_other_prompts_are_not_taken() -> None:
    async def handler(request: web.Request) -> web.Response:
        answers = [GOOD | {"meta_info": GOOD["meta_info"] | {"id": name}} for name in ("call-1", "call-0")]  # type: ignore[operator]
        return web.json_response(answers)

    with pytest.raises(EngineError, match="/generate: the answers are not those of the prompts, in their order"):
        _ask(handler, lambda client: client.generate([REQUEST, REQUEST], SAMPLING, "call"))


@pytest.mark.parametrize("moved", ["/elsewhere", "https://127.0.0.1/pause_generation"])
def test_who_sends_elsewhere_is_not_followed(moved: str) -> None:
    """A POST would come there as a GET, without its body."""

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/elsewhere":
            return web.json_response({})
        raise web.HTTPFound(moved)

    with pytest.raises(EngineError, match=f"/pause_generation: status 302 to {moved}: ") as caught:
        _ask(handler, lambda client: client.pause("abort"))
    assert caught.value.status == 302


@pytest.mark.parametrize("wrong", [-1, 10])
def test_answered_ids_are_of_the_vocabulary(wrong: int) -> None:
    meta = GOOD["meta_info"] | {"output_token_logprobs": [[-0.5, 4, None], [-1.5, wrong, None]]}  # type: ignore[operator]

    async def handler(request: web.Request) -> web.Response:
        return web.json_response([GOOD | {"output_ids": [4, wrong], "meta_info": meta}])

    with pytest.raises(EngineError, match="/generate: an answer has an id outside the vocabulary of 10"):
        _ask(handler, _generate)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("output_ids",), None, "lacks 'output_ids'"),
        (("meta_info",), None, "lacks 'meta_info'"),
        (("meta_info", "output_token_logprobs"), None, "lacks 'output_token_logprobs'"),
        (("meta_info", "output_token_logprobs"), [[-0.5, 4, None]], "2 output_ids and 1 logprobs"),
        (("meta_info", "output_token_logprobs"), [[None, 4, None]], "not that of SGLang: .*None"),
        (("meta_info", "output_token_logprobs"), [{}, {}], "not that of SGLang"),
        (("meta_info", "output_token_logprobs"), [[-0.5, math.inf, None]] * 2, "not that of SGLang"),
        (("meta_info", "output_token_logprobs"), [[10**400, 4, None]] * 2, "not that of SGLang"),
        (("output_ids",), 2, "not that of SGLang"),
        (("meta_info", "weight_versions"), 1, "not that of SGLang"),
        (("meta_info", "weight_versions"), [{"version": "3", "start": 0, "end": "2"}], "not that of SGLang"),
        (("meta_info", "weight_versions"), [{"version": "\u00b2", "start": 0, "end": 2}], "never synced"),
        (("meta_info", "output_token_logprobs"), [[-0.5, 4, None], [-0.5, 6, None]], "same tokens"),
        (("meta_info", "output_token_logprobs"), [[math.nan, 4, None], [-0.5, 5, None]], "not finite"),
        (("meta_info", "output_token_logprobs"), [[0.7, 4, None], [-0.5, 5, None]], "0.7, and none is above 0"),
        (("meta_info", "weight_version"), "default", "never synced"),
        (("meta_info", "weight_versions"), _spans((0, 1)), "not those of 2 tokens"),
        (("meta_info", "weight_versions"), _spans((0, 2), (0, 2)), "not those of 2 tokens"),
        (("meta_info", "weight_versions"), _spans((0, 2), (2, 1), (1, 2)), "not those of 2 tokens"),
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
        EngineClient("http://here", None, 10, 30.0)._completion(answer)


def test_a_logprob_that_rounding_has_brought_above_0_is_taken() -> None:
    logprobs = [[0.004, 4, None], [-0.5, 5, None]]
    answer = GOOD | {"meta_info": GOOD["meta_info"] | {"output_token_logprobs": logprobs}}  # type: ignore[operator]
    assert EngineClient("http://here", None, 10, 30.0)._completion(answer).logprobs == (0.004, -0.5)


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


@contextmanager
def _few_files(spare: int) -> Iterator[None]:
    """This process may open `spare` more files."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(spare + 1)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], limits[1]))
    for descriptor in free:
        os.close(descriptor)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_calls_wait_for_a_file_of_this_process(endpoint: Endpoint) -> None:
    async def calls() -> list[None]:
        async with closing(EngineClient(endpoint.url, endpoint.key, VOCABULARY, 30.0)) as client:
            await client.health()
            with _few_files(4):
                return await asyncio.gather(*(client.health() for _ in range(20)))

    assert asyncio.run(calls()) == [None] * 20


def test_where_there_is_no_file_for_long_the_engine_is_not_blamed() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise AssertionError("the request was sent")

    async def call(client: EngineClient) -> None:
        with _few_files(0):
            await client.health(0.5)

    with pytest.raises(OSError, match=r"/health: no socket within 0\.5 s: raise the limit of open files \(ulimit -n\)"):
        _ask(handler, call)


@pytest.mark.parametrize("spans", [False, True])
def test_tokens_of_two_weights_must_be_told_apart(spans: bool) -> None:
    """An answer may name one version only, as before SGLang 0.5.19, which is right while the weights stay."""
    pieces = [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}]
    answer = {**GOOD, "meta_info": {**GOOD["meta_info"], **({"weight_versions": pieces} if spans else {})}}  # type: ignore[dict-item]
    asked, stamped = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/update_weight_version":
            return web.json_response({"success": True})
        asked.set()
        await stamped.wait()
        return web.json_response([answer])

    async def call(client: EngineClient) -> list[Completion]:
        under_way = asyncio.ensure_future(_generate(client))
        await asked.wait()
        await client.set_weight_version("4")
        stamped.set()
        return await under_way

    if spans:
        assert _ask(handler, call)[0].weight_versions == ((3, 1), (4, 1))
    else:
        with pytest.raises(EngineError, match=r"/generate: .* does not tell which tokens are by which") as caught:
            _ask(handler, call)
        assert caught.value.status == 400


@pytest.mark.parametrize("ours", [True, False])
def test_weights_that_another_run_has_sent_are_known_though_their_version_is_ours(ours: bool) -> None:
    versions = []

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/update_weight_version":
            versions.append((await request.json())["new_version"])
            return web.json_response({"success": True})
        meta = GOOD["meta_info"] | {"weight_version": versions[0 if ours else 1]}  # type: ignore[operator]
        return web.json_response([GOOD | {"meta_info": meta}])

    async def call(client: EngineClient) -> list[Completion]:
        async with closing(EngineClient(client.url, "key", 10, 30.0)) as other:
            for run in (client, other):
                await run.set_weight_version(run.stamp(3))
            return await _generate(client)

    if ours:
        assert _ask(handler, call)[0].weight_versions == ((3, 2),)
    else:
        with pytest.raises(EngineError, match="weights 3 are those of another run, which uses this engine") as caught:
            _ask(handler, call)
        assert caught.value.status is None  # no more is asked of it before it has the run's own


@pytest.mark.parametrize(
    ("version", "holds"),
    [
        *((version, "") for version in ("default", "0", "v7", "2026-11")),  # of the start, of an evaluation
        *((version, "the weights that a run sent it as version 7") for version in ("7", "7-0badc0de")),
        ("unfinished", "a part of the weights that a run was sending it"),
    ],
)
def test_whose_weights_a_server_holds_is_read_off_their_version(version: str, holds: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": version, "model_path": "/models/m"})

    check = lambda client: client.check_untouched(Path("/models/m"))  # noqa: E731
    if holds:
        with pytest.raises(UserError, match=f"holds {holds}, not those of its folder: start it anew"):
            _ask(handler, check)
    else:
        assert _ask(handler, check) == "/models/m"


@pytest.mark.parametrize(
    ("version", "expected"), [("0.5.20", False), ("0.5.21", True), ("0.5.23+rloop.embedded", True)]
)
def test_update_sessions_by_version(version: str, expected: bool) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"version": version})

    assert _ask(handler, lambda client: client.has_update_sessions()) is expected


def _server(version: str, lacks: str = "") -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handler(request: web.Request) -> web.Response:
        if request.method == "OPTIONS":
            return web.Response(status=404 if request.path == lacks else 405)
        return web.json_response({"version": version})

    return handler


@pytest.mark.parametrize(
    ("version", "lacks", "words"),
    [
        ("0.5.16", "", r"/server_info: SGLang 0\.5\.16 is not supported: 0\.5\.17 to 0\.5\.23 are$"),
        ("0.5.20", "/pause_generation", r"/pause_generation: there is no such route"),
        ("0.5.21", "/begin_weight_update", r"/begin_weight_update: there is no such route"),
        ("0.5.23", "/weights_checker", r"/weights_checker: there is no such route"),
    ],
)
def test_a_server_that_cannot_serve_a_run_is_refused(version: str, lacks: str, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        _ask(_server(version, lacks), lambda client: client.check_server(30.0))
    assert caught.value.status is not None  # waiting would not help


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"version": "0.5.23", "preferred_sampling_params": {"top_k": 20}}, r"/server_info: it has --preferred-sampl"),
        (["0.5.23"], r"/server_info: the answer is not that of SGLang: \['0\.5\.23'\]"),
    ],
)
def test_a_server_that_would_sample_otherwise_is_refused(info: object, words: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(info)

    with pytest.raises(EngineError, match=words) as caught:
        _ask(handler, lambda client: client.check_server(30.0))
    assert caught.value.status == 200  # waiting would not help


def test_a_server_with_a_key_of_its_own_for_what_changes_it_is_refused_at_once() -> None:
    async def handler(request: web.Request) -> web.Response:
        if request.path == "/abort_request" and request.method == "POST":  # one of the routes that it guards
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await _server("0.5.23")(request)

    with pytest.raises(EngineError, match=r"it has --admin-api-key, .*: start it with --api-key alone$") as caught:
        _ask(handler, lambda client: client.check_server(30.0))
    assert caught.value.status == 401  # waiting would not help


@pytest.mark.parametrize(("asked", "seconds"), [("7", 7.0), ("", 0.0), ("Fri, 31 Dec 2100 23:59:59 GMT", 0.0)])
def test_a_server_that_has_no_room_says_when_to_come_back(asked: str, seconds: float) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=429, headers={"Retry-After": asked})

    with pytest.raises(EngineError, match="/generate: status 429") as caught:
        _ask(handler, _generate)
    assert (caught.value.status, caught.value.retry_after_s) == (429, seconds)


def test_calls_over_a_sync_need_a_version_that_has_them_wait() -> None:
    with pytest.raises(EngineError, match=r"0\.5\.20 takes no .*: rollout\.partial=true needs 0\.5\.21") as caught:
        _ask(_server("0.5.20"), lambda client: client.check_server(30.0), partial=True)
    assert caught.value.status is not None  # waiting would not help
    _ask(_server("0.5.21"), lambda client: client.check_server(30.0), partial=True)


@pytest.mark.parametrize("version", ["0.5.20", "0.5.23"])
def test_a_sync_begins_though_a_health_probe_is_under_way(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's scheduler, as far as it matters: before 0.5.21 what it retracted keeps the cache from being flushed."""
    monkeypatch.setattr(client_module, "_FLUSH_AGAIN_S", 0.01)
    flushes: list[int] = []
    retracted = False

    async def handler(request: web.Request) -> web.Response:
        nonlocal retracted
        if request.path == "/pause_generation":
            retracted = (await request.json())["mode"] == "retract"
        if request.path == "/flush_cache":  # the probe's token is there at the third
            busy = (retracted and version == "0.5.20") or len(flushes) < 2
            flushes.append(400 if busy else 200)
            return web.Response(status=flushes[-1])
        info = {"version": version, "dtype": "float32", "device": "cpu", "tp_size": 1, "dp_size": 1}
        return web.json_response(info | {"success": True})

    _ask(handler, lambda client: WeightSync(None, "gloo", 30.0, 1, ServedModel(10))._open([client]))
    assert flushes == [400, 400, 200]


def test_a_sync_does_one_thing_after_the_other() -> None:
    """From the pause to the verification the weights have no version; and a bucket that is on its way is waited for."""
    tensor, hasher, done = torch.arange(4.0), embedded_hasher(), [""]
    hasher.update(tensor)
    checksums = {name: hasher.hexdigest() for name in "ab"}
    answers = {
        "/server_info": {"version": "0.5.23+rloop.embedded", "dtype": "float32"},
        "/weights_checker": {"ranks": [{"checksums": checksums, "parallelism_info": {"tp_rank": 0}}]},
    }

    async def handler(request: web.Request) -> web.Response:
        if request.path == "/update_weights_from_tensor":
            await asyncio.sleep(0.2)
        version = (await request.json())["new_version"] if request.path == "/update_weight_version" else None
        answers["/model_info"] = {"weight_version": version or done[-1]}
        done.append(version or request.path)
        return web.json_response(answers.get(request.path, {"success": True}))

    async def run(client: EngineClient) -> str:
        loop = asyncio.get_running_loop()
        submit = lambda work: asyncio.run_coroutine_threadsafe(work, loop)  # noqa: E731
        sync = WeightSync(None, "gloo", 30.0, 1, ServedModel(10))
        await asyncio.to_thread(sync.run, [client], iter([("a", tensor), ("b", tensor)]), 5, submit)
        return client.stamp(5)

    stamp = _ask(handler, run)
    assert done[1:] == [
        *("/server_info", "/pause_generation", "unfinished", "/flush_cache", "/server_info", "/begin_weight_update"),
        *("/update_weights_from_tensor", "/update_weights_from_tensor", "/end_weight_update", "/weights_checker"),
        *(stamp, "/model_info", "/continue_generation"),
    ]


def test_the_weights_are_gone_through_to_their_end_though_a_sync_fails() -> None:
    """The other ranks gather each tensor with this one."""

    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=500)

    async def run(client: EngineClient) -> None:
        loop = asyncio.get_running_loop()
        submit = lambda work: asyncio.run_coroutine_threadsafe(work, loop)  # noqa: E731
        sync = WeightSync(None, "gloo", 30.0, 1, ServedModel(10))
        await asyncio.to_thread(sync.run, [client], tensors, 5, submit)

    tensors = iter([("a", torch.zeros(2)), ("b", torch.zeros(2))])
    with pytest.raises(EngineError, match="status 500"):
        _ask(handler, run)
    assert next(tensors, None) is None


def test_every_sample_of_a_call_is_aborted() -> None:
    rids = []

    async def handler(request: web.Request) -> web.Response:
        rids.append((await request.json())["rid"])
        return web.Response()

    _ask(handler, lambda client: client.abort("call", 3))
    assert sorted(rids) == ["call-0", "call-1", "call-2"]


_INFO = {"version": "0.5.23", "dtype": "float32", "device": "cpu"}


@pytest.mark.parametrize(
    ("other", "words"),
    [({"version": "0.5.20"}, "from before and after SGLang 0.5.21"), ({"dtype": "bfloat16"}, "differ in dtype")],
)
def test_engines_of_two_kinds_cannot_be_synced_together(other: dict[str, str], words: str) -> None:
    infos = itertools.cycle([_INFO, _INFO | other])

    async def handler(request: web.Request) -> web.Response:
        return web.json_response(next(infos) if request.path == "/server_info" else {"success": True})

    with pytest.raises(EngineError, match=words):
        _ask(handler, lambda client: WeightSync(None, "gloo", 30.0, 1, ServedModel(10))._open([client, client]))


class _NoChannel:
    group_name, world_size = "weights", 0

    def open(self, world_size: int) -> tuple[str, int]:
        self.world_size = world_size
        return "10.0.0.1", 1234

    def join(self) -> None:
        pass

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("broadcast", [True, False])
def test_each_rank_of_each_server_has_its_place_and_its_handles(broadcast: bool) -> None:
    """The trainer is rank 0; a server's first rank comes after all those of the servers before it."""
    ranks, joined, handles = {"Bearer key": 2, "Bearer other": 3}, {}, {}
    tensors = [("a", torch.zeros(2))]

    async def handler(request: web.Request) -> web.Response:
        key = request.headers["Authorization"]
        if request.path == "/server_info":
            return web.json_response(_INFO | {"tp_size": ranks[key]})
        body = await request.json() if request.can_read_body else {}
        if request.path == "/init_weights_update_group":
            joined[key] = (body["rank_offset"], body["world_size"], body["master_address"], body["master_port"])
        if request.path == "/update_weights_from_tensor":
            handles[key] = len(body["serialized_named_tensors"])
        return web.json_response({"success": True})

    async def call(client: EngineClient) -> None:
        channel = _NoChannel() if broadcast else None
        sync = WeightSync(channel, "gloo", 30.0, 1, ServedModel(10, query_heads=6, kv_heads=6))
        async with closing(EngineClient(client.url, "other", 10, 30.0)) as other:
            await sync._open([client, other])
            await sync._send(Bucket(tensors, torch.zeros(8, dtype=torch.uint8)))

    _ask(handler, call)
    if broadcast:
        place = (6, "10.0.0.1", 1234)
        assert joined == {"Bearer key": (1, *place), "Bearer other": (3, *place)}
    else:
        assert handles == ranks


@pytest.mark.parametrize(("version", "lacks"), [("0.5.23", ""), ("0.5.20", "/begin_weight_update")])
def test_a_server_that_can_is_taken(version: str, lacks: str) -> None:
    asked = set()

    async def handler(request: web.Request) -> web.Response:
        asked.add(request.path)
        return await _server(version, lacks)(request)

    _ask(handler, lambda client: client.check_server(30.0))
    assert "/pause_generation" in asked
    assert ("/begin_weight_update" in asked) == (not lacks)  # where a version has no such route it is not looked for


@pytest.mark.parametrize("place", [{"tp_rank": 1}, [{"tp_rank": 1}]], ids=["before 0.5.21", "since"])
def test_the_rank_of_checksums_is_read_in_both_forms(place: object) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"success": True, "ranks": [{"checksums": {"a": "1f"}, "parallelism_info": place}]})

    assert _ask(handler, lambda client: client.checksums()) == [(1, {"a": "1f"})]


def test_a_rank_that_is_no_number_is_a_fault_of_the_server() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(text='{"ranks": [{"checksums": {}, "parallelism_info": {"tp_rank": 1e400}}]}')

    with pytest.raises(EngineError, match="/weights_checker: the answer is not that of SGLang"):
        _ask(handler, lambda client: client.checksums())


@pytest.mark.parametrize("alive", [True, False])
def test_a_server_that_generates_nothing_now_is_asked_what_it_is(alive: bool) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if alive and request.path == "/server_info" else 503)

    if alive:
        _ask(handler, lambda client: client.health())
        return
    with pytest.raises(EngineError, match="/server_info: status 503"):
        _ask(handler, lambda client: client.health())


def test_a_proxy_that_counts_requests_tells_nothing_of_the_server_behind_it() -> None:
    asked: list[str] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.Response(status=429)

    _ask(handler, lambda client: client.health())
    assert asked == ["/health"]


def test_what_is_asked_of_a_server_that_is_given_up_fails_at_once_and_no_more_is_sent() -> None:
    asked = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(request.path)
        await asyncio.sleep(20)
        return web.json_response([GOOD])

    async def ask(client: EngineClient) -> None:
        under_way = asyncio.ensure_future(_generate(client))
        await asyncio.sleep(0.2)
        client.give_up("it is lost")
        for call in (under_way, _generate(client)):
            with pytest.raises(EngineError, match="/generate: it is lost"):
                await asyncio.wait_for(call, 10)

    _ask(handler, ask)
    assert asked == ["/generate"]


def test_who_is_cancelled_as_the_server_is_given_up_is_cancelled() -> None:
    """Else its call would be sent to the next engine."""

    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(20)
        return web.json_response({})

    async def both(client: EngineClient) -> None:
        call = asyncio.ensure_future(_generate(client))
        await asyncio.sleep(0.2)
        client.give_up("it is lost")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    _ask(handler, both)


def test_the_keys_in_a_servers_info_are_dropped() -> None:
    async def handler(request: web.Request) -> web.Response:
        keys = {"api_key": "secret", "admin_api_key": "secret", "launch_command": "--api-key secret"}
        return web.json_response({**keys, "tp_size": 2})

    assert _ask(handler, lambda client: client.server_info()) == {"tp_size": 2}


@pytest.mark.parametrize("status", [200, 302, 502])
def test_what_a_message_quotes_has_no_key(status: int) -> None:
    """A /server_info that is cut off, a proxy that shows what it was sent: what they end in is logged."""

    async def echo(request: web.Request) -> web.Response:
        text = f"{'x' * 480} {request.headers['Authorization']} and so on"  # the message is cut within the key
        return web.Response(text=text, status=status, headers={"Location": text})

    async def ask(client: EngineClient) -> None:
        key = "0123456789abcdef" * 4
        async with closing(EngineClient(client.url, key, 10, 30.0)) as other:
            for call in (other.server_info, other.weight_version, other.begin_update, other.checksums):
                with pytest.raises(EngineError) as caught:
                    await call()
                assert "0123" not in str(caught.value)
                assert "Bearer (the key)" in str(caught.value)

    _ask(echo, ask)


_SPAN = {"version": "3", "start": 0, "end": 2}


@pytest.mark.parametrize(
    ("answer", "call"),
    [
        ({"headers": ...}, EngineClient.weight_version),
        ({"version": ...}, EngineClient.has_update_sessions),
        ([{"headers": ...}], _generate),
        ([GOOD | {"meta_info": GOOD["meta_info"] | {"weight_version": ...}}], _generate),  # type: ignore[operator]
        ([GOOD | {"meta_info": GOOD["meta_info"] | {"weight_versions": [_SPAN | {"end": ...}]}}], _generate),  # type: ignore[operator]
    ],
)
def test_what_a_message_quotes_of_an_answer_that_can_be_read_has_no_key(
    answer: object, call: Callable[[EngineClient], Awaitable[object]]
) -> None:
    """..., which stands for a field of the request, is in the place of what should be there."""

    async def echo(request: web.Request) -> web.Response:
        return web.Response(text=json.dumps(answer, default=lambda _: request.headers["Authorization"]))

    async def ask(client: EngineClient) -> None:
        async with closing(EngineClient(client.url, "0123456789abcdef" * 4, 10, 30.0)) as other:
            with pytest.raises(EngineError, match=r"Bearer \(the key\)") as caught:
                await call(other)
            assert "0123" not in str(caught.value)

    _ask(echo, ask)


def test_the_reason_why_a_sample_ended_has_no_key() -> None:
    """What the controller does not know it quotes."""

    async def echo(request: web.Request) -> web.Response:
        meta = GOOD["meta_info"] | {"finish_reason": {"type": request.headers["Authorization"]}}  # type: ignore[operator]
        return web.json_response([GOOD | {"meta_info": meta}])

    assert _ask(echo, _generate)[0].finish_reason == "Bearer (the key)"
