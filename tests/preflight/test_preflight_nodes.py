"""`rloop preflight` on several nodes: real processes, sockets, files and gloo; each bad node is named."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nodes
import pytest
import torch
from nodes import Node

from rloop_mcore.errors import Fault
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.platform.network import addresses
from rloop_mcore.preflight.meeting import Meeting
from rloop_mcore.preflight.place import Place

pytestmark = pytest.mark.timeout(120)


def test_fit_nodes_are_fit(tmp_path: Path) -> None:
    codes, report, printed = nodes.run(tmp_path, [Node(), Node(), Node()])
    assert codes == [0, 0, 0], printed
    assert (report["ok"], report["exit_code"], report["bad_nodes"], report["problems"]) == (True, 0, [], [])
    assert [node["name"] for node in report["nodes"]] == ["n0", "n1", "n2"]
    assert [link["nodes"] for link in report["links"]] == [["n0", "n1"], ["n1", "n2"], ["n2", "n0"]]
    assert report["all_reduce_gb_s"] > 0
    assert report["broadcast_gb_s"] > 0
    assert "preflight: 3 nodes are fit (cpu)" in printed
    assert not list((tmp_path / "run").glob(".tmp-*"))
    RunDirectory(tmp_path / "run").create()  # a run may begin where a preflight was


def test_a_node_alone_is_told_of_as_one(tmp_path: Path) -> None:
    codes, _, printed = nodes.run(tmp_path, [Node()])
    assert (codes, "preflight: the node is fit (cpu)" in printed) == ([0], True), printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(("without", "code"), [([True], 69), ([True, True], 2), ([True, False], 69)])
def test_a_node_that_sees_no_gpu_is_told_that_alone(tmp_path: Path, without: list[bool], code: int) -> None:
    """No collective is tried on it, which would fail in other words."""
    asked = [Node(["cluster.device=cuda"] if blind else []) for blind in without]
    codes, report, printed = nodes.run(tmp_path, asked)
    assert codes == [code] * len(without), printed
    (problem,) = report["problems"]
    assert problem["message"].endswith(": torch sees no GPU, and cluster.device=cuda")
    assert problem["nodes"] == ([] if code == 2 else ["n0"])


def test_each_bad_node_is_named_with_what_is_bad(tmp_path: Path) -> None:
    """One is missing, one has another Megatron-Core, one another time, one another run.dir; two are fit."""
    site = tmp_path / "site" / "megatron_core-0.1.dist-info"
    site.mkdir(parents=True)
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.1\n")
    (tmp_path / "elsewhere").mkdir()
    bad = [None, Node(site=site.parent), Node(ahead_s=-30.0), Node([f"run.dir={tmp_path / 'elsewhere'}"])]
    codes, report, printed = nodes.run(tmp_path, [Node(), *bad, Node()], "preflight.timeout_s=10")
    assert codes == [69, None, 69, 69, 69, 69], printed
    assert report["exit_code"] == 69
    lines = {problem["nodes"][0]: problem["message"] for problem in report["problems"]}
    assert set(lines) == set(report["bad_nodes"]) == {"n1", "n2", "n3", "n4"}
    assert lines["n1"] == "n1: did not come within 10 s"
    assert lines["n2"].startswith("n2: megatron-core 0.1, not ")
    assert lines["n3"] == "n3: its clock is 30.0 s behind the others', more than preflight.clock_skew_s=2"
    assert lines["n4"].startswith("n4: sees another run.dir")
    assert [line for line in printed.splitlines() if line.startswith("n")] == [
        problem["message"] for problem in report["problems"]
    ]
    assert [node["present"] for node in report["nodes"]] == [True, False, True, True, True, True]


def test_the_nodes_are_asked_over_the_interface_of_the_run(tmp_path: Path) -> None:
    codes, report, printed = nodes.run(tmp_path, [Node(), Node(["cluster.interface=ib7"])], "cluster.interface=lo")
    assert codes == [69, 69], printed
    (problem,) = report["problems"]
    assert (problem["check"], problem["nodes"]) == ("network", ["n1"])
    assert problem["message"].startswith("n1: cluster.interface=ib7 has no IPv4 address on ")


def test_a_node_without_the_model_is_named(tmp_path: Path) -> None:
    """Its ranks would end the run as if that were the user's mistake, and nothing would start it again."""
    (tmp_path / "config.json").touch()
    lacks = Node([f"model.path={tmp_path}/unmounted"])
    codes, report, printed = nodes.run(tmp_path, [Node(), lacks, Node()], f"model.path={tmp_path}")
    assert codes == [69, 69, 69], printed
    (problem,) = report["problems"]
    assert problem["message"].startswith(f"n1: sees no {tmp_path}/unmounted/config.json: model.path must be on a file")


