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

from rloop_mcore import validate
from rloop_mcore.compose import flat, load_config, read_config, to_yaml
from rloop_mcore.config import Config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.data.problems import load_problems
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.errors import UserError
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.platform.process import die_with_parent

GENERATED_MODEL = "countdown"  # as model.path

# A resumed run may change these; everything else decides what is computed.
_MAY_CHANGE = (
    *("run.dir", "tracking.", "cluster.", "checkpoint.", "layout.", "reward.workers", "reward.max_failure_share"),
    *("rollout.endpoints", "rollout.mismatch_", "rollout.start_timeout_s", "rollout.request_timeout_s"),
)


def train(overrides: Sequence[str]) -> int:
    """Run or resume one training run; returns the exit code. Raises UserError."""
    config = load_config(overrides)
    validate.check_values(config)
    run = RunDirectory(Path(config.run.dir))
    if config.model.path == GENERATED_MODEL:
        config.model.path = str(_generated_model(run))
    validate.check_model(config)
    PromptTemplate(config.data.template)
    problems = load_problems(config.data.train, config.data.limit)
    if config.data.validation is not None:
        load_problems(config.data.validation, config.evaluation.limit)
    with run.lock():
        _check_same_run(run, config)
        write_atomic(run.config, to_yaml(config))
        for warning in validate.warnings(config, len(problems)):
            print(f"rloop: warning: {warning}", file=sys.stderr, flush=True)
        return _supervise(run, config)


def _generated_model(run: RunDirectory) -> Path:
    """The countdown task's untrained model, as a folder of the run."""
    folder = run.path / "model"
    if not folder.exists():
        run.create()
        write_model(folder, seed=0)
    return folder


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
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(_world_size(config)), "-m", "rloop_mcore.main.worker", str(run.path)),
    ]
    supervisor = os.getpid()
    with open(run.log, "ab") as log:
        # a session of its own: Ctrl-C reaches only the supervisor, which asks the run to stop at a step's end
        ranks = subprocess.Popen(
            command, stderr=log, start_new_session=True, preexec_fn=lambda: die_with_parent(supervisor)
        )
        with _stop_signals(run, ranks):
            code = ranks.wait()
    ending = run.ending()
    if ending is not None:
        if ending["message"]:
            print(f"rloop: {ending['message']}", file=sys.stderr)
        return int(ending["code"])
    run.write_ending(1, f"the ranks ended with exit code {code} without a word")
    print(
        f"rloop: the ranks ended with exit code {code}; the log is {run.log}, its end:\n{run.log_tail()}",
        file=sys.stderr,
    )
    return 1


def _world_size(config: Config) -> int:
    layout = config.layout
    return layout.tp * layout.pp * layout.cp * layout.dp


@contextmanager
def _stop_signals(run: RunDirectory, ranks: subprocess.Popen[bytes]) -> Iterator[None]:
    """First SIGTERM or SIGINT: finish the step, checkpoint, exit 75. Second: kill at once (a resume still works)."""

    def handle(signum: int, frame: Any) -> None:
        if run.stop_requested():
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
