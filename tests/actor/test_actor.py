"""The actor's passes through Megatron's schedule; one process, no collectives."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from rloop_mcore.actor import actor as module  # noqa: E402
from rloop_mcore.actor.packing import Row, Share, micro_batches  # noqa: E402
from rloop_mcore.actor.routing import RoutingReplay  # noqa: E402
from rloop_mcore.config import Config  # noqa: E402


def test_a_pass_without_a_backward_asks_for_no_recomputation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine queues fp8_delayed's scales for each one, and the next update would take the queue's."""
    decoder = torch.nn.Identity()
    chunk: Any = torch.nn.ModuleDict({"decoder": decoder})
    chunk.decoder = decoder
    actor = module.MegatronActor.__new__(module.MegatronActor)
    actor._config, actor._chunks, actor._wrapped = Config(), [chunk], [chunk]
    seen: list[tuple[bool, bool]] = []

    def schedule(**_: Any) -> None:
        seen.append((decoder.training, torch.is_grad_enabled()))

    monkeypatch.setattr(module, "get_forward_backward_func", lambda: schedule)
    batches = micro_batches([Row([1], [2])], Share())
    for forward_only in (True, False):
        actor._schedule(batches, lambda *_: None, 1.0, forward_only)
    assert seen == [(False, False), (True, True)]


def test_choices_of_experts_go_before_those_of_the_next_step_come() -> None:
    """A step's are gigabytes in the memory of each process of a node."""
    row = Row([1], [2, 3])
    trajectory: Any = type("Keyed", (), {"key": 7})()
    routing = RoutingReplay([], top_k=2, experts=4)
    recording = routing.recording([row])
    routing.keep(recording, [trajectory], [row])
    assert routing.replaying([trajectory])
    kept = weakref.ref(routing._kept[7])
    del recording
    routing.recording([row])
    assert kept() is None
