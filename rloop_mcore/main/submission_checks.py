"""What can be told of a job where it is submitted: what its configuration makes impossible, and what it may lack."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from rloop_mcore import validate
from rloop_mcore.compose import load_config
from rloop_mcore.config import GENERATED_MODEL, Config, SlurmConfig
from rloop_mcore.data.curriculum import load_sampler
from rloop_mcore.data.problems import FILES, HF_PREFIX, load_problems, problem_sources
from rloop_mcore.data.prompts import solution_of
from rloop_mcore.data.templates import PromptTemplate, template_file
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.main.changes import check_changes
from rloop_mcore.main.crashes import CrashRecord
from rloop_mcore.main.policies import Source
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.planning.nodes import roles
from rloop_mcore.planning.plan import Plan
from rloop_mcore.planning.search import check_fit
from rloop_mcore.reward.verifiers import load_verifier
from rloop_mcore.wandb_run import check_key
from rloop_mcore.weights.families import check_config, check_folder

_ASK_S = 10.0  # for sinfo, which only a warning comes of
_NOT_HERE = "does not exist here: the job ends at once unless its nodes see it."
# options of commands that name what is read
_READ = ("run", "runs", "first", "second", "policy", "data", "benchmark_files", "against", "source", "config", "file")
_ON_GPUS = ("train", "evaluate", "preflight")  # commands that take them where there are some
_FLAGS_OF_GPUS = ("--gpu", "--gres", "--tres", "-G")
_GPUS = re.compile(r"\bgpu(?::[^:,()]+)?:\d+")  # as sinfo has a node's: gpu:h100:8(S:0-1)


def checked_run(overrides: Sequence[str], force: bool) -> Config:
    """The configuration of a run, checked as far as that is possible here. Raises UserError.

    The layout and the memory where the model's sizes are known here, by model.path or model.architecture; files where
    they are here; where there is a run, as its start will, which takes unsafe changes by `force`.
    """
    config = load_config(overrides)
    in_image = config.cluster.slurm.container != "none"
    validate.check_values(config, elsewhere=in_image)
    validate.check_python(config.rollout, elsewhere=in_image)
    roles(config)
    device = "cuda" if config.cluster.device == "auto" and config.cluster.gpus_per_node else config.cluster.device
    if device != "auto":  # else it is for the nodes to say
        validate.check_device(config, device)
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


def checked_command(overrides: Sequence[str], command: argparse.Namespace) -> Config:
    """The configuration of the job that runs `command`, whose own keys are checked too. Raises UserError.

    What it reads may be there only once it starts: a policy of a run that is still at work, say.
    """
    config = load_config([*overrides, "model.path=?", "data.train=?", "run.dir=."])
    validate.check_values(config)
    in_image = config.cluster.slurm.container != "none"
    if command.command == "evaluate":
        from rloop_mcore.main.evaluate import benchmark_names, keys_of  # what it needs takes a while to import

        run = RunDirectory(command.policy)
        asked = keys_of(command, Source(command.policy, run if run.config.is_file() else None), elsewhere=in_image)
        _check_function(load_verifier, asked.reward.verifier, config.cluster.slurm)
        if not asked.data.template.endswith(".jinja"):
            template_file(asked.data.template)
        benchmark_names(command)
    elif "overrides" in command:
        validate.check_values(load_config(command.overrides, absent="?"), elsewhere=in_image)
    return config


def run_warnings(configs: Sequence[Config], in_the_job: bool) -> Iterator[str]:
    """What a job of these runs may lack. in_the_job: this process is of that job, which has what it asked for."""
    slurm = configs[0].cluster.slurm
    if slurm.container == "none":
        absent = (f"{key}={file}" for config in configs for key, file in _absent(config).items())
        for what in dict.fromkeys(absent):
            yield f"{what} {_NOT_HERE}"
    if projects := [name for config in configs if (name := config.tracking.wandb_project)]:
        yield from _wandb_warnings(projects[0], slurm, in_the_job)
    if not in_the_job:
        yield from _gpu_warnings(configs[0])


def command_warnings(config: Config, command: argparse.Namespace, in_the_job: bool) -> Iterator[str]:
    """As `run_warnings`, of a job that runs `command`."""
    if config.cluster.slurm.container == "none":
        for file in _unseen(command):
            yield f"{file} {_NOT_HERE}"
    if command.command in _ON_GPUS and not in_the_job:
        yield from _gpu_warnings(config)


def _check_inputs(config: Config) -> None:
    """What the run reads: its names, and what is here, of data the first row. Raises UserError."""
    slurm, elsewhere = config.cluster.slurm, _absent(config)
    for key, (source, _) in problem_sources(config).items():
        if key not in elsewhere and not source.startswith(HF_PREFIX):
            first = load_problems(source, 1)[0]
            if key == "sft.demonstrations":
                solution_of(first)
    _check_function(load_verifier, config.reward.verifier, slurm)
    if config.data.sampler is not None:
        _check_function(load_sampler, config.data.sampler, slurm)
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


def _check_function(load: Callable[[str], object], name: str, slurm: SlurmConfig) -> None:
    """That there is one of that name: a shipped one, or the user's where the job has this Python. Raises UserError."""
    own_python = slurm.container != "none" or slurm.venv is not None or slurm.setup
    if not (own_python and ":" in name):
        with redirect_stdout(sys.stderr):  # a module may print as it is imported, and the script is what is printed
            load(name)


def _wandb_warnings(project: str, slurm: SlurmConfig, in_the_job: bool) -> list[str]:
    """Where the job may find no key for W&B: a login shell on its nodes, lines of setup or an image may bring one that
    is not to be seen here."""
    if slurm.container != "none" or slurm.setup:
        return []
    gets_all = in_the_job or "ALL" in slurm.environment
    of_wandb = [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]
    hidden = {name: os.environ.pop(name) for name in of_wandb if not (gets_all or name in slurm.environment)}
    try:
        check_key(project)
        return []
    except UserError as error:
        more = f"; cluster.slurm.environment=[{','.join([*slurm.environment, *hidden])}] gives it what is set here"
        return [f"{error}: the job ends at once unless its nodes know more{more if hidden else ''}."]
    finally:
        os.environ |= hidden


def _gpu_warnings(config: Config) -> list[str]:
    """Where the job asks for no GPU and its nodes have some: it would work on their CPUs."""
    slurm, partition = config.cluster.slurm, config.cluster.slurm.partition
    asked = config.cluster.gpus_per_node or any(flag.startswith(_FLAGS_OF_GPUS) for flag in slurm.flags)
    if asked or config.cluster.device == "cpu" or shutil.which("sinfo") is None:
        return []
    where = [] if partition is None else [f"--partition={partition}"]
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P %G", *where], capture_output=True, text=True, timeout=_ASK_S
        )
    except subprocess.TimeoutExpired:
        return []
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line]
    gpus = {gpu for name, found in rows if partition or name.endswith("*") for gpu in _GPUS.findall(found)}
    if not gpus:
        return []
    return [
        f"the job asks for no GPU; its partition's nodes have some ({', '.join(sorted(gpus))}): choose a cluster "
        "(cluster=h100_8), or set cluster.gpus_per_node; cluster.device=cpu does without."
    ]


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
