"""`rloop evaluate`: Avg@N, pass@k and maj@k of a policy on benchmarks, and how it differs from another's results."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rloop_mcore import validate
from rloop_mcore.compose import load_config, load_config_over
from rloop_mcore.config import Config
from rloop_mcore.data.benchmarks import check_name, load_benchmark
from rloop_mcore.data.problems import FILES, load_problems
from rloop_mcore.errors import DiskFull, Fault, UserError
from rloop_mcore.evaluation.bootstrap import bootstrap_mean_interval
from rloop_mcore.main.against import check_comparable, compare, read_result
from rloop_mcore.main.evaluation_tables import print_comparison, print_results
from rloop_mcore.main.policies import Source, as_hf_folder, find_policy
from rloop_mcore.main.policy_evaluation import PolicyEvaluation
from rloop_mcore.main.training_problems import template_warnings
from rloop_mcore.planning.nodes import on_one_node
from rloop_mcore.platform.files import is_disk_full, write_atomic
from rloop_mcore.progress import ProgressDisplay
from rloop_mcore.reward.verifiers import load_verifier
from rloop_mcore.types import Problem
from rloop_mcore.weights.tensor_files import catalogue


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate, print tables, write JSON if asked for. Raises UserError."""
    other = read_result(options.against) if options.against is not None else None
    source = find_policy(options.policy, options.step)
    config = keys_of(options, source)
    load_verifier(config.reward.verifier)  # these now: a conversion and an engine's start take minutes
    for warning in template_warnings(config):
        print(f"rloop: warning: {warning}", file=sys.stderr, flush=True)
    if not source.is_checkpoint:
        validate.check_model(config, source.path)
    benchmarks = _benchmarks(options)
    if other is not None:  # now: what takes hours comes before they are compared
        keys = config.evaluation
        metrics = [f"avg@{keys.samples}", *(f"pass@{k}" for k in keys.k)]
        asked = {name: ([each.id for each in found[: keys.limit]], metrics) for name, (_, found) in benchmarks.items()}
        check_comparable(asked, other)
    display = ProgressDisplay()
    with ExitStack() as stack:
        stack.callback(display.close)
        stack.enter_context(_explained(source, options.out))
        policy = as_hf_folder(source, options.out / "converted", display)
        validate.check_model(config, policy)
        catalogue(policy)
        evaluation = PolicyEvaluation(config, policy, str(source.path), options.out, display, stack)
        prompts = {name: evaluation.prompts(name, problems) for name, (_, problems) in benchmarks.items()}
        records = [evaluation.run(name, *benchmarks[name], prompts[name]) for name in benchmarks]
    result = _together(records, config.run.seed)
    if other is not None:
        result["against"] = {"file": str(options.against), "benchmarks": compare(records, other, config.run.seed)}
    if options.json is not None:
        write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    print_results(records, result["metrics"])  # after the file: who reads it may see enough before the end
    if other is not None:
        print_comparison(result["against"])
    return 0


@contextmanager
def _explained(source: Source, out: Path) -> Iterator[None]:
    """What may happen to files meanwhile, in a sentence."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"no space is left under {out}: make some; the same command goes on from there.") from error
        if not source.path.exists():
            raise Fault(
                f"{source.path} was removed by its run while it was evaluated: choose another --step."
            ) from error
        raise


def keys_of(options: argparse.Namespace, source: Source, elsewhere: bool = False) -> Config:
    """The overrides, the options over them. Paths are set as they are: Hydra's grammar would read signs in them.

    A run's policy is evaluated by the run's own keys, but where something else is said. Raises UserError. elsewhere:
    the programs that keys name needn't be here.
    """
    if source.run is not None:
        config = load_config_over(source.run.config, options.overrides)
        if config.rollout.endpoints and not any(text.startswith("rollout.endpoints=") for text in options.overrides):
            raise UserError(
                f"{source.run.path} trains with the servers of its rollout.endpoints, which hold other weights: give "
                "rollout.endpoints=[http://...] of servers with this policy, or rollout.endpoints=[] to start some."
            )
    else:
        config = load_config([*options.overrides, "model.path=?", "data.train=?", "run.dir=?"])
    config.model.path = str(source.path)
    config.rollout.quantization = "none"  # what is measured is the policy as its folder has it
    config.rollout.partial = False  # no sync comes: any version of SGLang will do
    config.algorithm.overlong_buffer = 0  # of training's reward alone: it must not bound rollout.max_tokens here
    if options.samples is not None:
        config.evaluation.samples = options.samples
        config.evaluation.k = [k for k in config.evaluation.k if k <= options.samples]
    if options.k is not None:
        try:
            config.evaluation.k = [int(text) for text in options.k.split(",")]
        except ValueError:
            raise UserError(f"--k {options.k}: give whole numbers with commas between them, e.g. 1,8,32.") from None
    validate.check_values(config, elsewhere)
    return on_one_node(config)


def benchmark_names(options: argparse.Namespace) -> list[str]:
    """Of `--benchmarks`. Raises UserError for one that is none, and where there is nothing to evaluate on."""
    names = [name.strip() for text in options.benchmarks or () for name in text.split(",")]
    for name in names:
        check_name(name)
    if not (names or options.data):
        raise UserError("nothing to evaluate on: give --data FILE, or --benchmarks with names such as aime24,math500.")
    return names


def _benchmarks(options: argparse.Namespace) -> dict[str, tuple[str, list[Problem]]]:
    """Of every `--data` and every name of `--benchmarks`: a short name, where it is from, its problems."""
    names = benchmark_names(options)
    found = [(_short(data), data, load_problems(data)) for data in options.data or ()]
    found += [(name, name, load_benchmark(name, options.benchmark_files)) for name in names]
    benchmarks = {name: (data, problems) for name, data, problems in found}
    if len(benchmarks) < len(found):
        raise UserError(f"two benchmarks have one name: {', '.join(name for name, *_ in found)}; evaluate them apart.")
    return benchmarks


def _short(data: str) -> str:
    """A name for files: aime24 of data/aime24.jsonl, countdown-test of countdown:test."""
    path = Path(data)
    return path.stem if path.suffix in FILES else data.replace(":", "-").replace("/", "-")


def _together(records: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The record of the only benchmark; of several, their records and the unweighted mean of each metric."""
    if len(records) == 1:
        return dict(records[0])
    metrics = {
        key: asdict(bootstrap_mean_interval([list(record["scores"][key].values()) for record in records], seed))
        for key in records[0]["scores"]
    }
    return {
        "policy": records[0]["policy"],
        "metrics": metrics,
        "benchmarks": {record["name"]: record for record in records},
    }
