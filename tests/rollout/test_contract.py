"""SGLang's HTTP contract, asked over a socket. Takes an endpoint only: see conftest for how to point it elsewhere."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from served_model import EOS, VOCABULARY, Endpoint, token_logprobs
from transformers import PreTrainedModel

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


def test_one_seed_one_sample_whatever_else_is_asked(endpoint: Endpoint) -> None:
    def ask(prompts: list[list[int]], seeds: list[int]) -> list[list[int]]:
        settings = [{"max_new_tokens": 16, "sampling_seed": seed} for seed in seeds]
        return [
            a["output_ids"]
            for a in endpoint.request("/generate", {"input_ids": prompts, "sampling_params": settings})[1]
        ]

    prompts = [PROMPT, PROMPT, PROMPT[:4], [5, 6, 7]]
    together = ask(prompts, [1, 2, 3, 4])
    assert together[0] != together[1]
    assert ask(prompts[::-1], [4, 3, 2, 1]) == together[::-1]

    alone: dict[int, list[list[int]]] = {}
    threads = [
        threading.Thread(target=lambda i=i: alone.update({i: ask([prompts[i]], [i + 1])})) for i in range(len(prompts))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [alone[i][0] for i in range(len(prompts))] == together


def test_stop_reasons_and_text(endpoint: Endpoint) -> None:
    free = endpoint.generate(PROMPT, max_new_tokens=12, sampling_seed=5, ignore_eos=True)
    ids, text = free["output_ids"], free["text"]
    wanted = ids[4]
    by_id = endpoint.generate(PROMPT, max_new_tokens=12, sampling_seed=5, stop_token_ids=[wanted])
    if EOS not in ids[: ids.index(wanted)]:
        assert by_id["output_ids"] == ids[: ids.index(wanted) + 1]
        assert by_id["meta_info"]["finish_reason"] == {"type": "stop", "matched": wanted}
    stop = text[3:5]
    by_text = endpoint.generate(PROMPT, max_new_tokens=12, sampling_seed=5, ignore_eos=True, stop=[stop])
    assert by_text["text"] == text[: text.find(stop)]
    assert by_text["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[]]}, "empty"),
        ({"input_ids": [VOCABULARY]}, "vocabulary"),
        ({"input_ids": [-1]}, "vocabulary"),
        ({"input_ids": ["5"]}, "integers"),
        ({"text": "hello"}, "input_ids"),
        ({"input_ids": [5], "sampling_params": {"temprature": 1}}, "temprature"),
        ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "temperature"),
        ({"input_ids": [5], "sampling_params": {"top_p": 0}}, "top_p"),
        ({"input_ids": [5], "sampling_params": {"max_new_tokens": "many"}}, "max_new_tokens"),
        ({"input_ids": [5], "sampling_params": {"regex": "a+"}}, "regex"),
        ({"input_ids": [5], "sampling_params": {"stop_token_ids": 5}}, "stop_token_ids"),
        ({"input_ids": [[5], [6]], "sampling_params": [{}]}, "sampling_params"),
    ],
)
def test_bad_requests_are_answered_and_survived(endpoint: Endpoint, body: dict, words: str) -> None:
    status, answer = endpoint.request("/generate", body)
    assert status == 400, answer
    assert words in answer["error"]["message"]
    assert endpoint.generate([5], max_new_tokens=1)["output_ids"]


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


def test_weight_updates_need_a_session(endpoint: Endpoint) -> None:
    body = {"names": [], "dtypes": [], "shapes": [], "group_name": "none"}
    status, answer = endpoint.request("/update_weights_from_distributed", body)
    assert status == 400
    assert "begin_weight_update" in answer["error"]["message"]
    assert endpoint.request("/end_weight_update", {})[0] == 400
