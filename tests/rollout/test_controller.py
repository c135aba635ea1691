"""The controller over simulated engines on a virtual clock: who gets what, when, and what if an engine fails."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

from simulated_fleet import SimulatedClient, SimulatedFleet, length_of, make_requests, run_virtually

from rloop_mcore.rollout.client import EngineError
from rloop_mcore.rollout.controller import _Call
from rloop_mcore.types import Completion, SampleRequest, Sampling

SAMPLING = Sampling(max_tokens=2048)
HOUR = 3600.0


def _now() -> float:
    return asyncio.get_running_loop().time()


def _groups(completions: Sequence[Completion], size: int) -> list[Sequence[Completion]]:
    return [completions[i : i + size] for i in range(0, len(completions), size)]


def _assert_answered(requests: Sequence[SampleRequest], completions: Sequence[Completion], size: int) -> None:
    """Every request has its own whole answer; those of a group of `size` come from one engine."""
    assert len(completions) == len(requests)
    for request, completion in zip(requests, completions, strict=True):
        assert completion.response_ids == (request.seed,) * length_of(request.seed, SAMPLING.max_tokens)
        assert completion.finish_reason in ("stop", "length")
    for group in _groups(completions, size):
        assert len({engine for completion in group for engine in completion.logprobs}) == 1


def _assert_idle(fleet: SimulatedFleet) -> None:
    assert {engine.running for engine in fleet.controller.engines} == {0}
    assert not fleet.controller._queue


async def _ends(fleet: SimulatedFleet, number: int) -> None:
    """Wait for the end of the one call at this engine: until the turn of the loop in which its caller learns of it."""
    client = fleet.servers[number].client
    assert client is not None
    (job,) = client._jobs.values()
    await job.done


def test_each_engine_gets_as_much_and_groups_stay_together() -> None:
    async def work() -> None:
        async with SimulatedFleet(8) as fleet:
            requests = make_requests(groups=24, size=4)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
            assert len(fleet.sent) == 24  # a call a group
            assert set(Counter(number for ((_, number),) in fleet.sent.values()).values()) == {3}
            _assert_idle(fleet)

    run_virtually(work())


def test_a_call_goes_to_the_engine_with_the_least_to_do() -> None:
    async def work() -> None:
        async with SimulatedFleet(3) as fleet:
            sizes = (5, 1, 3, 1, 1, 1)  # to engines 0, 1, 2, then 1 (has 1), 1 (has 2), 1 or 2 (have 3)
            requests = [r for g, size in enumerate(sizes) for r in make_requests(1, size, first=g)]
            await fleet.controller.generate(requests, SAMPLING)
            assert [number for ((_, number),) in fleet.sent.values()] == [0, 1, 2, 1, 1, 1]

    run_virtually(work())


def test_completions_are_told_when_their_call_is_answered() -> None:
    async def work() -> None:
        async with SimulatedFleet(2, limit=8) as fleet:
            fleet.servers[0].fail("dead")  # its calls are answered elsewhere, and told once
            requests = make_requests(groups=6, size=4)
            told: dict[int, tuple[float, Completion]] = {}

            def answered(rows: Sequence[int], completions: Sequence[Completion]) -> None:
                assert told.keys().isdisjoint(rows)
                told.update(zip(rows, ((_now(), completion) for completion in completions), strict=True))

            completions = await fleet.controller.generate(requests, SAMPLING, answered=answered)
            assert [told[row][1] for row in range(len(requests))] == completions
            times = [{told[row][0] for row in range(first, first + 4)} for first in range(0, len(requests), 4)]
            assert all(len(time) == 1 for time in times)
            first, *_, last = sorted(time for (time,) in times)
            assert first < last == _now()

    run_virtually(work())


def test_an_engine_has_no_more_than_the_limit_and_waiting_calls_go_in_order() -> None:
    async def work() -> None:
        async with SimulatedFleet(4, limit=32) as fleet:
            requests = make_requests(groups=40, size=16)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 16)
            assert [server.batch.most for server in fleet.servers] == [32] * 4
            numbers = [int(rid.rsplit("-", 1)[1]) for rid in fleet.sent]
            assert numbers == list(range(40))
            times = [when for ((when, _),) in fleet.sent.values()]
            assert times == sorted(times)
            assert times[0] == times[7] < times[8]

    run_virtually(work())


def test_a_call_above_the_limit_has_an_engine_to_itself() -> None:
    async def work() -> None:
        async with SimulatedFleet(2, limit=0) as fleet:
            requests = make_requests(groups=6, size=4)
            await fleet.controller.generate(requests, SAMPLING, shares=3)
            assert len(fleet.sent) == 3
            assert [server.batch.most for server in fleet.servers] == [8, 8]

    run_virtually(work())


def test_two_callers_share_the_engines_in_the_order_of_their_calls() -> None:
    async def work() -> None:
        async with SimulatedFleet(1, limit=4) as fleet:
            first, second = make_requests(3, 4), make_requests(3, 4, first=3)
            both = asyncio.gather(*(fleet.controller.generate(r, SAMPLING) for r in (first, second)))
            for requests, completions in zip((first, second), await both, strict=True):
                _assert_answered(requests, completions, 4)
            callers = [rid.split("-")[0] for rid in fleet.sent]
            assert len(set(callers[:3])) == len(set(callers[3:])) == 1

    run_virtually(work())


@pytest.mark.parametrize("ended", [True, False])
def test_a_server_that_has_ended_before_the_start_is_started_once_more_and_a_slow_one_is_not(ended: bool) -> None:
    async def work() -> None:
        fleet = SimulatedFleet(2)
        if not ended:
            fleet.servers[0]._up_at = HOUR
            with pytest.raises(EngineError, match="was not ready within 600 s"):
                await fleet.controller.start()
            return
        fleet.servers[0].fail("dead")
        async with fleet:
            requests = make_requests(2, 4)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
            assert {number for ((_, number),) in fleet.sent.values()} == {0, 1}

    run_virtually(work())


@pytest.mark.parametrize(
    ("status", "until", "ends", "starts"),
    [
        (None, 5.0, 5.0, True),
        (502, 5.0, 5.0, True),  # of a proxy in front of it
        (429, 5.0, 5.0, True),
        (404, 5.0, 0.0, False),
        (502, HOUR, 600.0, False),
    ],
)
def test_a_server_that_is_starting_is_waited_for_while_that_may_last(
    monkeypatch: pytest.MonkeyPatch, status: int | None, until: float, ends: float, starts: bool
) -> None:
    async def check_server(client: SimulatedClient, timeout_s: float) -> None:
        if _now() < until:
            raise EngineError(f"{client.url}: not yet", status)

    async def work() -> None:
        fleet = SimulatedFleet(1)
        with nullcontext() if starts else pytest.raises(EngineError, match="sim://0: not yet"):
            await fleet.controller.start()
        assert ends <= _now() < ends + 1.0
        await fleet.controller.close()

    monkeypatch.setattr(SimulatedClient, "check_server", check_server)
    run_virtually(work())


def test_engines_that_wait_are_asked_for_their_health_as_those_that_serve_are() -> None:
    async def work() -> None:
        async with SimulatedFleet(3) as fleet:
            engines = fleet.controller.engines
            engines[0].state = "waiting"
            for server in fleet.servers[:2]:
                server.fail("dead")
            await fleet.controller.check_health()
            assert [engine.state for engine in engines] == ["lost", "lost", "serving"]

    run_virtually(work())


def test_an_engine_is_not_blamed_where_there_is_no_socket_to_ask_for_its_health(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            client = fleet.servers[0].client
            assert client is not None

            async def no_socket(timeout_s: float = 0.0) -> None:
                raise OSError("no socket within 30 s")

            client.health = no_socket  # type: ignore[method-assign]
            await fleet.controller.check_health()
            assert [engine.state for engine in fleet.controller.engines] == ["serving", "serving"]

    run_virtually(work())
    assert "engine 0 cannot be asked for its health: no socket within 30 s" in caplog.text


@pytest.mark.parametrize(("fault", "within_s"), [("dead", 1.0), ("hung", 45.0), ("stuck", 601.0), ("errors", 120.0)])
def test_the_calls_of_a_broken_engine_go_to_another_and_it_rejoins(fault: str, within_s: float) -> None:
    async def work() -> None:
        async with SimulatedFleet(3, limit=16) as fleet:
            requests = make_requests(groups=30, size=8)
            running = asyncio.ensure_future(fleet.controller.generate(requests, SAMPLING))
            await asyncio.sleep(5.0)
            fleet.servers[1].fail(fault)
            began, engine = _now(), fleet.controller.engines[1]
            while engine.state == "serving":
                await asyncio.sleep(0.1)
            assert engine.state == "lost"
            assert _now() - began <= within_s
            _assert_answered(requests, await running, 8)
            assert fleet.controller.counters.retries >= 1
            _assert_idle(fleet)
            await asyncio.sleep(300.0)
            assert engine.state == "serving"
            assert fleet.controller.counters.restarts == 1
            fleet.sent.clear()
            await fleet.controller.generate(make_requests(3, 8), SAMPLING)
            assert {number for ((_, number),) in fleet.sent.values()} == {0, 1, 2}

    run_virtually(work())


def test_a_call_that_one_engine_failed_goes_to_another_though_that_has_more_to_do() -> None:
    async def work() -> None:
        async with SimulatedFleet(3) as fleet:
            fleet.servers[0].fail("errors")
            requests = make_requests(groups=30, size=4)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
            for tries in fleet.sent.values():
                assert [number for _, number in tries].count(0) <= 1
            assert fleet.controller.counters.lost == 1  # three 500s in a row

    run_virtually(work())


@pytest.mark.parametrize(("full_s", "most"), [(5.0, 6), (120.0, 14)])  # where every pause is as short as may be
def test_an_engine_that_has_no_room_is_asked_again_ever_later(
    full_s: float, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with SimulatedFleet(1, limit=8) as fleet:
            server, requests = fleet.servers[0], make_requests(4, 4)
            server.fault = "full"
            asyncio.get_running_loop().call_later(full_s, setattr, server, "fault", None)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
            for tries in fleet.sent.values():
                assert len(tries) <= most
            counters = fleet.controller.counters
            assert (counters.retries, counters.lost) == (0, 0)
            _assert_idle(fleet)

    run_virtually(work())
    assert caplog.text.count("engine 0 has no room, and is asked again later (said once)") == 1


def test_an_engine_that_never_has_room_is_an_error_when_the_time_of_the_call_is_over() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            for server in fleet.servers:
                server.fault = "full"
            with pytest.raises(EngineError, match="status 503"):
                await fleet.controller.generate(make_requests(1, 4), SAMPLING)
            assert 500.0 < _now() < 700.0
            _assert_idle(fleet)

    run_virtually(work())


def test_a_call_that_waits_for_room_can_be_aborted() -> None:
    async def work() -> None:
        async with SimulatedFleet(2, limit=4) as fleet:
            fleet.servers[0].fault = "full"
            requests = make_requests(groups=3, size=4)
            completions = await fleet.controller.generate(requests, SAMPLING, enough=2)
            assert [c.finish_reason for c in completions[:4]] == ["abort"] * 4
            assert _now() < 60.0  # and not when the time of the call is over
            _assert_idle(fleet)
            fleet.servers[0].fault = None
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)

    run_virtually(work())


def test_a_call_that_waits_for_room_at_an_engine_that_dies_goes_to_another_before_its_pause_is_over() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            fleet.servers[0].fault = "full"
            requests = make_requests(groups=2, size=4)
            running = asyncio.ensure_future(fleet.controller.generate(requests, SAMPLING))
            await asyncio.sleep(0.1)
            tries = next(iter(fleet.sent.values()))
            while len(tries) < 8:  # the pause that begins now is of 15 s at least
                await asyncio.sleep(0.1)
            fleet.servers[0].fail("dead")
            died = _now()
            _assert_answered(requests, await running, 4)
            assert tries[-1][1] == 1
            assert tries[-1][0] < died + 11.0  # the next probe has found it dead
            assert fleet.controller.counters.lost == 1
            await asyncio.sleep(300.0)
            assert fleet.controller.engines[0].state == "serving"

    run_virtually(work())


def test_what_one_engine_alone_refuses_is_answered_by_another() -> None:
    async def work() -> None:
        async with SimulatedFleet(3, limit=8) as fleet:
            fleet.servers[0].fault = "refuses"
            requests = make_requests(groups=12, size=4)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
            assert fleet.controller.counters.lost == 1  # the third in a row

    run_virtually(work())


def test_what_two_engines_refuse_is_an_error() -> None:
    async def work() -> None:
        async with SimulatedFleet(3) as fleet:
            for server in fleet.servers:
                server.fault = "refuses"
            with pytest.raises(EngineError, match="status 400"):
                await fleet.controller.generate(make_requests(1, 4), SAMPLING)
            ((first, second),) = fleet.sent.values()
            assert first[1] != second[1]
            assert fleet.controller.counters.lost == 0

    run_virtually(work())


def test_an_engine_that_fails_now_and_then_is_kept() -> None:
    async def work() -> None:
        async with SimulatedFleet(1) as fleet:
            for first in range(5):
                fleet.servers[0].fault = "errors"
                running = asyncio.ensure_future(fleet.controller.generate(make_requests(1, 4, first), SAMPLING))
                await asyncio.sleep(0.015)  # the second try is under way
                fleet.servers[0].fault = None
                await running
            assert fleet.controller.counters.retries == 10
            assert fleet.controller.counters.lost == 0

    run_virtually(work())


def test_a_fault_of_the_request_is_raised_at_once_and_harms_no_engine() -> None:
    async def work() -> None:
        async with SimulatedFleet(2, limit=8) as fleet:
            requests = [*make_requests(6, 4), SampleRequest((-1,), 999)]
            with pytest.raises(EngineError, match="outside the vocabulary"):
                await fleet.controller.generate(requests, SAMPLING)
            assert sum(1 for tries in fleet.sent.values() for _ in tries) <= 7
            assert fleet.controller.counters.lost == fleet.controller.counters.retries == 0
            _assert_idle(fleet)

    run_virtually(work())


def test_an_engine_with_other_weights_is_fenced_and_its_samples_not_used() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            fleet.sync(7)
            fleet.servers[0].version = 6
            completions = await fleet.controller.generate(make_requests(4, 4), SAMPLING)
            assert {c.weight_versions[0][0] for c in completions} == {7}
            assert fleet.controller.engines[0].state == "lost"
            (reason,) = fleet.controller.counters.reasons
            assert "weight version 6, synced were 7 to 7" in reason

    run_virtually(work())


@pytest.mark.parametrize(
    ("tokens", "reason"), [(0, "stop"), (SAMPLING.max_tokens + 1, "length"), (3, "error"), (3, "None")]
)
def test_a_sample_of_no_token_or_too_many_or_that_ended_otherwise_is_not_used(tokens: int, reason: str) -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            client = fleet.servers[0].client
            assert client is not None
            plain = client.generate

            async def wrong(requests: Sequence[SampleRequest], sampling: Sampling, rid: str) -> list[Completion]:
                answer = await plain(requests, sampling, rid)
                ids, logprobs = (7,) * tokens, (0.0,) * tokens
                return [replace(c, response_ids=ids, logprobs=logprobs, finish_reason=reason) for c in answer]

            client.generate = wrong  # type: ignore[method-assign]
            requests = make_requests(groups=2, size=4)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
            assert fleet.controller.counters.retries == 1
            _assert_idle(fleet)

    run_virtually(work())


def test_a_sync_may_fall_into_a_call() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            running = asyncio.ensure_future(fleet.controller.generate(make_requests(4, 4), SAMPLING))
            await asyncio.sleep(1.0)
            fleet.sync(2)
            await running
            assert fleet.controller.counters.lost == 0

    run_virtually(work())


def test_an_engine_that_a_sync_resumed_may_answer_before_the_others_are_resumed() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            requests = make_requests(groups=4, size=4)
            running = asyncio.ensure_future(fleet.controller.generate(requests, SAMPLING))
            await asyncio.sleep(0.01)
            fleet.controller.expect(2)
            for server in fleet.servers:
                server.version = 2
            answers = await running
            assert {version for c in answers for version, _ in c.weight_versions} == {2}
            assert (fleet.controller.counters.retries, fleet.controller.counters.lost) == (0, 0)

    run_virtually(work())


def test_an_error_ends_the_calls_beside_it_at_once() -> None:
    async def work() -> None:
        async with SimulatedFleet(3) as fleet:
            client = fleet.servers[0].client
            assert client is not None

            async def no_socket(requests: Sequence[SampleRequest], sampling: Sampling, rid: str) -> list[Completion]:
                await asyncio.sleep(0.5)
                raise OSError("no socket")

            client.generate = no_socket  # type: ignore[method-assign]
            with pytest.raises(OSError, match="no socket"):
                await fleet.controller.generate(make_requests(groups=6, size=4), SAMPLING)
            assert _now() < 0.6
            _assert_idle(fleet)

    run_virtually(work())


def test_engines_that_catch_up_to_newer_weights_leave_the_others_valid() -> None:
    """Engine 2 is lost between its catch-up and its promotion: as many engines serve as were to be promoted."""

    async def work() -> None:
        async with SimulatedFleet(3) as fleet:
            engines = fleet.controller.engines
            for engine in engines[1:]:
                engine.state, fleet.servers[engine.number].version = "waiting", 2
            fleet.controller.lose(engines[2], "it died")
            fleet.controller.promote(engines[1:], 2)
            assert engines[2].state == "lost"
            await fleet.controller.generate(make_requests(4, 4), SAMPLING)
            assert [engine.state for engine in engines] == ["serving", "serving", "lost"]
            fleet.sync(3)  # brings all that serve to 3, so 2 is wrong from here on
            assert fleet.controller._versions == (3, 3)

    run_virtually(work())


def test_an_engine_that_never_comes_back_is_dead_after_three_restarts() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            fleet.servers[0].comes_back = False
            fleet.servers[0].fail("dead")
            requests = make_requests(4, 4)
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
            await asyncio.sleep(4 * 600.0)
            assert fleet.controller.engines[0].state == "dead"
            assert fleet.controller.counters.restarts == 3
            _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)

    run_virtually(work())


def test_an_engine_that_answers_between_its_restarts_is_never_given_up() -> None:
    """A run takes weeks. And what it failed before a restart does not count after it."""

    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            engine, server, requests = fleet.controller.engines[0], fleet.servers[0], make_requests(8, 4)
            for count in range(1, 6):
                server.fault = "errors"
                while engine.state == "serving":
                    _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
                while engine.state != "serving":
                    await asyncio.sleep(1.0)
                assert fleet.controller.counters.restarts == count
                server.fault = "errors"
                await fleet.controller.generate(requests[:4], SAMPLING)  # one call, which the other answers
                assert engine.failures == 1
                server.fault = None
                _assert_answered(requests, await fleet.controller.generate(requests, SAMPLING), 4)
                assert fleet.controller.counters.lost == count
                assert engine.failures == engine.restarts == 0

    run_virtually(work())


def test_a_restart_that_the_system_refuses_counts_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse() -> None:
        raise OSError(11, "Resource temporarily unavailable")

    async def work() -> None:
        async with SimulatedFleet(1) as fleet:
            monkeypatch.setattr(fleet.servers[0], "restart", refuse)
            fleet.servers[0].fail("dead")
            with pytest.raises(EngineError, match="Resource temporarily unavailable"):
                await asyncio.wait_for(fleet.controller.generate(make_requests(1, 4), SAMPLING), HOUR)

    run_virtually(work())


def test_when_all_are_dead_every_call_fails_with_the_reason() -> None:
    async def work() -> None:
        async with SimulatedFleet(3, limit=4) as fleet:
            fleet.controller._on_waiting = lambda: None  # there is no engine left that somebody brings weights
            running = asyncio.ensure_future(fleet.controller.generate(make_requests(9, 4), SAMPLING))
            await asyncio.sleep(1.0)
            for server in fleet.servers:
                server.comes_back = False
                server.fail("dead")
            with pytest.raises(EngineError, match=r"no engine is left; the last failed so: .* was not ready within"):
                await asyncio.wait_for(running, HOUR)
            _assert_idle(fleet)
            with pytest.raises(EngineError, match="no engine is left"):
                await fleet.controller.generate(make_requests(1, 4), SAMPLING)

    run_virtually(work())


def test_enough_ends_the_slowest_with_what_they_have() -> None:
    async def work() -> None:
        async with SimulatedFleet(2, limit=16) as fleet:
            requests = make_requests(groups=12, size=8)  # 4 at once
            completions = await fleet.controller.generate(requests, SAMPLING, enough=5)
            groups = _groups(completions, 8)
            assert sum(all(c.finish_reason != "abort" for c in group) for group in groups) == 5
            aborted = [c for c in completions if c.finish_reason == "abort"]
            assert any(c.response_ids for c in aborted)
            assert any(not c.response_ids for c in aborted)
            assert fleet.controller.counters.aborted == 7
            _assert_idle(fleet)
            resumed = [
                SampleRequest(r.prompt_ids, r.seed, c) if c.finish_reason == "abort" else r
                for r, c in zip(requests, completions, strict=True)
            ]
            fleet.sync(2)
            finished = await fleet.controller.generate(resumed, SAMPLING)
            assert any([v for v, _ in c.weight_versions] == [1, 2] for c in finished)
            assert [len(c.response_ids) for c in finished] == [length_of(r.seed, 2048) for r in requests]

    run_virtually(work())


def test_enough_counts_groups_though_neighbours_have_one_prompt() -> None:
    async def work() -> None:
        async with SimulatedFleet(2, limit=16) as fleet:
            requests = [SampleRequest((7,), seed, group=seed // 8) for seed in range(12 * 8)]
            groups = _groups(await fleet.controller.generate(requests, SAMPLING, enough=5), 8)
            assert sum(all(c.finish_reason != "abort" for c in group) for group in groups) == 5

    run_virtually(work())


def test_an_aborted_call_is_not_sent_again_and_one_just_granted_is_aborted_too() -> None:
    async def work() -> None:
        async with SimulatedFleet(3, limit=4) as fleet:
            requests = make_requests(groups=6, size=4)
            hung = fleet.servers[0]
            running = asyncio.ensure_future(fleet.controller.generate(requests, SAMPLING, enough=3))
            await asyncio.sleep(1.0)
            hung.fail("hung")  # its abort is not answered either
            completions = await running
            assert sum(all(c.finish_reason != "abort" for c in group) for group in _groups(completions, 4)) == 3
            first = fleet.sent[next(iter(fleet.sent))]
            assert [number for _, number in first] == [0]
            assert fleet.controller.engines[0].state == "lost"
            _assert_idle(fleet)

    run_virtually(work())


def test_a_partial_response_that_is_aborted_before_its_next_token_is_no_fault_of_the_engine() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            fleet.sync(2)
            fleet.servers[1].batch.set_speed(1e-6)
            partial = Completion((1,), (0.0,), "abort", ((1, 1),), started=5.0, seconds=7.0)
            requests = [SampleRequest((g,), g, partial) for g in range(2)]
            completions = await fleet.controller.generate(requests, SAMPLING, enough=1)
            assert completions[0].started == 5.0  # the first time that an engine was asked for it
            assert 7.0 <= completions[0].seconds < 67.0
            assert completions[1] == partial
            assert [v for v, _ in completions[0].weight_versions] == [1, 2]
            assert fleet.controller.counters.lost == 0

    run_virtually(work())


def test_calls_that_are_aborted_before_their_first_token_are_no_fault_of_the_engine() -> None:
    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            fleet.servers[1].batch.set_speed(1e-6)
            completions = await fleet.controller.generate(make_requests(groups=8, size=2), SAMPLING, enough=4)
            assert sum(not c.response_ids for c in completions) == 8
            assert fleet.controller.counters.aborted == 4
            assert fleet.controller.counters.lost == 0
            _assert_idle(fleet)

    run_virtually(work())


def test_an_engine_that_refuses_what_is_aborted_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang 0.5.17 answers 400 where the abort comes before it has read the call."""

    async def refuse(self: SimulatedClient, rid: str, count: int) -> None:
        if rid in self._jobs and not (done := self._jobs[rid].done).done():
            done.set_exception(EngineError(f"{self.url}/generate: Request {rid} was aborted", 400, self.url))

    monkeypatch.setattr(SimulatedClient, "abort", refuse)

    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            fleet.servers[1].batch.set_speed(1e-6)
            completions = await fleet.controller.generate(make_requests(groups=8, size=2), SAMPLING, enough=4)
            assert sum(c.finish_reason == "abort" for c in completions) == 8
            assert fleet.controller.counters.lost == 0
            assert fleet.controller.engines[1].failures == 0

    run_virtually(work())


