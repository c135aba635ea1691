"""The HTTP side: SGLang's routes and fields (0.5.23) over one `Engine`.

The model is touched by one worker thread only. The engine runs there until a call is done or it is interrupted, so
pauses and aborts find it between two tokens, never within one; what touches the weights waits until no call is under
way or generation is paused.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from rloop_mcore.rollout.embedded.engine import Engine
from rloop_mcore.rollout.embedded.generation import Generation
from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.params import BadRequest, GenerateRequest, parse_generate
from rloop_mcore.rollout.embedded.responses import describe
from rloop_mcore.rollout.embedded.weights import WeightReceiver

VERSION = "0.5.23+rloop.embedded"  # the contract's version, and whose implementation this is
_MAX_BODY = 1 << 30
_LOOK_S = 0.25  # between two looks whether a client is still there
_GROUP_TIMEOUT_S = 300.0  # for all to join a weight update group, and for a broadcast

log = logging.getLogger(__name__)
T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    def __init__(self, model: CausalModel, max_running: int, api_key: str) -> None:
        self.model, self.max_running, self.api_key = model, max_running, api_key
        self.weights = WeightReceiver(model.network, _GROUP_TIMEOUT_S)
        self.weight_version = "default"
        self.worker = ThreadPoolExecutor(1, "engine")
        self.engine = Engine(model, max_running)
        self.paused = False
        self.driven = False  # one of the calls under way has the engine run, for all of them
        self.between = 0  # jobs that want the worker between two tokens
        self.updates = 0  # jobs that want it when no call is under way; new calls let them pass
        self.changed = asyncio.Condition()  # something of the above, or a call finished
        self.calls: dict[Generation, GenerateRequest] = {}  # waiting and running

    def app(self) -> web.Application:
        app = web.Application(client_max_size=_MAX_BODY, middlewares=[self._authorize, _explain])
        app.router.add_get("/health", self.health)
        app.router.add_get("/health_generate", self.health_generate)
        app.router.add_get("/model_info", self.model_info)
        app.router.add_get("/server_info", self.server_info)
        for handler in (
            self.generate,
            self.abort_request,
            self.pause_generation,
            self.continue_generation,
            self.flush_cache,
            self.release_memory_occupation,
            self.resume_memory_occupation,
            self.begin_weight_update,
            self.end_weight_update,
            self.init_weights_update_group,
            self.destroy_weights_update_group,
            self.update_weights_from_distributed,
            self.update_weights_from_tensor,
            self.update_weights_from_disk,
            self.update_weight_version,
            self.weights_checker,
        ):
            app.router.add_post(f"/{handler.__name__}", handler)
        return app

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode()
        open_to_all = request.path.startswith("/health")
        if not open_to_all and not hmac.compare_digest(given, f"Bearer {self.api_key}".encode()):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    async def _on_worker(self, function: Callable[..., T], *args: Any) -> T:
        """Run it on the worker once no call is under way, or generation is paused."""
        self.updates += 1
        try:
            async with self.changed:
                await self.changed.wait_for(lambda: self.paused or not self.calls)
            return await self._worker(function, *args)
        finally:
            self.updates -= 1
            await self._notify()

    async def _between_tokens(self, function: Callable[..., T], *args: Any) -> T:
        """Run it on the worker at once, between two tokens of the calls that run."""
        self.between += 1
        try:
            return await self._worker(function, *args)
        finally:
            self.between -= 1
            await self._notify()

    async def _worker(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.worker, function, *args)

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    # -- what the server is ---------------------------------------------------------------------------------------

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def health_generate(self, request: web.Request) -> web.Response:
        """200 when the engine can produce a token now."""
        self._require_whole_weights()
        if not self.paused and not self.calls:
            body = {"input_ids": [0], "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
            await self._run(parse_generate(body, self.model.vocabulary))
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "model_path": str(self.model.path),
                "tokenizer_path": str(self.model.path),
                "is_generation": True,
                "weight_version": self.weight_version,
                "model_type": self.model.config.model_type,
                "architectures": self.model.config.architectures,
                "vocab_size": self.model.vocabulary,
            }
        )

    async def server_info(self, request: web.Request) -> web.Response:
        dtype = str(self.model.network.dtype).removeprefix("torch.")
        return web.json_response(
            {
                "version": VERSION,
                "model_path": str(self.model.path),
                "max_running_requests": self.max_running,
                "dtype": dtype,
                "device": self.model.device.type,
                "tp_size": 1,
                "dp_size": 1,
                "weight_version": self.weight_version,
            }
        )

    # -- generation -----------------------------------------------------------------------------------------------

    async def generate(self, request: web.Request) -> web.Response:
        parsed = parse_generate(await _body(request), self.model.vocabulary)
        if any(s.params.stop for s in parsed.samples) and self.model.tokenizer is None:
            raise BadRequest("sampling_params.stop needs a tokenizer, and the model folder has none")
        answer = asyncio.create_task(self._run(parsed))
        while not (await asyncio.wait({answer}, timeout=_LOOK_S))[0]:
            if request.transport is None:  # the client has gone, and nobody else wants the samples
                answer.cancel()
        return web.Response(body=await answer, content_type="application/json")

    async def _run(self, parsed: GenerateRequest) -> bytes:
        async with self.changed:
            await self.changed.wait_for(lambda: not self.updates or self.paused)
        call = Generation(self.model, parsed.samples)
        self.calls[call] = parsed
        try:
            await self._between_tokens(self.engine.add, call)
            while not call.finished:
                async with self.changed:
                    await self.changed.wait_for(lambda: call.finished or not (self.paused or self.driven))
                if not call.finished:
                    await self._drive()
            answers = await self._between_tokens(describe, call, parsed, self.weight_version)
            return json.dumps(answers[0] if parsed.single else answers).encode()
        finally:
            if not call.finished:  # cancelled, or the engine failed
                await self._between_tokens(self.engine.abort, call)
            del self.calls[call]
            await self._notify()

    async def _drive(self) -> None:
        """Run the engine until a call is finished or something interrupts."""
        self._require_whole_weights()
        self.driven = True
        try:
            await self._worker(self.engine.advance, self.weight_version, lambda: self.paused or self.between > 0)
        finally:
            self.driven = False
            await self._notify()

    def _require_whole_weights(self) -> None:
        if self.weights.broken:
            raise web.HTTPServiceUnavailable(
                text=f"the weights are incomplete since an update failed ({self.weights.broken}); update them again"
            )
        if self.weights.missing is not None:
            raise web.HTTPServiceUnavailable(text="the weights are incomplete: an update was begun and has not ended")

    async def abort_request(self, request: web.Request) -> web.Response:
        body = await _body(request)
        for call, parsed in list(self.calls.items()):
            if body.get("abort_all"):
                await self._between_tokens(self.engine.abort, call)
            elif body.get("rid") in parsed.rids:
                await self._between_tokens(self.engine.abort, call, body["rid"])
        return web.Response()

    async def pause_generation(self, request: web.Request) -> web.Response:
        """abort: running calls return what they have; retract: they wait and forget their cache; in_place: wait."""
        mode = (await _body(request)).get("mode", "abort")
        if mode not in ("abort", "retract", "in_place"):
            raise BadRequest(f"mode {mode!r} must be abort, retract or in_place")
        self.paused = True
        engine = self.engine
        change = {"abort": engine.abort_all, "retract": engine.retract, "in_place": engine.forget_prompts}[mode]
        await self._between_tokens(change)
        return web.json_response({"status": "ok", "message": f"paused ({mode})"})

    async def continue_generation(self, request: web.Request) -> web.Response:
        self.paused = False
        await self._notify()
        return web.json_response({"status": "ok", "message": "continued"})

    async def flush_cache(self, request: web.Request) -> web.Response:
        """Nothing outlives the calls; refused, as the contract has it, while one holds keys and values."""
        if self.engine.batch is not None:
            raise BadRequest("cannot flush: there are running requests; pause with mode abort or retract first")
        return web.Response(text="Cache flushed.\n")

    async def release_memory_occupation(self, request: web.Request) -> web.Response:
        """The memory of the weights; the cache's is the calls', and there may be none."""
        tags = _tags(await _body(request))
        if self.calls:
            raise BadRequest("the memory cannot be released: there are requests under way")
        if "weights" in tags:
            await self._on_worker(self.weights.release)
        return web.Response()

    async def resume_memory_occupation(self, request: web.Request) -> web.Response:
        if "weights" in _tags(await _body(request)):
            await self._on_worker(self.weights.restore)
        return web.Response()

    # -- weights --------------------------------------------------------------------------------------------------

    async def begin_weight_update(self, request: web.Request) -> web.Response:
        body = await _body(request)
        await self._on_worker(self.weights.begin, body.get("selector", "all"))
        return _done("weight update begun")

    async def end_weight_update(self, request: web.Request) -> web.Response:
        await self._on_worker(self.weights.end)
        return _done("weight update ended")

    async def init_weights_update_group(self, request: web.Request) -> web.Response:
        body = await _body(request)
        await self._on_worker(
            self.weights.join,
            _field(body, "master_address", str),
            _field(body, "master_port", int),
            _field(body, "rank_offset", int),
            _field(body, "world_size", int),
            _field(body, "group_name", str),
            _field(body, "backend", str),
        )
        return _done("joined the weight update group")

    async def destroy_weights_update_group(self, request: web.Request) -> web.Response:
        await self._on_worker(self.weights.leave, _field(await _body(request), "group_name", str))
        return _done("left the weight update group")

    async def update_weights_from_distributed(self, request: web.Request) -> web.Response:
        body = await _body(request)
        await self._on_worker(
            self.weights.receive,
            _field(body, "names", list),
            _field(body, "dtypes", list),
            _field(body, "shapes", list),
            _field(body, "group_name", str),
            body.get("load_format"),
        )
        self._stamp(body.get("weight_version"))
        return _done("weights updated")

    async def update_weights_from_tensor(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if body.get("load_format") is not None:
            raise BadRequest(f"load_format {body['load_format']!r} is not known; leave it out")
        handles = _field(body, "serialized_named_tensors", list)
        if len(handles) != 1:
            raise BadRequest(f"serialized_named_tensors has {len(handles)} entries; this server has one rank")
        await self._on_worker(self.weights.take, handles[0])
        self._stamp(body.get("weight_version"))
        return _done("weights updated")

    async def update_weights_from_disk(self, request: web.Request) -> web.Response:
        body = await _body(request)
        await self._on_worker(self.weights.load, Path(_field(body, "model_path", str)))
        self._stamp(body.get("weight_version"))
        return _done("weights loaded")

    async def update_weight_version(self, request: web.Request) -> web.Response:
        self._stamp(_field(await _body(request), "new_version", str))
        return web.json_response({"success": True, "message": "stamped", "new_version": self.weight_version})

    def _stamp(self, version: str | None) -> None:
        if version is not None:
            self.weight_version = version

    async def weights_checker(self, request: web.Request) -> web.Response:
        action = _field(await _body(request), "action", str)
        if action != "checksum":
            raise BadRequest(f"action {action!r}: the embedded engine knows 'checksum' only")
        sums = await self._on_worker(self.weights.checksums)
        place = {"tp_rank": 0, "tp_size": 1}
        return web.json_response({"success": True, "ranks": [{"checksums": sums, "parallelism_info": [place]}]})


@web.middleware
async def _explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors become JSON answers with their sentence; a request can not take the server down."""
    try:
        return await handler(request)
    except BadRequest as error:
        return _failed(str(error), 400)
    except web.HTTPException as error:
        return _failed(error.text or error.reason, error.status)
    except Exception as error:
        log.exception("%s failed", request.path)
        return _failed(f"{type(error).__name__}: {error}", 500)


def _tags(body: dict[str, Any]) -> set[str]:
    """Which memory is meant: all that there is where none is named."""
    known = {"weights", "kv_cache", "cuda_graph"}
    tags = set(body.get("tags") or known)
    if not tags <= known:
        raise BadRequest(f"tags {sorted(tags - known)} are not known: there are {', '.join(sorted(known))}")
    return tags


def _failed(message: str, status: int) -> web.Response:
    return web.json_response({"success": False, "message": message, "error": {"message": message}}, status=status)


def _done(message: str) -> web.Response:
    return web.json_response({"success": True, "message": message})


async def _body(request: web.Request) -> dict[str, Any]:
    raw = await request.read()
    try:
        body = json.loads(raw) if raw else {}
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    return body


def _field(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind):
        raise BadRequest(f"{name} must be given, as {kind.__name__}; got {value!r}")
    return value
