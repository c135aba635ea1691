"""The embedded engine's generation against transformers' `generate`: same model, prompts and equal lengths."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import arguments, at_least, random_qwen2, report, side_by_side

from rloop_mcore.rollout.embedded.engine import Engine
from rloop_mcore.rollout.embedded.generation import Generation
from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.params import Sample, SamplingParams

PROMPT = 64


def main() -> None:
    options = arguments(__doc__ or "")
    rows, tokens, repeats = (32, 32, 3) if options.quick else (64, 64, 5)
    ids = torch.randint(1, 4096, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        baseline = random_qwen2(path, options.quick).eval()
        engine = CausalModel(path, torch.float32, "cpu")
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    samples = [Sample(tuple(row), params, number, "") for number, row in enumerate(ids.tolist())]

    def ours() -> None:
        batch = Engine(engine, rows)
        batch.add(Generation(engine, samples))
        batch.advance("0", lambda: False)

    @torch.inference_mode()
    def transformers_generate() -> None:
        baseline.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0)

    ratio = side_by_side(ours, transformers_generate, repeats)
    report("rollout", [at_least("engine_vs_generate_equal", ratio, 0.9, "transformers generate")], options.json)


if __name__ == "__main__":
    main()
