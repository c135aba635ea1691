"""What a /generate body may say: parsed, checked, and spread into one `Sample` a response wanted."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import dataclass, fields, replace
from typing import Any


class BadRequest(Exception):
    """The request cannot be served as it stands; answered with status 400 and this message."""


@dataclass(frozen=True)
class SamplingParams:
    """The fields of SGLang's `sampling_params` that this engine implements."""

    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling_seed: int | None = None
    skip_special_tokens: bool = True
    no_stop_trim: bool = False


_GREEDY = 1e-6  # below it SGLang takes a temperature for 0

# Fields of the contract that are accepted only with a value that leaves them off, as null does.
_OFF: dict[str, tuple[Any, ...]] = {
    "top_k": (-1, 1 << 30),
    "min_p": (0,),
    "min_new_tokens": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "json_schema": (),
    "regex": (),
    "ebnf": (),
    "structural_tag": (),
    "stop_regex": ([],),
    "logit_bias": (),
    "custom_params": (),
    "stream_interval": (),
    "beam_width": (),
    "watermark": (),
    "spaces_between_special_tokens": (True,),
}
_KNOWN = {f.name for f in fields(SamplingParams)}


@dataclass
class Sample:
    """One response wanted: its prompt, how to sample it, and the seed that fixes the draw."""

    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int
    rid: str


@dataclass
class GenerateRequest:
    samples: list[Sample]
    single: bool  # one prompt, n = 1: the answer is an object, not a list
    return_logprob: bool
    logprob_start_len: int  # -1: no prompt logprobs
    rids: set[str]


def parse_generate(body: Any, vocabulary: int) -> GenerateRequest:
    """Read a /generate body. Unknown top-level fields are ignored, unknown sampling fields raise BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    prompts, batched = _prompts(body.get("input_ids"), vocabulary)
    if body.get("stream"):
        raise BadRequest("stream: the embedded engine answers whole responses only")
    given = body.get("sampling_params") or {}
    listed = given if isinstance(given, list) else [given] * len(prompts)
    if len(listed) != len(prompts):
        raise BadRequest(f"sampling_params has {len(listed)} entries for {len(prompts)} prompts")
    rids = _rids(body.get("rid"), len(prompts))
    samples = []
    parsed: dict[int, SamplingParams] = {}  # a dict shared by all prompts is read once
    for prompt, rid, raw in zip(prompts, rids, listed, strict=True):
        if id(raw) not in parsed:
            parsed[id(raw)] = parse_sampling(raw, vocabulary)
        params = parsed[id(raw)]
        seed = secrets.randbits(63) if params.sampling_seed is None else params.sampling_seed
        samples += [Sample(prompt, params, seed + copy, rid) for copy in range(params.n)]
    start = body.get("logprob_start_len", -1)
    start = -1 if start is None else start
    if not isinstance(start, int):
        raise BadRequest(f"logprob_start_len must be one integer, got {start!r}")
    return GenerateRequest(
        samples=samples,
        single=not batched and len(samples) == 1,
        return_logprob=bool(body.get("return_logprob", False)),
        logprob_start_len=start,
        rids=set(rids),
    )


def _prompts(input_ids: Any, vocabulary: int) -> tuple[list[tuple[int, ...]], bool]:
    if not isinstance(input_ids, list) or not input_ids:
        raise BadRequest("input_ids must be a non-empty list of token ids, or a list of such lists")
    batched = isinstance(input_ids[0], list)
    prompts = []
    for ids in input_ids if batched else [input_ids]:
        if not isinstance(ids, list) or not ids:
            raise BadRequest("input_ids: a prompt is empty or not a list")
        if not all(type(i) is int for i in ids):
            raise BadRequest("input_ids must hold integers only")
        if min(ids) < 0 or max(ids) >= vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise BadRequest(f"input_ids: {wrong} is outside the vocabulary of {vocabulary} tokens")
        prompts.append(tuple(ids))
    return prompts, batched


def _rids(rid: Any, count: int) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    rids = rid if isinstance(rid, list) else [rid] * count
    if len(rids) != count or not all(isinstance(r, str) for r in rids):
        raise BadRequest(f"rid must be a string or {count} strings")
    return rids


def parse_sampling(raw: Any, vocabulary: int) -> SamplingParams:
    """Read one `sampling_params` object; raises BadRequest with the field and what would be right."""
    if not isinstance(raw, dict):
        raise BadRequest("sampling_params must be an object or a list of objects")
    for name, value in raw.items():
        if name in _OFF and value is not None and value not in _OFF[name]:
            raise BadRequest(f"sampling_params.{name}={value!r} is not implemented by the embedded engine")
        if name not in _OFF and name not in _KNOWN:
            raise BadRequest(f"unknown sampling_params field {name!r}")
    if raw.get("max_new_tokens", 1) is None:
        raise BadRequest("sampling_params.max_new_tokens=None, as many as there is room for, is not implemented")
    given = {name: value for name, value in raw.items() if name in _KNOWN and value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    for name in ("stop", "stop_token_ids"):
        listed = given.get(name, [])
        if not isinstance(listed, list):
            raise BadRequest(f"sampling_params.{name}={listed!r} must be a list")
        given[name] = tuple(listed)
    params = SamplingParams(**given)
    _check(params, vocabulary)
    return replace(params, temperature=0.0) if params.temperature < _GREEDY else params


def _check(params: SamplingParams, vocabulary: int) -> None:
    rules = {
        "max_new_tokens": (type(params.max_new_tokens) is int and params.max_new_tokens >= 1, "an integer >= 1"),
        "temperature": (
            type(params.temperature) in (int, float) and 0 <= params.temperature < float("inf"),
            "a number >= 0",
        ),
        "top_p": (type(params.top_p) in (int, float) and 0 < params.top_p <= 1, "a number in (0, 1]"),
        "n": (type(params.n) is int and params.n >= 1, "an integer >= 1"),
        "stop": (all(isinstance(s, str) and s for s in params.stop), "non-empty strings"),
        "stop_token_ids": (
            all(type(i) is int and 0 <= i < vocabulary for i in params.stop_token_ids),
            "vocabulary ids",
        ),
        "sampling_seed": (
            params.sampling_seed is None
            or (type(params.sampling_seed) is int and -(2**63) <= params.sampling_seed < 2**63),
            "an integer of 64 bits",
        ),
        "ignore_eos": (isinstance(params.ignore_eos, bool), "true or false"),
    }
    for name, (holds, wanted) in rules.items():
        if not holds:
            raise BadRequest(f"sampling_params.{name}={getattr(params, name)!r} must be {wanted}")
