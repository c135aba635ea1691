"""`rloop COMMAND ...`: the arguments of every command, and the exit codes.

0 done; 2 the user's mistake, told in one sentence; 75 checkpointed and wants to be started again; 69 a bad node
(`rloop preflight` only); 1 a fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rloop_mcore.compose import config_folder
from rloop_mcore.errors import Fault, UserError

_TRAIN_EXAMPLES = """
examples:
  rloop train experiment=tiny run.dir=runs/tiny        a run of seconds, to see every phase
  rloop train experiment=quickstart_base               the quickstart's base model; then experiment=quickstart
  rloop train model.path=/models/Qwen2.5-Math-7B data.train=dapo.jsonl data.validation=aime24.jsonl run.dir=runs/7b

The same command again goes on where the run stands, after any kill. Every key, with its default and what it means, is
in rloop_mcore/config.py; experiments are the files of {folder}.
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `rloop`."""
    top = argparse.ArgumentParser(
        prog="rloop", description="RL on verifiable rewards, in iterations (arXiv 2511.04285)."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="run RLoop (or plain DAPO, or SFT), or resume it",
        description="Run, or resume, one training run in run.dir.",
        epilog=_TRAIN_EXAMPLES.format(folder=config_folder() / "experiment"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    train.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides, e.g. algorithm.rl_steps=100")
    train.add_argument(
        "--force",
        action="store_true",
        help="resume although a changed key makes it another run, or it failed alike three times",
    )

    plan = commands.add_parser(
        "plan",
        help="memory, legal layouts and time of a run, before a GPU is used",
        description="What a run takes of each GPU and how long a step is, from its configuration alone: no GPU, "
        "weights, data or run.dir needed. Exit code 2 where it can't fit, with the nearest that does.",
    )
    plan.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="e.g. experiment=qwen2.5_72b cluster=h100_64")
    plan.add_argument("--json", action="store_true", help="one JSON object on standard output")
    plan.add_argument("--search", action="store_true", help="rank all legal layouts of the cluster's GPUs")
    launch = commands.add_parser(
        "launch",
        help="submit a run, or another command, as a Slurm job",
        description="Check a run, write its batch script (cluster.* says what it asks for) and submit it; it starts "
        "itself again until it is done. After `--`: another rloop command to run as a job, e.g. -- evaluate ...",
    )
    launch.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for rloop train")
    launch.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    launch.add_argument("--force", action="store_true", help="as for rloop train, at the first start of the job")
    launch.add_argument("--sweep", type=Path, metavar="FILE", help="an array: a run a line, each its own overrides")

    node = commands.add_parser(
        "node", help="one node of such a job (started by it)", description="What a job of `rloop launch` starts."
    )
    node.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    node.add_argument("--force", action="store_true")

    evaluate = commands.add_parser(
        "evaluate",
        help="Avg@k, pass@k and maj@k of a policy on benchmarks",
        description="Sample responses of a policy, grade them, print Avg@N, unbiased pass@k and maj@k with 95 %% "
        "intervals. The same command again goes on where a killed one stood; more samples add to those there are.",
    )
    evaluate.add_argument(
        "--policy", required=True, type=Path, metavar="PATH", help="a Hugging Face folder, Megatron checkpoint or run"
    )
    evaluate.add_argument("--step", metavar="NAME", help="of a run: i1_explore_000100, theta_1, last or best (default)")
    evaluate.add_argument(
        "--data", action="append", metavar="FILE", help="problems: JSONL, Parquet or hf:NAME[:SPLIT]; may be repeated"
    )
    evaluate.add_argument("--benchmarks", action="append", metavar="NAME,...", help="aime24, math500, ... from the hub")
    evaluate.add_argument(
        "--benchmark-files", type=Path, metavar="FOLDER", help="where the benchmarks are as files: FOLDER/aime24.jsonl"
    )
    evaluate.add_argument("--samples", type=int, metavar="N", help="responses a problem (default 32)")
    evaluate.add_argument("--k", metavar="K,...", help="the k of pass@k (default 1,8,16,32)")
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write the result as JSON too")
    evaluate.add_argument(
        "--against", type=Path, metavar="JSON", help="an earlier result: paired differences with p-values"
    )
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("runs/evaluations"),
        help="where samples are kept, and reused (default runs/evaluations)",
    )
    evaluate.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="e.g. experiment=quickstart rollout.max_tokens=1024"
    )

    report = commands.add_parser(
        "report",
        help="one self-contained HTML file with the curves and the table of runs",
        description="Write one HTML file, readable offline, with the curves and the final table of one or more runs.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run directory")
    report.add_argument("--export", type=Path, metavar="FOLDER", help="write each figure as CSV, SVG and PNG too")
    report.add_argument("--live", action="store_true", help="serve it on this machine, and follow the runs")
    report.add_argument("--port", type=int, default=0, metavar="N", help="for --live; default: any free one")

    compare = commands.add_parser(
        "compare",
        help="two runs problem by problem, with intervals",
        description="Say what two runs differ in and what came of it: paired differences on the validation problems, "
        "and what each forgets. Writes the report of both, too.",
    )
    compare.add_argument("first", type=Path, metavar="RUN_A")
    compare.add_argument("second", type=Path, metavar="RUN_B")
    compare.add_argument("--out", type=Path, metavar="FILE", help="default: compare.html in RUN_A")
    compare.add_argument("--json", type=Path, metavar="OUT", help="write the comparison as JSON too")

    convert = commands.add_parser(
        "convert",
        help="a Hugging Face folder to a Megatron checkpoint, or back",
        description="Convert a Hugging Face folder to a Megatron checkpoint (torch_dist) that any layout loads, or a "
        "checkpoint to a folder. Needs no GPU. Ends by mapping every tensor back from its files and comparing.",
    )
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("target", type=Path, metavar="DST", help="appears when it is complete and verified")
    convert.add_argument("--to", choices=("mcore", "hf"), help="default: the other one than SRC is")
    convert.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), help="default: each tensor's own")
    for option, what in (("tp", "tensor parallel"), ("pp", "pipeline"), ("ep", "expert parallel")):
        convert.add_argument(
            f"--{option}", type=int, default=1, metavar="N", help=f"files for N {what} ranks (to mcore)"
        )
    convert.add_argument("--config", type=Path, metavar="FOLDER", help="config and tokenizer files (to hf)")
    convert.add_argument("--family", default="auto", help="default: the one config.json names")
    convert.add_argument("--trust", action="store_true", help="take a checkpoint that rloop did not write (to hf)")
    convert.add_argument("--threads", type=int, default=0, metavar="N", help="default: one a core, at most 8")
    convert.add_argument("--dry-run", action="store_true", help="check everything, print the plan, write nothing")

    preflight = commands.add_parser(
        "preflight",
        help="is every node of a job fit for the run? Names the ones that are not",
        description="Run once on every node of a job, before `rloop train`: GPUs, versions, disks, clocks, network, a "
        "small all-reduce. Exit code 69: a bad node, which preflight.json in run.dir names (docs/preflight.md).",
    )
    preflight.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="those of rloop train")
    preflight.add_argument("--nodes", type=int, metavar="N", help="how many run it (default: as Slurm says, or 1)")
    preflight.add_argument("--node-rank", type=int, metavar="R", help="this one, from 0 (default: as Slurm says, or 0)")
    preflight.add_argument("--master", metavar="HOST:PORT", help="where node 0 listens")
    preflight.add_argument("--names", metavar="LIST", help="the nodes by rank: n1,n2 or n[1-2] (default: Slurm's)")
    preflight.add_argument("--json", action="store_true", help="node 0 prints its report as one JSON object")

    status = commands.add_parser(
        "status", help="where a run stands", description="Where a run stands: state, phase, step, cache, last metrics."
    )
    status.add_argument("run", type=Path, metavar="RUN_DIR")
    status.add_argument("--json", action="store_true", help="one JSON object on standard output")

    cache = commands.add_parser(
        "cache",
        help="what a run has sampled: counts, a check, rows as text or JSON lines",
        description="Summarise the trajectory cache of a run; or check it, look at rows, export them. While no run "
        "works in RUN_DIR: set damaged shards aside, merge small ones.",
    )
    cache.add_argument("run", type=Path, metavar="RUN_DIR")
    cache.add_argument("--verify", action="store_true", help="compare every shard with its checksum")
    cache.add_argument("--quarantine", action="store_true", help="set damaged shards aside, and say what is lost")
    cache.add_argument("--compact", action="store_true", help="merge small shards into large ones; same rows")
    cache.add_argument("--show", type=int, default=0, metavar="N", help="the first N trajectories as text")
    cache.add_argument("--export", type=Path, metavar="OUT.jsonl", help="write the trajectories as JSON lines")
    cache.add_argument("--iteration", type=int, metavar="I", help="for --show and --export: of this iteration")
    cache.add_argument("--problem", metavar="ID", help="for --show and --export: of this problem")

    trace = commands.add_parser(
        "trace",
        help="the timeline of a run, for Perfetto",
        description="Write what a run did when (generation, grading, training, syncs) as a Chrome trace.",
    )
    trace.add_argument("run", type=Path, metavar="RUN_DIR")
    trace.add_argument("--out", type=Path, metavar="FILE", help="default: trace.json in the run directory")

    grade = commands.add_parser(
        "grade",
        help="grade answers against gold answers",
        description='Grade rows {"id", "gold", "pred"}; pred is a whole response.',
    )
    grade.add_argument("file", type=Path, metavar="FILE.jsonl")
    grade.add_argument("--json", type=Path, metavar="OUT.jsonl", help="the rows with correct, reason and seconds")
    grade.add_argument("--answer-format", choices=("boxed", "answer_line"), default="boxed")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    inner: list[str] = []  # of `rloop launch ... -- inner`
    if words[:1] == ["launch"] and "--" in words:
        words, inner = words[: words.index("--")], words[words.index("--") + 1 :]
    options = parser().parse_args(words)
    try:
        # each command is imported when it is wanted: `rloop status` must not wait for what training needs
        if options.command == "train":
            from rloop_mcore.main.train import train

            return train(options.overrides, options.force)
        if options.command == "plan":
            from rloop_mcore.main.plan import plan

            return plan(options.overrides, options.json, options.search)
        if options.command == "launch":
            from rloop_mcore.main.launch import launch

            return launch(options, inner)
        if options.command == "node":
            from rloop_mcore.main.node import node

            return node(options.overrides, options.force)
        if options.command == "evaluate":
            from rloop_mcore.main.evaluate import evaluate

            return evaluate(options)
        if options.command == "convert":
            from rloop_mcore.main.convert import convert

            return convert(options)
        if options.command == "report":
            from rloop_mcore.main.report import report

            return report(options)
        if options.command == "compare":
            from rloop_mcore.main.compare import compare

            return compare(options.first, options.second, options.out, options.json)
        if options.command == "preflight":
            from rloop_mcore.main.preflight import preflight

            return preflight(options)
        if options.command == "status":
            from rloop_mcore.main.status import status

            return status(options.run, options.json)
        if options.command == "cache":
            from rloop_mcore.main.cache import cache

            return cache(options)
        if options.command == "trace":
            from rloop_mcore.main.trace import trace

            return trace(options.run, options.out)
        from rloop_mcore.main.grade import grade

        return grade(options.file, options.json, options.answer_format)
    except (UserError, Fault) as error:
        print(f"rloop: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
