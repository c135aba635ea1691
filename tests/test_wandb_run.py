"""What W&B's own process writes of a run, offline, read back from its files; and what a run does without W&B."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32768, struct.Struct("<IHB")  # LevelDB's log: checksum, length, whole/first/middle/last part


def records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file: protobuf messages in a LevelDB log, after 7 bytes of its own."""
    data, at, message = file.read_bytes(), 7, b""
    while at + _HEADER.size <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER.size:  # the padding of a block
            at += _BLOCK - at % _BLOCK
            continue
        _, length, part = _HEADER.unpack_from(data, at)
        message += data[at + _HEADER.size : at + _HEADER.size + length]
        at += _HEADER.size + length
        if part in (1, 4):
            record = Record()
            record.ParseFromString(message)
            yield record
            message = b""


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)


def points(file: Path) -> list[dict[str, Any]]:
    return [
        {
            key: json.loads(item.value_json)
            for item in record.history.item
            if (key := "/".join(item.nested_key))[0] != "_"
        }
        | {"line": record.history.step.num}
        for record in records(file)
        if record.HasField("history")
    ]


def start(run_dir: Path, *calls: str, **environment: str) -> str:
    """A process with a tracker, which `calls` then use; returns what it said.

    Its user has no key, and W&B's server would be one that nobody runs.
    """
    lines = [
        "import pathlib, signal",
        "import psutil",
        "from rloop_mcore.config import TrackingConfig",
        "from rloop_mcore.errors import UserError",
        "from rloop_mcore.tracking import Tracker",
        f"run_dir, config = pathlib.Path({str(run_dir)!r}), TrackingConfig(tensorboard=False, wandb_project='loops')",
        *calls,
        "tracker.close()",
    ]
    home = {"HOME": str(run_dir / "home"), "NETRC": str(run_dir / "netrc"), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | home | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return f"{done.stdout}{done.stderr}"


def test_curves_keys_and_the_same_run_again_after_a_resume(tmp_path: Path) -> None:
    start(
        tmp_path,
        "tracker = Tracker(run_dir, config, keys={'algorithm': {'rl_steps': 200}})",
        "tracker.log(1, 'explore', 3, 203, {'entropy': 0.5, 'grad_norm': float('nan')}, 200)",
        WANDB_MODE="offline",
    )
    start(
        tmp_path,
        "tracker = Tracker(run_dir, config, keys={'algorithm': {'rl_steps': 300}})",
        "tracker.log(1, 'exploit', 7, 400, {'loss': 0.25})",
        WANDB_MODE="offline",
    )
    first, second = files(tmp_path)
    (begun,), (resumed,) = ([r.run for r in records(file) if r.HasField("run")][:1] for file in (first, second))
    assert (begun.project, begun.run_id) == ("loops", resumed.run_id)
    keys = {item.key: json.loads(item.value_json) for item in resumed.config.update}
    assert keys["algorithm"] == {"rl_steps": 300}
    assert points(first) == [{"explore/entropy": 0.5, "explore/step": 203, "line": 1}]
    assert points(second) == [{"exploit_1/loss": 0.25, "exploit_1/step": 7, "line": 2}]
    axes = {r.metric.glob_name: r.metric.step_metric for r in records(first) if r.HasField("metric")}
    assert axes["explore/*"] == "explore/step"


def test_without_a_key_the_user_hears_what_to_set(tmp_path: Path) -> None:
    said = start(tmp_path, "tracker = Tracker(run_dir, config)")
    assert "rloop_mcore.errors.UserError: tracking.wandb_project" in said
    assert "WANDB_API_KEY" in said


def test_a_key_is_missed_before_there_are_ranks_and_without_asking_a_server(tmp_path: Path) -> None:
    check = (
        "from rloop_mcore.wandb_run import check_key",
        "import socket; socket.socket.connect = None",
        "check_key('loops')",
        "print('a key')",
        "sys.exit()",
    )

    def said(**environment: str) -> str:
        return start(tmp_path, "import sys", *check, **environment)

    refused = "UserError: tracking.wandb_project is 'loops', but W&B says: "
    assert f"{refused}No API key configured. Set WANDB_API_KEY" in said()
    assert refused in said(WANDB_API_KEY="short")
    assert said(WANDB_API_KEY="0" * 40) == said(WANDB_MODE="offline") == said(WANDB_MODE="disabled") == "a key\n"
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9\n  login user\n  password {'0' * 40}\n")
    assert said() == "a key\n"


def test_a_server_out_of_reach_costs_nothing(tmp_path: Path) -> None:
    said = start(
        tmp_path,
        "tracker = Tracker(run_dir, config)",
        "tracker.log(0, 'explore', 1, 1, {'entropy': 0.5}, 2)",
        WANDB_API_KEY="0" * 40,
        WANDB_INIT_TIMEOUT="5",
    )
    assert "`wandb sync " in said
    (file,) = files(tmp_path)
    assert points(file) == [{"explore/entropy": 0.5, "explore/step": 1, "line": 1}]


def test_the_run_goes_on_where_wandb_dies(tmp_path: Path) -> None:
    said = start(
        tmp_path,
        "tracker = Tracker(run_dir, config)",
        "(service,) = [p for p in psutil.Process().children(recursive=True) if 'wandb-core' in p.name()]",
        "service.kill()",
        "for step in range(1, 9):",
        "    tracker.log(0, 'explore', step, step, {'entropy': 0.5}, 8)",
        WANDB_MODE="offline",
    )
    assert said.count("W&B gets nothing more") == 1
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 8
