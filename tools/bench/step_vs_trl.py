"""A whole RL step (generation, reward, updates, weight sync) against TRL's GRPOTrainer, each at its fastest here.

Both do the same work in fp32 on the same number of threads: the same random model, prompts and reward function,
`prompts` x `group` responses, `updates` optimizer updates of DAPO's loss with AdamW, no KL term, no recomputation of
activations, nothing logged or saved. A response ends with a fixed probability a token (the model is made so), at
`max_tokens` at the latest: both see the same spread of lengths, about a third of the maximum in the mean.

Ours runs as in a real run: trainer and embedded engine are two processes that take turns, the engine gets the weights
before each step, old logprobs are the engine's. TRL generates in the trainer's process with transformers' `generate`
(KV cache, all responses in one batch) and pads a rollout batch to its longest response; it recomputes old logprobs,
which it always does when a batch serves several updates. Its continuous batching took many times as long on a CPU,
smaller micro-batches than an update's changed nothing. TRL lives in .venv-trl: `make install-trl`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Timer

from rloop_mcore import platform

platform.setup("cpu", len(os.sched_getaffinity(0)))  # before Megatron is imported

import torch  # noqa: E402
from common import arguments, at_least, random_qwen2, report  # noqa: E402
from even_rewards import EvenRewards  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from rloop_mcore.config import (  # noqa: E402
    ActorConfig,
    AlgorithmConfig,
    ClusterConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from rloop_mcore.data.prompts import TemplatePrompts  # noqa: E402
from rloop_mcore.data.templates import PromptTemplate  # noqa: E402
from rloop_mcore.data.tokenizer import TextTokenizer  # noqa: E402
from rloop_mcore.main.engines import fleet_of, start_servers, weight_channel  # noqa: E402
from rloop_mcore.main.rooms import conducted_actor  # noqa: E402
from rloop_mcore.rl_step import RLStep  # noqa: E402
from rloop_mcore.trajectory.cache import TrajectoryCache  # noqa: E402
from rloop_mcore.types import Problem  # noqa: E402
from rloop_mcore.weights.bridge import HfBridge  # noqa: E402

ROOT = Path(__file__).parents[2]
TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
VOCABULARY, EOS = 4096, 0
CONSTANT = 10.0  # of one hidden dimension that every token embedding shares
STEPS = 1000  # more than are taken
DEADLINE_S = 1200.0  # of TRL's process
TOLERANCE = 0.03  # where chance gave ours fewer response tokens by more than this, seconds are compared a token


@dataclass(frozen=True)
class Settings:
    """What both sides do in a step."""

    prompts: int = 4
    group: int = 16
    prompt_tokens: int = 16
    max_tokens: int = 192
    mean_tokens: float = 64.0  # 1 / P(end) of a token
    updates: int = 4
    threads: int = len(os.sched_getaffinity(0))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    micro_batch_tokens: int = 2048  # ours, packed
    texts: list[str] = field(default_factory=list)  # the prompts


@dataclass(frozen=True)
class Step:
    """What one RL step took."""

    seconds: float
    tokens: int  # of the responses
    stages: dict[str, float]


def write_model(folder: Path, settings: Settings, quick: bool) -> None:
    """A random Qwen2 whose every token is the end token with probability 1 / mean_tokens, and a tokenizer of numbers.

    One hidden dimension is a large constant, which only the end token's output row reads.
    """
    model = random_qwen2(folder, quick).eval()
    ids = torch.tensor([[int(word) for word in text.split()] for text in settings.texts])
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = CONSTANT
        head = model.get_output_embeddings().weight
        head[:, 0] = 0.0
        head[EOS] = 0.0
        hidden = model.base_model(ids).last_hidden_state.flatten(0, 1)
        others = (hidden @ head[1:].T).logsumexp(-1)
        head[EOS, 0] = ((others - math.log(settings.mean_tokens - 1)) / hidden[:, 0]).mean()
    model.save_pretrained(folder)
    end = "<end>"
    words = Tokenizer(models.WordLevel({str(n) if n != EOS else end: n for n in range(VOCABULARY)}, unk_token=end))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end).save_pretrained(folder)


@contextmanager
def our_step(folder: Path, settings: Settings) -> Iterator[Callable[[], Step]]:
    """Trainer and embedded engine as a run has them; a call is one step."""
    model, template = folder / "model", folder / "prompt.jinja"
    template.write_text("{{ problem }}", encoding="utf-8")
    config = Config(
        run=RunConfig(dir=str(folder)),
        model=ModelConfig(path=str(model)),
        precision="fp32",
        algorithm=AlgorithmConfig(
            group_size=settings.group,
            prompts_per_step=settings.prompts,
            sampled_per_step=settings.prompts,
            updates_per_step=settings.updates,
            sampling_rounds=1,
            overlong_buffer=0,
        ),
        optimizer=settings.optimizer,
        actor=ActorConfig(micro_batch_tokens=settings.micro_batch_tokens),
        rollout=RolloutConfig(max_tokens=settings.max_tokens),
        data=DataConfig(template=str(template)),
        cluster=ClusterConfig(device="cpu", threads=settings.threads),
    )
    problems = [Problem(str(number), text, "") for number, text in enumerate(settings.texts)]
    tokenizer = TextTokenizer(model)
    prompts = TemplatePrompts(problems, tokenizer, PromptTemplate(str(template), tokenizer), 0, settings.prompt_tokens)
    servers = start_servers(config, model, folder)
    bridge = HfBridge(model)
    with (
        conducted_actor(config, bridge) as actor,
        fleet_of(config, servers, weight_channel(config, bridge.largest), model, deterministic=True) as fleet,
    ):
        actor.begin(model, config.optimizer, STEPS * settings.updates)
        rl_step = RLStep(config, actor, fleet, EvenRewards(), prompts, TrajectoryCache(folder / "cache"))
        numbers = itertools.count()
        with rl_step.feed(0, 0, STEPS, 0) as feed:

            def step() -> Step:
                number = next(numbers)
                start = time.perf_counter()
                metrics = fleet.sync(actor.export, number)
                metrics |= rl_step.train(0, number, feed.take(number), number)
                seconds = time.perf_counter() - start
                stages = {
                    stage: metrics[f"seconds_{stage}"] for stage in ("sync", "generate", "grade", "logprobs", "update")
                }
                return Step(seconds, round(metrics["sampled_tokens"]), stages)

            yield step


@contextmanager
def trl_step(folder: Path, settings: Settings) -> Iterator[Callable[[], Step]]:
    """TRL's trainer in a process of its own; a call is one step."""
    told = asdict(settings) | {"model": str(folder / "model"), "folder": str(folder / "trl")}
    log = folder / "trl.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(TRL_PYTHON), str(Path(__file__).with_name("trl_step.py")), json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    lines, answers = process.stdin, process.stdout
    assert lines is not None
    assert answers is not None
    watch = Timer(DEADLINE_S, process.kill)
    watch.start()

    def step() -> Step:
        with suppress(BrokenPipeError):
            print("step", file=lines, flush=True)
        answer = answers.readline()
        if not answer:
            raise RuntimeError(f"TRL's process ended:\n{log.read_text(encoding='utf-8')[-3000:]}")
        return Step(**json.loads(answer))

    try:
        yield step
    finally:
        watch.cancel()
        process.kill()
        process.wait()


