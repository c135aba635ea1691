"""TRL's GRPOTrainer as `step_vs_trl.py` drives it: one RL step for every line on stdin, one JSON line back.

Runs in .venv-trl (`make install-trl`). The settings, a JSON object, are the only argument; `step_vs_trl.py` has them.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import time
from collections import defaultdict
from threading import Thread
from typing import Any

settings: dict[str, Any] = json.loads(sys.argv[1])
os.environ |= {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
answers = os.fdopen(os.dup(1), "w")  # TRL and transformers may print: only answers go to stdout
os.dup2(2, 1)

import torch  # noqa: E402
from common import even_length  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, PrinterCallback, Qwen2ForCausalLM, TrainerCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

torch.set_num_threads(settings["threads"])


class Step:
    """What one RL step took: seconds in all and by stage, response tokens."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.tokens = 0

    def answer(self) -> dict[str, Any]:
        return {"seconds": time.perf_counter() - self.start, "tokens": self.tokens, "stages": dict(self.seconds)}


step = Step()
lines: queue.Queue[str] = queue.Queue()


class TimedTrainer(GRPOTrainer):
    """GRPOTrainer with a watch around its two stages before the updates."""

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate_single_turn(*args, **kwargs)
        step.seconds["generate"] += time.perf_counter() - start
        return result

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = super()._generate_and_score_completions(*args, **kwargs)
        step.seconds["old logprobs, reward"] += time.perf_counter() - start - step.seconds["generate"]
        return result


class OneStepALine(TrainerCallback):
    """Holds the trainer before every rollout batch until a line comes."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        global step
        if state.global_step % settings["updates"]:
            return
        lines.get()
        step = Step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % settings["updates"] == 0:
            print(json.dumps(step.answer()), file=answers, flush=True)


def listen() -> None:
    """Queue the lines of stdin; its end (the benchmark is over, or dead) ends this process, whatever it is doing."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The same function of the text as ours."""
    step.tokens = sum(map(len, completion_ids))
    return [float(even_length(text)) for text in completions]


def main() -> None:
    rows = settings["prompts"] * settings["group"] // settings["updates"]  # of an optimizer update
    optimizer = settings["optimizer"]
    config = GRPOConfig(
        output_dir=settings["folder"],
        max_steps=10**6,
        # the batch: G responses a prompt, one rollout batch for `updates` optimizer updates
        num_generations=settings["group"],
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        steps_per_generation=settings["updates"],
        max_completion_length=settings["max_tokens"],
        temperature=1.0,
        # DAPO's loss
        loss_type="dapo",
        epsilon=0.2,
        epsilon_high=0.28,
        delta=10.0,
        beta=0.0,
        # AdamW
        optim="adamw_torch_fused",
        learning_rate=optimizer["lr"],
        lr_scheduler_type="constant",
        weight_decay=optimizer["weight_decay"],
        adam_beta1=optimizer["beta1"],
        adam_beta2=optimizer["beta2"],
        adam_epsilon=optimizer["eps"],
        max_grad_norm=optimizer["clip_grad"],
        # the machine: fp32 on the CPU, nothing recomputed (TRL's default is to), nothing logged or saved
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model = Qwen2ForCausalLM.from_pretrained(settings["model"], dtype=torch.float32, attn_implementation="sdpa")
    trainer = TimedTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": settings["texts"]}),
        processing_class=AutoTokenizer.from_pretrained(settings["model"], padding_side="left"),
        callbacks=[OneStepALine()],
    )
    trainer.remove_callback(PrinterCallback)
    Thread(target=listen, daemon=True).start()
    trainer.train()


if __name__ == "__main__":
    main()
