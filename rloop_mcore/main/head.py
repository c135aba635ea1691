"""The first node of a job, as the others need it: where it is reached, and which of all ranks brought the job down."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from rloop_mcore.config import Config
from rloop_mcore.main.engine_keeper import start_keeper
from rloop_mcore.main.job_folder import Head, JobFolder, head_address
from rloop_mcore.main.ranks import Rendezvous, first_failure
from rloop_mcore.main.run_directory import RunDirectory, log_tail
from rloop_mcore.planning.nodes import roles
from rloop_mcore.platform.network import free_port

_OTHERS_S = 10.0  # for the other nodes to say what became of their ranks
_POLL_S = 0.2


def first_rendezvous(
    config: Config, run: RunDirectory, job: JobFolder
) -> tuple[Rendezvous, subprocess.Popen[bytes] | None]:
    """Wait for the other nodes and tell them where this one is; the keeper of its engines, if it has some.

    Everything that the others read of the run must be there. Raises Fault when one doesn't come.
    """
    nodes = roles(config)
    if nodes.nodes == 1:
        return Rendezvous(nodes.ranks), None
    others = job.wait_for_nodes(nodes.nodes, config.cluster.start_timeout_s)
    address = head_address(others, config.cluster.interface)
    head = Head(address, free_port(address, int(os.environ["SLURM_JOB_ID"])))
    job.publish_head(head)
    keeper = start_keeper(run.path, job, 0, address) if 0 in nodes.hosts else None
    return Rendezvous(nodes.ranks, 0, nodes.trainers, address, address, head.port), keeper


def explain(run: RunDirectory, job: JobFolder, nodes: int) -> None:
    """After a fault: make the ending name the rank that fell first, and show the end of its log first of all.

    The ranks that it was working with fall after it, and may be the first to say so.
    """
    ending = run.ending() or {"code": 1, "message": ""}
    if ending["code"] != 1:
        return
    own = first_failure(job.log("torchrun-0"))
    if own is not None:
        job.write_failure(0, own)
    deadline = time.monotonic() + (_OTHERS_S if nodes > 1 else 0.0)
    while not (failures := job.failures(nodes)) or (failures[0]["code"] >= 0 and time.monotonic() < deadline):
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)
    first = failures[0]
    log = job.log(f"rank-{first['rank']}")
    print(f"rloop: the end of {log}:\n{log_tail(log)}\n", file=sys.stderr)
    if first["code"] < 0:
        place = f"rank {first['rank']} on node {first['node']} ({first['host']})"
        run.write_ending(1, f"{place} was killed by signal {-first['code']}", log_tail(log))