def test_a_call_that_somebody_else_aborted_is_sent_again() -> None:
    """Whoever has the key of an adopted server, for one: `/abort_request` with `abort_all`."""

    async def work() -> None:
        async with SimulatedFleet(2) as fleet:
            requests = make_requests(groups=2, size=4)
            answers = asyncio.ensure_future(fleet.controller.generate(requests, SAMPLING))
            await asyncio.sleep(0.5)
            client = fleet.servers[0].client
            assert client is not None
            await client.abort(next(iter(client._jobs)), 4)
            _assert_answered(requests, await answers, 4)
            assert (fleet.controller.counters.retries, fleet.controller.counters.lost) == (1, 0)

    run_virtually(work())


def test_a_cancelled_run_leaves_no_load_behind_and_others_go_on() -> None:
    async def work() -> None:
        async with SimulatedFleet(4, limit=8) as fleet:
            cancelled = asyncio.ensure_future(fleet.controller.generate(make_requests(40, 4), SAMPLING))
            kept = make_requests(20, 4, first=40)
            other = asyncio.ensure_future(fleet.controller.generate(kept, SAMPLING))
            await asyncio.sleep(7.0)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
            _assert_answered(kept, await other, 4)
            _assert_idle(fleet)
            assert fleet.controller.counters.lost == 0

    run_virtually(work())


