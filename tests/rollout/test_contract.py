"""SGLang's HTTP contract, asked over a socket. Takes an endpoint only: see conftest for how to point it elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from served_model import EOS, VOCABULARY, Channel, Endpoint, token_logprobs
from transformers import PreTrainedModel

from rloop_mcore.rollout.handles import handles_of

PROMPT = [12, 13, 2, 5, 6, 7, 20]


def _scored(answer: dict) -> tuple[list[int], list[float]]:
    entries = answer["meta_info"]["output_token_logprobs"]
    assert [i for _, i, _ in entries] == answer["output_ids"]
    return answer["output_ids"], [lp for lp, _, _ in entries]


def test_what_the_server_is(endpoint: Endpoint) -> None:
    assert endpoint.request("/health")[0] == 200
    assert endpoint.request("/health_generate")[0] == 200
    status, info = endpoint.request("/server_info")
    assert status == 200
    assert info["version"].startswith("0.5.")
    status, info = endpoint.request("/model_info")
    assert status == 200
    assert "weight_version" in info


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_models(endpoint: Endpoint, reference: PreTrainedModel, temperature: float) -> None:
    answer = endpoint.generate(PROMPT, max_new_tokens=20, temperature=temperature, sampling_seed=3, ignore_eos=True)
    ids, logprobs = _scored(answer)
    expected = token_logprobs(reference, PROMPT + ids, temperature)[len(PROMPT) - 1 :]
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
    meta = answer["meta_info"]
    assert meta["prompt_tokens"] == len(PROMPT)
    assert meta["completion_tokens"] == 20
    assert meta["finish_reason"] == {"type": "length", "length": 20}


@pytest.mark.parametrize("start", [0, 3])
def test_prompt_logprobs(endpoint: Endpoint, reference: PreTrainedModel, start: int) -> None:
    body = {"input_ids": PROMPT, "return_logprob": True, "logprob_start_len": start}
    _, answer = endpoint.request("/generate", {**body, "sampling_params": {"max_new_tokens": 1}})
    entries = answer["meta_info"]["input_token_logprobs"]
    assert entries[0] == [None, PROMPT[start], None]
    assert [i for _, i, _ in entries] == PROMPT[start:]
    np.testing.assert_allclose([lp for lp, _, _ in entries[1:]], token_logprobs(reference, PROMPT)[start:], atol=1e-4)


def test_greedy_is_transformers_greedy(endpoint: Endpoint, reference: PreTrainedModel) -> None:
    ids = endpoint.generate(PROMPT, max_new_tokens=30, temperature=0)["output_ids"]
    expected = reference.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False)[0, len(PROMPT) :]
    assert ids == expected.tolist()


def test_sampled_frequencies_match_the_softmax(endpoint: Endpoint, reference: PreTrainedModel) -> None:
    count = 4000
    answers = endpoint.generate(PROMPT, max_new_tokens=1, temperature=1.0, sampling_seed=11, n=count)
    assert len(answers) == count
    observed = np.bincount([a["output_ids"][0] for a in answers], minlength=VOCABULARY)
    with torch.inference_mode():
        expected = reference(input_ids=torch.tensor([PROMPT])).logits[0, -1].softmax(-1).numpy() * count
    # Each count is binomial with variance below its mean; 5 deviations plus 1 for the rare ones: a 1e-6 event a token.
    assert (np.abs(observed - expected) < 5 * np.sqrt(expected) + 1).all()


def test_batches_lists_and_single_answers(endpoint: Endpoint) -> None:
    single = endpoint.generate(PROMPT, max_new_tokens=4, sampling_seed=1)
    assert isinstance(single, dict)
    batch = endpoint.generate([PROMPT, PROMPT[:3]], max_new_tokens=4, sampling_seed=1)
    assert [a["meta_info"]["prompt_tokens"] for a in batch] == [7, 3]
    assert len(endpoint.generate(PROMPT, max_new_tokens=4, n=3)) == 3
    own = [{"max_new_tokens": 2, "ignore_eos": True}, {"max_new_tokens": 5, "ignore_eos": True}]
    status, answers = endpoint.request("/generate", {"input_ids": [PROMPT, PROMPT], "sampling_params": own})
    assert status == 200
    assert [len(a["output_ids"]) for a in answers] == [2, 5]
    assert "output_token_logprobs" not in answers[0]["meta_info"]  # not asked for


def test_a_body_that_is_not_json_is_a_bad_request(endpoint: Endpoint) -> None:
    assert endpoint.request("/generate", raw=b"{not json")[0] == 400


def test_unknown_top_level_fields_are_ignored(endpoint: Endpoint) -> None:
    assert endpoint.request("/generate", {"input_ids": [5], "no_such_field": 1})[0] == 200


def test_a_wrong_key_is_refused(endpoint: Endpoint) -> None:
    if endpoint.key is None:
        pytest.skip("this endpoint takes no key")
    assert endpoint.request("/generate", {"input_ids": [5]}, key="wrong")[0] == 401
    assert endpoint.request("/model_info", key="wrong")[0] == 401


def test_paused_requests_wait_until_continued(endpoint: Endpoint) -> None:
    assert endpoint.request("/pause_generation", {"mode": "retract"})[0] == 200
    answers: list[dict] = []
    waiting = threading.Thread(target=lambda: answers.append(endpoint.generate(PROMPT, max_new_tokens=2)))
    waiting.start()
    assert endpoint.request("/flush_cache", {})[0] == 200  # served while the call is held
    assert not answers
    assert endpoint.request("/continue_generation", {})[0] == 200
    waiting.join(30)
    assert len(answers) == 1


def test_pausing_with_abort_returns_what_there_is(endpoint: Endpoint) -> None:
    answers: list[list[dict]] = []
    long = {"max_new_tokens": 200, "ignore_eos": True, "n": 64}
    running = threading.Thread(target=lambda: answers.append(endpoint.generate(PROMPT, **long)))
    running.start()
    while running.is_alive():  # until a pause falls into the call
        endpoint.request("/pause_generation", {"mode": "abort"})
        endpoint.request("/continue_generation", {})
    reasons = {a["meta_info"]["finish_reason"]["type"] for a in answers[0]}
    assert reasons <= {"abort", "length"}
    for answer in answers[0]:
        assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] <= 200
    assert "abort" in reasons


@pytest.mark.parametrize("how", ["stop_token_ids", "stop"])
def test_a_stop_ends_a_response_and_is_named(endpoint: Endpoint, how: str) -> None:
    free = endpoint.generate(PROMPT, max_new_tokens=12, temperature=0, ignore_eos=True)
    assert free["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    ids, text = free["output_ids"], free["text"]
    assert EOS not in ids
    assert len(text) == 12
    if how == "stop_token_ids":
        stopped = endpoint.generate(PROMPT, max_new_tokens=12, temperature=0, stop_token_ids=[ids[4]])
        assert stopped["output_ids"] == ids[: ids.index(ids[4]) + 1]
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[4]}
    else:
        stop = text[3:5]
        stopped = endpoint.generate(PROMPT, max_new_tokens=12, temperature=0, ignore_eos=True, stop=[stop])
        assert stopped["output_ids"] == ids[: text.find(stop) + 2]
        assert stopped["text"] == text[: text.find(stop)]
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_the_end_token_stops_and_is_kept(endpoint: Endpoint) -> None:
    answers = endpoint.generate(PROMPT, max_new_tokens=200, temperature=1.0, n=16)
    stopped = [a for a in answers if a["meta_info"]["finish_reason"]["type"] == "stop"]
    assert stopped
    for answer in stopped:
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": EOS}
        assert answer["output_ids"].index(EOS) == len(answer["output_ids"]) - 1


def test_top_p_leaves_the_rest_out(endpoint: Endpoint, reference: PreTrainedModel) -> None:
    with torch.inference_mode():
        chances = reference(input_ids=torch.tensor([PROMPT])).logits[0, -1].softmax(-1).sort(descending=True)
    kept = int((chances.values.cumsum(0) - chances.values < 0.5).sum())
    answers = endpoint.generate(PROMPT, max_new_tokens=1, top_p=0.5, n=100)
    assert {a["output_ids"][0] for a in answers} <= set(chances.indices[:kept].tolist())


def test_a_temperature_next_to_0_is_0_and_null_leaves_off(endpoint: Endpoint) -> None:
    settings = ("top_k", "min_p", "repetition_penalty", "frequency_penalty", "stop", "sampling_seed", "regex")
    greedy = endpoint.generate(PROMPT, max_new_tokens=4, temperature=0)
    cold = endpoint.generate(PROMPT, max_new_tokens=4, temperature=1e-7, **dict.fromkeys(settings))
    assert cold["output_ids"] == greedy["output_ids"]
    scored, expected = ([t[0] for t in a["meta_info"]["output_token_logprobs"]] for a in (cold, greedy))
    assert scored == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [5], "sampling_params": {"temprature": 1}}, "temprature"),
        ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [5], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [5], "sampling_params": {"sampling_seed": 2**63}}, "sampling_seed"),
    ],
)
def test_bad_requests_are_answered_and_survived(endpoint: Endpoint, body: dict, word: str) -> None:
    status, answer = endpoint.request("/generate", body)
    assert status == 400, answer
    assert word in str(answer)
    assert endpoint.generate([5], max_new_tokens=1)["output_ids"]


# -- while something runs ---------------------------------------------------------------------------------------------


def _in_background(
    endpoint: Endpoint,
    body: dict,
    act: Callable[[], None],
    fell_in: Callable[[list[dict]], bool],
    before: Callable[[], None] = lambda: None,
) -> list[dict]:
    """The answers to a long /generate call, during which `act` was called.

    Nothing tells from outside when a call runs, and it takes a fraction of a second or many: so it is tried with longer
    and longer waits, `before` first, until `fell_in` finds in the answers that `act` came neither early nor late.
    """
    for wait_s in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        before()
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(endpoint.request, "/generate", {"return_logprob": True, **body})
            time.sleep(wait_s)
            act()
            status, answers = pending.result(60)
        assert status == 200, answers
        if fell_in(answers):
            return answers
    raise AssertionError(f"it never fell into the call; the last answers: {answers}")


LONG = {"max_new_tokens": 240, "ignore_eos": True}


def _is_aborted(answer: dict) -> bool:
    return answer["meta_info"]["finish_reason"]["type"] == "abort" and answer["meta_info"]["completion_tokens"] > 0


def test_one_of_a_call_is_aborted_by_its_id(endpoint: Endpoint) -> None:
    def abort() -> None:
        assert endpoint.request("/abort_request", {"rid": "first"})[0] == 200

    body = {"input_ids": [PROMPT, PROMPT], "rid": ["first", "second"], "sampling_params": LONG}
    first, second = _in_background(endpoint, body, abort, lambda answers: _is_aborted(answers[0]))
    assert [first["meta_info"]["id"], second["meta_info"]["id"]] == ["first", "second"]
    ids, _ = _scored(first)
    assert len(ids) == first["meta_info"]["completion_tokens"] < 240
    assert len(second["output_ids"]) == 240


def test_everything_is_aborted(endpoint: Endpoint) -> None:
    def abort() -> None:
        assert endpoint.request("/abort_request", {"abort_all": True})[0] == 200

    body = {"input_ids": [PROMPT, PROMPT[:3]], "sampling_params": LONG}
    _in_background(endpoint, body, abort, lambda answers: all(map(_is_aborted, answers)))
    assert endpoint.generate(PROMPT, max_new_tokens=2, ignore_eos=True)["output_ids"]


def test_aborting_what_is_not_there_is_no_error(endpoint: Endpoint) -> None:
    assert endpoint.request("/abort_request", {"rid": "nobody"})[0] == 200


def test_the_cache_of_requests_paused_in_place_cannot_be_flushed(endpoint: Endpoint) -> None:
    flushes = []

    def pause() -> None:
        assert endpoint.request("/pause_generation", {"mode": "in_place"})[0] == 200
        flushes.append(endpoint.request("/flush_cache", {})[0])
        assert endpoint.request("/continue_generation", {})[0] == 200

    body = {"input_ids": [PROMPT], "sampling_params": LONG}
    (answer,) = _in_background(endpoint, body, pause, lambda _: flushes[-1] == 400)
    assert len(answer["output_ids"]) == 240


def test_an_unknown_pause_mode_is_refused(endpoint: Endpoint) -> None:
    assert endpoint.request("/pause_generation", {"mode": "later"})[0] in (400, 422)
    assert endpoint.generate(PROMPT, max_new_tokens=1)["output_ids"]


# -- weights ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def changing(endpoint: Endpoint, model_path: Path) -> Iterator[Endpoint]:
    """The endpoint, given its weights back afterwards."""
    yield endpoint
    endpoint.request("/end_weight_update", {})  # where the test failed before it could
    _load(endpoint, model_path, "default")


def _load(endpoint: Endpoint, path: Path, version: str) -> None:
    status, answer = endpoint.request("/update_weights_from_disk", {"model_path": str(path), "weight_version": version})
    assert status == 200, answer
    assert answer["success"] is True


def _assert_by(model: PreTrainedModel, endpoint: Endpoint, version: str) -> None:
    answer = endpoint.generate(PROMPT, max_new_tokens=12, temperature=1.0, ignore_eos=True)
    ids, logprobs = _scored(answer)
    np.testing.assert_allclose(logprobs, token_logprobs(model, PROMPT + ids)[len(PROMPT) - 1 :], atol=1e-4)
    assert answer["meta_info"]["weight_version"] == version
    assert answer["meta_info"]["weight_versions"] == [{"version": version, "start": 0, "end": 12}]
    assert endpoint.request("/model_info")[1]["weight_version"] == version


def test_weights_from_disk(changing: Endpoint, other_path: Path, other_model: PreTrainedModel) -> None:
    _load(changing, other_path, "7")
    _assert_by(other_model, changing, "7")


def test_the_weight_version_can_be_set(changing: Endpoint, reference: PreTrainedModel) -> None:
    body = {"new_version": "12", "abort_all_requests": False}
    status, answer = changing.request("/update_weight_version", body)
    assert (status, answer["success"]) == (200, True)
    _assert_by(reference, changing, "12")


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_weights_by_broadcast(changing: Endpoint, other_model: PreTrainedModel, load_format: str | None) -> None:
    tensors = [(name, p.detach()) for name, p in other_model.named_parameters()]
    with _group(changing) as channel, ThreadPoolExecutor(1) as pool:
        assert changing.request("/begin_weight_update", {"selector": "all"})[0] == 200
        body = {
            "names": [name for name, _ in tensors],
            "dtypes": ["float32" for _ in tensors],
            "shapes": [list(t.shape) for _, t in tensors],
            "group_name": channel.group_name,
            "load_format": load_format,
            "flush_cache": False,
            "weight_version": "8",
        }
        pending = pool.submit(changing.request, "/update_weights_from_distributed", body)
        sent = [torch.cat([t.contiguous().view(-1).view(torch.uint8) for _, t in tensors])]
        channel.send(sent if load_format else [t for _, t in tensors])
        status, answer = pending.result(60)
        assert (status, answer["success"]) == (200, True), answer
        status, answer = changing.request("/end_weight_update", {})
        assert (status, answer["success"]) == (200, True), answer
    assert changing.request("/flush_cache", {})[0] == 200
    _assert_by(other_model, changing, "8")


@contextmanager
def _group(endpoint: Endpoint) -> Iterator[Channel]:
    """A weight update group of this process and the server."""
    channel = Channel()
    address, port = channel.open(2)
    body = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": 2, "backend": "gloo"}
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(endpoint.request, "/init_weights_update_group", body | {"group_name": channel.group_name})
        channel.join()
        status, answer = pending.result(60)
        assert (status, answer["success"]) == (200, True), answer
    try:
        yield channel
    finally:
        status, answer = endpoint.request("/destroy_weights_update_group", {"group_name": channel.group_name})
        channel.close()
    assert (status, answer["success"]) == (200, True), answer


def test_tokens_after_an_update_are_the_new_weights(
    changing: Endpoint, model_path: Path, reference: PreTrainedModel, other_path: Path, other_model: PreTrainedModel
) -> None:
    def versions(answer: dict) -> list[str]:
        return [span["version"] for span in answer["meta_info"]["weight_versions"]]

    def update() -> None:
        assert changing.request("/pause_generation", {"mode": "retract"})[0] == 200
        assert changing.request("/flush_cache", {})[0] == 200
        _load(changing, other_path, "9")
        assert changing.request("/continue_generation", {})[0] == 200

    answers = _in_background(
        changing,
        {"input_ids": [PROMPT, PROMPT[:4]], "sampling_params": LONG},
        update,
        fell_in=lambda answers: all(len(versions(answer)) > 1 for answer in answers),
        before=lambda: _load(changing, model_path, "default"),
    )
    for prompt, answer in zip([PROMPT, PROMPT[:4]], answers, strict=True):
        ids, logprobs = _scored(answer)
        spans = answer["meta_info"]["weight_versions"]
        assert versions(answer) == ["default", "9"]
        assert (spans[0]["start"], spans[0]["end"], spans[1]["end"]) == (0, spans[1]["start"], 240)
        assert answer["meta_info"]["weight_version"] == "9"
        for span, model in zip(spans, (reference, other_model), strict=True):
            expected = token_logprobs(model, prompt + ids)[len(prompt) - 1 :][span["start"] : span["end"]]
            np.testing.assert_allclose(logprobs[span["start"] : span["end"]], expected, atol=1e-4)


def test_weights_by_handles_of_shared_memory(changing: Endpoint, other_model: PreTrainedModel) -> None:
    tensors = [(name, p.detach().clone()) for name, p in other_model.named_parameters()]
    body = {"serialized_named_tensors": [handles_of(tensors)]}
    assert changing.request("/update_weights_from_tensor", body)[0] == 400  # no session is open
    assert changing.request("/begin_weight_update", {})[0] == 200
    half = len(tensors) // 2
    for part in (tensors[:half], tensors[half:]):
        status, answer = changing.request(
            "/update_weights_from_tensor", {"serialized_named_tensors": [handles_of(part)]}
        )
        assert (status, answer["success"]) == (200, True), answer
    assert changing.request("/end_weight_update", {})[0] == 200
    changing.request("/update_weight_version", {"new_version": "8", "abort_all_requests": False})
    _assert_by(other_model, changing, "8")


def test_weight_updates_need_a_session(endpoint: Endpoint) -> None:
    body = {"names": [], "dtypes": [], "shapes": [], "group_name": "none"}
    status, answer = endpoint.request("/update_weights_from_distributed", body)
    assert status == 400
    assert "begin_weight_update" in str(answer)
    assert endpoint.request("/end_weight_update", {})[0] == 400
    assert endpoint.request("/begin_weight_update", {"selector": "all"})[0] == 200
    assert endpoint.request("/begin_weight_update", {"selector": "all"})[0] == 400
    assert endpoint.request("/end_weight_update", {})[0] == 200


def test_a_group_that_is_not_there_cannot_be_left(endpoint: Endpoint) -> None:
    status, answer = endpoint.request("/destroy_weights_update_group", {"group_name": "nobody"})
    assert status == 400
    assert answer["success"] is False


def test_checksums_name_what_the_weights_are(changing: Endpoint, model_path: Path, other_path: Path) -> None:
    def checksums() -> dict[str, str]:
        status, answer = changing.request("/weights_checker", {"action": "checksum"})
        assert status == 200, answer
        assert answer["success"] is True
        (rank,) = answer["ranks"]
        assert rank["parallelism_info"][0]["tp_rank"] == 0
        return rank["checksums"]

    before = checksums()
    assert all(len(checksum) == 16 and int(checksum, 16) >= 0 for checksum in before.values())
    _load(changing, other_path, "1")
    assert all(value != before[name] for name, value in checksums().items() if name.endswith("_proj.weight"))
    _load(changing, model_path, "2")
    assert checksums() == before
