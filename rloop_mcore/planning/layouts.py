"""Which layouts a model allows, the legal one nearest to an illegal one, and the layers of each pipeline stage.

The rules are Megatron-Core's, checked here before any process starts. Two are narrower: Megatron copies key/value heads
where tp is a multiple of them, and runs middle stages without layers; neither is of use to us.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

from rloop_mcore.config import LayoutConfig
from rloop_mcore.planning.architecture import Architecture


def processes(layout: LayoutConfig) -> int:
    """The number of processes of a layout; experts are spread over the same ones."""
    return layout.tp * layout.pp * layout.cp * layout.dp


def broken_rule(layout: LayoutConfig, model: Architecture) -> str | None:
    """The first rule that the layout breaks, as a clause that names key and value; None for a legal layout.

    Every size of the layout has to be positive. The vocabulary breaks no rule: it is padded.
    """
    return _broken_by_tensors(layout, model) or _broken_by_experts(layout, model) or _broken_by_stages(layout, model)


def _broken_by_tensors(layout: LayoutConfig, model: Architecture) -> str | None:
    if broken := _undivided("tp", layout.tp, "num_attention_heads", model.heads):
        return broken
    if broken := _undivided("tp", layout.tp, "num_key_value_heads", model.kv_heads):
        return broken
    if not model.experts and (broken := _undivided("tp", layout.tp, "intermediate_size", model.ffn)):
        return broken
    if layout.sp and layout.tp == 1:
        return "layout.sp=true needs layout.tp above 1"
    return None


def _broken_by_experts(layout: LayoutConfig, model: Architecture) -> str | None:
    if not model.experts:
        wrong = [f"layout.{key}={size}" for key, size in (("ep", layout.ep), ("etp", layout.etp)) if size > 1]
        return f"{wrong[0]} needs a model with experts" if wrong else None
    if broken := _undivided("ep", layout.ep, "the number of experts", model.experts):
        return broken
    if broken := _undivided("etp", layout.etp, "the experts' intermediate size", model.expert_ffn):
        return broken
    stage = layout.tp * layout.cp * layout.dp
    if stage % (layout.ep * layout.etp):
        return (
            f"layout.ep={layout.ep} x layout.etp={layout.etp} does not divide the {stage} processes of a pipeline "
            "stage (tp x cp x dp)"
        )
    if layout.tp > 1 and not layout.sp:
        return f"layout.tp={layout.tp} of a model with experts needs layout.sp=true"
    return None


def _broken_by_stages(layout: LayoutConfig, model: Architecture) -> str | None:
    if layout.vpp > 1 and layout.pp == 1:
        return f"layout.vpp={layout.vpp} needs layout.pp above 1"
    count = layout.pp * layout.vpp
    if not layout.stages:
        if count <= model.layers:
            return None
        return (
            f"layout.pp={layout.pp} x layout.vpp={layout.vpp} makes {count} stages of num_hidden_layers={model.layers}"
        )
    named = f"layout.stages={_text(layout.stages)}"
    if len(layout.stages) != count:
        return f"{named} has {len(layout.stages)} stages and layout.pp={layout.pp} x layout.vpp={layout.vpp} is {count}"
    if sum(layout.stages) != model.layers:
        return f"{named} has {sum(layout.stages)} layers and num_hidden_layers is {model.layers}"
    if min(layout.stages) < 0 or 0 in layout.stages[1:-1]:
        return f"{named} has a stage without layers that isn't the first (embedding) or the last (loss)"
    return None


def _undivided(key: str, parts: int, name: str, size: int) -> str | None:
    return f"layout.{key}={parts} does not divide {name}={size}" if size % parts else None


def nearest_legal(layout: LayoutConfig, model: Architecture) -> LayoutConfig:
    """The legal layout of as many processes that changes the fewest keys of `layout`, and those by the least factors.

    Of equally near ones, one that keeps tp, then pp. One is always legal: all processes in dp.
    """
    return min(_legal_layouts(layout, model), key=lambda candidate: _distance(layout, candidate))


def _legal_layouts(layout: LayoutConfig, model: Architecture) -> Iterator[LayoutConfig]:
    """The legal layouts of as many processes: all of tp, pp, cp and dp, each with the nearest of the other keys."""
    total = processes(layout)
    for pp in divisors(total):
        stage = total // pp
        near = replace(_nearest_experts(layout, model, stage), pp=pp, stages=[])
        near.vpp = 1 if pp == 1 else max(1, min(layout.vpp, model.layers // pp))
        pipelines = [near]
        if layout.stages:
            pipelines.append(replace(near, vpp=max(1, len(layout.stages) // pp), stages=layout.stages))
        for tp, cp, pipeline in product(divisors(stage), divisors(stage), pipelines):
            if stage % (tp * cp) == 0:
                sp = tp > 1 and (layout.sp or model.experts > 0)
                candidate = replace(pipeline, tp=tp, cp=cp, dp=stage // (tp * cp), sp=sp)
                if broken_rule(candidate, model) is None:
                    yield candidate


def _nearest_experts(layout: LayoutConfig, model: Architecture, stage: int) -> LayoutConfig:
    """`layout` with the nearest ep and etp that spread the experts over the `stage` processes of a pipeline stage."""
    if not model.experts:
        return replace(layout, ep=1, etp=1)
    pairs = product(divisors(math.gcd(stage, model.experts)), divisors(math.gcd(stage, model.expert_ffn)))
    legal = (replace(layout, ep=ep, etp=etp) for ep, etp in pairs if stage % (ep * etp) == 0)
    return min(legal, key=lambda candidate: _distance(layout, candidate))


def divisors(number: int) -> list[int]:
    """From 1 to the number itself."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _distance(wanted: LayoutConfig, candidate: LayoutConfig) -> tuple[int, float, bool, bool]:
    """Without sp, which follows from tp and the experts; giving up the user's stages counts as a factor of 2."""
    before, after = vars(wanted), vars(candidate)
    changed = [key for key in before if key != "sp" and before[key] != after[key]]
    factors = sum(1.0 if key == "stages" else abs(math.log2(after[key] / before[key])) for key in changed)
    return len(changed), round(factors, 6), "tp" in changed, "pp" in changed


def overrides(section: str, before: object, after: object) -> list[str]:
    """What to write on the command line to turn a section into another: [layout.tp=2, layout.dp=3]."""
    old, new = vars(before), vars(after)
    return [f"{section}.{key}={_text(new[key])}" for key in new if new[key] != old[key]]


def _text(value: Any) -> str:
    return str(value).lower().replace(" ", "")


def stages(layout: LayoutConfig, layers: int) -> list[int]:
    """The layers of each of the pp * vpp stages, first to last.

    `layout.stages` where it is given; else as many each where that divides; else balanced with the embedding on the
    first stage and the loss on the last counted as one layer each: 10 layers over 4 stages are [2, 3, 3, 2].
    """
    if layout.stages:
        return list(layout.stages)
    return list(_balanced(layers, layout.pp * layout.vpp))


@lru_cache(maxsize=4096)
def _balanced(layers: int, count: int) -> tuple[int, ...]:
    """A search asks for each layout's anew, stage by stage."""
    if layers % count == 0:
        return (layers // count,) * count
    split = [1] * count
    for _ in range(layers - count):
        work = [(n + (stage in (0, count - 1)), stage in (0, count - 1), stage) for stage, n in enumerate(split)]
        split[min(work)[2]] += 1
    return tuple(split)
