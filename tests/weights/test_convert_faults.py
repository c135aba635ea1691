"""What goes wrong while `rloop convert` works: wrong bytes, kills, signals, full disks, other processes."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import edit_tensors, flip_a_bit
from safetensors.torch import load_file

from rloop_mcore.main.cli import main
from rloop_mcore.weights import conversion, hf_to_mcore, mcore_to_hf
from rloop_mcore.weights.digest import digest_of
from rloop_mcore.weights.hf_folder import TensorReader, TensorWriter
from rloop_mcore.weights.sections import Layout
from rloop_mcore.weights.torch_dist import BlockFile, finish


def test_a_byte_that_was_written_wrongly_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf_to_mcore.finish

    def damaged(folder: Path, *arguments: object) -> None:
        flip_a_bit(folder, source)
        whole(folder, *arguments)

    monkeypatch.setattr(hf_to_mcore, "finish", damaged)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 1
    said = capsys.readouterr().err
    assert "model.layers.2.mlp.up_proj.weight, mapped back from its files, is not what was read" in said
    assert not (tmp_path / "mcore").exists()


def test_a_byte_of_a_folder_that_was_written_wrongly_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0

    def damaged(folder: Path) -> TensorReader:
        edit_tensors(folder, lambda t: t["model.layers.3.self_attn.k_proj.bias"].view(torch.int32)[-1:].bitwise_xor_(1))
        return TensorReader(folder)

    monkeypatch.setattr(mcore_to_hf, "TensorReader", damaged)
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 1
    assert "k_proj.bias, model.layers.3.self_attn.v_proj.bias, mapped back from its files" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore", "source"]


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background has it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
from rloop_mcore.main.cli import main
from rloop_mcore.weights import torch_dist
add = torch_dist.BlockFile.add
def slow(*arguments):
    add(*arguments)
    print("block", flush=True)
    time.sleep(2)
torch_dist.BlockFile.add = slow
sys.exit(main(["convert", *sys.argv[1:]]))
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_can_be_repeated(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "mcore"
    process = subprocess.Popen([sys.executable, "-c", SLOW, source, target], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "block" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not target.exists()
    (left,) = tmp_path.glob(".tmp-*-mcore")
    for path in [left, *left.rglob("*")]:
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert main(["convert", str(source), str(target)]) == 0
    assert not left.exists()
    assert main(["convert", str(target), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == digest_of(source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_at_once_and_leaves_nothing(number: int, source: Path, tmp_path: Path) -> None:
    """Ctrl-C, scancel and a terminal that is closed."""
    command = [sys.executable, "-c", SLOW, source, tmp_path / "mcore", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "block" not in process.stdout.readline():
        pass
    process.send_signal(number)
    assert process.wait(25) == 130  # all of it, 35 blocks, would take 70 s
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_was_killed_just_before_is_removed_at_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".tmp-2-mcore"
    left.mkdir()
    whole = hf_to_mcore.finish

    def a_minute_later(*arguments: Any) -> None:
        assert left.exists()  # it might be another machine's, whose lock isn't seen here
        os.utime(left, (time.time() - 100, time.time() - 100))
        whole(*arguments)

    monkeypatch.setattr(hf_to_mcore, "finish", a_minute_later)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore", "source"]


def test_a_file_that_takes_no_more_is_named_by_what_the_system_says(tmp_path: Path) -> None:
    file = BlockFile(tmp_path / "blocks")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.add("key", ((0,), (100_000,)), torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_at_the_last_small_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "common.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        finish(tmp_path, [], {})


@pytest.mark.parametrize("how", ["another", "none"])
def test_a_source_that_is_replaced_meanwhile_is_converted_as_it_was(how: str, source: Path, tmp_path: Path) -> None:
    before, file = digest_of(source), source / "model.safetensors"
    conversion = hf_to_mcore.plan(source, tmp_path / "mcore", Layout())
    tensors = dict(sorted(load_file(file).items(), reverse=True))
    file.unlink()
    if how == "another":
        plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with TensorWriter(source, plan) as writer:  # in another order
            for name, tensor in tensors.items():
                writer.write(name, tensor * 2)
    conversion.run(lambda size: None)
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == before


def test_a_target_that_somebody_made_meanwhile_is_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf_to_mcore.finish

    def late(*arguments: Any) -> None:
        (tmp_path / "mcore").mkdir()
        (tmp_path / "mcore" / "precious").write_text("x")
        whole(*arguments)

    monkeypatch.setattr(hf_to_mcore, "finish", late)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 1
    assert "was made by somebody else meanwhile" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mcore").iterdir()] == ["precious"]


def test_what_another_process_is_writing_is_left_alone(source: Path, tmp_path: Path) -> None:
    mine = f".tmp-{os.getpid()}-mcore"  # in another container
    others = [tmp_path / name for name in (mine, ".tmp-2-mcore", ".tmp-3-my-mcore")]
    for number, other in enumerate(others):
        other.mkdir()
        if number:  # quiet for long: the second is locked, the third has another target
            os.utime(other, (time.time() - 1000, time.time() - 1000))
    lock = os.open(others[1], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    os.close(lock)
    assert all(other.exists() for other in others)


def test_copies_wait_for_room() -> None:
    memory, held = conversion.Memory(10), []

    def work(size: int) -> None:
        with memory.of(size):
            held.append(size)
            assert sum(held) <= 10 or held == [25]
            time.sleep(0.01)
            held.remove(size)

    conversion.in_threads([lambda n=n: work(n) for n in (4, 6, 3, 25, 7, 10, 1)], 4, memory)
