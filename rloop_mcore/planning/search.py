"""Layouts of a number of GPUs, ranked; and what to change of a run that doesn't fit so that it does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from rloop_mcore.config import Config, LayoutConfig, RolloutConfig
from rloop_mcore.errors import UserError
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.engines import GIB, legal_engine_tp
from rloop_mcore.planning.layouts import broken_rule, divisors, overrides, processes
from rloop_mcore.planning.nodes import node_gpus, trainer_gpus
from rloop_mcore.planning.plan import Plan

_RECOMPUTE = ("none", "selective", "full")
_CONTEXT, _VIRTUAL = (1, 2, 4, 8), (1, 2, 4)  # sizes of cp and vpp that are tried
_TIMES = (2, 4, 8, 16, 32, 64)  # as many GPUs are looked at before giving up


def legal_layouts(model: Architecture, gpus: int, node: int) -> list[LayoutConfig]:
    """Legal layouts of `gpus` GPUs: tp within a node of `node`, all pp and ep, few cp and vpp; experts' tp 1 or tp."""
    found = []
    for tp, pp, cp in product(divisors(math.gcd(gpus, model.heads)), divisors(gpus), _CONTEXT):
        if tp > node or pp > model.layers or gpus % (tp * pp * cp):
            continue
        for vpp, ep, etp in product(_VIRTUAL, divisors(model.experts) if model.experts else [1], {1, tp}):
            layout = LayoutConfig(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp, dp=gpus // (tp * pp * cp), sp=tp > 1)
            if broken_rule(layout, model) is None:
                found.append(layout)
    return found


def ranked(model: Architecture, config: Config, gpus: int | None = None) -> list[Plan]:
    """A plan for each legal layout of the trainer's GPUs, at the least recomputation that fits, the best first.

    Those that fit come first, by the estimated time of a step; without rates, and those that don't fit, by memory.
    """
    layouts = legal_layouts(model, gpus or trainer_gpus(config), node_gpus(config))
    plans = [min(_variants(model, replace(config, layout=layout)), key=_rank) for layout in layouts]
    return sorted(plans, key=_rank)


def _rank(plan: Plan) -> tuple[bool, float, int]:
    fits = plan.fits is not False
    return not fits, plan.times.step_s if fits and plan.times else 0.0, plan.worst.total


def _variants(model: Architecture, config: Config) -> Iterator[Plan]:
    """The configuration at each recomputation; where that doesn't fit, with engines that it leaves room for too."""
    for recompute in _RECOMPUTE:
        plan = Plan.of(model, replace(config, actor=replace(config.actor, recompute=recompute)))
        yield plan
        if plan.fits is False and config.rollout.engine == "sglang":
            for rollout in _engines(plan):
                yield Plan.of(model, replace(plan.config, rollout=rollout))


def _engines(plan: Plan) -> Iterator[RolloutConfig]:
    """As many GPUs of engines, with the cache that the policy leaves room for; wider engines where that is none."""
    rollout = plan.config.rollout
    affordable = rollout
    if plan.engine.shared:
        affordable = replace(rollout, memory_fraction=_affordable_fraction(plan))
        yield affordable
    if plan.short_of_cache:
        gpus = rollout.engines * rollout.tp
        for tp in legal_engine_tp(plan.model, node_gpus(plan.config)):
            if tp > rollout.tp and gpus % tp == 0 and tp % rollout.ep == tp % rollout.dp == 0:
                yield replace(affordable, tp=tp, engines=gpus // tp)


def _affordable_fraction(plan: Plan) -> float:
    """The largest `rollout.memory_fraction`, in hundredths, that leaves the policy what it needs; at least 0.01."""
    taken = (
        sum(parts[part] for part in parts if part not in ("engine_weights", "kv_cache"))
        for stage in plan.stages
        for parts in stage.phases.values()
        if parts["engine_weights"]
    )
    return max(1, math.floor(100 * (plan.memory - max(taken)) / plan.memory)) / 100


def nearest_fit(model: Architecture, config: Config) -> Plan | None:
    """The plan that fits on as many GPUs with the fewest keys changed, then the least time; None: there is none."""
    layouts = [config.layout, *legal_layouts(model, processes(config.layout), node_gpus(config))]
    plans = (plan for layout in layouts for plan in _variants(model, replace(config, layout=layout)))
    fitting = [plan for plan in plans if plan.fits]
    return min(fitting, key=lambda plan: (_changed(config, plan.config), *_rank(plan)), default=None)


def _changed(before: Config, after: Config) -> int:
    """The number of keys; layout.sp, which follows from tp, is none."""
    return sum(not change.startswith("layout.sp=") for change in changes(before, after))


def changes(before: Config, after: Config) -> list[str]:
    """What to write on the command line to turn one configuration into the other, key by key."""
    sections = ("layout", "actor", "rollout")
    return [text for name in sections for text in overrides(name, getattr(before, name), getattr(after, name))]


def check_fit(plan: Plan) -> None:
    """Raises UserError, with the nearest that fits, where the plan does not; any does where no memory is given."""
    if plan.fits is False:
        raise UserError(f"{_shortage(plan)}; {_way_out(plan.model, plan.config)}.")


def _shortage(plan: Plan) -> str:
    """What is too much, as a clause."""
    worst, gpu = plan.worst, plan.config.cluster.gpu
    if plan.short_of_cache:
        longest = plan.config.data.max_prompt_tokens + plan.config.rollout.max_tokens
        return (
            f"an engine over rollout.tp={plan.config.rollout.tp} GPUs has room for {plan.engine.tokens} tokens beside "
            f"its weights, and one sequence may have {longest}"
        )
    return (
        f"the run needs {worst.total / GIB:.1f} GiB on a GPU of pipeline stage {worst.stage} and "
        f"cluster.gpu.memory_gib={gpu.memory_gib:g} (most of it {worst.largest}, "
        f"{worst.parts[worst.largest] / GIB:.1f} GiB)"
    )


def _way_out(model: Architecture, config: Config) -> str:
    """What would fit, as a clause: fewest changes first, then more GPUs."""
    nearest = nearest_fit(model, config)
    if nearest is not None:
        return f"the nearest that fits has {' '.join(changes(config, nearest.config))}"
    gpus = processes(config.layout)
    for more in _TIMES:
        best = ranked(model, config, more * gpus)[0]
        if best.fits:
            change = " ".join(changes(config, best.config))
            return f"no layout of so many GPUs ({gpus}) does; {more * gpus} would, with {change}"
    return f"no layout of up to {more * gpus} GPUs would: {_remedy(best)}"


def _remedy(plan: Plan) -> str:
    """What to lower or raise where more GPUs don't help."""
    if not plan.short_of_cache and plan.worst.largest not in ("engine_weights", "kv_cache"):
        return "lower actor.micro_batch_tokens or rollout.max_tokens"
    if plan.config.rollout.engine == "embedded":
        return (
            "the embedded engine has the whole model and rollout.max_running sequences on one GPU; choose "
            "rollout=sglang_colocated"
        )
    return "raise rollout.tp, or lower rollout.max_tokens"
