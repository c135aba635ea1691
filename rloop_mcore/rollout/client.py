"""One server's contract (SGLang's HTTP API) as typed methods; what comes back is not trusted."""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import aiohttp

from rloop_mcore.errors import Fault, UserError
from rloop_mcore.platform.files import parse_json
from rloop_mcore.rollout.embedded import KEY_VARIABLE
from rloop_mcore.rollout.together import together
from rloop_mcore.rollout.versions import check_partial, has_update_sessions, routes_of
from rloop_mcore.types import Completion, SampleRequest, Sampling

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
log = logging.getLogger(__name__)

ADOPTED = 0  # the version of weights that no run has sent; those of a run begin at 1
UNFINISHED = "unfinished"  # that of weights of which a sync has written a part, or is about to
_CONTROL_TIMEOUT_S = 60.0
_LEAVE_TIMEOUT_S = 10.0
_FLUSHES, _FLUSH_AGAIN_S = 20, 0.5
_FILES_AGAIN_S = 0.2
_ROUNDING = 0.01  # of a logprob near 0, in bf16
_STAMP = re.compile(r"([0-9]+)(?:-([0-9a-f]{8}))?")  # a weight version, and whose: adopted weights are nobody's
_SECRET = ("api_key", "admin_api_key", "launch_command")


class EngineError(Fault):
    """A server that does not answer, or not as the contract says. The message names the server and the endpoint."""

    def __init__(
        self, message: str, status: int | None = None, engine: str | None = None, retry_after_s: float = 0.0
    ) -> None:
        """status: of the HTTP answer, if there was one; engine: URL of the server whose fault it is, if it is one's;
        retry_after_s: how long a server that has no room wants to be left alone."""
        super().__init__(message)
        self.status, self.engine, self.retry_after_s = status, engine, retry_after_s


