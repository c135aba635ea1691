"""Several calls in flight at one embedded server: they share its batch, and each ends, waits or goes on its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from served_model import Endpoint, endpoint_of, make_model, start_server, token_logprobs
from transformers import AutoModelForCausalLM, PreTrainedModel

from rloop_mcore.rollout.launch import EmbeddedServer

PROMPTS = [[12, 13, 2, 5, 6, 7, 20], [9, 9, 4], [30, 31, 32, 33]]
LONG_TOKENS = 500


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[EmbeddedServer]:
    server = start_server(model_path, tmp_path_factory.mktemp("in_flight"), "engine", max_running=8)
    yield server
    server.stop()


@pytest.fixture
def endpoint(server: EmbeddedServer) -> Endpoint:
    return endpoint_of(server)


class Call(threading.Thread):
    """A /generate call on a thread of its own; `answers` once joined."""

    def __init__(self, endpoint: Endpoint, number: int, tokens: int, rid: str | None = None) -> None:
        super().__init__()
        self.endpoint, self.prompt = endpoint, PROMPTS[number % len(PROMPTS)]
        self.sampling = {"max_new_tokens": tokens, "sampling_seed": 50 * number, "ignore_eos": True, "n": 4}
        self.rid = rid
        self.answers: list[dict] = []
        self.start()

    def run(self) -> None:
        body = {"input_ids": self.prompt, "sampling_params": self.sampling, "return_logprob": True, "rid": self.rid}
        self.answers = self.endpoint.request("/generate", body)[1]

    def result(self) -> list[dict]:
        self.join(60)
        assert not self.is_alive()
        return self.answers


def _ids(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def _reasons(answers: list[dict]) -> set[str]:
    return {answer["meta_info"]["finish_reason"]["type"] for answer in answers}


def _wait_until_running(endpoint: Endpoint) -> None:
    """A call that holds keys and values forbids a flush."""
    for _ in range(1000):
        if endpoint.request("/flush_cache", {})[0] == 400:
            return
    raise AssertionError("no call is running")


def test_calls_at_once_get_what_each_gets_alone(endpoint: Endpoint, reference: PreTrainedModel) -> None:
    calls = [Call(endpoint, number, 30 + 10 * number) for number in range(6)]
    together = [call.result() for call in calls]
    for number, answers in enumerate(together):
        assert _ids(answers) == _ids(Call(endpoint, number, 30 + 10 * number).result())
        for answer in answers:
            logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            prompt = PROMPTS[number % len(PROMPTS)]
            expected = token_logprobs(reference, prompt + answer["output_ids"])[len(prompt) - 1 :]
            np.testing.assert_allclose(logprobs, expected, atol=1e-4)


def test_a_short_call_does_not_wait_for_a_long_one(endpoint: Endpoint) -> None:
    long = Call(endpoint, 0, LONG_TOKENS)
    _wait_until_running(endpoint)
    for number in range(3):
        assert len(Call(endpoint, number, 1).result()) == 4
    assert long.is_alive()
    assert _reasons(long.result()) == {"length"}


def test_one_call_of_several_is_aborted_by_its_id(endpoint: Endpoint) -> None:
    calls = [Call(endpoint, number, LONG_TOKENS, rid=f"call {number}") for number in range(3)]
    _wait_until_running(endpoint)
    while calls[1].is_alive():  # until it has arrived and an abort finds it
        endpoint.request("/abort_request", {"rid": "call 1"})
    assert [_reasons(call.result()) for call in calls] == [{"length"}, {"abort"}, {"length"}]


def test_a_call_aborted_while_paused_is_answered_at_once(endpoint: Endpoint) -> None:
    calls = [Call(endpoint, number, LONG_TOKENS, rid=f"call {number}") for number in range(2)]
    _wait_until_running(endpoint)
    endpoint.request("/pause_generation", {"mode": "in_place"})
    assert endpoint.request("/flush_cache", {})[0] == 400
    while calls[1].is_alive():
        endpoint.request("/abort_request", {"rid": "call 1"})
    assert calls[0].is_alive()
    endpoint.request("/continue_generation", {})
    assert _reasons(calls[0].result()) == {"length"}


def test_pausing_with_abort_ends_all_calls(endpoint: Endpoint) -> None:
    calls = [Call(endpoint, number, LONG_TOKENS) for number in range(3)]
    while any(call.is_alive() for call in calls):
        endpoint.request("/pause_generation", {"mode": "abort"})
        endpoint.request("/continue_generation", {})
    for call in calls:
        assert _reasons(call.answers) <= {"abort", "length"}


def test_a_client_that_has_gone_is_not_worked_for(endpoint: Endpoint) -> None:
    address = urlsplit(endpoint.url)
    body = b'{"input_ids": [[5, 6, 7]], "sampling_params": {"max_new_tokens": 1000000, "ignore_eos": true, "n": 1}}'
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {endpoint.key}\r\nContent-Length: {len(body)}"
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        _wait_until_running(endpoint)
    deadline = time.monotonic() + 10
    while endpoint.request("/flush_cache", {})[0] == 400:
        assert time.monotonic() < deadline, "the engine still generates for nobody"


def test_weights_change_under_several_calls(
    endpoint: Endpoint, model_path: Path, reference: PreTrainedModel, tmp_path: Path
) -> None:
    """Retracted, all go on under the new weights; what was drawn before keeps its version and its logprobs."""
    other = make_model(tmp_path / "other", seed=1)
    models = {"1": reference, "2": AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).eval()}
    endpoint.request("/update_weight_version", {"new_version": "1"})
    calls = [Call(endpoint, number, LONG_TOKENS) for number in range(3)]
    _wait_until_running(endpoint)
    time.sleep(0.1)
    endpoint.request("/pause_generation", {"mode": "retract"})
    assert endpoint.request("/flush_cache", {})[0] == 200
    assert endpoint.request("/update_weights_from_disk", {"model_path": str(other), "weight_version": "2"})[0] == 200
    endpoint.request("/continue_generation", {})
    mixed = 0
    for call in calls:
        for answer in call.result():
            ids, spans = answer["output_ids"], answer["meta_info"]["weight_versions"]
            logprobs = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
            assert (spans[0]["start"], spans[-1]["end"]) == (0, LONG_TOKENS)
            mixed += len(spans) == 2
            for span in spans:
                where = slice(span["start"], span["end"])
                expected = token_logprobs(models[span["version"]], call.prompt + ids)[len(call.prompt) - 1 :]
                np.testing.assert_allclose(logprobs[where], expected[where], atol=1e-4)
    assert mixed
    endpoint.request("/update_weights_from_disk", {"model_path": str(model_path), "weight_version": "3"})


def test_an_update_waits_for_the_calls_under_way(endpoint: Endpoint, model_path: Path) -> None:
    """Without a pause no call sees two versions."""
    calls = [Call(endpoint, number, LONG_TOKENS) for number in range(3)]
    _wait_until_running(endpoint)
    assert (
        endpoint.request("/update_weights_from_disk", {"model_path": str(model_path), "weight_version": "4"})[0] == 200
    )
    for call in calls:
        assert all(len(answer["meta_info"]["weight_versions"]) == 1 for answer in call.result())