def main() -> int:
    options = arguments(__doc__ or "")
    if not TRL_PYTHON.exists():
        print("step_vs_trl needs TRL in .venv-trl: run `make install-trl` first.", file=sys.stderr)
        return 77
    draw = random.Random(0)
    shape = Settings(prompts=2, group=8, max_tokens=64, mean_tokens=24.0, updates=2) if options.quick else Settings()
    count = 8 * shape.prompts
    texts = [" ".join(str(draw.randrange(1, VOCABULARY)) for _ in range(shape.prompt_tokens)) for _ in range(count)]
    settings = replace(shape, texts=texts)
    print("settings:", ", ".join(f"{key}={value}" for key, value in asdict(settings).items() if key != "texts"))
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_model(folder / "model", settings, options.quick)
        runs = [stack.enter_context(side(folder, settings)) for side in (our_step, trl_step)]
        steps = alternating(runs, warm_ups=1, repeats=3)
    for name, side in zip(("ours", "TRL"), steps, strict=True):
        print(f"{name}: {breakdown(side)}")
    ours, trl = (statistics.median(step.seconds for step in side) for side in steps)
    drawn = [sum(step.tokens for step in side) for side in steps]
    baseline, ratio = "TRL GRPOTrainer, seconds a step", trl / ours
    if drawn[0] < (1 - TOLERANCE) * drawn[1]:
        baseline, ratio = "TRL GRPOTrainer, seconds a response token", ratio * drawn[0] / drawn[1]
    report("step_vs_trl", [at_least("step_vs_trl", ratio, 2.0, baseline)], options.json)
    return 0


def alternating(runs: list[Callable[[], Step]], warm_ups: int, repeats: int) -> list[list[Step]]:
    """The steps of each side, taken in turns so that noise hits both."""
    rounds = []
    for number in range(warm_ups + repeats):
        rounds.append([run() for run in runs])
        kind = "warm-up" if number < warm_ups else f"round {number - warm_ups + 1}"
        print(f"{kind}: ours {rounds[-1][0].seconds:.2f} s, TRL {rounds[-1][1].seconds:.2f} s", flush=True)
    return [list(side) for side in zip(*rounds[warm_ups:], strict=True)]


def breakdown(steps: list[Step]) -> str:
    """Medians of the seconds, in all and by stage, and the tokens a step."""
    stages = {key: statistics.median(step.stages.get(key, 0.0) for step in steps) for key in steps[0].stages}
    total = statistics.median(step.seconds for step in steps)
    parts = ", ".join(f"{key} {value:.2f}" for key, value in stages.items())
    tokens = statistics.fmean(step.tokens for step in steps)
    return f"{total:.2f} s a step ({parts}, rest {total - sum(stages.values()):.2f}), {tokens:.0f} response tokens"


if __name__ == "__main__":
    sys.exit(main())
