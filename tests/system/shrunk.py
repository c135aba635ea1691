"""Any experiment cut down to seconds on the CPU: its family, kinds of parallelism and options, nothing of its size."""

from __future__ import annotations

import json
import sys
from dataclasses import fields, replace
from pathlib import Path

from rloop_mcore.config import ArchitectureConfig, Config, LayoutConfig
from rloop_mcore.data.countdown import EOS, PAD, VOCABULARY
from rloop_mcore.data.countdown_model import TOKENIZER_CONFIG, tokenizer
from rloop_mcore.planning.layouts import processes

sys.path.append(str(Path(__file__).parents[1] / "weights"))
from tiny_models import make_folder


def shrunk_layout(layout: LayoutConfig) -> LayoutConfig:
    """Up to 8 processes the layout itself; else its kinds: 2 of what there are more of, one replica where it has 4."""
    if processes(layout) <= 8:
        return layout
    names = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
    small = replace(layout, stages=[], **{name: min(2, getattr(layout, name)) for name in names})
    return small if processes(small) <= 4 else replace(small, dp=1)


def shrunk_architecture(architecture: ArchitectureConfig, layout: LayoutConfig) -> ArchitectureConfig:
    """A model of the family that the layout just divides: a key/value head a tensor rank, a layer a stage."""
    kv_heads = layout.tp
    ratio = 2 if architecture.num_attention_heads != architecture.num_key_value_heads else 1
    small = replace(
        architecture,
        num_hidden_layers=max(2, layout.pp * layout.vpp),
        hidden_size=8 * kv_heads * ratio,
        num_attention_heads=kv_heads * ratio,
        num_key_value_heads=kv_heads,
        head_dim=8,
        intermediate_size=16 * layout.tp,
        vocab_size=len(VOCABULARY),
        max_position_embeddings=64,
    )
    if architecture.num_experts:
        small = replace(small, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8 * layout.etp)
    return small


def overrides(config: Config, layout: LayoutConfig) -> list[str]:
    """What makes one RL step, and one fine-tuning where there is one, of an experiment on the generated task.

    Every problem counts as hard: of 8 responses none can be right in less than 10 %. On one process the precision is
    fp32.
    """
    architecture = shrunk_architecture(config.model.architecture, layout)
    algorithm, sizes = config.algorithm, [(f"model.architecture.{f.name}", f.name) for f in fields(architecture)]
    sections = ("optimizer", "rft.optimizer", "sft.optimizer")
    return [
        *(f"{key}={_text(getattr(architecture, name))}" for key, name in sizes),
        *(f"layout.{f.name}={_text(getattr(layout, f.name))}" for f in fields(layout)),
        f"precision={config.precision if processes(layout) > 1 else 'fp32'}",
        *("cluster=cpu", "cluster.threads=1", "rollout=embedded", "rollout.engines=1", "rollout.nodes=0"),
        *("rollout.tp=1", "algorithm.hard_threshold=null"),
        *(f"rollout.max_lag={config.rollout.max_lag}", "rollout.max_running=64", "actor.micro_batch_tokens=64"),
        *("data.train=countdown:train", "data.validation=null", "data.limit=16", "data.template=countdown"),
        *("data.max_prompt_tokens=16", "rollout.max_tokens=12", "reward.verifier=toss:toss", "reward.workers=1"),
        f"algorithm.iterations={min(1, algorithm.iterations)}",
        *("algorithm.rl_steps=1", "algorithm.group_size=8", "algorithm.sampling_rounds=1"),
        *("algorithm.prompts_per_step=4", "algorithm.sampled_per_step=4", "algorithm.overlong_buffer=0"),
        f"algorithm.updates_per_step={min(2, algorithm.updates_per_step)}",
        *("rft.batch_size=16", "sft.limit=64", "sft.batch_size=16", "sft.epochs=1"),
        *(f"{section}={{lr: 1e-3, schedule: constant, warmup_updates: 0, weight_decay: 0.0}}" for section in sections),
        *("evaluation.samples=1", "evaluation.k=[1]", "evaluation.limit=null", "evaluation.every=0"),
        *("evaluation.top_p=1.0", "checkpoint.every=1", "checkpoint.asynchronous=true"),
    ]


def write_model(config: Config, folder: Path) -> None:
    """A random model of the sizes of a shrunk configuration, by transformers, and the generated task's tokenizer."""
    sizes = {name: value for name, value in vars(config.model.architecture).items() if value is not None}
    family, heads = sizes.pop("model_type"), sizes["num_attention_heads"]
    kv_heads, tied = sizes["num_key_value_heads"], sizes["tie_word_embeddings"]
    ends = {"eos_token_id": VOCABULARY.index(EOS), "pad_token_id": VOCABULARY.index(PAD)}
    make_folder(folder, family, kv_heads, heads // kv_heads, tied, **sizes, **ends)
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


def _text(value: object) -> str:
    return "null" if value is None else str(value).lower()
