"""The arguments of every `rloop` command."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from rloop_mcore import config
from rloop_mcore.config import config_folder

_EXAMPLES = {  # of each command's --help; formatted with `keys` and `folder`
    "train": """
  rloop train experiment=tiny run.dir=runs/tiny        every phase in a minute or less
  rloop train experiment=quickstart_base               the quickstart's base model; then experiment=quickstart
  rloop train model.path=/models/Qwen2.5-Math-7B data.train=dapo.jsonl data.validation=aime24.jsonl run.dir=runs/7b

The same command again goes on where the run stands, after any kill.
Every key, with its default and meaning: {keys}
Experiments: {folder}
""",
    "launch": """
  rloop launch experiment=rloop_qwen2.5_math_7b model.path=/models/Qwen2.5-Math-7B run.dir=/shared/runs/7b --dry-run
  rloop launch experiment=rloop_qwen2.5_math_7b model.path=/models/Qwen2.5-Math-7B --sweep sweep.txt
  rloop launch cluster=h100_8 cluster.slurm.time=60 -- evaluate --policy runs/7b --data aime24.jsonl
""",
    "plan": """
  rloop plan experiment=qwen2.5_72b cluster=h100_64
  rloop plan model=qwen2.5_7b cluster=h100_8 layout=tp4 layout.dp=2 rollout=sglang_colocated rollout.engines=8 --search
""",
    "preflight": """
  rloop preflight experiment=tiny                                               this machine alone
  srun --ntasks-per-node=1 rloop preflight experiment=tiny run.dir=/shared/run  in an allocation
""",
    "status": """
  rloop status runs/tiny
  rloop status runs/tiny --json
""",
    "evaluate": """
  rloop evaluate --policy runs/7b --step best --benchmarks aime24,math500
  rloop evaluate --policy /models/Qwen2.5-Math-7B --data my.jsonl --samples 8 --k 1,8 --json base.json
  rloop evaluate --policy runs/7b --step last --data my.jsonl --samples 8 --k 1,8 --against base.json
""",
    "report": """
  rloop report runs/7b runs/dapo --out both.html
  rloop report runs/7b --live --port 8000
""",
    "compare": """
  rloop compare runs/dapo runs/7b --json differences.json
""",
    "cache": """
  rloop cache runs/7b
  rloop cache runs/7b --iteration 0 --problem q1 --show 16
  rloop cache runs/7b --export rows.jsonl
""",
    "trace": """
  rloop trace runs/7b
""",
    "convert": """
  rloop convert /models/Qwen2.5-7B checkpoint --dtype bf16 --tp 4
  rloop convert checkpoint folder
""",
    "grade": """
  rloop grade answers.jsonl --json graded.jsonl

answers.jsonl has a row a line, such as {{"id": "q1", "gold": "42", "pred": "so it is \\\\boxed{{42}}"}}.
""",
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command and its options; `inner` is what follows `--` in `rloop launch ... -- COMMAND...`, and
    `inner_options` what that says (None without one).

    Overrides (KEY=VALUE) may stand between options. Leaves the process with 2 for what no command takes.
    """
    top = _parser()
    inner: Sequence[str] = ()
    read: argparse.Namespace | None = None
    if words[:1] == ["launch"] and "--" in words:
        words, inner = words[: words.index("--")], words[words.index("--") + 1 :]
        read = parse(inner)  # its mistakes show here, not in the job
        if read.command in ("launch", "node"):
            top.error(f"a job runs no rloop {read.command}: what follows -- does the work itself, as evaluate does")
    options, rest = top.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-") or "=" not in word or "overrides" not in options]:
        top.error(f"{' '.join(unknown)}: not known to rloop {options.command}, see rloop {options.command} --help")
    if inner and (options.sweep or options.force):
        top.error("--sweep and --force are for training runs, and what follows -- is another command")
    if rest:
        options.overrides += rest
    options.inner, options.inner_options = inner, read
    return options


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="rloop",
        description="RL on verifiable rewards, in iterations (arXiv 2511.04285).",
        epilog="Begin with: rloop train experiment=tiny run.dir=runs/tiny. rloop COMMAND --help has more examples.",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print rloop_mcore's version")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        *(_train, _launch, _plan, _preflight, _status, _evaluate),
        *(_report, _compare, _cache, _trace, _convert, _grade, _node),
    ):
        add(commands)
    for name, examples in _EXAMPLES.items():
        command = commands.choices[name]
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        command.description = textwrap.fill(command.description or "", 100)
        command.epilog = "examples:" + examples.format(keys=config.__file__, folder=config_folder() / "experiment")
    return top


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version  # here: it takes a while

        print(f"rloop_mcore {version('rloop-mcore')}")
        parser.exit()


def _new_file(text: str) -> Path:
    """The path of a file that can be written, or written over. Raises ArgumentTypeError: not when the work is done."""
    of_a_process = os.path.islink(text) and os.readlink(text).startswith("/proc/")  # /dev/stdout: to be left there
    if of_a_process or (os.path.exists(text or ".") and not os.path.isfile(text)):
        raise argparse.ArgumentTypeError(f"{text or 'an empty path'} is no ordinary file: give the path of one")
    return _new(text, within=Path(text).parent)