@dataclass(frozen=True)
class GroupSpec:
    """One server's place in the weight update group; the trainer is rank 0."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str
    backend: str


class EngineClient:
    """Talks to one server. Every request has a deadline; the methods raise EngineError, and OSError where this process
    has no socket for it."""

    def __init__(
        self, url: str, api_key: str | None, vocabulary: int, generate_timeout_s: float, partial: bool = False
    ) -> None:
        """partial: calls are to go on over weight syncs."""
        self.url, self._partial = url.rstrip("/"), partial
        self.vocabulary, self.generate_timeout_s = vocabulary, generate_timeout_s
        self._key = api_key or ""
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None
        self._requests: set[asyncio.Task[bytes]] = set()
        self._given_up: str | None = None
        self._stamped: str | None = None  # the weight version that was set last
        self._mark = secrets.token_hex(4)  # in the versions that it gives weights: no other client, of any run, has it
        self._released: set[str] = set()  # what it has given up its memory of

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def give_up(self, reason: str) -> None:
        """The server is lost: what is asked of it now and later fails with `reason`."""
        self._given_up = reason
        for request in self._requests:
            request.cancel()

    async def health(self, timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        """Raises EngineError unless the server lives. SGLang's /health waits for a token: 503 while it is paused."""
        if self.asleep:  # and there is no memory for a token
            await self.server_info(timeout_s)
            return
        try:
            await self._call("GET", "/health", timeout_s=timeout_s)
        except EngineError as error:
            if error.status == 429:  # never SGLang's: a proxy in front of it that counts requests, and tells no more
                return
            if error.status != 503:
                raise
            await self.server_info()  # its scheduler answers this one, paused or not

    async def check_server(self, timeout_s: float) -> None:
        """Raises EngineError unless the server answers, takes the key, is of a supported version and has its routes."""
        await self.health(timeout_s)
        info = await self.server_info()
        if info.get("preferred_sampling_params"):
            text = "it has --preferred-sampling-params, which hold where the run asks for nothing: start it without"
            raise self._error("/server_info", text, 200)
        if self._partial:
            self._of_version(info, check_partial)
        await together(*(self._check_route(path) for path in self._of_version(info, routes_of)))
        await self._check_admin()

    async def _check_admin(self) -> None:
        """Whether it takes the key for what changes it too: by the end of a sample that nobody asked for."""
        try:
            await self.abort("none", 1)
        except EngineError as error:
            if error.status not in (401, 403):
                raise
            text = (
                "it has --admin-api-key, and takes no other key for pauses and weights: start it with --api-key alone"
            )
            raise self._error("/abort_request", text, error.status) from None

    async def _check_route(self, path: str) -> None:
        """OPTIONS has no effect: 405 where the route is, 404 where it is not (SGLang's router, for one)."""
        try:
            await self._call("OPTIONS", path)
        except EngineError as error:
            if error.status == 404:
                text = "there is no such route: this is no SGLang server (a router of SGLang must be up before the run)"
                raise self._error(path, text, 404) from None
            if error.status != 405:
                raise

    async def server_info(self, timeout_s: float = _CONTROL_TIMEOUT_S) -> dict[str, Any]:
        """What the server says of itself, less the keys that SGLang tells with it: messages quote answers."""
        info = await self._json("GET", "/server_info", timeout_s=timeout_s)
        if not isinstance(info, dict):
            raise self._error("/server_info", f"the answer is not that of SGLang: {self._quoted(info)}", 200)
        return {k: v for k, v in info.items() if k not in _SECRET}

    async def weight_version(self) -> str:
        return self._quoted(self._get(await self._json("GET", "/model_info"), "weight_version", "/model_info"))

    async def check_untouched(self, folder: Path) -> str:
        """Raises UserError where a run has brought other weights than the server was started with, or a part of them;
        warns where that was another folder than `folder`. Returns what it was started with."""
        info = await self._json("GET", "/model_info")
        version, started_with = (str(self._get(info, name, "/model_info")) for name in ("weight_version", "model_path"))
        stamp = _STAMP.fullmatch(version)
        sent = f"the weights that a run sent it as version {stamp[1]}" if stamp else ""
        if version == UNFINISHED:
            sent = "a part of the weights that a run was sending it"
        if sent and version != str(ADOPTED):
            raise UserError(f"rollout.endpoints: {self.url} holds {sent}, not those of its folder: start it anew.")
        if Path(started_with).resolve() != folder.resolve():
            log.warning("%s was started with %s, and is taken to hold %s", self.url, started_with, folder)
        return started_with

    async def has_update_sessions(self) -> bool:
        """Whether this version wants a weight update between begin and end."""
        return self._of_version(await self.server_info(), has_update_sessions)

    def _of_version(self, info: dict[str, Any], fact: Callable[[str], T]) -> T:
        """What `fact` says of the server's version. Raises EngineError where that is not a supported one."""
        path = "/server_info"
        version = str(self._get(info, "version", path))
        try:
            return fact(version)
        except ValueError as error:
            raise self._error(path, self._quoted(error), 200) from error

    async def generate(self, requests: Sequence[SampleRequest], sampling: Sampling, rid: str) -> list[Completion]:
        """One /generate call; one completion a request, in order. A request with a partial response goes on from it.

        `rid` names the call for `abort`; what is aborted comes back as far as it is, with finish reason abort.
        """
        self._check_ids(requests)
        body = {
            "input_ids": [[*r.prompt_ids, *r.drawn] for r in requests],
            "sampling_params": [
                {
                    "max_new_tokens": sampling.max_tokens - len(r.drawn),
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                    "stop": list(sampling.stop),
                    "sampling_seed": (r.seed + len(r.drawn)) & (2**63 - 1),
                }
                for r in requests
            ],
            "rid": [f"{rid}-{number}" for number in range(len(requests))],
            "return_logprob": True,
        }
        stamped = self._stamped
        answers = await self._json("POST", "/generate", body, self.generate_timeout_s)
        if not isinstance(answers, list) or len(answers) != len(requests):
            raise self._error(
                "/generate", f"{len(requests)} prompts were sent, the answer is not a list of as many", 200
            )
        completions = [self._completion(answer) for answer in answers]
        if [answer["meta_info"].get("id") for answer in answers] != body["rid"]:
            raise self._error("/generate", "the answers are not those of the prompts, in their order", 200)
        for completion in completions:
            if completion.response_ids and not self._knows(completion.response_ids):
                raise self._error("/generate", f"an answer has an id outside the vocabulary of {self.vocabulary}", 200)
        if stamped != self._stamped and not all("weight_versions" in answer["meta_info"] for answer in answers):
            text = "the weights were changed meanwhile, and the answer does not tell which tokens are by which weights"
            raise self._error("/generate", text, 400)
        return [_joined(r.partial, c) for r, c in zip(requests, completions, strict=True)]

    async def abort(self, rid: str, count: int) -> None:
        """End the `count` samples of the call named `rid` where they are."""
        await together(*(self._call("POST", "/abort_request", {"rid": f"{rid}-{n}"}) for n in range(count)))

    def _check_ids(self, requests: Sequence[SampleRequest]) -> None:
        """An id outside the vocabulary kills an SGLang server, so none is sent. No engine's fault."""
        for prompt in {r.prompt_ids for r in requests}:
            if not prompt:
                raise EngineError(f"{self.url}/generate: a prompt is empty", 400)
            if not self._knows(prompt):
                wrong = next(i for i in prompt if not 0 <= i < self.vocabulary)
                text = f"id {wrong} is outside the vocabulary of {self.vocabulary}"
                raise EngineError(f"{self.url}/generate: {text}", 400)

    def _knows(self, ids: Sequence[int]) -> bool:
        """Are these ids, one at least, of the vocabulary?"""
        return min(ids) >= 0 and max(ids) < self.vocabulary

    async def pause(self, mode: str) -> None:
        """mode: abort, retract (calls wait and forget their cache) or in_place."""
        await self._call("POST", "/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        await self._call("POST", "/continue_generation", {})

    async def flush_cache(self) -> None:
        """Refused while something is under way, as a health probe may be: tried again for a while."""
        for attempt in range(1, _FLUSHES + 1):
            try:
                await self._call("POST", "/flush_cache")
                return
            except EngineError as error:
                if error.status != 400 or attempt == _FLUSHES:
                    raise
            await asyncio.sleep(_FLUSH_AGAIN_S)

    @property
    def asleep(self) -> bool:
        return bool(self._released)

    async def sleep(self) -> None:
        """Give up the memory of the weights and of the cache, contents and all. Nothing may be under way."""
        self._released = {"kv_cache", "weights"}  # from now on no /health, which is a token
        await self.flush_cache()  # SGLang dies of a release while something is under way
        await self._call("POST", "/release_memory_occupation", {"tags": sorted(self._released)})

    async def wake(self, tag: str) -> None:
        """Take memory for the `weights`, which have to be written anew, or the `kv_cache`; none where it has it."""
        if tag in self._released:  # SGLang dies of a second time
            await self._call("POST", "/resume_memory_occupation", {"tags": [tag]})
            self._released.discard(tag)

    async def begin_update(self) -> None:
        await self._succeed("/begin_weight_update", {"selector": "all"})

    async def end_update(self) -> None:
        await self._succeed("/end_weight_update", {})

    async def join_group(self, group: GroupSpec, timeout_s: float) -> None:
        await self._succeed("/init_weights_update_group", asdict(group), timeout_s)

    async def leave_group(self, group_name: str) -> None:
        await self._succeed("/destroy_weights_update_group", {"group_name": group_name}, _LEAVE_TIMEOUT_S)

    async def update_from_distributed(
        self, tensors: Sequence[tuple[str, torch.Tensor]], group_name: str, timeout_s: float
    ) -> None:
        """Receive one flattened bucket: a uint8 broadcast of the tensors in this order, aligned to their item size."""
        body = {
            "names": [name for name, _ in tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
            "shapes": [list(tensor.shape) for _, tensor in tensors],
            "group_name": group_name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._succeed("/update_weights_from_distributed", body, timeout_s)

    async def update_from_tensors(self, handles: Sequence[str], timeout_s: float) -> None:
        """Copy tensors of this host. handles: for each tensor parallel rank of the server, what `handles_of` gave."""
        body = {"serialized_named_tensors": list(handles), "flush_cache": False}
        await self._succeed("/update_weights_from_tensor", body, timeout_s)

    def stamp(self, version: int) -> str:
        """How the server is to call the weights `version` that this client brings it."""
        return f"{version}-{self._mark}"

    async def set_weight_version(self, version: str) -> None:
        await self._succeed("/update_weight_version", {"new_version": version, "abort_all_requests": False})
        self._stamped = version

    async def checksums(self, timeout_s: float = _CONTROL_TIMEOUT_S) -> list[tuple[int, dict[str, str]]]:
        """(tensor parallel rank, {tensor: checksum}) of every rank of the server."""
        path = "/weights_checker"
        answer = await self._json("POST", path, {"action": "checksum"}, timeout_s)
        try:
            return [
                (_tp_rank(rank["parallelism_info"]), {str(k): str(v) for k, v in rank["checksums"].items()})
                for rank in answer["ranks"]
            ]
        except (ArithmeticError, TypeError, LookupError, ValueError, AttributeError) as error:
            raise self._error(path, f"the answer is not that of SGLang: {self._quoted(answer)}") from error

    async def _succeed(self, path: str, body: dict[str, Any], timeout_s: float = _CONTROL_TIMEOUT_S) -> None:
        """A 200 alone does not mean that it was done: `success` must be true."""
        answer = await self._json("POST", path, body, timeout_s)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise self._error(path, f"did not succeed: {self._quoted(answer)}")

    async def _json(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _CONTROL_TIMEOUT_S
    ) -> Any:
        raw = await self._call(method, path, body, timeout_s)
        try:
            return parse_json(raw)
        except ValueError as error:
            raise self._error(path, f"the answer is not JSON ({error}): {self._quoted(raw)}", 200) from error

    async def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout_s: float = _CONTROL_TIMEOUT_S
    ) -> bytes:
        if self._given_up is not None:
            raise self._error(path, self._given_up)
        begun, request = time.monotonic(), asyncio.ensure_future(self._request(method, path, body, timeout_s))
        self._requests.add(request)
        try:
            return await request
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._given_up is None or (caller is not None and caller.cancelling()):
                raise
            raise self._error(path, self._given_up) from None
        except TimeoutError as error:
            raise self._error(path, f"no answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
            waited = time.monotonic() - begun
            if _has_no_file(error):  # no fault of the server's
                text = f"{self.url}{path}: no socket within {timeout_s:g} s: raise the limit of open files (ulimit -n)"
                raise OSError(errno.EMFILE, text) from error
            text = f"connection failed after {waited:.1f} s (deadline {timeout_s:g} s): {type(error).__name__}: "
            raise self._error(path, text + self._quoted(error)) from error
        finally:
            self._requests.discard(request)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> bytes:
        if self._session is None:
            # No connection is kept: a server that closed an idle one would fail the next request.
            self._session = aiohttp.ClientSession(
                headers=self._headers, connector=aiohttp.TCPConnector(force_close=True, limit=0)
            )
        deadline = time.monotonic() + timeout_s
        while True:
            timeout = aiohttp.ClientTimeout(total=max(deadline - time.monotonic(), _FILES_AGAIN_S))
            try:
                async with self._session.request(
                    method, self.url + path, json=body, timeout=timeout, allow_redirects=False
                ) as response:
                    raw = await response.read()
                break
            except OSError as error:
                if not _has_no_file(error) or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(_FILES_AGAIN_S)  # other calls give theirs back
        if response.status != 200:  # a redirected POST would come as a GET
            moved = response.headers.get("Location")
            text = f"status {response.status}{f' to {self._quoted(moved)}' if moved else ''}: {self._quoted(raw)}"
            text += f" (the key of running servers is {KEY_VARIABLE})" if response.status == 401 else ""
            asked = response.headers.get("Retry-After", "")  # or a date, by a clock that may be another
            raise self._error(path, text, response.status, float(asked) if asked.isdecimal() else 0.0)
        return raw

    def _completion(self, answer: Any) -> Completion:
        """From one answer of /generate; raises EngineError where a field is missing or they contradict."""
        path = "/generate"
        try:
            meta, ids = self._get(answer, "meta_info", path), list(self._get(answer, "output_ids", path))
            entries = self._get(meta, "output_token_logprobs", path)
            reason = self._get(self._get(meta, "finish_reason", path), "type", path)
            logprobs = tuple(float(entry[0]) for entry in entries)
            scored_ids = tuple(int(entry[1]) for entry in entries)
            whole = [{"version": self._get(meta, "weight_version", path), "start": 0, "end": len(ids)}]
            versions = self._versions(meta.get("weight_versions") or whole, len(ids))
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._error(path, f"the answer is not that of SGLang: {self._quoted(answer)}", 200) from error
        if list(scored_ids) != ids:
            counts = f"{len(ids)} output_ids and {len(scored_ids)} logprobs"
            raise self._error(path, f"{counts} do not name the same tokens", 200)
        if not math.isfinite(sum(logprobs)):
            raise self._error(path, "a logprob is not finite", 200)
        if max(logprobs, default=0.0) > _ROUNDING:
            raise self._error(path, f"a logprob is {max(logprobs):g}, and none is above 0", 200)
        return Completion(scored_ids, logprobs, self._quoted(reason), versions)

    def _versions(self, spans: Any, tokens: int) -> tuple[tuple[int, int], ...]:
        """(weight version, tokens sampled by it) in order; raises EngineError where the spans are not of so many."""
        path = "/generate"
        runs: list[tuple[int, int]] = []
        end = 0
        for span in spans:
            version, start, stop = (self._get(span, name, path) for name in ("version", "start", "end"))
            if start != end or stop < end:
                break
            if stop > end:
                stamp = _STAMP.fullmatch(str(version))
                if stamp is None:
                    text = f"weight_version {self._quoted(version)!r} is not a number: the engine was never synced"
                    raise self._error(path, text, 200)
                if stamp[2] not in (None, self._mark):
                    raise self._error(path, f"weights {stamp[1]} are those of another run, which uses this engine too")
                runs.append((int(stamp[1]), stop - end))
            end = stop
        else:
            if end == tokens:
                return tuple(runs)
        raise self._error(path, f"weight_versions {self._quoted(spans)} are not those of {tokens} tokens", 200)

    def _get(self, mapping: Any, name: str, path: str) -> Any:
        if not isinstance(mapping, dict) or name not in mapping:
            raise self._error(path, f"the answer lacks {name!r}: {self._quoted(mapping)}", 200)
        return mapping[name]

    def _quoted(self, value: Any) -> str:
        """An answer, cut short, without the key: SGLang's /server_info has it, and a proxy may echo its request."""
        text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        text = text.replace(self._key, "(the key)") if self._key else text
        return text if len(text) <= 500 else f"{text[:500]}... ({len(text)} characters)"

    def _error(self, path: str, text: str, status: int | None = None, retry_after_s: float = 0.0) -> EngineError:
        return EngineError(f"{self.url}{path}: {text}", status, self.url, retry_after_s)


def _has_no_file(error: BaseException) -> bool:
    """Whether this process, or this machine, could open no socket."""
    return isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)


def _tp_rank(place: Any) -> int:
    """From a `parallelism_info`: an object, or since 0.5.21 a list of one for each model of the server."""
    return int((place[0] if isinstance(place, list) else place)["tp_rank"])


def _joined(partial: Completion | None, rest: Completion) -> Completion:
    """The completion that `partial` and what was sampled after it make."""
    if partial is None:
        return rest
    runs = [*partial.weight_versions, *rest.weight_versions]
    by_version = itertools.groupby(runs, key=lambda run: run[0])
    merged = [(version, sum(tokens for _, tokens in same)) for version, same in by_version]
    return Completion(
        partial.response_ids + rest.response_ids, partial.logprobs + rest.logprobs, rest.finish_reason, tuple(merged)
    )