def test_a_call_cancelled_as_it_is_granted_makes_way_for_the_next() -> None:
    async def work() -> None:
        async with SimulatedFleet(1, limit=0) as fleet:
            controller = fleet.controller
            first = asyncio.ensure_future(controller.generate(make_requests(1, 4), SAMPLING))
            await asyncio.sleep(0.1)
            second = asyncio.ensure_future(controller._serve(_Call(make_requests(1, 4, 1), "second"), SAMPLING))
            requests = make_requests(1, 4, first=2)
            third = asyncio.ensure_future(controller.generate(requests, SAMPLING))
            await asyncio.sleep(0.1)
            await _ends(fleet, 0)
            assert controller.engines[0].running == 4  # the second has the engine, and does not know yet
            second.cancel()
            _assert_answered(requests, await third, 4)
            assert "second" not in fleet.sent
            await first
            _assert_idle(fleet)

    run_virtually(work())


def test_what_a_call_in_the_queue_held_up_goes_on_when_that_is_cancelled() -> None:
    async def work() -> None:
        async with SimulatedFleet(1, limit=8) as fleet:
            first, large, small = (
                asyncio.ensure_future(fleet.controller.generate(make_requests(1, size, first=n), SAMPLING))
                for n, size in enumerate((4, 8, 4))
            )
            await asyncio.sleep(0.1)
            assert len(fleet.sent) == 1
            large.cancel()
            await asyncio.sleep(0.1)
            assert len(fleet.sent) == 2
            await asyncio.gather(first, small)
            _assert_idle(fleet)

    run_virtually(work())