def test_a_missing_node_0_is_named_by_the_others(tmp_path: Path) -> None:
    codes, report, printed = nodes.run(tmp_path, [None, Node(), Node()], "preflight.timeout_s=3")
    assert codes == [None, 69, 69]
    assert report["bad_nodes"] == ["n0"]
    assert "n1 says: n0: can't be reached at 127.0.0.1:" in printed


def test_a_node_that_stops_in_the_middle_is_named(tmp_path: Path) -> None:
    """It has said that it is there when it is stopped: the others find that it does not answer."""
    started = nodes.start(tmp_path, [Node(), Node(), Node(late_s=5.0)], "preflight.timeout_s=10")
    frozen = started[1]
    assert frozen is not None
    time.sleep(2.5)
    os.kill(frozen.pid or 0, signal.SIGSTOP)
    try:
        for process in (started[0], started[2]):
            assert process is not None
            process.join(nodes.DEADLINE_S)
            assert process.exitcode == 69
    finally:
        frozen.kill()
    _, report, printed = nodes.finish(tmp_path, started)
    assert report["bad_nodes"] == ["n1"], printed


def test_what_every_node_lacks_is_the_users(tmp_path: Path) -> None:
    codes, report, printed = nodes.run(tmp_path, [Node(), Node()], "preflight.shm_gib=1e6")
    assert (codes, report["bad_nodes"]) == ([2, 2], [])
    assert "every node: " in printed
    assert "GiB are free in /dev/shm, not preflight.shm_gib=1e+06" in printed


def test_a_run_dir_that_nobody_shares_is_the_users(tmp_path: Path) -> None:
    own = [Node([f"run.dir={tmp_path / name}"]) for name in ("run", "b", "c")]
    codes, report, printed = nodes.run(tmp_path, own)
    assert (codes, report["bad_nodes"]) == ([2, 2, 2], [])
    assert "every node: sees another run.dir" in printed


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_run_dir_is_said(full_disk: Path) -> None:
    codes, report, _ = nodes.run(full_disk, [Node()], "preflight.run_gib=0.5")
    assert (codes, report["bad_nodes"]) == ([2], [])
    assert "GiB are free there, not preflight.run_gib=0.5" in report["problems"][0]["message"]
    with open(full_disk / "filler", "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    codes, _, printed = nodes.run(full_disk, [Node(), Node()])
    assert codes == [2, 2]
    assert "run: 0 GiB are free there, not preflight.run_gib=0.0001" in printed


def test_slurms_variables_do_instead_of_options(tmp_path: Path) -> None:
    """The names are addresses of this host, so that they resolve."""
    step = {"SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "127.0.0.[1-2]", "SLURM_JOB_ID": str(nodes.free_port())}
    each = [Node(environment={**step, "SLURM_NODEID": str(rank)}) for rank in range(2)]
    codes, report, printed = nodes.finish(tmp_path, nodes.start(tmp_path, each, options=[]))
    assert codes == [0, 0], printed
    assert [node["name"] for node in report["nodes"]] == ["127.0.0.1", "127.0.0.2"]


def test_a_port_that_is_taken_is_a_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Fault, match=f"node 0 can't listen at 127.0.0.1:{port}"):
            Meeting(Place(2, 0, "127.0.0.1", port, ()), 1.0)


def test_node_0_listens_where_the_others_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name leads to loopback, as in the /etc/hosts of Debian."""
    own = next((address for address in addresses() if not address.startswith("127.")), None)
    if own is None:
        pytest.skip("this machine has no address but loopback")
    known, real = {"n0": "127.0.1.1", "n1": own, "n2": "127.0.0.1"}, socket.getaddrinfo
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *more, **named: real(known.get(host, host), *more, **named))
    assert Meeting(Place(2, 0, "n0", nodes.free_port(), ("n0", "n1")), 1.0).address == own
    for name in ("n2", "unknown"):  # all on this machine; names that don't resolve
        assert Meeting(Place(2, 0, "n0", nodes.free_port(), ("n0", name)), 1.0).address == "127.0.1.1"
