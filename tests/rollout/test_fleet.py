"""Two real servers, a real gloo group: syncing, generating, and what happens when a part of it fails."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served_model import (
    TEMPERATURE,
    VOCABULARY,
    Borrowed,
    assert_by,
    endpoint_of,
    make_fleet,
    start_server,
    token_logprobs,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from rloop_mcore.errors import UserError
from rloop_mcore.rollout.buckets import Buffers
from rloop_mcore.rollout.client import EngineClient, EngineError
from rloop_mcore.rollout.controller import Probe
from rloop_mcore.rollout.fleet import Fleet
from rloop_mcore.rollout.launch import EmbeddedServer, RunningServer
from rloop_mcore.types import SampleRequest, Sampling

SAMPLING = Sampling(max_tokens=12, temperature=TEMPERATURE)


@pytest.fixture(scope="module")
def servers(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EmbeddedServer]]:
    run_dir = tmp_path_factory.mktemp("fleet")
    started = [start_server(model_path, run_dir, f"engine-{i}", max_running=16) for i in range(2)]
    yield started
    for server in started:
        server.stop()


@pytest.fixture(params=["broadcast", "handles"])
def fleet(servers: list[EmbeddedServer], request: pytest.FixtureRequest) -> Iterator[Fleet]:
    channel = {"broadcast": "broadcast", "handles": None}[request.param]
    with make_fleet([Borrowed(s) for s in servers], channel) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def _mortal(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    run_dir = tmp_path_factory.mktemp("mortal")
    started = [start_server(model_path, run_dir, f"engine-{i}", max_running=16) for i in range(2)]
    with make_fleet(started, None, probe=Probe(every_s=1.0, deadline_s=4.0)) as fleet:
        fleet.wait_ready()
        yield fleet


@pytest.fixture
def mortal(_mortal: Fleet) -> Fleet:
    """Two engines of its own, which its tests kill and stop; both are there again, and none is counted as lost."""
    wait_for_both(_mortal)
    _mortal._controller.counters.lost = 0
    return _mortal


def wait_for_both(fleet: Fleet) -> None:
    while len(fleet._controller.in_state("waiting", "serving")) < 2:
        time.sleep(0.1)


def process_of(fleet: Fleet, number: int) -> subprocess.Popen[bytes]:
    return fleet.servers[number].process  # type: ignore[attr-defined,no-any-return]


def _weights(model: PreTrainedModel) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
    return lambda: iter(model.named_parameters())


def _requests() -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(2, VOCABULARY, 4 + i).tolist()) for i in range(5)]
    return [SampleRequest(p, seed=100 * i + j) for i, p in enumerate(prompts) for j in range(3)]


def _assert_by(model: PreTrainedModel, fleet: Fleet, version: int) -> None:
    requests = _requests()
    assert_by(model, requests, fleet.generate(requests, SAMPLING), version)


def test_a_sync_changes_the_policy_and_stamps_it(
    fleet: Fleet, reference: PreTrainedModel, other_model: PreTrainedModel
) -> None:
    with pytest.raises(EngineError, match="sync before generating"):
        fleet.generate(_requests(), SAMPLING)
    metrics = fleet.sync(_weights(other_model), 7)
    assert metrics["sync_bytes"] == sum(p.nbytes for p in other_model.parameters())
    _assert_by(other_model, fleet, 7)
    fleet.sync(_weights(reference), 8)  # the group is kept
    _assert_by(reference, fleet, 8)


def test_what_is_submitted_during_a_sync_is_generated_by_its_weights(
    fleet: Fleet, reference: PreTrainedModel, other_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `rollout.partial`: one batch may end, and the next begin, at any moment. Its answers may come before the
    sync has returned."""
    fleet.sync(_weights(reference), 1)
    submitted, promote = [], fleet._promote

    async def late(*arguments: Any) -> None:
        await asyncio.sleep(3)
        await promote(*arguments)

    monkeypatch.setattr(fleet, "_promote", late)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for number, tensor in enumerate(other_model.named_parameters()):
            if number == 1:
                submitted.append(fleet.submit(_requests(), SAMPLING))
            yield tensor

    fleet.sync(weights, 2)
    assert_by(other_model, _requests(), fleet.wait(submitted[0]), 2)
    assert fleet._controller.counters.lost == 0


def test_engines_sleep_until_the_next_sync(
    fleet: Fleet, servers: list[EmbeddedServer], other_model: PreTrainedModel
) -> None:
    fleet.sync(_weights(other_model), 1)
    for version in (2, 3):
        fleet.sleep()
        fleet.sleep()
        with pytest.raises(EngineError, match="sync before generating"):
            fleet.generate(_requests(), SAMPLING)
        status, answer = endpoint_of(servers[0]).request("/health_generate")
        assert (status, "released" in str(answer)) == (503, True)
        fleet.sync(_weights(other_model), version)
        _assert_by(other_model, fleet, version)
    assert fleet._controller.counters.lost == 0


