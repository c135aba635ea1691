"""Faults injected into real engine processes, real gloo broadcasts and real sockets: none hangs a run or spoils it.

docs/faults.md has the table: what happens, the deadline, the message. Every test has a deadline of its own (`within`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from faulty_proxy import (
    Fault,
    FaultyProxy,
    Forward,
    after,
    answer_400,
    answer_500,
    cut_the_json,
    reset_the_connection,
    succeed_without_doing,
    times,
)
from served_model import (
    TEMPERATURE,
    VOCABULARY,
    Endpoint,
    assert_by,
    endpoint_of,
    make_fleet,
    make_model,
    start_server,
)
from transformers import AutoModelForCausalLM, PreTrainedModel

from rloop_mcore.errors import UserError
from rloop_mcore.rollout import fleet as fleet_module
from rloop_mcore.rollout import sync as sync_module
from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.controller import Probe
from rloop_mcore.rollout.fleet import Fleet
from rloop_mcore.rollout.launch import EmbeddedServer, RunningServer
from rloop_mcore.types import SampleRequest, Sampling
from rloop_mcore.weights.channel import BroadcastChannel

SHORT = Sampling(max_tokens=12, temperature=TEMPERATURE)
LONG = Sampling(max_tokens=200, temperature=TEMPERATURE)
PROBE = Probe(every_s=0.5, deadline_s=4.0)  # a busy machine may let a healthy engine wait for seconds
BUCKET_S = 20.0
HANG_S = 120.0  # far above what is expected: a restart on a busy machine takes half of it


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begun = time.monotonic()
    yield
    took = time.monotonic() - begun
    assert took < seconds, f"took {took:.1f} s of {seconds:g} s"


def fleet_of(servers: Sequence[Any], name: str, **options: Any) -> Fleet:
    usual = {"request_timeout_s": 60.0, "probe": PROBE}
    fleet = make_fleet(servers, BroadcastChannel("gloo", name, BUCKET_S), **usual | options)
    fleet._sync.buffers.bucket_bytes = 3000  # smaller than some tensors: many buckets
    return fleet


def weights(model: PreTrainedModel) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
    return lambda: iter(model.named_parameters())


def half_way(model: PreTrainedModel, act: Callable[[], None]) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
    """The weights; the first time they are asked for, `act` is called when about half of them were sent."""
    acted: list[bool] = []

    def export() -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(model.named_parameters()):
            if number == 12 and not acted:
                acted.append(True)
                act()
            yield pair

    return export


def requests_of(prompts: int, samples: int = 3) -> list[SampleRequest]:
    rng = np.random.default_rng(0)
    ids = [tuple(rng.integers(2, VOCABULARY, 4 + i % 5).tolist()) for i in range(prompts)]
    return [SampleRequest(p, seed=100 * i + j) for i, p in enumerate(ids) for j in range(samples)]


def assert_all_serve(fleet: Fleet, model: PreTrainedModel, version: int) -> None:
    requests = requests_of(5)
    assert_by(model, requests, fleet.generate(requests, SHORT), version)


def wait_until(condition: Callable[[], object], seconds: float = HANG_S) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """What the engines are synced to; they start with another policy (`reference`)."""
    folder = make_model(tmp_path_factory.mktemp("policy"), seed=1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


# -- processes that die or stop -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mortal(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two engines of its own, which its tests kill and stop."""
    run_dir = tmp_path_factory.mktemp("mortal")
    servers = [start_server(model_path, run_dir, f"engine-{i}", max_running=16) for i in range(2)]
    with fleet_of(servers, "mortal") as fleet:
        yield fleet


@pytest.fixture
def fleet(mortal: Fleet) -> Fleet:
    """`mortal`, with both engines there, and nothing left of what went wrong before."""
    wait_until(lambda: not mortal._started or len(mortal._controller.in_state("waiting", "serving")) == 2)
    mortal._controller.counters.reasons.clear()
    return mortal


def process_of(fleet: Fleet, number: int) -> int:
    return int(fleet.servers[number].process.pid)  # type: ignore[attr-defined]


