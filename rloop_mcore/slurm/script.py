"""From a configuration to the batch script of its job. Every value is checked, or quoted for the shell."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from rloop_mcore.config import Config, SlurmConfig
from rloop_mcore.errors import UserError

# variables of the submitting shell that every job gets, beside cluster.slurm.environment
_ALWAYS = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "TZ", "TMPDIR", "RLOOP_CHAIN")
# what sbatch reads otherwise in an #SBATCH line, or a shell would; not & | ( ), of which constraints are made
_SIGNS = re.compile(r"[\s'\"\\`$;<>#]")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED")
_LONGEST_WARNING_S = 65535
_LONGEST_MINUTES = 24 * 60  # written as a plain number: YAML makes 3600 of 1:00:00
# options of sbatch that are not for cluster.slurm.flags, and what to do instead
_DECIDED = {
    "array": "`rloop launch --sweep FILE` makes an array, a run.dir each",
    "chdir": "a job runs where it is submitted",
    "export": "list variables in cluster.slurm.environment, or [ALL]",  # RLOOP_CHAIN is among them
    "nodes": "set cluster.nodes",
    "time": "set cluster.slurm.time",
    "wait": "rloop launch does not wait for the job's end",
    "test-only": "`rloop launch --dry-run` prints the script",
}
_SHORT = {"a": "array", "D": "chdir", "N": "nodes", "t": "time", "W": "wait"}
_OUTPUT = re.compile(r"(?:--ou[a-z]*=|-o)(.+)")  # sbatch takes a name's beginning
_READ_S = 60.0  # for bash to read a few lines, on a login node that is busy
_WAY_OUT_S = 20  # before a job's end, to have it requeued while it still runs


@dataclass(frozen=True)
class Run:
    """One training run of a job: an array has several."""

    directory: Path  # absolute
    overrides: Sequence[str]


def training_script(config: Config, runs: Sequence[Run], force: bool) -> str:
    """The job that trains `runs`, one a task of an array where there are several. Raises UserError for a bad value.

    Nodes that have engines only are the last ones, or a second component of a heterogeneous job.
    force: the first start takes unsafe changes, and goes on after a row of equal faults.
    """
    slurm, nodes = config.cluster.slurm, config.cluster.nodes
    _check(slurm)
    apart = config.rollout.nodes if slurm.hetjob else 0
    margins = (slurm.signal_s, "cluster.slurm.signal_s"), (config.cluster.stop_margin_s, "cluster.stop_margin_s")
    least_s, key = max(margins)
    if slurm.time is not None and 0 < (limit_s := _seconds(slurm.time)) <= least_s:
        raise UserError(
            f"cluster.slurm.time={slurm.time} is {limit_s} s, and {key}={least_s:g} s before its end a job has to "
            f"stop: raise the limit, or lower {key}."
        )
    if slurm.hetjob and not apart:
        raise UserError("cluster.slurm.hetjob=true needs rollout.nodes, the second component, to be 1 or more.")
    _check_directories(runs, slurm.container)
    array = "" if len(runs) == 1 else f"--array=0-{len(runs) - 1}"
    output = log_file(runs, slurm.flags)
    directives = _directives(config, nodes - apart, output, slurm.flags)
    directives += ["--requeue", f"--signal=B:USR1@{slurm.signal_s}", *([array] if array else [])]
    if apart:
        directives += ["hetjob", *_directives(config, apart, output, slurm.engine_flags)]
    return _render(
        "job.sh.jinja",
        config,
        _checked(directives),
        runs=[{"directory": shlex.quote(str(run.directory)), "overrides": shlex.join(run.overrides)} for run in runs],
        placement="--het-group=0,1" if apart else f"--nodes={nodes} --ntasks={nodes} --ntasks-per-node=1",
        retries=slurm.retries,
        backoff=slurm.backoff_s,
        resubmit=slurm.resubmit,
        preflight=slurm.preflight,
        exclude_bad=slurm.exclude_bad,
        force=force,
        way_out_s=_WAY_OUT_S,
        saved="$run_dir/slurm/job.sh",
    )


def log_file(runs: Sequence[Run], flags: Sequence[str]) -> str:
    """Where the job's output goes, by Slurm's patterns: %j the job, %A the array, %a the task. No run: a command's.

    flags: cluster.slurm.flags, of which the last --output is what sbatch takes.
    """
    if chosen := [found[1] for found in map(_OUTPUT.fullmatch, flags) if found]:
        return chosen[-1]
    if not runs:
        return "rloop-%j.out"
    return f"{runs[0].directory}/slurm/%j.out" if len(runs) == 1 else f"{runs[0].directory.parent}/%A_%a.out"


def command_script(config: Config, command: Sequence[str]) -> str:
    """The job that runs another `rloop` command on one node. Raises UserError for a bad value."""
    flags = config.cluster.slurm.flags
    _check(config.cluster.slurm)
    directives = _directives(config, 1, log_file((), flags), flags)
    return _render("command.sh.jinja", config, _checked(directives), command=shlex.join(command))


def _directives(config: Config, nodes: int, output: str, flags: Sequence[str]) -> list[str]:
    """Options of one component of the job."""
    slurm, gpus = config.cluster.slurm, config.cluster.gpus_per_node
    name = slurm.job_name or Path(config.run.dir).name or "rloop"
    named = [(f"--{key}", getattr(slurm, key)) for key in ("partition", "account", "qos", "constraint", "time")]
    return [
        f"--job-name={name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={slurm.cpus_per_node}"] if slurm.cpus_per_node else ["--exclusive", "--mem=0"]),
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        *(f"{option}={value}" for option, value in named if value is not None),
        f"--output={output}",
        "--open-mode=append",
        f"--export={','.join((*_ALWAYS, *slurm.environment))}",
        *flags,
    ]


def _seconds(limit: str) -> int:
    """Of MINUTES[:SECONDS], HOURS:MINUTES:SECONDS or DAYS-HOURS[:MINUTES[:SECONDS]]; 0 for no limit."""
    if limit == "UNLIMITED":
        return 0
    days, dash, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if dash or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False))


def _check(slurm: SlurmConfig) -> None:
    for name in slurm.environment:
        if not _NAME.fullmatch(name):
            raise UserError(f"cluster.slurm.environment holds {name!r}: give names of variables; their values follow.")
    if slurm.time is not None and not _TIME.fullmatch(slurm.time):
        raise UserError(f"cluster.slurm.time={slurm.time} is no time limit: write 04:00:00, 2-12:00:00 or minutes.")
    if slurm.time is not None and slurm.time.isdigit() and int(slurm.time) > _LONGEST_MINUTES:
        raise UserError(
            f"cluster.slurm.time={slurm.time} is {int(slurm.time) / 1440:.3g} days of minutes: write 2-12:00:00 for "
            "days, and in a YAML file quotes around '1:00:00', which it takes for 3600."
        )
    if slurm.signal_s > _LONGEST_WARNING_S:
        raise UserError(f"cluster.slurm.signal_s={slurm.signal_s} is more than Slurm's {_LONGEST_WARNING_S}.")
    for key in ("flags", "engine_flags"):
        for flag in getattr(slurm, key):
            if not flag.startswith("-"):
                raise UserError(f"cluster.slurm.{key} holds {flag!r}: an option of sbatch looks like --exclude=n7.")
            name = flag[2:].partition("=")[0] if flag.startswith("--") else _SHORT.get(flag[1:2], "")
            for option, instead in _DECIDED.items():
                if name and option.startswith(name):  # sbatch takes a name's beginning
                    raise UserError(f"cluster.slurm.{key} holds {flag!r}: {instead}.")
    for line in slurm.setup:
        if "\n" in line:
            raise UserError(f"cluster.slurm.setup holds {line!r}: give one shell line an entry.")
    closed = "{ :; " + "\n".join(slurm.setup) + "\n}"  # a line that goes on would take what comes next
    read = subprocess.run(["/bin/bash", "-n"], input=closed, capture_output=True, text=True, timeout=_READ_S)
    if read.returncode != 0:
        why = read.stderr.partition("\n")[0].removeprefix("/bin/bash: ")
        raise UserError(f"cluster.slurm.setup={slurm.setup} is nothing that bash can run: {why}.")
    if slurm.container == "none" and (slurm.image or slurm.mounts):
        raise UserError("cluster.slurm.image and mounts need cluster.slurm.container=pyxis or apptainer.")
    if slurm.container != "none" and not slurm.image:
        raise UserError(f"cluster.slurm.container={slurm.container} needs cluster.slurm.image.")
    for mount in slurm.mounts:
        if not re.fullmatch(r"/[^:,]*(:/[^:,]*(:r[ow])?)?", mount):
            raise UserError(f"cluster.slurm.mounts holds {mount!r}: write /HOST:/CONTAINER[:ro].")


def _check_directories(runs: Sequence[Run], container: str) -> None:
    """Slurm puts the job's number where the name of a log has %, and mounts are lists with : and ,."""
    for run in runs:
        for sign in str(run.directory):
            if _SIGNS.match(sign) or sign in ("%" if container == "none" else "%:,"):
                called = "blank" if sign.isspace() else sign
                raise UserError(
                    f"run.dir={run.directory} cannot be a job's, for the {called} in it: choose another name."
                )