def test_an_engine_that_cannot_sleep_is_lost_and_the_sync_waits_for_it(
    mortal: Fleet, other_model: PreTrainedModel
) -> None:
    mortal.sync(_weights(other_model), 1)
    process_of(mortal, 1).kill()
    mortal.sleep()
    wait_for_both(mortal)
    status, answer = endpoint_of(mortal.servers[1]).request("/health_generate")
    assert (status, "released" in str(answer)) == (503, True)  # once it is back it leaves the trainer the memory
    assert mortal.sync(_weights(other_model), 2)["engines_serving"] == 2
    _assert_by(other_model, mortal, 2)
    assert mortal._controller.counters.lost == 1


def test_many_small_buckets_equal_one(
    fleet: Fleet, servers: list[EmbeddedServer], other_model: PreTrainedModel
) -> None:
    fleet._sync.buffers.bucket_bytes = 3000  # smaller than some tensors
    assert fleet.sync(_weights(other_model), 3)["sync_buckets"] > 5
    _assert_by(other_model, fleet, 3)
    for server in servers:  # none keeps the trainer's memory
        assert "/dev/shm/torch_" not in Path(f"/proc/{server.process.pid}/maps").read_text()


def test_dtypes_are_converted_and_aligned(fleet: Fleet, other_model: PreTrainedModel) -> None:
    """bf16 beside fp32 and an odd byte count in front of it: offsets must follow the item size."""
    mixed = [(name, p.bfloat16() if i % 2 else p) for i, (name, p) in enumerate(other_model.named_parameters())]
    fleet.sync(lambda: iter(mixed), 4)
    rounded = AutoModelForCausalLM.from_config(other_model.config, attn_implementation="eager").eval()
    rounded.load_state_dict({name: t.float() for name, t in mixed}, strict=False)
    _assert_by(rounded, fleet, 4)


def test_results_do_not_depend_on_the_number_of_engines(
    servers: list[EmbeddedServer], reference: PreTrainedModel
) -> None:
    with make_fleet([Borrowed(s) for s in servers]) as two:
        two.sync(_weights(reference), 1)
        both = two.generate(_requests(), SAMPLING)
        assert two.generate(_requests(), SAMPLING) == both  # bit-identical
    with make_fleet([Borrowed(servers[1])]) as one:
        one.sync(_weights(reference), 1)
        alone = one.generate(_requests(), SAMPLING)
    assert [c.response_ids for c in alone] == [c.response_ids for c in both]


def test_running_servers_are_adopted(servers: list[EmbeddedServer], reference: PreTrainedModel) -> None:
    endpoint = endpoint_of(servers[0])
    with make_fleet([RunningServer(endpoint.url, endpoint.key)]) as fleet:
        fleet.sync(_weights(reference), 1)
        assert len(fleet.generate(_requests(), SAMPLING)) == 15
    assert endpoint.request("/health")[0] == 200  # not ours to stop
    words = r"/server_info: status 401: .* \(the key of running servers is RLOOP_ENGINE_KEY\)$"
    with make_fleet([RunningServer(endpoint.url, "wrong")]) as fleet, pytest.raises(EngineError, match=words):
        fleet.wait_ready()