def url_of(fleet: Fleet, number: int) -> str:
    client = fleet._controller.engines[number].client
    assert client is not None
    return client.url


def lost_because(fleet: Fleet) -> str:
    return "\n".join(fleet._controller.counters.reasons)


@pytest.mark.parametrize(
    ("sent", "words"),
    [(signal.SIGKILL, "/generate: connection failed"), (signal.SIGSTOP, "/health: no answer within 4 s")],
    ids=["killed", "stopped"],
)
def test_an_engine_that_fails_in_generate_is_replaced(
    fleet: Fleet, policy: PreTrainedModel, sent: signal.Signals, words: str
) -> None:
    with within(HANG_S):
        fleet.sync(weights(policy), 1)
        requests = requests_of(120)
        undisturbed = fleet.generate(requests, LONG)
        future = fleet.submit(requests, LONG)
        wait_until(lambda: all(engine.running for engine in fleet._controller.engines))
        time.sleep(0.2)
        url = url_of(fleet, 1)
        os.kill(process_of(fleet, 1), sent)
        assert not future.done()
        answers = fleet.wait(future)
    assert answers == undisturbed  # bit for bit: each request was answered once
    assert_by(policy, requests, answers, 1)
    assert url + words in lost_because(fleet)
    with within(HANG_S):  # it comes back, and serves the current weights
        wait_until(lambda: len(fleet._controller.in_state("waiting", "serving")) == 2)
        assert fleet.sync(weights(policy), 2)["engines_serving"] == 2
        assert_all_serve(fleet, policy, 2)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("when", ["before", "half_way"])
def test_a_sync_succeeds_without_an_engine_that_fails_in_it(
    fleet: Fleet, policy: PreTrainedModel, reference: PreTrainedModel, when: str, sent: signal.Signals
) -> None:
    fleet.sync(weights(reference), 3)
    url, process, survivor = url_of(fleet, 1), process_of(fleet, 1), process_of(fleet, 0)
    fail = lambda: os.kill(process, sent)  # noqa: E731
    if when == "before":
        fail()
    with within(PROBE.every_s + PROBE.deadline_s + BUCKET_S):
        metrics = fleet.sync(weights(policy) if when == "before" else half_way(policy, fail), 4)
    assert process_of(fleet, 0) == survivor  # nobody else was fenced
    assert metrics["engines_serving"] == 1
    assert url in lost_because(fleet)
    with within(HANG_S):
        assert_all_serve(fleet, policy, 4)  # the other one, with whole weights
        wait_until(lambda: len(fleet._controller.in_state("waiting")) == 1)
        requests = requests_of(5)
        fleet.wait(fleet.submit(requests, SHORT))
        wait_until(lambda: fleet.generate(requests, SHORT) and len(fleet._controller.in_state("serving")) == 2)
        assert_all_serve(fleet, policy, 4)


# -- engines that answer wrongly ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def servers(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EmbeddedServer]]:
    """Two engines that survive every test."""
    run_dir = tmp_path_factory.mktemp("faults")
    started = [start_server(model_path, run_dir, f"engine-{i}", max_running=16) for i in range(2)]
    yield started  # type: ignore[misc]
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def endpoints(servers: list[EmbeddedServer]) -> list[Endpoint]:
    return [endpoint_of(server) for server in servers]


@pytest.fixture
def proxies(endpoints: list[Endpoint]) -> Iterator[list[FaultyProxy]]:
    started = [FaultyProxy(endpoint.url, endpoint.key) for endpoint in endpoints]
    yield started
    for proxy in started:
        proxy.stop()


