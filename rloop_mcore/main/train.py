"""`rloop train`: check everything, lock the run directory, start the ranks with torchrun, watch them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rloop_mcore import platform, validate
from rloop_mcore.compose import load_config, to_yaml
from rloop_mcore.config import Config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.data.problems import load_problems
from rloop_mcore.data.prompts import TextTokenizer
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.main.changes import take_changes
from rloop_mcore.main.deadline import check_job_end, in_words, job_end
from rloop_mcore.main.run_directory import GENERATED_MODEL, SUPERVISOR_VARIABLE, RunDirectory, check_not_removed
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.cluster import check_cluster
from rloop_mcore.planning.layouts import processes
from rloop_mcore.planning.search import check_fit
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.platform.process import die_with_parent
from rloop_mcore.weights.tensor_files import catalogue

_SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)  # what Slurm's --signal sends


def train(overrides: Sequence[str], force: bool) -> int:
    """Run or resume one training run; returns the exit code. `force` takes unsafe changes. Raises UserError."""
    config = load_config(overrides)
    validate.check_values(config)
    check_cluster(config)
    check_job_end(config.cluster)
    run = RunDirectory(Path(config.run.dir))
    if config.model.path == GENERATED_MODEL and not run.model(config).exists():
        run.create()
        write_model(run.model(config), seed=0)
    problems = _check_inputs(config, run.model(config))
    with run.lock():
        take_changes(run, config, force)
        write_atomic(run.config, to_yaml(config))
        for warning in validate.warnings(config, problems):
            print(f"rloop: warning: {warning}", file=sys.stderr, flush=True)
        return _supervise(run, config)


def _check_inputs(config: Config, model: Path) -> int:
    """Read whatever the run will read, so that a mistake shows now; returns the number of training problems."""
    device = platform.choose(config.cluster.device)
    validate.check_device(config, device)
    if device == "cuda":
        platform.check_gpus(processes(config.layout), config.precision)
    check_not_removed(model)
    validate.check_model(config, model)
    if device == "cuda" and config.cluster.gpu.memory_gib:
        check_fit(Architecture.of(validate.read_hf_config(model), model / "config.json"), config)
    catalogue(model)
    TextTokenizer(model)
    PromptTemplate(config.data.template)
    if config.data.validation is not None:
        load_problems(config.data.validation, config.evaluation.limit)
    if config.sft.demonstrations is not None:
        load_problems(config.sft.demonstrations, config.sft.limit)
    return len(load_problems(config.data.train, config.data.limit))


def _supervise(run: RunDirectory, config: Config) -> int:
    run.clear_ending()
    end, margin_s = job_end(config.cluster), config.cluster.stop_margin_s
    if end is not None and (left_s := end - time.time()) < margin_s:
        message = (
            f"not started: {in_words(end)}, in {left_s:.0f} s, less than cluster.stop_margin_s={margin_s:g}; the same "
            "command goes on in another job"
        )
        run.write_ending(75, message)
        print(f"rloop: {message}", file=sys.stderr)
        return 75
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"),
        *("--nproc-per-node", str(processes(config.layout)), "-m", "rloop_mcore.main.worker", str(run.path)),
    ]
    supervisor = os.getpid()
    # one host for now: neither the rendezvous nor gloo has to be reached from another
    environment = {**os.environ, SUPERVISOR_VARIABLE: str(supervisor), "GLOO_SOCKET_IFNAME": "lo"}
    with open(run.log, "ab") as log:
        # a session of its own: Ctrl-C reaches only the supervisor, which asks the run to stop at a step's end
        ranks = subprocess.Popen(
            command,
            stderr=log,
            start_new_session=True,
            env=environment,
            preexec_fn=lambda: _become_a_rank(supervisor),
        )
        with _stop_signals(run, ranks):
            code = ranks.wait()
    ending = run.ending()
    if ending is not None:
        if ending["message"]:
            print(f"rloop: {ending['message']}", file=sys.stderr)
        return int(ending["code"])
    run.write_ending(1, f"the ranks ended with exit code {code} without a word", run.log_tail())
    print(
        f"rloop: the ranks ended with exit code {code}; the log is {run.log}, its end:\n{run.log_tail()}",
        file=sys.stderr,
    )
    return 1


def _become_a_rank(supervisor: int) -> None:
    """Slurm signals every process of a job's step; only the supervisor is to heed it."""
    for number in _SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(supervisor)


@contextmanager
def _stop_signals(run: RunDirectory, ranks: subprocess.Popen[bytes]) -> Iterator[None]:
    """A signal: finish the step, checkpoint, exit 75. A second SIGTERM or SIGINT: kill at once (a resume still works).

    SIGUSR1 and SIGUSR2 are for schedulers, which tell a job so that it will soon be killed, perhaps more than once.
    """
    insisted = False

    def handle(signum: int, frame: Any) -> None:
        nonlocal insisted
        if insisted and signum not in _SCHEDULERS:
            run.write_ending(75, "killed as asked; the same command goes on from the last commit")
            ranks.kill()
            return
        insisted = insisted or signum not in _SCHEDULERS
        try:
            if not run.stop_requested():
                run.request_stop(f"{signal.Signals(signum).name} came")
        except OSError as error:
            print(f"rloop: the run cannot be told to stop ({error}): again to kill it", file=sys.stderr, flush=True)
            return
        print("rloop: stopping after this step; Ctrl-C or SIGTERM again to kill at once", file=sys.stderr, flush=True)

    numbers = (signal.SIGTERM, signal.SIGINT, *_SCHEDULERS)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