def test_a_call_in_the_queue_is_aborted_there_and_not_when_an_engine_is_free() -> None:
    async def work() -> None:
        async with SimulatedFleet(1, limit=8) as fleet:
            long, short, large = make_requests(1, 4, first=9), make_requests(1, 4, first=7), make_requests(1, 8)
            assert max(length_of(r.seed, 2048) for r in short) < max(length_of(r.seed, 2048) for r in long)
            others = asyncio.ensure_future(fleet.controller.generate(long, SAMPLING))
            await asyncio.sleep(0.1)
            completions = await fleet.controller.generate([*short, *large], SAMPLING, enough=1)
            assert [c.finish_reason for c in completions[4:]] == ["abort"] * 8
            assert not others.done()
            await others
            _assert_idle(fleet)

    run_virtually(work())


def test_calls_cancelled_while_another_ends_do_not_break_that_one() -> None:
    """The queue then holds calls that are cancelled and have not been told yet."""

    async def work() -> None:
        async with SimulatedFleet(1, limit=0) as fleet:
            controller = fleet.controller
            requests = make_requests(1, 4)
            first = asyncio.ensure_future(controller.generate(requests, SAMPLING))
            await asyncio.sleep(0.1)
            second = asyncio.ensure_future(controller.generate(make_requests(5, 4, first=1), SAMPLING))
            await asyncio.sleep(0.1)
            await _ends(fleet, 0)
            second.cancel()
            await first
            with pytest.raises(asyncio.CancelledError):
                await second
            _assert_idle(fleet)

    run_virtually(work())


