"""What a node finds out about itself: GPUs from a program called nvidia-smi, versions, a revision."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.preflight import facts
from rloop_mcore.preflight.facts import Facts, gather, query_gpus

SMI = """#!/bin/sh
case "$1" in
--query-gpu=index*) printf '0, GPU-a, NVIDIA H100 80GB HBM3, 3\\n1, GPU-b, NVIDIA H100 80GB HBM3, 40210\\n' ;;
--query-compute-apps*) printf 'GPU-b\\nGPU-b\\n' ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name; the test writes it."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    return tmp_path / "nvidia-smi"


def test_gpus_and_who_uses_them(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(g.index, g.uuid, g.used_mib, g.processes) for g in query_gpus()] == [
        (0, "GPU-a", 3, 0),
        (1, "GPU-b", 40210, 2),
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a")
    assert [g.index for g in query_gpus()] == [0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [g.index for g in query_gpus()] == [1]


def test_a_driver_that_hangs_or_fails_is_said(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_PATIENCE_S", 0.2)
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(OSError, match=r"nvidia-smi did not answer within 0\.2 s"):
        query_gpus()
    smi.write_text("#!/bin/sh\necho 'Unable to determine the device handle for GPU1: GPU is lost.'; exit 15\n")
    with pytest.raises(OSError, match="nvidia-smi failed: Unable to determine the device handle for GPU1: GPU is lost"):
        query_gpus()


def test_versions_are_those_of_the_interpreters(tmp_path: Path) -> None:
    import torch

    given = ["model.path=m", "data.train=d", f"run.dir={tmp_path}", "rollout.python=" + sys.executable]
    found = gather(load_config([*given, "cluster.device=cpu"]))
    assert found.device == "cpu"
    assert found.versions["torch"] == torch.__version__
    assert found.versions["sglang"].startswith("unknown (")  # this one has none
    assert set(found.free_gib) == {str(tmp_path), "/tmp", "/dev/shm"}
    assert Facts.of(asdict(found)) == found
