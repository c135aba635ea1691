"""`rloop node`: what a job starts on each of its nodes. The first trains as `rloop train` does; the others follow."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rloop_mcore.compose import load_config
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.main.engine_keeper import start_keeper
from rloop_mcore.main.job_folder import JobFolder
from rloop_mcore.main.ranks import SCHEDULERS, Rendezvous, first_failure, start_ranks
from rloop_mcore.main.run_directory import FOLDER_VARIABLE, RunDirectory, log_tail
from rloop_mcore.main.train import train
from rloop_mcore.main.watchdog import keep_stacks
from rloop_mcore.planning.nodes import roles
from rloop_mcore.platform.network import address_of, address_towards

_FIRST_WAIT_S = 300.0  # where the configuration is wrong, and says nothing of how long
_LAST_WAIT_S = 120.0  # for the first node to end once this one has failed
_WAY_OUT_S = 20.0  # for its processes to end after that
_POLL_S = 0.2

Work = tuple[subprocess.Popen[bytes], Path]  # a process of this node, and its log


def node(overrides: Sequence[str], force: bool) -> int:
    """Do this node's part of the job; returns the exit code, of which the first node's is the job's.

    Raises UserError outside of a job.
    """
    job = JobFolder.of_this_job()
    if job is None or "SLURM_PROCID" not in os.environ:
        raise UserError(f"`rloop node` is for the jobs of `rloop launch`, which set {FOLDER_VARIABLE}.")
    number = int(os.environ["SLURM_PROCID"])
    return _first(overrides, force, job) if number == 0 else _other(overrides, job, number)


def _first(overrides: Sequence[str], force: bool, job: JobFolder) -> int:
    code = 1
    try:
        job.new_key()
        code = train(overrides, force, job)
    except (UserError, Fault) as error:
        print(f"rloop: {error}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    finally:
        with suppress(OSError):  # of a disk that is full, read-only or away, which was said
            job.end(code)
    return code


def _other(overrides: Sequence[str], job: JobFolder, number: int) -> int:
    for signum in SCHEDULERS:  # the first node's to heed
        signal.signal(signum, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s node {number} %(levelname)s %(name)s: %(message)s")
    job.hello(number)
    run = RunDirectory(job.folder.parent.parent)  # as the batch script made it: the configuration may be wrong
    try:
        work = _start(overrides, run, job, number)
    except (UserError, Fault, OSError) as error:
        run.write_error(error, f"node {number} ({socket.gethostname()}): ")
        _wait_for_the_first(job)
        raise
    return 0 if work is None else _follow(run, job, number, work)


def _start(overrides: Sequence[str], run: RunDirectory, job: JobFolder, number: int) -> dict[str, Work] | None:
    """Start what this node has of the job; None where the first node has ended. Raises UserError, Fault and OSError."""
    try:
        config = load_config(overrides)
    except UserError:
        if job.wait_for_head(_FIRST_WAIT_S) is None:
            return None  # the first node has said it
        raise  # only here is it wrong
    head = job.wait_for_head(config.cluster.start_timeout_s)
    if head is None:
        return None
    interface = config.cluster.interface
    address = address_towards(head.address) if interface is None else address_of(interface)
    nodes = roles(config)
    work: dict[str, Work] = {}
    if number in nodes.hosts:
        keeper = start_keeper(run.path, job, number, address)
        work["keeper of the engines"] = keeper, job.log(f"engines-{number}")
    if number < nodes.trainers:
        log = job.log(f"torchrun-{number}")
        rendezvous = Rendezvous(nodes.ranks, number, nodes.trainers, address, head.address, head.port)
        work["ranks"] = start_ranks(run.path, rendezvous, log), log
    return work


def _follow(run: RunDirectory, job: JobFolder, number: int, work: dict[str, Work]) -> int:
    """Wait for this node's processes to end, or the first node; meanwhile keep stacks where it asks for them."""
    while not job.ended() and all(process.poll() is None for process, _ in work.values()):
        if (stamp := job.stacks_asked(number)) is not None:
            job.stacks_kept(number, keep_stacks(run, stamp))
        time.sleep(_POLL_S)
    ended = {name: log for name, (process, log) in work.items() if process.poll()}
    if ended and not job.ended():
        _tell(run, job, number, *next(iter(ended.items())))
    _wait_for_the_first(job)
    if "ranks" in work:
        work["ranks"][0].terminate()
    for process, _ in work.values():
        with suppress(subprocess.TimeoutExpired):  # the keeper stops its engines; ranks may hang
            process.wait(_WAY_OUT_S)
    return 1 if ended else 0


def _wait_for_the_first(job: JobFolder) -> None:
    """So that it is the first node whose exit code Slurm sees."""
    deadline = time.monotonic() + _LAST_WAIT_S
    while not job.ended() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _tell(run: RunDirectory, job: JobFolder, number: int, name: str, log: Path) -> None:
    """What has ended on this node, for the first node to explain."""
    if (failure := first_failure(log)) is not None:
        job.write_failure(number, failure)
    if run.ending() is None:
        run.write_ending(1, f"the {name} of node {number} ended without a word", log_tail(log))
