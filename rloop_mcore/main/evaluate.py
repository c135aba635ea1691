"""`rloop evaluate`: Avg@N and pass@k of a policy folder on a problem file, by the engine alone."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rloop_mcore import platform, validate
from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.data.problems import load_problems
from rloop_mcore.data.prompts import TemplatePrompts, TextTokenizer
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.evaluate import EngineEvaluator
from rloop_mcore.main.engines import start_servers
from rloop_mcore.main.run_directory import check_not_removed
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.progress import ProgressDisplay
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.rollout.fleet import Fleet
from rloop_mcore.rollout.served import ServedModel
from rloop_mcore.weights.tensor_files import catalogue


def evaluate(options: argparse.Namespace) -> int:
    """Evaluate, print a table, write JSON if asked for. Raises UserError."""
    config = _config(options)
    template, tokenizer = PromptTemplate(config.data.template), TextTokenizer(options.policy)
    prompts = TemplatePrompts(
        load_problems(options.data, config.evaluation.limit),
        tokenizer,
        template,
        config.run.seed,
        config.data.max_prompt_tokens,
    )
    with tempfile.TemporaryDirectory() as folder, _engine(config, options.policy, Path(folder)) as fleet:
        display = ProgressDisplay()
        with RewardPool(config.reward) as rewards:
            evaluator = EngineEvaluator(
                fleet,
                rewards,
                prompts.prompts,
                prompts.decode,
                config.evaluation,
                config.rollout.max_tokens,
                template.stop,
                config.run.seed,
                Path(folder),
                2 * config.rollout.max_running,
                lambda done, total: display.show("evaluation", done, total, None, {}),
            )
            evaluator.evaluate("result", str(options.policy))
        display.close()
        result = json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))
    result |= {"data": options.data, "template": config.data.template, "verifier": config.reward.verifier}
    result["too_long"] = prompts.too_long
    _print(result)
    if options.json is not None:
        write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    return 0


def _config(options: argparse.Namespace) -> Config:
    """The overrides, the options over them. Paths are set as they are: Hydra's grammar would read signs in them."""
    config = load_config([*options.overrides, "model.path=?", "data.train=?", "run.dir=?"])
    config.model.path = str(options.policy)
    if options.samples is not None:
        config.evaluation.samples = options.samples
        config.evaluation.k = [k for k in config.evaluation.k if k <= options.samples]
    if options.k is not None:
        try:
            config.evaluation.k = [int(text) for text in options.k.split(",")]
        except ValueError:
            raise UserError(f"--k {options.k}: give whole numbers with commas between them, e.g. 1,8,32.") from None
    validate.check_values(config)
    check_not_removed(options.policy)
    validate.check_model(config, options.policy)
    catalogue(options.policy)
    if options.json is not None and not (options.json.absolute().parent.is_dir() and not options.json.is_dir()):
        raise UserError(f"--json {options.json} cannot be written: give a file in a folder that exists.")
    return config


@contextmanager
def _engine(config: Config, policy: Path, folder: Path) -> Iterator[Fleet]:
    """An engine that serves the policy folder as it is: no actor, no weight sync."""
    servers = start_servers(config, policy, folder)
    model = ServedModel.of(validate.read_hf_config(policy), policy)
    with Fleet(
        servers,
        None,
        model=model,
        bucket_mib=config.rollout.bucket_mib,
        start_timeout_s=config.rollout.start_timeout_s,
        request_timeout_s=config.rollout.request_timeout_s,
        deterministic=platform.deterministic(config.run.deterministic, platform.choose(config.cluster.device)),
        max_running=config.rollout.max_running,
    ) as fleet:
        fleet.adopt_weights()
        yield fleet


def _print(result: dict) -> None:  # type: ignore[type-arg]
    table = Table(title=f"{result['policy']} on {result['data']}", title_justify="left")
    for heading in ("metric", "mean", "95 % interval"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for name, value in result["metrics"].items():
        table.add_row(name, f"{100 * value['mean']:.2f}", f"{100 * value['low']:.2f} - {100 * value['high']:.2f}")
    console = Console()
    console.print(table)
    sampling = result["sampling"]
    console.print(
        f"{result['problems']} problems x {sampling['samples']} responses, temperature {sampling['temperature']}, "
        f"top-p {sampling['top_p']}, at most {sampling['max_tokens']} tokens; template {result['template']}, "
        f"verifier {result['verifier']}; mean length {result['response_length']:.1f} tokens, "
        f"{result['truncated']:.1%} truncated; {result['too_long']} problems left out as too long",
        highlight=False,
    )