def _checked(directives: list[str]) -> list[str]:
    for line in directives:
        if _SIGNS.search(line):
            raise UserError(f"{line!r} can't stand in an #SBATCH line: leave out blanks, quotes and shell signs.")
    return directives


def _render(template: str, config: Config, directives: list[str], **values: object) -> str:
    slurm = config.cluster.slurm
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # it is no HTML: what is quoted is quoted for the shell
    )
    return environment.get_template(template).render(
        directives=directives,
        setup=slurm.setup,
        cpus=slurm.cpus_per_node,
        wrapper=_wrapper(config),
        rloop=shlex.join(_rloop(slurm)),
        **values,
    )


def _rloop(slurm: SlurmConfig) -> list[str]:
    """The program that tasks run: of the venv, of the container, or the one that writes the script."""
    if slurm.venv is not None:
        return [f"{slurm.venv}/bin/rloop"]
    return ["rloop"] if slurm.container != "none" else [sys.executable, "-P", "-m", "rloop_mcore.main.cli"]


def _wrapper(config: Config) -> str:
    """What stands between srun's options and the program: nothing, or the container, which sees run.dir and where the
    job was submitted as they are."""
    slurm = config.cluster.slurm
    if slurm.container == "none":
        return ""
    here = '"$PWD"', '"${run_dir:-$PWD}"'
    mounts = [shlex.quote(mount if ":" in mount else f"{mount}:{mount}") for mount in slurm.mounts]
    bound = ",".join([*(f"{place}:{place}" for place in here), *mounts])
    image = shlex.quote(str(slurm.image))
    if slurm.container == "pyxis":
        return f' --container-image={image} --container-mounts={bound} --container-workdir="$PWD"'
    gpus = " --nv" if config.cluster.gpus_per_node else ""
    return f' apptainer exec{gpus} --bind {bound} --pwd "$PWD" {image}'
