"""`rloop launch`: check a run where it is submitted, write its batch script, give it to sbatch."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path

from rloop_mcore import validate
from rloop_mcore.compose import load_config
from rloop_mcore.config import GENERATED_MODEL, Config, SlurmConfig
from rloop_mcore.data.curriculum import load_sampler
from rloop_mcore.data.problems import FILES, HF_PREFIX, load_problems, problem_sources
from rloop_mcore.data.prompts import solution_of
from rloop_mcore.data.templates import PromptTemplate, template_file
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.main.changes import check_changes
from rloop_mcore.main.crashes import CrashRecord
from rloop_mcore.main.policies import Source
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.planning.nodes import roles
from rloop_mcore.planning.plan import Plan
from rloop_mcore.planning.search import check_fit
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.reward.verifiers import load_verifier
from rloop_mcore.slurm.script import Run, command_script, log_file, training_script
from rloop_mcore.wandb_run import check_key
from rloop_mcore.weights.families import check_config, check_folder

_SUBMIT_S = 120.0
_ASK_S = 10.0  # for sinfo, which only a warning comes of
_NOT_HERE = "does not exist here: the job ends at once unless its nodes see it."
# options of commands that name what is read
_READ = ("run", "runs", "first", "second", "policy", "data", "benchmark_files", "against", "source", "config", "file")
_ON_GPUS = ("train", "evaluate", "preflight")  # commands that take them where there are some
_FLAGS_OF_GPUS = ("--gpu", "--gres", "--tres", "-G")
_GPUS = re.compile(r"\bgpu(?::[^:,()]+)?:\d+")  # as sinfo has a node's: gpu:h100:8(S:0-1)


def launch(options: argparse.Namespace) -> int:
    """Submit a training run, an array of them, or another `rloop` command; or print the script. Raises UserError."""
    runs: list[Run] = []
    if options.inner:
        config = load_config([*options.overrides, "model.path=?", "data.train=?", "run.dir=."])
        validate.check_values(config)
        _check_command(options.inner_options, elsewhere=config.cluster.slurm.container != "none")
        if config.cluster.slurm.container == "none":
            for file in _unseen(options.inner_options):
                print(f"rloop: warning: {file} {_NOT_HERE}", file=sys.stderr)
        script = command_script(config, options.inner)
    else:
        lines = {"": []} if options.sweep is None else _lines(options.sweep)
        configs = []
        for where, line in lines.items():
            try:
                configs.append(_config([*options.overrides, *line], options.force))
            except UserError as error:
                raise UserError(f"{where}{error}") from error
        runs = [
            Run(Path(config.run.dir).absolute(), [*options.overrides, *line])
            for config, line in zip(configs, lines.values(), strict=True)
        ]
        _check_distinct(runs, configs)
        if configs[0].cluster.slurm.container == "none":
            absent = (f"{key}={file}" for config in configs for key, file in _absent(config).items())
            for what in dict.fromkeys(absent):
                print(f"rloop: warning: {what} {_NOT_HERE}", file=sys.stderr)
        config = configs[0]
        script = training_script(config, runs, options.force)
        if projects := [name for each in configs if (name := each.tracking.wandb_project)]:
            _warn_of_wandb(projects[0], config.cluster.slurm, _in_the_job(options.dry_run))
    if not _in_the_job(options.dry_run) and (not options.inner or options.inner_options.command in _ON_GPUS):
        _warn_of_gpus(config)
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


def _in_the_job(dry_run: bool) -> bool:
    """Whether this is the job itself, which has its script printed to run it, as slurm/*.sbatch do."""
    return dry_run and "SLURM_JOB_ID" in os.environ


def _config(overrides: Sequence[str], force: bool) -> Config:
    """A run's configuration, checked as far as that is possible where it is submitted.

    The layout and the memory where the model's sizes are known here, by model.path or model.architecture; files where
    they are here; where there is a run, as its start will, which takes unsafe changes by `force`.
    """
    config = load_config(overrides)
    in_image = config.cluster.slurm.container != "none"
    validate.check_values(config, elsewhere=in_image)
    validate.check_python(config.rollout, elsewhere=in_image)
    roles(config)
    folder = Path(config.model.path)
    if there := (folder / "config.json").is_file():
        check_config(folder, config.model.family)
    if there or any(vars(config.model.architecture).values()):
        check_fit(Plan.of(validate.check_sizes(config, *validate.stated_sizes(config.model)), config))
    _check_inputs(config)
    run = RunDirectory(Path(config.run.dir))
    check_changes(run, config, force)
    if not force:
        CrashRecord(run, config).check(force=False)
    return config


def _check_inputs(config: Config) -> None:
    """What the run reads: its names, and what is here, of data the first row. Raises UserError."""
    slurm, elsewhere = config.cluster.slurm, _absent(config)
    for key, (source, _) in problem_sources(config).items():
        if key not in elsewhere and not source.startswith(HF_PREFIX):
            first = load_problems(source, 1)[0]
            if key == "sft.demonstrations":
                solution_of(first)
    own_python = slurm.container != "none" or slurm.venv is not None or slurm.setup
    for load, name in ((load_verifier, config.reward.verifier), (load_sampler, config.data.sampler)):
        if name is not None and not (own_python and ":" in name):
            with redirect_stdout(sys.stderr):  # a module may print as it is imported, and the script is what is printed
                load(name)
    tokenizer = None
    if config.model.path != GENERATED_MODEL and "model.path" not in elsewhere:
        check_folder(Path(config.model.path), config.model.family)
        tokenizer = TextTokenizer(Path(config.model.path))
    if "data.template" in elsewhere:
        return
    if tokenizer is not None:
        PromptTemplate(config.data.template, tokenizer)
    else:
        template_file(config.data.template)


def _warn_of_wandb(project: str, slurm: SlurmConfig, in_the_job: bool) -> None:
    """Say it where the job may find no key for W&B: a login shell on its nodes, lines of setup or an image may bring
    one that is not to be seen here."""
    if slurm.container != "none" or slurm.setup:
        return
    gets_all = in_the_job or "ALL" in slurm.environment
    of_wandb = [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]
    hidden = {name: os.environ.pop(name) for name in of_wandb if not (gets_all or name in slurm.environment)}
    try:
        check_key(project)
    except UserError as error:
        more = f"; cluster.slurm.environment=[{','.join([*slurm.environment, *hidden])}] gives it what is set here"
        print(
            f"rloop: warning: {error}: the job ends at once unless its nodes know more{more if hidden else ''}.",
            file=sys.stderr,
        )
    finally:
        os.environ |= hidden


def _check_command(command: argparse.Namespace, elsewhere: bool) -> None:
    """The keys of a command that a job is to run, `elsewhere` where in an image. Raises UserError.

    What it reads may be there only once it starts: a policy of a run that is still at work, say.
    """
    if command.command == "evaluate":
        from rloop_mcore.main.evaluate import benchmark_names, keys_of  # what it needs takes a while to import

        run = RunDirectory(command.policy)
        keys_of(command, Source(command.policy, run if run.config.is_file() else None), elsewhere)
        benchmark_names(command)
    elif "overrides" in command:
        validate.check_values(load_config(command.overrides, absent="?"), elsewhere)


def _warn_of_gpus(config: Config) -> None:
    """Say it where the job asks for no GPU and its nodes have some: it would work on their CPUs."""
    slurm, partition = config.cluster.slurm, config.cluster.slurm.partition
    asked = config.cluster.gpus_per_node or any(flag.startswith(_FLAGS_OF_GPUS) for flag in slurm.flags)
    if asked or config.cluster.device == "cpu" or shutil.which("sinfo") is None:
        return
    where = [] if partition is None else [f"--partition={partition}"]
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %G", *where], capture_output=True, text=True, timeout=_ASK_S
        )
    except subprocess.TimeoutExpired:
        return
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line]
    gpus = {gpu for name, found in rows if partition or name.endswith("*") for gpu in _GPUS.findall(found)}
    if gpus:
        print(
            f"rloop: warning: the job asks for no GPU; its partition's nodes have some ({', '.join(sorted(gpus))}): "
            "choose a cluster (cluster=h100_8), or set cluster.gpus_per_node; cluster.device=cpu does without.",
            file=sys.stderr,
        )


def _absent(config: Config) -> dict[str, str]:
    """Files of the run that are not to be seen here, by key: all, where it runs in an image.

    Its nodes may see more, so it is for the user to say.
    """
    slurm = config.cluster.slurm
    files = {key: source for key, (source, _) in problem_sources(config).items() if Path(source).suffix in FILES}
    if config.model.path != GENERATED_MODEL:
        files["model.path"] = config.model.path
    if config.data.template.endswith(".jinja"):
        files["data.template"] = config.data.template
    if slurm.venv is not None:
        files["cluster.slurm.venv"] = slurm.venv
    return {key: file for key, file in files.items() if slurm.container != "none" or not Path(file).exists()}


def _unseen(command: argparse.Namespace) -> Iterator[str]:
    """What a command would read and that is not to be seen here."""
    for name in _READ:
        given = vars(command).get(name) or []
        for path in given if isinstance(given, list) else [given]:
            if not Path(path).exists() and (name != "data" or Path(path).suffix in FILES):
                yield str(path)


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
