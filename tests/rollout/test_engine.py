"""Batched generation against transformers: shared prefixes, ragged prompts, rows that leave and join, interruptions."""

from __future__ import annotations

import copy
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from served_model import EOS, VOCABULARY, token_logprobs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from rloop_mcore.rollout.embedded.engine import Engine
from rloop_mcore.rollout.embedded.generation import Generation
from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.params import GenerateRequest, Sample, SamplingParams
from rloop_mcore.rollout.embedded.responses import describe


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small a second thread only waits, and where cores are taken it waits long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    call = Generation(model, samples)
    engine = _engine(model, call, max_running=max_running)
    engine.advance("1", _never)
    assert call.finished
    assert engine.batch is None
    assert not engine.calls
    return call


def _engine(model: CausalModel, *calls: Generation, max_running: int) -> Engine:
    engine = Engine(model, max_running)
    for call in calls:
        engine.add(call)
    return engine


def _never() -> bool:
    return False


def _after(tokens: int) -> Callable[[], bool]:
    """Interrupts when so many tokens a row have been drawn."""
    polls = iter([False] * tokens)
    return lambda: next(polls, True)


def _expected(reference: PreTrainedModel, sample: Sample, ids: list[int]) -> list[float]:
    """Logprobs of the drawn `ids` by one plain forward of transformers."""
    scored = token_logprobs(reference, [*sample.prompt, *ids], temperature=sample.params.temperature)
    return scored[len(sample.prompt) - 1 :]


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
        np.testing.assert_allclose(logprobs[: len(ids)], _expected(reference, sample, ids), atol=1e-4)