def test_the_heap_of_loads_does_not_grow_with_the_calls() -> None:
    async def work() -> None:
        async with SimulatedFleet(4, limit=8) as fleet:
            for step in range(20):
                await fleet.controller.generate(make_requests(50, 4, first=50 * step), SAMPLING)
            assert len(fleet.controller._loads) <= 20

    run_virtually(work())


@pytest.mark.parametrize("enough", [None, 1000])
def test_512_engines_that_fail_often_answer_everything_in_time(enough: int | None) -> None:
    """Two failures an engine and hour, of all kinds, for a step that takes minutes; a step has 1,024 groups of 16."""

    async def work() -> None:
        async with SimulatedFleet(512, limit=16, failures_per_hour=2.0, seed=3) as fleet:
            for step in range(3):
                requests, began = make_requests(1024, 16, first=1024 * step), _now()
                completions = await fleet.controller.generate(requests, SAMPLING, enough=enough)
                assert _now() - began < 400.0
                if enough is None:
                    _assert_answered(requests, completions, 16)
                else:
                    whole = sum(all(c.finish_reason != "abort" for c in group) for group in _groups(completions, 16))
                    assert enough <= whole < 1024
                _assert_idle(fleet)
            assert fleet.controller.counters.lost > 20
            assert fleet.controller.counters.retries > 20
            assert not fleet.controller.in_state("dead")
            assert all(len(tries) <= 5 for tries in fleet.sent.values())

    run_virtually(work())
