"""The weight broadcast between processes, beside a default group as the trainer has one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from rloop_mcore.platform.process_group import join_group
from rloop_mcore.weights import channel as channel_module
from rloop_mcore.weights.channel import BroadcastChannel

TENSORS = [torch.arange(6.0).reshape(2, 3), torch.tensor([0.5]), torch.randn(4, 4).t()]
SHAPES = [list(tensor.shape) for tensor in TENSORS]


@pytest.fixture(scope="module", autouse=True)
def _default_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """A process of engine_rank.py."""

    def __init__(self, how: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("engine_rank.py")), how]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def join(self, address: str, port: int, world_size: int, rank: int, shapes: list[list[int]]) -> None:
        self.process.stdin.write(json.dumps([address, port, world_size, rank, "weights", shapes]) + "\n")
        self.process.stdin.flush()

    def received(self) -> list:
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def engines() -> Iterator[list[Engine]]:
    both = [Engine("ours"), Engine("sglang")]
    yield both
    for engine in both:
        engine.process.kill()
        engine.process.communicate(timeout=60)


def test_two_engines_receive_bit_for_bit(engines: list[Engine]) -> None:
    channel = BroadcastChannel("gloo", "weights", timeout_s=60)
    address, port = channel.open(world_size=3)
    for rank, engine in enumerate(engines, start=1):
        engine.join(address, port, 3, rank, SHAPES)
    channel.join()
    channel.send(TENSORS)
    channel.close()
    for engine in engines:
        assert engine.received() == [tensor.tolist() for tensor in TENSORS]


def test_an_engine_that_left_is_an_error_and_the_channel_reopens(engines: list[Engine]) -> None:
    channel = BroadcastChannel("gloo", "weights", timeout_s=20)
    engines[0].join(*channel.open(world_size=2), 2, 1, [])
    channel.join()
    assert engines[0].received() == []  # it wanted no tensors and has left
    with pytest.raises(TimeoutError, match=r"weight broadcast \d of 3 to the 1 engine ranks of 'weights'"):
        channel.send([torch.zeros(1 << 20)] * 3)

    engines[0].join(*channel.open(world_size=2), 2, 1, SHAPES)
    channel.join()
    channel.send(TENSORS)
    channel.close()
    assert engines[0].received() == [tensor.tolist() for tensor in TENSORS]


def test_an_engine_that_never_joins() -> None:
    channel = BroadcastChannel("gloo", "weights", timeout_s=1)
    channel.open(world_size=2)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"'weights': rank 0 waited 1 s for all 2 ranks at 127\.0\.0\.1"):
        channel.join()
    assert time.monotonic() - started < 10
    channel.close()


def test_a_group_whose_store_is_gone_is_no_long_wait() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=f"group 'gone': nobody waits at 127.0.0.1:{port}"):
        join_group("gloo", "127.0.0.1", port, 2, 1, "gone", timeout_s=20.0)
    assert time.monotonic() - begun < 5


def test_who_is_on_its_way_to_a_rendezvous_that_is_given_up_learns_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine has failed. This one would knock at a closed port until its own deadline, deaf to all else."""
    monkeypatch.setattr(channel_module, "_LAST_COME_S", 6.0)  # for a busy machine
    channel = BroadcastChannel("gloo", "given up", timeout_s=60)
    address, port = channel.open(world_size=3)
    closing = threading.Thread(target=channel.close)
    closing.start()
    time.sleep(0.2)
    store = dist.TCPStore(address, port, 3, is_master=False, timeout=timedelta(seconds=10))
    with pytest.raises(dist.DistNetworkError, match="Connection was likely closed"):  # and not that it has timed out
        store.wait(["the other engine"], timedelta(seconds=60))
    closing.join()


@pytest.mark.parametrize("before", [None, "0"])
def test_a_peer_that_dies_in_nccl_does_not_end_the_trainer(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's watchdog would, but for this variable, which it reads when the group is made; other groups keep it."""
    seen = []
    make = c10d._new_process_group_helper

    def made(*arguments: Any, **options: Any) -> Any:
        seen.append(os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))
        return make(*arguments, **options)

    monkeypatch.setattr(c10d, "_new_process_group_helper", made)
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", before)
    channel = BroadcastChannel("gloo", "alone", timeout_s=30)
    channel.open(1)
    channel.join()
    channel.close()
    assert seen == ["1"]
    assert os.environ.get("TORCH_NCCL_BLOCKING_WAIT") == before


def test_the_rendezvous_listens_on_loopback_only() -> None:
    channel = BroadcastChannel("gloo", "weights", timeout_s=5)
    _, port = channel.open(world_size=2)
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(OSError, match="refused"):  # 127.0.0.2 is this machine too, by another address
        socket.create_connection(("127.0.0.2", port), timeout=5)
    channel.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_order_of_calls() -> None:
    channel = BroadcastChannel("gloo", "weights", timeout_s=1)
    with pytest.raises(RuntimeError, match=r"call open\(\) first"):
        channel.join()
    with pytest.raises(RuntimeError, match=r"call join\(\) first"):
        channel.send(TENSORS)