def test_uneven_groups_and_prompts_read_in_parts(
    model: CausalModel, reference: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest group's prompt is kept in several copies; a forward takes two or three prompts."""
    monkeypatch.setattr("rloop_mcore.rollout.embedded.model._PREFILL_TOKENS", 60)
    groups = zip(_prompts(5, 20), (1, 9, 2, 1, 1), strict=True)
    samples = [sample for prompt, size in groups for sample in _samples([prompt], size, ignore_eos=True)]
    call = _run(model, samples)
    for sample, ids, logprobs in zip(samples, _ids(call), call.logprobs, strict=True):
        np.testing.assert_allclose(logprobs[: len(ids)], _expected(reference, sample, ids), atol=1e-4)


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
    heads = [len(p) - 1 for p in _prompts(2, 20)]  # the last token is read for every sample
    assert call.cached.tolist() == [0, heads[0], heads[0], 20, heads[1], heads[1]]


def _ragged(common: int, group: int = 3) -> list[Sample]:
    """Groups of samples of 1 to 40 tokens each, by prompts of different lengths, one of a single token."""
    rng = np.random.default_rng(7)
    prompts = [*_prompts(5, common), (5,)]
    return [
        Sample(p, SamplingParams(max_new_tokens=int(rng.integers(1, 41)), ignore_eos=True), 100 * i + j, f"{i}")
        for i, p in enumerate(prompts)
        for j in range(group)
    ]


@pytest.mark.parametrize("max_running", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("common", [0, 40], ids=["no prefix", "shared prefix"])
def test_refilled_rows_get_what_each_gets_alone(
    model: CausalModel, reference: PreTrainedModel, common: int, max_running: int
) -> None:
    samples = _ragged(common)
    call = _run(model, samples, max_running)
    assert call.lengths.tolist() == [s.params.max_new_tokens for s in samples]
    for sample, ids, logprobs in zip(samples, _ids(call), call.logprobs, strict=True):
        assert ids == _ids(_run(model, [sample]))[0]
        np.testing.assert_allclose(logprobs[: len(ids)], _expected(reference, sample, ids), atol=1e-4)


def test_places_are_refilled_while_others_run(model: CausalModel) -> None:
    samples = _ragged(0)
    lengths = [s.params.max_new_tokens for s in samples]
    steps = 0

    def count() -> bool:
        nonlocal steps
        steps += 1
        return False

    call = Generation(model, samples)
    _engine(model, call, max_running=4).advance("1", count)
    batched = sum(max(lengths[i : i + 4]) for i in range(0, len(lengths), 4))
    assert sum(lengths) / 4 <= steps < sum(lengths) / 4 + max(lengths) < batched


def test_a_refilled_call_is_bit_identical_whatever_the_engine_did_before(model: CausalModel) -> None:
    first = _run(model, _ragged(20), 4)
    second = Generation(model, _ragged(20))
    engine = _engine(model, Generation(model, _samples(_prompts(3, 0), 5, max_new_tokens=90)), max_running=4)
    engine.advance("0", _never)
    engine.add(second)
    engine.advance("1", _never)
    assert (first.tokens == second.tokens).all()
    assert (first.logprobs == second.logprobs).all()


@pytest.mark.parametrize("max_running", [3, 8, 64])
@pytest.mark.parametrize("later", [0, 9], ids=["at once", "later"])
def test_calls_in_flight_together_get_what_each_gets_alone(
    model: CausalModel, reference: PreTrainedModel, later: int, max_running: int
) -> None:
    """The second shares no prefix with the first, the third does."""
    wanted = [_ragged(40), _ragged(0), _samples(_prompts(4, 40), 2, temperature=0.7, top_p=0.9)]
    calls = [Generation(model, samples) for samples in wanted]
    engine = _engine(model, calls[0], max_running=max_running)
    engine.advance("1", _after(later))
    for call in calls[1:]:
        engine.add(call)
    while engine.calls:
        engine.advance("1", _never)
    for samples, call in zip(wanted, calls, strict=True):
        assert _ids(call) == _ids(_run(model, samples))
        for sample, ids, logprobs in zip(samples, _ids(call), call.logprobs, strict=True):
            np.testing.assert_allclose(logprobs[: len(ids)], _expected(reference, sample, ids), atol=1e-4)


def test_a_finished_call_does_not_wait_for_the_others(model: CausalModel) -> None:
    long = Generation(model, _samples(_prompts(1, 0), 2, max_new_tokens=100, ignore_eos=True))
    short = Generation(model, _samples(_prompts(1, 0), 2, max_new_tokens=5, ignore_eos=True))
    engine = _engine(model, long, short, max_running=8)
    engine.advance("1", _never)
    assert short.finished
    assert engine.calls == [long]
    assert long.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("keep_cache", [True, False], ids=["in_place", "retract"])
@pytest.mark.parametrize("max_running", [5, 64])
def test_interrupted_between_tokens_it_goes_on_as_if_never(
    model: CausalModel, keep_cache: bool, max_running: int
) -> None:
    wanted = [_samples(_prompts(4, 20), 3), _ragged(20)]
    calls = [Generation(model, samples) for samples in wanted]
    engine = _engine(model, *calls, max_running=max_running)
    rounds = 0
    while engine.calls:
        engine.advance(str(rounds), _after(3))
        engine.forget_prompts() if keep_cache else engine.retract()
        rounds += 1
    assert rounds > 5
    for samples, call in zip(wanted, calls, strict=True):
        whole = _run(model, samples)
        assert _ids(call) == _ids(whole)
        np.testing.assert_allclose(call.logprobs, whole.logprobs, atol=1e-5)
        for row, length in enumerate(call.lengths):
            spans = call.version_spans(row)
            assert spans[0]["start"] == 0
            assert spans[-1]["end"] == length
            assert all(a["end"] == b["start"] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("max_running", [4, 64])
def test_retracted_samples_go_on_under_new_weights(
    model_path: Path, reference: PreTrainedModel, max_running: int
) -> None:
    """Every span of tokens has the logprobs of its version's weights, given all that stands before."""
    model = CausalModel(model_path, torch.float32, "cpu")
    changed = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    wanted = [_ragged(40), _samples(_prompts(3, 40), 4, ignore_eos=True, max_new_tokens=30)]
    calls = [Generation(model, samples) for samples in wanted]
    engine = _engine(model, *calls, max_running=max_running)
    engine.advance("old", _after(12))
    engine.retract()
    model.network.load_state_dict(changed.state_dict())
    while engine.calls:
        engine.advance("new", _never)
    mixed = 0
    for samples, call in zip(wanted, calls, strict=True):
        for row, (sample, ids) in enumerate(zip(samples, _ids(call), strict=True)):
            spans = call.version_spans(row)
            mixed += len(spans) == 2
            expected = {"old": _expected(reference, sample, ids), "new": _expected(changed, sample, ids)}
            for span in spans:
                where = slice(span["start"], span["end"])
                np.testing.assert_allclose(call.logprobs[row, where], expected[span["version"]][where], atol=1e-4)
    assert mixed >= 2


def test_newcomers_read_their_prompts_anew_after_an_in_place_pause(
    model_path: Path, reference: PreTrainedModel
) -> None:
    model = CausalModel(model_path, torch.float32, "cpu")
    changed = copy.deepcopy(reference)
    with torch.no_grad():
        changed.get_input_embeddings().weight.mul_(1.2)
    samples = _samples(_prompts(2, 40), 2, ignore_eos=True)
    running, newcomer = Generation(model, samples), Generation(model, samples)
    engine = _engine(model, running, max_running=64)
    engine.advance("old", _after(4))
    engine.forget_prompts()
    model.network.load_state_dict(changed.state_dict())
    engine.add(newcomer)
    while engine.calls:
        engine.advance("new", _never)
    for sample, ids, logprobs in zip(samples, _ids(newcomer), newcomer.logprobs, strict=True):
        np.testing.assert_allclose(logprobs[: len(ids)], _expected(changed, sample, ids), atol=1e-4)


def test_aborted_samples_keep_what_they_have(model: CausalModel) -> None:
    call = Generation(model, _samples(_prompts(2, 0), 2, ignore_eos=True))
    other = Generation(model, _samples(_prompts(2, 0), 2, ignore_eos=True))
    engine = _engine(model, call, other, max_running=3)
    engine.advance("1", _after(5))
    engine.abort(call)
    assert call.finished
    assert call.lengths.tolist() == [5, 5, 5, 0]
    assert call.finish_reason(0)["type"] == "abort"
    while engine.calls:
        engine.advance("1", _never)
    assert _ids(other) == _ids(_run(model, list(other.samples)))


def test_a_call_aborted_before_it_ran_has_no_version(model: CausalModel) -> None:
    call = Generation(model, _samples(_prompts(2, 0), 1))
    engine = _engine(model, call, max_running=3)
    engine.abort(call)
    assert call.finished
    assert call.version_spans(0) == []


def test_one_request_of_a_call_is_aborted(model: CausalModel) -> None:
    samples = _ragged(0)
    call = Generation(model, samples)
    engine = _engine(model, call, max_running=6)
    engine.abort(call, "2")
    engine.advance("1", _never)
    for row, sample in enumerate(samples):
        assert call.finish_reason(row)["type"] == ("abort" if sample.rid == "2" else "length")


def test_after_a_failure_it_goes_on_from_the_tokens_it_has(model: CausalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = _ragged(20)
    call = Generation(model, samples)
    engine = _engine(model, call, max_running=4)
    engine.advance("1", _after(7))
    with monkeypatch.context() as patch:
        patch.setattr("rloop_mcore.rollout.embedded.engine.draw", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.advance("1", _never)
    engine.advance("1", _never)
    assert _ids(call) == _ids(_run(model, samples))


def test_end_token_is_kept_and_named(model: CausalModel) -> None:
    call = _run(model, _samples(_prompts(8, 0), 4, max_new_tokens=200))
    stopped = [row for row in range(32) if call.finish_reason(row)["type"] == "stop"]
    assert stopped
    for row in stopped:
        assert call.finish_reason(row) == {"type": "stop", "matched": EOS}
        assert EOS not in _ids(call)[row][:-1]
        assert _ids(call)[row][-1] == EOS


def test_the_end_tokens_of_all_files_end_a_response(model_path: Path, tmp_path: Path) -> None:
    """As SGLang has them (`_get_hf_eos_token_id` and `_check_token_based_finish` of its 0.5.23)."""
    folder = shutil.copytree(model_path, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    AutoTokenizer.from_pretrained(folder, eos_token="<pad>").save_pretrained(folder)
    assert CausalModel(folder, torch.float32, "cpu").eos == (EOS, 5, 7, 0)


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


@pytest.mark.parametrize("before", [0, 3, 40])
@pytest.mark.parametrize("stop", ["\n\nQ:", "答案：答案", "🙂🙂🙂🙂🙂🙂", "</answer>", "<|im_end|>"])
def test_stop_strings_are_seen_in_tokens_of_a_byte(model: CausalModel, stop: str, before: int) -> None:
    """Byte-level BPE: a character may be four tokens, an added token is a whole word, a special one is no text."""
    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(bytes_of)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["</answer>"])
    tokenizer.add_special_tokens(["<|im_end|>"])
    bytewise = copy.copy(model)
    bytewise.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokens = tokenizer.encode("é" * before + stop + "and more").ids
    samples = _samples([(2,)], 1, max_new_tokens=len(tokens), ignore_eos=True, stop=("never", stop))
    call = Generation(bytewise, samples)
    for token in tokens:
        call.record(np.array([0]), np.array([token]), np.array([-1.0], dtype=np.float32))
    assert call.finish_reason(0) == {"type": "stop", "matched": stop}
    assert _ids(call)[0] == tokens[: len(tokens) - len("and more")]
    answer = describe(call, GenerateRequest(samples, True, True, -1, {""}), "1")[0]
    assert answer["text"] == "é" * before
