"""The JSON objects /generate answers with."""

from __future__ import annotations

from typing import Any

import torch

from rloop_mcore.rollout.embedded.generation import STOP_STRING, Generation
from rloop_mcore.rollout.embedded.params import GenerateRequest


@torch.inference_mode()
def describe(call: Generation, request: GenerateRequest, weight_version: str) -> list[dict[str, Any]]:
    """One answer a sample, in the contract's fields."""
    prompt_logprobs = _prompt_logprobs(call, request)
    texts = _texts(call)
    answers = []
    for row, sample in enumerate(call.samples):
        length = int(call.lengths[row])
        ids = call.tokens[row, :length].tolist()
        spans = call.version_spans(row)
        meta: dict[str, Any] = {
            "id": sample.rid,
            "finish_reason": call.finish_reason(row),
            "prompt_tokens": len(sample.prompt),
            "completion_tokens": length,
            "cached_tokens": int(call.cached[row]),
            "weight_version": spans[-1]["version"] if spans else weight_version,
            "weight_versions": spans,
        }
        if request.return_logprob:
            logprobs = call.logprobs[row, :length].tolist()
            meta["output_token_logprobs"] = [[lp, i, None] for lp, i in zip(logprobs, ids, strict=True)]
            meta["input_token_logprobs"] = prompt_logprobs.get(sample.prompt, [])
        answers.append({"text": texts[row], "output_ids": ids, "meta_info": meta})
    return answers


def _prompt_logprobs(call: Generation, request: GenerateRequest) -> dict[tuple[int, ...], list[list[Any]]]:
    """Per distinct prompt: [logprob, id, null] from `logprob_start_len` on; the first has no logprob."""
    start = request.logprob_start_len
    table: dict[tuple[int, ...], list[list[Any]]] = {}
    if not request.return_logprob or start < 0:
        return table
    for prompt in {s.prompt for s in call.samples}:
        if start < len(prompt):
            logprobs = [None, *call.model.prompt_logprobs(prompt, start)]
            table[prompt] = [[lp, i, None] for lp, i in zip(logprobs, prompt[start:], strict=True)]
    return table


def _texts(call: Generation) -> list[str]:
    tokenizer = call.model.tokenizer
    if tokenizer is None:
        return [""] * len(call.samples)
    texts = []
    for row, sample in enumerate(call.samples):
        ids = call.tokens[row, : call.lengths[row]].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=sample.params.skip_special_tokens)
        if call.state[row] == STOP_STRING and not sample.params.no_stop_trim:
            text = text.partition(call.matched[row])[0]  # it is not in it where it is a special token's and was skipped
        texts.append(text)
    return texts
