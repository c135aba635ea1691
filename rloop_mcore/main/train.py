"""`rloop train`: check everything, lock the run directory, start the ranks with torchrun, watch them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rloop_mcore import platform, validate
from rloop_mcore.compose import flat, load_config, read_config, to_yaml
from rloop_mcore.config import Config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.data.problems import load_problems
from rloop_mcore.data.prompts import TextTokenizer
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.errors import UserError
from rloop_mcore.main.run_directory import GENERATED_MODEL, SUPERVISOR_VARIABLE, RunDirectory
from rloop_mcore.planning.layouts import processes
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.platform.process import die_with_parent
from rloop_mcore.weights.tensor_files import catalogue

# A resumed run may change these. Another layout, device or number of threads gives the same run up to rounding.
_MAY_CHANGE = (
    *("run.dir", "tracking.", "cluster.", "checkpoint.", "layout.", "actor.micro_batch_tokens", "actor.recompute"),
    *("reward.workers", "reward.max_failure_share", "rollout.endpoints", "rollout.mismatch_"),
    *("rollout.start_timeout_s", "rollout.request_timeout_s"),
    *("guard.", "optimizer.skip_grad", "rft.optimizer.skip_grad", "sft.optimizer.skip_grad"),
)


def train(overrides: Sequence[str]) -> int:
    """Run or resume one training run; returns the exit code. Raises UserError."""
    config = load_config(overrides)
    validate.check_values(config)
    run = RunDirectory(Path(config.run.dir))
    if config.model.path == GENERATED_MODEL and not run.model(config).exists():
        run.create()
        write_model(run.model(config), seed=0)
    problems = _check_inputs(config, run.model(config))
    with run.lock():
        _check_same_run(run, config)
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
    validate.check_model(config, model)
    catalogue(model)
    TextTokenizer(model)
    PromptTemplate(config.data.template)
    if config.data.validation is not None:
        load_problems(config.data.validation, config.evaluation.limit)
    if config.sft.demonstrations is not None:
        load_problems(config.sft.demonstrations, config.sft.limit)
    return len(load_problems(config.data.train, config.data.limit))


def _check_same_run(run: RunDirectory, config: Config) -> None:
    if not run.journal.exists():  # nothing has been done with an earlier configuration
        return
    before, now = flat(read_config(run.config)), flat(config)
    for key, value in now.items():
        if before[key] != value and not key.startswith(_MAY_CHANGE):
            raise UserError(
                f"{run.path} was started with {key}={before[key]}, not {value}: resume it with the same command, "
                "or choose another run.dir."
            )


def _supervise(run: RunDirectory, config: Config) -> int:
    run.clear_ending()
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
            preexec_fn=lambda: die_with_parent(supervisor),
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


@contextmanager
def _stop_signals(run: RunDirectory, ranks: subprocess.Popen[bytes]) -> Iterator[None]:
    """First SIGTERM or SIGINT: finish the step, checkpoint, exit 75. Second: kill at once (a resume still works)."""

    def handle(signum: int, frame: Any) -> None:
        if run.stop_requested():
            run.write_ending(75, "killed as asked; the same command goes on from the last commit")
            ranks.kill()
            return
        run.request_stop()
        print("rloop: stopping after this step; again to kill at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