async def swap_two_tensors(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
    """Damage on the way: gate_proj and up_proj of a layer, which have one shape, change places."""
    swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    names = []
    for name in body["names"]:
        part = name.split(".")[-2]
        names.append(name.replace(part, swapped.get(part, part)))
    return web.json_response(await forward(body | {"names": names}))


def edit_checksums(edit: Callable[[dict[str, str]], None]) -> Any:
    async def spoil(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        answer = await forward(body)
        edit(answer["ranks"][0]["checksums"])
        return web.json_response(answer)

    return spoil


def corrupt(sums: dict[str, str]) -> None:
    sums["model.norm.weight"] = "0" * 16


def forget(sums: dict[str, str]) -> None:
    del sums["model.norm.weight"]


def invent(sums: dict[str, str]) -> None:
    sums["model.layers.7.mlp.extra.weight"] = "0" * 16


@pytest.mark.parametrize(
    ("path", "fault", "words"),
    [
        ("/weights_checker", edit_checksums(corrupt), r"1 with other values \(e.g. model.norm.weight\)"),
        ("/weights_checker", edit_checksums(forget), r"1 missing \(e.g. model.norm.weight\)"),
        ("/weights_checker", edit_checksums(invent), r"1 that were not sent \(e.g. model.layers.7.mlp.extra.weight\)"),
        ("/update_weights_from_distributed", swap_two_tensors, r"4 with other values \(e.g. model.layers.0.mlp.gate_p"),
    ],
    ids=["corrupt", "missing", "unknown", "swapped"],
)
def test_an_engine_with_wrong_weights_is_not_used(
    proxies: list[FaultyProxy], policy: PreTrainedModel, path: str, fault: Any, words: str
) -> None:
    proxies[1].faults[path] = fault
    with within(30), fleet_of(proxies, "wrong", request_timeout_s=20.0) as fleet:
        fleet.sync(weights(policy), 5)
        reasons = lost_because(fleet)
        assert f"{proxies[1].url}: rank 0 does not hold the weights it was sent: " in reasons

        assert re.search(words, reasons), reasons
        assert proxies[1].restarts >= 1
        assert_all_serve(fleet, policy, 5)
        assert "/generate" not in proxies[1].calls


def test_an_engine_that_does_not_tell_its_version_is_not_used(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    async def tell_nothing(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        return web.json_response({})

    proxies[1].faults["/model_info"] = tell_nothing
    with within(30), fleet_of(proxies, "untold") as fleet:
        assert fleet.sync(weights(policy), 5)["engines_serving"] == 1
        assert f"{proxies[1].url}/model_info: the answer lacks 'weight_version': {{}}" in lost_because(fleet)
        assert_all_serve(fleet, policy, 5)


def test_an_engine_that_keeps_the_version_it_had_is_not_used(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    proxies[1].faults["/update_weight_version"] = succeed_without_doing
    with within(30), fleet_of(proxies, "stays") as fleet:
        assert fleet.sync(weights(policy), 5)["engines_serving"] == 1
        assert re.search(rf"^{proxies[1].url}: holds weight version \S+ after a sync to 5-", lost_because(fleet))
        assert_all_serve(fleet, policy, 5)


def test_a_fleet_of_wrong_engines_is_an_error(proxies: list[FaultyProxy], policy: PreTrainedModel) -> None:
    for proxy in proxies:
        proxy.faults["/weights_checker"] = edit_checksums(corrupt)
    with within(30), fleet_of(proxies, "wrong") as fleet:
        with pytest.raises(EngineError, match=r"does not hold the weights it was sent: .*model\.norm\.weight"):
            fleet.sync(weights(policy), 5)
        with pytest.raises(EngineError, match="sync before generating"):
            fleet.submit(requests_of(1), SHORT)


def test_success_with_nothing_transferred_is_noticed(
    proxies: list[FaultyProxy],
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The engine is in no broadcast, and says that it was: the trainer waits for it in vain, once."""
    channel_s = 5.0
    with within(60), fleet_of(proxies, "nothing") as fleet:
        fleet._sync.channel.timeout_s = channel_s  # type: ignore[attr-defined]
        fleet.sync(weights(reference), 5)
        proxies[1].faults["/update_weights_from_distributed"] = times(1, succeed_without_doing)
        fleet.sync(weights(policy), 6)
        assert "the weights are sent again: weight broadcast 1 of 1 to the 2 engine ranks" in caplog.text
        assert_all_serve(fleet, policy, 6)


def test_an_engine_that_is_late_for_a_group_that_was_given_up_is_not_lost(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    """The other one failed as it was to join, so that nobody is there any more when the late one comes."""
    came: list[Any] = []

    async def late(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        async def join() -> Any:
            await asyncio.sleep(1.0)
            return await forward(body)

        came.append(asyncio.ensure_future(join()))  # though the trainer hears no more of it
        return web.json_response(await asyncio.shield(came[-1]))

    async def fail_and_wait(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        if "/init_weights_update_group" not in proxies[0].calls:
            await asyncio.sleep(0.2)
        return await answer_500(request, body, forward)

    async def pause_when_it_came(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        if came:
            await asyncio.sleep(1.2)
        return web.json_response(await forward(body))

    with within(60), fleet_of(proxies, "late", start_timeout_s=10.0) as fleet:
        fleet.wait_ready()
        proxies[0].faults["/init_weights_update_group"] = times(1, late)
        proxies[0].faults["/pause_generation"] = pause_when_it_came
        proxies[1].faults["/init_weights_update_group"] = times(1, fail_and_wait)
        fleet.sync(weights(policy), 7)
        assert came[0].done()
        assert proxies[0].restarts == 0
        assert_all_serve(fleet, policy, 7)


@pytest.mark.parametrize(("fault", "other_dies"), [(answer_400, True), (answer_400, False), (answer_500, True)])
def test_an_engine_that_refuses_a_bucket_once_is_synced_anew(
    proxies: list[FaultyProxy], policy: PreTrainedModel, fault: Fault, other_dies: bool
) -> None:
    """Its receive broke since another engine died, of which the trainer hears later."""

    async def die(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        proxies[1].faults["*"] = reset_the_connection
        await asyncio.sleep(0.5)
        return await reset_the_connection(request, body, forward)

    with within(60), fleet_of(proxies, "refuses", start_timeout_s=10.0) as fleet:
        fleet._sync.channel.timeout_s = 5.0  # type: ignore[attr-defined]
        fleet.wait_ready()
        proxies[0].faults["/update_weights_from_distributed"] = times(1, fault)
        if other_dies:
            proxies[1].faults["/update_weights_from_distributed"] = die
        assert fleet.sync(weights(policy), 6)["engines_serving"] == 2 - other_dies
        assert proxies[0].restarts == 0
        assert_all_serve(fleet, policy, 6)


def test_an_engine_that_refuses_the_weights_again_ends_the_sync(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    proxies[0].faults["/begin_weight_update"] = answer_400
    with within(30), fleet_of(proxies, "refuses") as fleet:
        with pytest.raises(EngineError, match=r"/begin_weight_update: status 400: .*Failed to receive"):
            fleet.sync(weights(policy), 6)
        assert fleet._controller.counters.lost == 0
        assert proxies[0].calls.count("/pause_generation") == 2


# -- /generate that fails -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [(answer_500, "/generate: status 500: .*illegal memory"), (cut_the_json, "/generate: the answer is not JSON")],
    ids=["500s", "truncated"],
)
def test_bad_answers_are_asked_for_again_and_three_fence(
    proxies: list[FaultyProxy],
    policy: PreTrainedModel,
    fault: Any,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with within(30), fleet_of(proxies, "bad") as fleet:
        fleet.sync(weights(policy), 7)
        requests = requests_of(5)
        good = fleet.generate(requests, SHORT)
        proxies[1].faults["/generate"] = times(2, fault)
        with caplog.at_level(logging.WARNING):
            assert fleet.generate(requests, SHORT) == good
            assert fleet.generate(requests, SHORT) == good
        assert proxies[1].restarts == 0  # two are forgiven
        assert fleet._controller.counters.retries >= 1
        proxies[1].faults["/generate"] = fault
        for _ in range(4):
            assert fleet.generate(requests, SHORT) == good
        assert proxies[1].restarts >= 1

        assert re.search(words, lost_because(fleet)), lost_because(fleet)


def test_a_connection_that_is_reset_fences_at_once(proxies: list[FaultyProxy], policy: PreTrainedModel) -> None:
    with within(30), fleet_of(proxies, "reset") as fleet:
        fleet.sync(weights(policy), 7)
        requests = requests_of(5)
        good = fleet.generate(requests, SHORT)
        proxies[1].faults["/generate"] = times(1, reset_the_connection)
        assert fleet.generate(requests, SHORT) == good
        assert f"{proxies[1].url}/generate: connection failed" in lost_because(fleet)
        assert fleet.generate(requests, SHORT) == good
        assert proxies[1].restarts == 1


def test_an_engine_that_comes_back_while_the_policy_is_ahead_has_the_version_of_what_it_is_sent(
    proxies: list[FaultyProxy], policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    """One step off: the batch of weights 7 is generated while the actor holds weights 8."""
    held = reference
    with within(60), fleet_of(proxies[:1], "ahead") as fleet:
        fleet.sync(lambda: weights(held)(), 7)
        held = policy
        proxies[0].faults["/generate"] = times(1, reset_the_connection)
        requests = requests_of(5)
        assert_by(policy, requests, fleet.wait(fleet.submit(requests, SHORT), 8), 8)


def test_an_engine_that_comes_back_and_takes_the_weights_no_more_is_given_up(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    """A refusal loses no engine in a sync. Here nobody else would bring it back, and its call would wait for ever."""
    with within(60), fleet_of(proxies[:1], "no more") as fleet:
        fleet.sync(weights(policy), 7)
        proxies[0].faults["/generate"] = reset_the_connection
        proxies[0].faults["/begin_weight_update"] = answer_400
        with pytest.raises(EngineError, match=r"no engine is left; .*/begin_weight_update: status 400"):
            fleet.generate(requests_of(5), SHORT)
        assert proxies[0].restarts == 3


def lose(fleet: Fleet) -> None:
    """All engines, which are back at once, and wait for weights."""
    for engine in fleet._controller.engines:
        fleet._on_loop(fleet._controller.lose, engine, "somebody stumbled")
    wait_until(lambda: fleet._controller.in_state("waiting") == fleet._controller.engines)


def test_an_engine_that_takes_no_weights_as_it_comes_back_does_not_take_another_along(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    with within(60), fleet_of(proxies, "alone") as fleet:
        fleet.sync(weights(policy), 7)
        lose(fleet)
        proxies[0].faults["/begin_weight_update"] = answer_400
        fleet._catch_up(7)
        wait_until(lambda: proxies[0].restarts == 2)
        assert proxies[1].restarts == 1
        del proxies[0].faults["/begin_weight_update"]
        wait_until(lambda: fleet._controller.in_state("waiting") == fleet._controller.engines)
        fleet._catch_up(7)
        assert fleet._controller.in_state("serving") == fleet._controller.engines
        assert_all_serve(fleet, policy, 7)


def test_an_engine_that_comes_back_and_is_in_no_broadcast_does_not_stay_so(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    """The broadcast's failure names nobody. An engine that stayed as it is would be waited for for ever."""
    with within(120), fleet_of(proxies[:1], "in none") as fleet:
        fleet.sync(weights(policy), 7)
        lose(fleet)
        fleet._sync.channel.timeout_s = 3.0  # type: ignore[attr-defined]
        proxies[0].faults["/update_weights_from_distributed"] = succeed_without_doing
        fleet._catch_up(7)
        assert "weight broadcast 1 of 1 to the 1 engine ranks" in lost_because(fleet)
        wait_until(lambda: proxies[0].restarts == 2)


def test_an_engine_that_starts_anew_behind_a_proxy_comes_back(
    proxies: list[FaultyProxy], policy: PreTrainedModel
) -> None:
    """The proxy answers for it meanwhile."""
    with within(60), fleet_of(proxies, "behind") as fleet:
        fleet.sync(weights(policy), 7)
        proxies[1].faults["*"] = answer_500
        wait_until(lambda: fleet._controller.in_state("lost"))
        time.sleep(2.0)
        assert not fleet._controller.in_state("dead")
        del proxies[1].faults["*"]
        wait_until(lambda: fleet._controller.in_state("waiting"))
        assert proxies[1].restarts == 1
        assert fleet.sync(weights(policy), 8)["engines_serving"] == 2


def test_a_fleet_that_only_fails_is_an_error(proxies: list[FaultyProxy], policy: PreTrainedModel) -> None:
    with within(30), fleet_of(proxies, "fails") as fleet:
        fleet.sync(weights(policy), 7)
        for proxy in proxies:
            proxy.faults["/generate"] = answer_500
        with pytest.raises(EngineError, match=r"/generate: status 500: .*illegal memory access"):
            fleet.generate(requests_of(5), SHORT)


def test_a_node_of_engines_that_dies_does_not_fail_the_sync(endpoints: list[Endpoint], policy: PreTrainedModel) -> None:
    """More engines at once than a sync has attempts."""
    proxies = [FaultyProxy(endpoints[0].url, endpoints[0].key) for _ in range(5)]
    try:
        with within(30), fleet_of(proxies, "node", start_timeout_s=10.0) as fleet:
            fleet.wait_ready()
            for proxy in proxies[1:]:
                proxy.faults["*"] = reset_the_connection
            assert fleet.sync(weights(policy), 8)["engines_serving"] == 1
            assert_all_serve(fleet, policy, 8)
    finally:
        for proxy in proxies:
            proxy.stop()


def test_engines_that_die_one_after_the_other_do_not_fail_the_sync(
    endpoints: list[Endpoint], policy: PreTrainedModel
) -> None:
    """Each takes an attempt with it, and there are more of them than attempts."""
    proxies = [FaultyProxy(endpoints[0].url, endpoints[0].key) for _ in range(5)]

    def dies_at(proxy: FaultyProxy, attempt: int) -> Fault:
        async def pause(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
            if proxy.calls.count("/pause_generation") < attempt:
                return web.json_response(await forward(body))
            proxy.faults["*"] = reset_the_connection
            return await reset_the_connection(request, body, forward)

        return pause

    try:
        with within(60), fleet_of(proxies, "rolling", start_timeout_s=10.0) as fleet:
            for attempt, proxy in enumerate(proxies[1:], 1):
                proxy.faults["/pause_generation"] = dies_at(proxy, attempt)
            assert fleet.sync(weights(policy), 8)["engines_serving"] == 1
            assert_all_serve(fleet, policy, 8)
    finally:
        for proxy in proxies:
            proxy.stop()


def test_a_slow_engine_gets_less(proxies: list[FaultyProxy], policy: PreTrainedModel) -> None:
    proxies[1].faults["/generate"] = after(1.0)
    with within(60), fleet_of(proxies, "slow", deterministic=False, max_running=6) as fleet:
        fleet.sync(weights(policy), 9)
        requests = requests_of(30)
        assert_by(policy, requests, fleet.generate(requests, SHORT), 9)
        fast, slow = (proxy.calls.count("/generate") for proxy in proxies)
        assert fast + slow == 30
        assert 0 < slow < fast / 2
        assert fleet._controller.counters.lost == 0


def test_an_id_outside_the_vocabulary_is_not_sent(proxies: list[FaultyProxy], policy: PreTrainedModel) -> None:
    with within(30), fleet_of(proxies, "ids") as fleet:
        fleet.sync(weights(policy), 10)
        wrong = [SampleRequest((3, VOCABULARY), seed=1), SampleRequest((3, 4), seed=2)]
        with pytest.raises(EngineError, match=rf"id {VOCABULARY} is outside the vocabulary of {VOCABULARY}") as caught:
            fleet.generate(wrong, SHORT)
        assert caught.value.status == 400
        assert fleet._controller.counters.lost == 0
        assert not any(proxy.restarts for proxy in proxies)
        assert_all_serve(fleet, policy, 10)


# -- the start, the trainer, the end ------------------------------------------------------------------------------


def test_servers_that_start_together_have_ports_of_their_own(endpoints: list[Endpoint]) -> None:
    assert len({endpoint.url for endpoint in endpoints}) == 2


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [(404, "Not here", "/health: status 404: Not here"), (200, "<html>hello", "/server_info: the answer is not JSON")],
    ids=["404", "garbage"],
)
def test_an_endpoint_that_is_something_else_is_one_sentence(
    endpoints: list[Endpoint], status: int, text: str, words: str
) -> None:
    async def other(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        return web.Response(text=text, status=status)

    proxy = FaultyProxy(endpoints[0].url, None)
    proxy.faults["*"] = other
    try:
        with within(10), fleet_of([RunningServer(proxy.url, None)], "other") as fleet:
            with pytest.raises(EngineError, match=words) as caught:
                fleet.wait_ready()
            assert "\n" not in str(caught.value)
    finally:
        proxy.stop()


TRAINER = """
import os, signal, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import torch
from test_faults import fleet_of, weights
from transformers import AutoModelForCausalLM
from rloop_mcore.rollout.launch import RunningServer
from rloop_mcore.weights.channel import BroadcastChannel

class Channel(BroadcastChannel):
    sends = 0
    def send(self, tensors):
        self.sends += 1
        if self.sends == 5:
            time.sleep(0.5)  # the engines wait in the broadcast by now
            os.kill(os.getpid(), signal.SIGKILL)
        super().send(tensors)

model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32)
fleet = fleet_of([RunningServer(*pair.split()) for pair in sys.argv[3:]], "trainer")
fleet._sync.channel.__class__ = Channel
fleet.sync(weights(model), 66)
"""


def test_a_trainer_that_dies_in_a_sync_leaves_nothing_that_serves(
    endpoints: list[Endpoint], policy: PreTrainedModel, reference: PreTrainedModel, model_path: Path
) -> None:
    adopted = [RunningServer(endpoint.url, endpoint.key) for endpoint in endpoints]
    with fleet_of(adopted, "trainer") as fleet:
        fleet.sync(weights(policy), 11)
    for endpoint in endpoints:  # as an evaluation leaves it
        endpoint.request("/update_weight_version", {"new_version": "0", "abort_all_requests": False})
    arguments = [__file__, str(model_path), *(f"{endpoint.url} {endpoint.key}" for endpoint in endpoints)]
    with within(HANG_S):
        trainer = subprocess.run([sys.executable, "-c", TRAINER, *arguments], timeout=HANG_S, check=False)
    assert trainer.returncode == -signal.SIGKILL
    for endpoint in endpoints:
        with within(20):
            endpoint.request("/continue_generation", {})  # somebody who does not know
            status, answer = endpoint.request("/generate", {"input_ids": [5]})
        assert status == 503, answer
        assert "the weights are incomplete" in answer["message"]
    words = "a part of the weights that a run was sending it, not those of its folder: start it anew"
    with within(20), fleet_of(adopted, "evaluation") as fleet, pytest.raises(UserError, match=words):
        fleet.adopt_weights(model_path)
    with within(60), fleet_of(adopted, "trainer") as fleet:  # the trainer's next start
        assert fleet.sync(weights(policy), 12)["engines_serving"] == 2
        assert_all_serve(fleet, policy, 12)


def test_an_adopted_engine_that_hangs_in_a_broadcast_is_left_out_and_rejoins(
    servers: list[EmbeddedServer], endpoints: list[Endpoint], policy: PreTrainedModel, reference: PreTrainedModel
) -> None:
    """It cannot be killed from here, so that the broadcast lasts to its deadline."""
    channel_s, process = 8.0, servers[1].process.pid
    adopted = [RunningServer(endpoint.url, endpoint.key) for endpoint in endpoints]
    try:
        with within(HANG_S), fleet_of(adopted, "adopted") as fleet:
            fleet._sync.channel.timeout_s = channel_s  # type: ignore[attr-defined]
            fleet.sync(weights(reference), 1)
            with within(2 * channel_s + BUCKET_S):
                metrics = fleet.sync(half_way(policy, lambda: os.kill(process, signal.SIGSTOP)), 2)
            assert metrics["engines_serving"] == 1
            assert_all_serve(fleet, policy, 2)
            os.kill(process, signal.SIGCONT)
            wait_until(lambda: fleet._controller.in_state("waiting"))
            fleet._catch_up(2)
            assert len(fleet._controller.in_state("serving")) == 2
            assert_all_serve(fleet, policy, 2)
    finally:
        os.kill(process, signal.SIGCONT)


def test_an_engine_of_adopted_weights_that_comes_back_with_another_model_ends_the_evaluation(
    endpoints: list[Endpoint], proxies: list[FaultyProxy], policy: PreTrainedModel, model_path: Path
) -> None:
    async def other_model(request: web.Request, body: Any, forward: Forward) -> web.StreamResponse:
        return web.json_response(await forward(body) | {"model_path": "/models/other"})

    with within(60), fleet_of([RunningServer(endpoint.url, endpoint.key) for endpoint in endpoints], "a run") as fleet:
        fleet.sync(weights(policy), 1)
    for endpoint in endpoints:  # as an evaluation leaves it
        endpoint.request("/update_weight_version", {"new_version": "0", "abort_all_requests": False})
    with within(60), fleet_of(proxies, "evaluation") as fleet:
        fleet.adopt_weights(model_path)

        def fall_and_come_back() -> None:
            proxies[1].faults["/generate"] = times(1, reset_the_connection)
            assert_all_serve(fleet, policy, 0)
            wait_until(lambda: len(fleet._controller.in_state("waiting", "serving")) == 2)
            fleet._catch_up(0)  # unless that is done

        fall_and_come_back()
        assert len(fleet._controller.in_state("serving")) == 2
        proxies[1].faults["/model_info"] = other_model
        words = f"{proxies[1].url} was started anew with /models/other, and had {model_path} before: evaluate anew"
        with pytest.raises(UserError, match=words):
            fall_and_come_back()


def test_close_does_not_wait_for_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that NCCL does not let go, and servers that take as long as they may to end."""

    class Slow(RunningServer):
        def stop(self) -> None:
            time.sleep(1.0)

    fleet = fleet_of([Slow("http://127.0.0.1:1", None) for _ in range(8)], "hangs")
    monkeypatch.setattr(fleet_module, "_DISCONNECT_S", 0.5)
    hangs = threading.Event()
    monkeypatch.setattr(fleet._sync.channel, "close", lambda: hangs.wait(20.0))
    with within(5):
        fleet.close()
    hangs.set()


def test_a_sync_does_not_wait_for_ever_to_leave_the_group_of_the_one_before(
    proxies: list[FaultyProxy], policy: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, closings = threading.Event(), []

    def close() -> None:
        closings.append(1)
        hangs.wait(HANG_S)

    with fleet_of(proxies, "held") as fleet:
        monkeypatch.setattr(sync_module, "_BEYOND_DEADLINE_S", 0.2)
        fleet._sync.timeout_s = 0.3
        monkeypatch.setattr(fleet._sync.channel, "close", close)
        with within(HANG_S / 2), pytest.raises(TimeoutError, match=r"broadcast was not left within 0\.5 s"):
            fleet.sync(weights(policy), 1)
        assert len(closings) == 1  # in three attempts: it goes on
        hangs.set()


def test_close_ends_what_is_in_flight(endpoints: list[Endpoint], policy: PreTrainedModel) -> None:
    fleet = fleet_of([RunningServer(endpoint.url, endpoint.key) for endpoint in endpoints], "close")
    fleet.sync(weights(policy), 13)
    future = fleet.submit(requests_of(2000), LONG)
    wait_until(lambda: all(engine.running for engine in fleet._controller.engines))
    with within(10):
        fleet.close()
    assert future.cancelled()
    with within(30), fleet_of([RunningServer(e.url, e.key) for e in endpoints], "close") as again:
        again.sync(weights(policy), 14)  # the engines have forgotten the old calls
        assert_all_serve(again, policy, 14)
