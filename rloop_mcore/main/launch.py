"""`rloop launch`: write the batch script of a run, an array of them or another command, and give it to sbatch."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rloop_mcore.config import Config
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.submission_checks import checked_command, checked_run, command_warnings, run_warnings
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.slurm.script import Run, command_script, log_file, training_script

_SUBMIT_S = 120.0


def launch(options: argparse.Namespace) -> int:
    """Submit a training run, an array of them, or another `rloop` command; or print the script. Raises UserError."""
    # the job itself, which has its script printed to run it, as slurm/*.sbatch do
    in_the_job = options.dry_run and "SLURM_JOB_ID" in os.environ
    runs: list[Run] = []
    if options.inner:
        config = checked_command(options.overrides, options.inner_options)
        script = command_script(config, options.inner)
        warnings = command_warnings(config, options.inner_options, in_the_job)
    else:
        runs, configs = _runs(options)
        config = configs[0]
        script = training_script(config, runs, options.force)
        warnings = run_warnings(configs, in_the_job)
    for words in warnings:
        print(f"rloop: warning: {words}", file=sys.stderr)
    if options.dry_run:
        print(script, end="")
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("sbatch is not on PATH here: run this where jobs are submitted, or add --dry-run.")
    kept = [folder / "job.sh" for folder in _folders(runs)]
    new = [path for path in kept if not path.exists()]
    for path in new:  # the others after it is accepted: a job that goes on may still submit the one that is there
        write_atomic(path, script)
    try:
        job = _submit(script)
    except UserError:
        for path in new:
            _remove(path)
        raise
    print(f"submitted job {job}; its log is {_log_of(job, log_file(runs, config.cluster.slurm.flags), len(runs))}")
    for path in kept:
        write_atomic(path, script)
    return 0


def _runs(options: argparse.Namespace) -> tuple[list[Run], list[Config]]:
    """The run, or those of the sweep, with their configurations, which are checked."""
    runs, configs = [], []
    for where, line in ({"": []} if options.sweep is None else _lines(options.sweep)).items():
        overrides = [*options.overrides, *line]
        try:
            config = checked_run(overrides, options.force)
        except UserError as error:
            raise UserError(f"{where}{error}") from error
        runs.append(Run(Path(config.run.dir).absolute(), overrides))
        configs.append(config)
    _check_distinct(runs, configs)
    return runs, configs


def _lines(file: Path) -> dict[str, list[str]]:
    """The overrides of each line of a sweep file, by where it is; empty lines and comments are none."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--sweep {file} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--sweep {file} has to be UTF-8 text ({error.reason}, byte {error.start}).") from error
    found = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{file}, line {number}: no words of a shell ({error}).") from error
        if words:
            found[f"{file}, line {number}: "] = words
    if not found:
        raise UserError(f"--sweep {file} is empty: write the overrides of one run on each line.")
    return found


def _check_distinct(runs: Sequence[Run], configs: Sequence[Config]) -> None:
    """Runs of one job have a directory each, and the same wishes of Slurm."""
    seen: dict[Path, int] = {}
    for number, run in enumerate(runs, 1):
        if run.directory in seen:
            raise UserError(
                f"runs {seen[run.directory]} and {number} of the sweep have one run.dir={run.directory}: write one on "
                "each line."
            )
        seen[run.directory] = number
    for number, config in enumerate(configs, 1):
        if (config.cluster, config.rollout.nodes) != (configs[0].cluster, configs[0].rollout.nodes):
            raise UserError(f"run {number} of the sweep changes cluster.* or rollout.nodes, which one job has once.")


def _folders(runs: Sequence[Run]) -> list[Path]:
    """Make the folder of each run that is for its jobs: what Slurm logs to must be there. Raises UserError."""
    directories = [RunDirectory(run.directory) for run in runs]
    for directory in directories:
        directory.create()
        directory.jobs.mkdir(exist_ok=True)
    return [directory.jobs for directory in directories]


def _remove(script: Path) -> None:
    """Remove what a refused job leaves: its script, and the folders around it that hold nothing else."""
    script.unlink()
    with suppress(OSError):
        script.parent.rmdir()
        script.parent.parent.rmdir()


def _submit(script: str) -> str:
    """Give the script to sbatch; returns the job's id."""
    try:
        done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True, timeout=_SUBMIT_S)
    except subprocess.TimeoutExpired:
        raise Fault(
            f"sbatch did not answer within {_SUBMIT_S:g} s: see with squeue whether it took the job, before the same "
            "command again."
        ) from None
    if done.returncode != 0:
        raise UserError(f"sbatch refuses the job: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def _log_of(job: str, log: str, runs: int) -> str:
    log = log.replace("%j", job).replace("%A", job).replace("%a", "K")
    return f"{log} for run K, from 0 on" if runs > 1 else log