def _new_folder(text: str) -> Path:
    """The path of a folder that can be made, or written to. Raises ArgumentTypeError."""
    return _new(text, within=Path(text))


def _new(text: str, within: Path) -> Path:
    """The path `text`, where the nearest folder around it that is there takes a file of that name."""
    place = next(folder for folder in (within.absolute(), *within.absolute().parents) if os.path.lexists(folder))
    try:
        NamedTemporaryFile(dir=place, prefix=f".tmp-{Path(text).name}").close()  # not every file system minds its modes
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written in {place}: {error.strerror}") from error
    return Path(text)


def _number(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds."""

    def number(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} to {most}")
        return int(text)

    return number


def _train(commands: Any) -> None:
    command = commands.add_parser(
        "train",
        help="run RLoop (or plain DAPO, or SFT), or resume it",
        description="Run, or resume, one training run in run.dir.",
    )
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, e.g. algorithm.rl_steps=100"
    )
    command.add_argument(
        "--force",
        action="store_true",
        help="resume although a changed key makes it another run, or it failed alike three times",
    )


def _launch(commands: Any) -> None:
    command = commands.add_parser(
        "launch",
        usage="rloop launch [-h] [--dry-run] [--force] [--sweep FILE] [KEY=VALUE ...] [-- COMMAND ...]",
        help="submit a run, or another command, as a Slurm job",
        description="Check a run, write its batch script (cluster.* says what it asks for) and submit it; it starts "
        "itself again until it is done. After `--`: another rloop command to run as a job, e.g. -- evaluate ...",
    )
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for rloop train")
    command.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    command.add_argument("--force", action="store_true", help="as for rloop train, at the first start of the job")
    command.add_argument("--sweep", type=Path, metavar="FILE", help="an array: a run a line, each its own overrides")


def _plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="memory, legal layouts and time of a run, before a GPU is used",
        description="What a run takes of each GPU and how long a step is, from its configuration alone: no GPU, "
        "weights, data or run.dir needed. Exit code 2 where it can't fit, with the nearest that does.",
    )
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. experiment=qwen2.5_72b cluster=h100_64"
    )
    command.add_argument("--json", action="store_true", help="one JSON object on standard output")
    command.add_argument("--search", action="store_true", help="rank all legal layouts of the cluster's GPUs")


def _preflight(commands: Any) -> None:
    command = commands.add_parser(
        "preflight",
        help="is every node of a job fit for the run? Names the ones that are not",
        description="Run once on every node of a job, before `rloop train`: GPUs, versions, disks, clocks, network, a "
        "small all-reduce. Exit code 69: a bad node, which preflight.json in run.dir names (docs/preflight.md).",
    )
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="those of rloop train")
    command.add_argument("--nodes", type=int, metavar="N", help="how many run it (default: as Slurm says, or 1)")
    command.add_argument("--node-rank", type=int, metavar="R", help="this one, from 0 (default: as Slurm says, or 0)")
    command.add_argument("--master", metavar="HOST:PORT", help="where node 0 listens")
    command.add_argument("--names", metavar="LIST", help="the nodes by rank: n1,n2 or n[1-2] (default: Slurm's)")
    command.add_argument("--json", action="store_true", help="node 0 prints its report as one JSON object")


def _status(commands: Any) -> None:
    command = commands.add_parser(
        "status", help="where a run stands", description="Where a run stands: state, phase, step, cache, last metrics."
    )
    command.add_argument("run", type=Path, metavar="RUN_DIR")
    command.add_argument("--json", action="store_true", help="one JSON object on standard output")


def _evaluate(commands: Any) -> None:
    command = commands.add_parser(
        "evaluate",
        help="Avg@N, pass@k and maj@k of a policy on benchmarks",
        description="Sample responses of a policy, grade them, print Avg@N, unbiased pass@k and maj@k with 95 % "
        "intervals. The same command again goes on where a killed one stood; more samples add to those there are.",
    )
    command.add_argument(
        "--policy", required=True, type=Path, metavar="PATH", help="a Hugging Face folder, Megatron checkpoint or run"
    )
    command.add_argument("--step", metavar="NAME", help="of a run: i1_explore_000100, theta_1, last or best (default)")
    command.add_argument(
        "--data", action="append", metavar="FILE", help="problems: JSONL, Parquet or hf:NAME[:SPLIT]; may be repeated"
    )
    command.add_argument("--benchmarks", action="append", metavar="NAME,...", help="aime24, math500, ... from the hub")
    command.add_argument(
        "--benchmark-files", type=Path, metavar="FOLDER", help="where the benchmarks are as files: FOLDER/aime24.jsonl"
    )
    command.add_argument("--samples", type=int, metavar="N", help="responses a problem (default: evaluation.samples)")
    command.add_argument("--k", metavar="K,...", help="the k of pass@k (default: evaluation.k)")
    command.add_argument("--json", type=_new_file, metavar="OUT", help="write the result as JSON too")
    command.add_argument(
        "--against", type=Path, metavar="JSON", help="an earlier result: paired differences with p-values"
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/evaluations"),
        help="where samples are kept, and reused (default runs/evaluations)",
    )
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. experiment=quickstart rollout.max_tokens=1024"
    )


def _report(commands: Any) -> None:
    command = commands.add_parser(
        "report",
        help="one self-contained HTML file with the curves and the table of runs",
        description="Write one HTML file, readable offline, with the curves and the final table of one or more runs.",
    )
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    command.add_argument("--out", type=_new_file, metavar="FILE", help="default: report.html in the first RUN_DIR")
    command.add_argument(
        "--export", type=_new_folder, metavar="FOLDER", help="write each figure as CSV, SVG and PNG too"
    )
    command.add_argument("--live", action="store_true", help="serve it on this machine, and follow the runs")
    command.add_argument(
        "--port", type=_number(0, 65535), default=0, metavar="N", help="of --live; default: any free one"
    )


def _compare(commands: Any) -> None:
    command = commands.add_parser(
        "compare",
        help="two runs problem by problem, with intervals",
        description="Say what two runs differ in and what came of it: paired differences on the validation problems, "
        "and what each forgets. Writes the report of both, too.",
    )
    command.add_argument("first", type=Path, metavar="RUN_A")
    command.add_argument("second", type=Path, metavar="RUN_B")
    command.add_argument("--out", type=_new_file, metavar="FILE", help="default: compare.html in RUN_A")
    command.add_argument("--json", type=_new_file, metavar="OUT", help="write the comparison as JSON too")


def _cache(commands: Any) -> None:
    command = commands.add_parser(
        "cache",
        help="what a run has sampled: counts, a check, rows as text or JSON lines",
        description="Summarise the trajectory cache of a run; or check it, look at rows, export them. While no run "
        "works in RUN_DIR: set damaged shards aside, merge small ones.",
    )
    command.add_argument("run", type=Path, metavar="RUN_DIR")
    command.add_argument("--verify", action="store_true", help="compare every shard with its checksum")
    command.add_argument("--quarantine", action="store_true", help="set damaged shards aside, and say what is lost")
    command.add_argument("--compact", action="store_true", help="merge small shards into large ones; same rows")
    command.add_argument("--show", type=_number(0, 10**9), default=0, metavar="N", help="the first N rows as text")
    command.add_argument("--export", type=_new_file, metavar="OUT.jsonl", help="write the trajectories as JSON lines")
    command.add_argument("--iteration", type=int, metavar="I", help="for --show and --export: of this iteration")
    command.add_argument("--problem", metavar="ID", help="for --show and --export: of this problem")


def _trace(commands: Any) -> None:
    command = commands.add_parser(
        "trace",
        help="the timeline of a run, for Perfetto",
        description="Write what a run did when (generation, grading, training, syncs) as a Chrome trace.",
    )
    command.add_argument("run", type=Path, metavar="RUN_DIR")
    command.add_argument("--out", type=_new_file, metavar="FILE", help="default: trace.json in the run directory")


def _convert(commands: Any) -> None:
    command = commands.add_parser(
        "convert",
        help="a Hugging Face folder to a Megatron checkpoint, or back",
        description="Convert a Hugging Face folder to a Megatron checkpoint (torch_dist) that any layout loads, or a "
        "checkpoint to a folder. Needs no GPU. Ends by mapping every tensor back from its files and comparing.",
    )
    command.add_argument("source", type=Path, metavar="SRC")
    command.add_argument("target", type=Path, metavar="DST", help="appears when it is complete and verified")
    command.add_argument("--to", choices=("mcore", "hf"), help="default: the other one than SRC is")
    command.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: each tensor's own")
    for option, what in (("tp", "tensor parallel"), ("pp", "pipeline"), ("ep", "expert parallel")):
        command.add_argument(
            f"--{option}", type=int, default=1, metavar="N", help=f"files for N {what} ranks (to mcore)"
        )
    command.add_argument("--config", type=Path, metavar="FOLDER", help="config and tokenizer files (to hf)")
    command.add_argument("--family", default="auto", help="default: the one config.json names")
    command.add_argument("--trust", action="store_true", help="take a checkpoint that rloop did not write (to hf)")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="default: one a core, at most 8")
    command.add_argument("--dry-run", action="store_true", help="check all but values, print the plan, write nothing")


def _grade(commands: Any) -> None:
    command = commands.add_parser(
        "grade",
        help="grade answers against gold answers",
        description='Grade rows {"id", "gold", "pred"}; pred is a whole response.',
    )
    command.add_argument("file", type=Path, metavar="FILE.jsonl")
    command.add_argument(
        "--json", type=_new_file, metavar="OUT.jsonl", help="the rows with correct, reason and seconds"
    )
    command.add_argument(
        "--answer-format",
        choices=("boxed", "answer_line"),
        default="boxed",
        help=r'where the answer stands: in the last \boxed{} (default), or after the last "Answer:"',
    )


def _node(commands: Any) -> None:
    command = commands.add_parser(
        "node",
        description="One node of a job: what `rloop launch` has the job start.",  # no help: not listed
    )
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    command.add_argument("--force", action="store_true")
