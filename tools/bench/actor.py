"""One SFT update of the Megatron actor against transformers + AdamW: same weights, batch, loss and clipping."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from rloop_mcore import platform

platform.setup("auto")  # before Megatron is imported

import torch  # noqa: E402
from common import arguments, at_least, random_qwen2, report, side_by_side  # noqa: E402
from transformers import Qwen2ForCausalLM  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.actor import MegatronActor  # noqa: E402
from rloop_mcore.config import Config, OptimizerConfig, RunConfig  # noqa: E402
from rloop_mcore.types import Example  # noqa: E402
from rloop_mcore.weights.bridge import HfBridge  # noqa: E402

PROMPT, RESPONSE = 32, 224
OPTIMIZER = OptimizerConfig(lr=1e-5)


def main() -> None:
    options = arguments(__doc__ or "")
    rows, repeats = (8, 3) if options.quick else (16, 7)
    draw = random.Random(0)
    batch = [
        Example(
            tuple(draw.randrange(4096) for _ in range(PROMPT)), tuple(draw.randrange(4096) for _ in range(RESPONSE))
        )
        for _ in range(rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        baseline = random_qwen2(model, options.quick)
        actor = MegatronActor(Config(precision="fp32", run=RunConfig(dir=folder)), HfBridge(model))
        actor.begin(model, OPTIMIZER, 1000)
    ratio = side_by_side(lambda: actor.fine_tune(batch), transformers_update(baseline, batch), repeats)
    actor.close()
    parallel.destroy()
    report("actor", [at_least("train_vs_hf_equal", ratio, 1.0, "transformers Qwen2 + torch AdamW")], options.json)


def transformers_update(model: Qwen2ForCausalLM, batch: list[Example]):  # type: ignore[no-untyped-def]
    """A closure that does the same update with transformers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay)
    ids = torch.tensor([example.prompt_ids + example.response_ids for example in batch])

    def update() -> None:
        optimizer.zero_grad()
        logits = model(input_ids=ids[:, :-1]).logits[:, PROMPT - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()

    return update


if __name__ == "__main__":
    main()
