"""Batched generation against transformers: shared prefixes, ragged prompts, leaving rows, interruptions."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from served_model import EOS, VOCABULARY, token_logprobs
from transformers import PreTrainedModel

from rloop_mcore.rollout.embedded.engine import Generation
from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.params import Sample, SamplingParams


@pytest.fixture(scope="module")
def model(model_path: Path) -> CausalModel:
    return CausalModel(model_path, torch.float32, "cpu")


def _prompts(count: int, common: int) -> list[tuple[int, ...]]:
    """Prompts of different lengths after `common` equal tokens."""
    rng = np.random.default_rng(common)
    head = rng.integers(2, VOCABULARY, common).tolist()
    return [tuple(head + rng.integers(2, VOCABULARY, 3 + 5 * i).tolist()) for i in range(count)]


def _samples(prompts: list[tuple[int, ...]], group: int, **params: object) -> list[Sample]:
    settings = SamplingParams(**{"max_new_tokens": 24, **params})  # type: ignore[arg-type]
    return [Sample(p, settings, 1000 * i + j, "") for i, p in enumerate(prompts) for j in range(group)]


def _run(model: CausalModel, samples: list[Sample], max_running: int = 64) -> Generation:
    call = Generation(model, samples, max_running)
    call.advance("1", lambda: False)
    assert call.finished
    return call


def _ids(call: Generation) -> list[list[int]]:
    return [call.tokens[row, :length].tolist() for row, length in enumerate(call.lengths)]


@pytest.mark.parametrize("common", [0, 5, 40], ids=["no prefix", "short prefix", "shared prefix"])
@pytest.mark.parametrize("group", [1, 4])
def test_logprobs_equal_a_plain_forward(
    model: CausalModel, reference: PreTrainedModel, common: int, group: int
) -> None:
    samples = _samples(_prompts(4, common), group, temperature=0.8, stop_token_ids=(5, 9, 13, 17, 21))
    call = _run(model, samples)
    assert len(set(call.lengths.tolist())) > 1  # rows left at different times
    for sample, ids, logprobs in zip(samples, _ids(call), call.logprobs, strict=True):
        expected = token_logprobs(reference, [*sample.prompt, *ids], temperature=0.8)[len(sample.prompt) - 1 :]
        np.testing.assert_allclose(logprobs[: len(ids)], expected, atol=1e-4)


def test_greedy_equals_transformers_generate(model: CausalModel, reference: PreTrainedModel) -> None:
    samples = _samples(_prompts(5, 20), 1, temperature=0.0)
    for sample, ids in zip(samples, _ids(_run(model, samples)), strict=True):
        expected = reference.generate(torch.tensor([sample.prompt]), max_new_tokens=24, do_sample=False)
        assert ids == expected[0, len(sample.prompt) :].tolist()


def test_a_sample_does_not_depend_on_the_batch_around_it(model: CausalModel) -> None:
    samples = _samples(_prompts(6, 20), 3, stop_token_ids=(5, 9))
    together = _ids(_run(model, samples))
    assert _ids(_run(model, samples, max_running=4)) == together
    order = np.random.default_rng(0).permutation(len(samples))
    shuffled = _ids(_run(model, [samples[i] for i in order]))
    assert [shuffled[i] for i in np.argsort(order)] == together


def test_the_same_call_is_bit_identical(model: CausalModel) -> None:
    first, second = (_run(model, _samples(_prompts(6, 20), 4)) for _ in range(2))
    assert (first.tokens == second.tokens).all()
    assert (first.logprobs == second.logprobs).all()


def test_copies_of_a_prompt_are_read_once(model: CausalModel) -> None:
    call = _run(model, _samples(_prompts(2, 20), 3))
    lengths = [len(p) for p in _prompts(2, 20)]
    assert call.cached.tolist() == [0, lengths[0], lengths[0], 20, lengths[1], lengths[1]]


@pytest.mark.parametrize("keep_cache", [True, False], ids=["in_place", "retract"])
def test_interrupted_between_tokens_it_goes_on_as_if_never(model: CausalModel, keep_cache: bool) -> None:
    samples = _samples(_prompts(4, 20), 3)
    whole = _run(model, samples)
    call = Generation(model, samples, 8)
    rounds = 0
    while not call.finished:
        polls = iter([False, False, False])
        call.advance(str(rounds), lambda polls=polls: next(polls, True))
        if not keep_cache:
            call.drop_cache()
        rounds += 1
    assert rounds > 5
    assert _ids(call) == _ids(whole)
    np.testing.assert_allclose(call.logprobs, whole.logprobs, atol=1e-5)
    for row, length in enumerate(call.lengths):
        spans = call.version_spans(row)
        assert spans[0]["start"] == 0
        assert spans[-1]["end"] == length
        assert all(a["end"] == b["start"] for a, b in itertools.pairwise(spans))


def test_aborted_samples_keep_what_they_have(model: CausalModel) -> None:
    call = Generation(model, _samples(_prompts(2, 0), 2, ignore_eos=True), 8)
    polls = iter([False] * 5)
    call.advance("1", lambda: next(polls, True))
    call.abort()
    assert call.finished
    assert call.lengths.tolist() == [5] * 4
    assert call.finish_reason(0)["type"] == "abort"


def test_end_token_is_kept_and_named(model: CausalModel) -> None:
    call = _run(model, _samples(_prompts(8, 0), 4, max_new_tokens=200))
    stopped = [row for row in range(32) if call.finish_reason(row)["type"] == "stop"]
    assert stopped
    for row in stopped:
        assert call.finish_reason(row) == {"type": "stop", "matched": EOS}
        assert EOS not in _ids(call)[row][:-1]
        assert _ids(call)[row][-1] == EOS


def test_ignore_eos_goes_on_to_the_limit(model: CausalModel) -> None:
    call = _run(model, _samples(_prompts(2, 0), 4, max_new_tokens=150, ignore_eos=True, stop_token_ids=(5,)))
    assert call.lengths.tolist() == [150] * 8
    assert call.finish_reason(0) == {"type": "length", "length": 150}
    assert any(EOS in ids[:-1] and 5 in ids[:-1] for ids in _ids(call))


def test_stop_strings_end_a_sample_where_they_appear(model: CausalModel) -> None:
    free = _run(model, _samples(_prompts(2, 0), 2, ignore_eos=True))
    texts = [model.tokenizer.decode(ids) for ids in _ids(free)]
    stop = texts[0][7:9]  # two characters, so two tokens
    call = _run(model, _samples(_prompts(2, 0), 2, ignore_eos=True, stop=(stop,)))
    for row, text in enumerate(texts):
        end = text.find(stop) + len(stop) if stop in text else len(text)
        assert model.tokenizer.decode(_ids(call)[row]) == text[:end]
    assert call.finish_reason(0) == {"type": "stop", "matched": stop}