def _unknown_tensor(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(model.named_parameters())[:5]
    yield "model.no_such.weight", torch.zeros(3)


def _wrong_shape(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    name, tensor = next(iter(model.named_parameters()))
    yield name, tensor[:-1]


def _half(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    yield from list(model.named_parameters())[:5]
    raise RuntimeError("the export broke")


@pytest.mark.parametrize(
    ("weights", "words"),
    [(_unknown_tensor, "no parameter 'model.no_such.weight'"), (_wrong_shape, "got shape"), (_half, "export broke")],
)
def test_a_failed_sync_serves_nothing_until_a_whole_one(
    fleet: Fleet, servers: list[EmbeddedServer], other_model: PreTrainedModel, weights: object, words: str
) -> None:
    fleet._sync.buffers.bucket_bytes = 3000
    with pytest.raises((EngineError, RuntimeError), match=words):
        fleet.sync(lambda: weights(other_model), 5)  # type: ignore[operator]
    with pytest.raises(EngineError, match="sync before generating"):
        fleet.generate(_requests(), SAMPLING)
    # Even somebody who lets a broken engine go on gets no sample from it.
    endpoint = endpoint_of(servers[0])
    endpoint.request("/continue_generation", {})
    status, answer = endpoint.request("/generate", {"input_ids": [5]})
    assert status == 503
    assert "incomplete" in answer["message"]
    fleet.sync(_weights(other_model), 6)
    _assert_by(other_model, fleet, 6)


def test_an_update_from_disk_repairs_a_broken_engine(
    fleet: Fleet, servers: list[EmbeddedServer], model_path: Path, reference: PreTrainedModel
) -> None:
    with pytest.raises(EngineError):
        fleet.sync(lambda: _wrong_shape(reference), 5)
    endpoint = endpoint_of(servers[0])
    endpoint.request("/end_weight_update", {})  # the failed sync left it open
    body = {"model_path": str(model_path), "weight_version": "9"}
    assert endpoint.request("/update_weights_from_disk", body)[0] == 200
    endpoint.request("/continue_generation", {})
    answer = endpoint.generate([5, 6], max_new_tokens=4)
    expected = token_logprobs(reference, [5, 6, *answer["output_ids"]])[1:]
    np.testing.assert_allclose([e[0] for e in answer["meta_info"]["output_token_logprobs"]], expected, atol=1e-4)
    assert answer["meta_info"]["weight_version"] == "9"


def test_a_channel_that_fails_to_close_leaves_no_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, closed = make_fleet([], None), []

    async def fail() -> None:
        raise RuntimeError("the group is broken")

    async def close() -> None:
        closed.append("connections")

    monkeypatch.setattr(fleet._sync, "close", fail)
    monkeypatch.setattr(fleet._controller, "close", close)
    with pytest.raises(RuntimeError, match="the group is broken"):
        fleet.close()
    assert closed == ["connections"]


def test_checksums_tell_policies_apart(
    fleet: Fleet, servers: list[EmbeddedServer], reference: PreTrainedModel, other_model: PreTrainedModel
) -> None:
    def checksums(server: EmbeddedServer) -> object:
        status, answer = endpoint_of(server).request("/weights_checker", {"action": "checksum"})
        assert status == 200
        return answer["ranks"]

    fleet.sync(_weights(reference), 1)
    first = [checksums(server) for server in servers]
    assert first[0] == first[1]
    fleet.sync(_weights(other_model), 2)
    assert checksums(servers[0]) != first[0]


def test_buckets_keep_order_and_size() -> None:
    tensors = [(str(i), torch.arange(n, dtype=torch.float32)) for i, n in enumerate([3, 5, 100, 2, 2])]
    buffers = Buffers(32, host=True)  # the first two fill one
    cut = [
        ([name for name, _ in bucket.tensors], bucket.data.view(torch.float32).tolist())
        for bucket in buffers.fill(iter(tensors), torch.float32)
    ]
    values = [[*range(3), *range(5)], [*range(100)], [*range(2), *range(2)]]
    assert cut == list(zip([["0", "1"], ["2"], ["3", "4"]], values, strict=True))
    (halved,) = buffers.fill(iter(tensors[:1]), torch.bfloat16)
    assert halved.tensors[0][1].dtype == torch.bfloat16
    assert halved.data.view(torch.bfloat16).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(("device", "kept"), [("cpu", 40), ("meta", 0)])  # meta: not the CPU's memory, as a GPU's
def test_buckets_on_a_gpu_are_given_up_after_a_sync(device: str, kept: int) -> None:
    buffers = Buffers(40, host=False)
    tensors = [(str(i), torch.zeros(10, device=device)) for i in range(2)]
    assert len(list(buffers.fill(iter(tensors), torch.float32))) == 2
    buffers.release()
    assert [memory.numel() for memory in buffers._memory] == [kept, kept]


@pytest.mark.parametrize(("device", "memories"), [("cpu", 2), ("meta", 4)])
def test_buckets_handed_out_on_a_gpu_are_not_written_again(device: str, memories: int) -> None:
    tensors = [(str(i), torch.zeros(10, device=device)) for i in range(4)]
    buckets = list(Buffers(40, host=False, shared=True).fill(iter(tensors), torch.float32))
    assert len({bucket.data.untyped_storage()._cdata for bucket in buckets}) == memories


def test_when_all_engines_are_killed_others_take_their_calls_with_the_current_weights(
    mortal: Fleet, reference: PreTrainedModel, other_model: PreTrainedModel
) -> None:
    mortal.sync(_weights(reference), 1)
    mortal.sync(_weights(other_model), 2)
    undisturbed = mortal.generate(_requests(), SAMPLING)
    for number in range(2):
        process_of(mortal, number).kill()
        process_of(mortal, number).wait()
    assert mortal.generate(_requests(), SAMPLING) == undisturbed  # bit for bit: a call is a pure function
    assert_by(other_model, _requests(), undisturbed, 2)


def test_an_engine_that_is_killed_before_the_first_sync_is_started_once_more(
    model_path: Path, tmp_path: Path, other_model: PreTrainedModel
) -> None:
    """A base model may be trained for an hour while nothing is asked of the engines."""
    server = start_server(model_path, tmp_path, "engine", max_running=16)
    endpoint_of(server)
    server.process.kill()
    server.process.wait()
    with make_fleet([server]) as fleet:
        fleet.sync(_weights(other_model), 1)
        _assert_by(other_model, fleet, 1)


def test_an_engine_of_adopted_weights_that_is_killed_comes_back_with_them(
    model_path: Path, tmp_path: Path, reference: PreTrainedModel
) -> None:
    """As in `rloop evaluate`, where no sync brings it back."""
    server = start_server(model_path, tmp_path, "engine", max_running=16)
    with make_fleet([server], None) as fleet:
        fleet.adopt_weights(model_path)
        server.process.kill()
        server.process.wait()
        answers = fleet.submit(_requests(), SAMPLING)
        with ThreadPoolExecutor(1) as waiting, contextlib.suppress(TimeoutError):
            try:
                waiting.submit(fleet.wait, answers).result(60)
            finally:
                fleet.cancel()
        assert_by(reference, _requests(), answers.result(0), 0)


def test_weights_that_a_run_sent_are_not_adopted_for_those_of_the_folder(
    model_path: Path,
    other_path: Path,
    tmp_path: Path,
    reference: PreTrainedModel,
    other_model: PreTrainedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run has trained with a server of `rollout.endpoints`; then `rloop evaluate` is given it."""
    server = start_server(model_path, tmp_path, "engine", max_running=16)
    try:
        for _ in range(2):  # the second evaluation finds the version of the first
            with make_fleet([Borrowed(server)], None) as fleet:
                fleet.adopt_weights(model_path)
                _assert_by(reference, fleet, 0)
            endpoint_of(server).request("/pause_generation", {})  # as a run leaves it that dies as it begins a sync
        assert not caplog.records
        with make_fleet([Borrowed(server)], None) as fleet:
            fleet.adopt_weights(other_path)
        assert f"was started with {model_path}, and is taken to hold {other_path}" in caplog.text
        endpoint = endpoint_of(server)
        with make_fleet([RunningServer(endpoint.url, endpoint.key)], None) as evaluation:
            evaluation.adopt_weights(model_path)
            with make_fleet([Borrowed(server)], None) as fleet:
                fleet.sync(_weights(other_model), 3)
            with pytest.raises(UserError, match="version 3, not those of its folder"):
                evaluation.generate(_requests(), SAMPLING)
        with (
            make_fleet([Borrowed(server)], None) as fleet,
            pytest.raises(UserError, match="version 3, not those of its folder: start it anew"),
        ):
            fleet.adopt_weights(model_path)
        with make_fleet([Borrowed(server)], None) as fleet:
            fleet.sync(_weights(reference), 4)
            _assert_by(reference, fleet, 4)
    finally:
        server.stop()


def test_two_runs_that_share_an_engine_do_not_take_each_others_samples(
    servers: list[EmbeddedServer], reference: PreTrainedModel, other_model: PreTrainedModel
) -> None:
    """Their weights have one version: nothing else tells them apart."""
    endpoint = endpoint_of(servers[0])
    running = RunningServer(endpoint.url, endpoint.key)
    with make_fleet([running], None) as one, make_fleet([running], None) as other:
        one.sync(_weights(reference), 3)
        other.sync(_weights(other_model), 3)
        _assert_by(reference, one, 3)  # brought to the engine anew
        assert one._controller.counters.lost == 1
        assert "weights 3 are those of another run" in one._controller.counters.reasons[0]
        _assert_by(other_model, other, 3)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_fails_among_the_handles_of_a_sync_is_left_out_and_rejoins(
    mortal: Fleet,
    reference: PreTrainedModel,
    other_model: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    mortal.sync(_weights(other_model), 1)
    monkeypatch.setattr(mortal._sync.buffers, "bucket_bytes", 3000)
    monkeypatch.setattr(mortal._sync, "timeout_s", 5.0)
    update, calls = EngineClient.update_from_tensors, []

    async def third_fails(client: EngineClient, *arguments: Any) -> None:
        calls.append(client)
        if len(calls) == 3:
            process_of(mortal, 0).send_signal(how)
        await update(client, *arguments)

    monkeypatch.setattr(EngineClient, "update_from_tensors", third_fails)
    assert mortal.sync(_weights(reference), 2)["engines_lost"] == 1
    _assert_by(reference, mortal, 2)
    wait_for_both(mortal)
    assert mortal.sync(_weights(other_model), 3)["engines_serving"] == 2
    _assert_by(other_model, mortal, 3)
