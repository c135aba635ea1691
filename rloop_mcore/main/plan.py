"""`rloop plan`: what a run takes of its GPUs and how long its steps are, before there is a GPU or a weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from rloop_mcore import validate
from rloop_mcore.compose import load_config
from rloop_mcore.config import LayoutConfig
from rloop_mcore.planning.engines import GIB, legal_engine_tp
from rloop_mcore.planning.layouts import processes, stages
from rloop_mcore.planning.memory import PARTS, StageMemory
from rloop_mcore.planning.nodes import check_gpus, node_gpus, trainer_gpus
from rloop_mcore.planning.parameters import total_parameters
from rloop_mcore.planning.plan import Plan
from rloop_mcore.planning.search import changes, check_fit, legal_layouts, nearest_fit, ranked
from rloop_mcore.planning.state import Coordinates, state_of

_SHOWN = 10  # layouts of a search
_ENDLESS = 10_000  # columns


def plan(overrides: Sequence[str], as_json: bool, search: bool) -> int:
    """Print the plan. Raises UserError where the layout is illegal, or nothing fits of what was asked for."""
    config = load_config(overrides, absent="(not given)")
    validate.check_values(config, elsewhere=True)
    check_gpus(config)
    validate.check_device(config, "cpu" if config.cluster.device == "cpu" else "cuda")
    model = validate.check_sizes(config, *validate.stated_sizes(config.model))
    chosen = Plan.of(model, config)
    others = ranked(model, config) if search else []
    if as_json:
        print(json.dumps(_as_json(chosen, others)))
    else:
        _show(chosen, others, Console(width=150 if not Console().is_terminal else None))
    if not any(other.fits for other in others):
        check_fit(chosen)
    return 0


def _as_json(chosen: Plan, others: Sequence[Plan]) -> dict[str, Any]:
    model, config = chosen.model, chosen.config
    parameters = dict(total_parameters(model))
    of_ranks = [state_of(model, config, Coordinates(stage.stage)).parameters for stage in chosen.stages]
    legal: list[dict[str, Any]] = [_ranked_json(other) for other in others]
    if not others:
        layouts = legal_layouts(model, trainer_gpus(config), node_gpus(config))
        legal = [_layout(layout, model.layers) for layout in layouts]
    nearest = nearest_fit(model, config) if chosen.fits is False else None
    return {
        "model": asdict(model),
        "parameters": parameters.pop("total"),
        "active_parameters": parameters.pop("active"),
        "parameters_by_tensor": parameters,
        "parameters_of_a_rank_by_stage": of_ranks,
        "layouts": legal,
        "engine_layouts": [{"tp": tp} for tp in legal_engine_tp(model, node_gpus(config))],
        "chosen": {
            "layout": _layout(config.layout, model.layers),
            "gpus": processes(config.layout),
            "recompute": config.actor.recompute,
            "stage": chosen.worst.stage,
            "phase": chosen.worst.peak,
            "memory_gib": _gib(chosen.worst.parts),
            "fits": chosen.fits,
            "margin_gib": round(chosen.margin / GIB, 3) if chosen.memory else None,
            "stages": [
                {phase: _gib(parts) for phase, parts in stage.phases.items()} | {"host_gib": round(stage.host / GIB, 3)}
                for stage in chosen.stages
            ],
            "engine": asdict(chosen.engine) | {"gpus": config.rollout.engines * config.rollout.tp},
            "times": _times(chosen),
        },
        "fits": chosen.fits,
        "nearest": changes(config, nearest.config) if nearest else None,
    }


def _layout(layout: LayoutConfig, layers: int) -> dict[str, Any]:
    return vars(layout) | {"stages": stages(layout, layers)}


def _ranked_json(plan: Plan) -> dict[str, Any]:
    return _layout(plan.config.layout, plan.model.layers) | {
        "recompute": plan.config.actor.recompute,
        "memory_fraction": plan.config.rollout.memory_fraction,
        "total_gib": round(plan.worst.total / GIB, 3),
        "fits": plan.fits,
        "times": _times(plan),
    }


def _gib(parts: dict[str, int]) -> dict[str, float]:
    return {part: round(size / GIB, 3) for part, size in (parts | {"total": sum(parts.values())}).items()}


def _times(plan: Plan) -> dict[str, Any] | None:
    return asdict(plan.times) if plan.times else None


def _show(chosen: Plan, others: Sequence[Plan], console: Console) -> None:
    model, config = chosen.model, chosen.config
    parameters = total_parameters(model)
    active = f", {_count(parameters['active'])} of them a token's" if model.experts else ""
    console.print(f"{_count(parameters['total'])} parameters{active}; {model.layers} layers of width {model.hidden}")
    console.print(
        f"{processes(config.layout)} of {trainer_gpus(config)} GPUs train: {_sizes(config.layout) or 'one process'}; "
        f"precision {config.precision}, recompute {config.actor.recompute}"
    )
    console.print(_parts_table(chosen.worst, console))
    if config.layout.pp > 1:
        console.print(_stages_table(chosen))
    _show_verdict(chosen, console)
    _show_times(chosen, console)
    if others:
        fitting = sum(other.fits is not False for other in others)
        console.print(f"\n{len(others)} legal layouts, {fitting} of them fit; the best:")
        console.print(_search_table(others[:_SHOWN]))


def _sizes(layout: LayoutConfig) -> str:
    """What is spread: tp=4 dp=2."""
    return " ".join(f"{key}={size}" for key, size in vars(layout).items() if key not in ("stages", "sp") and size > 1)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 5e6 else f"{parameters:,}"


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _parts_table(worst: StageMemory, console: Console) -> Table:
    """The fullest GPU in each phase, part by part; a row a part where the console is too narrow for a column each."""
    used = [part for part in PARTS if any(parts[part] for parts in worst.phases.values())]
    title, parts_of = f"GiB of a GPU of stage {worst.stage}", list(worst.phases.values())
    rows = [[parts[part] for parts in parts_of] for part in used] + [[sum(parts.values()) for parts in parts_of]]
    figures = [[f"{size / GIB:.2f}" for size in row] for row in rows]
    names = [*used, "total"]
    table = _table(title, "phase", *names)
    for phase, column in zip(worst.phases, zip(*figures, strict=True), strict=True):
        table.add_row(phase, *column)
    if Measurement.get(console, console.options.update(width=_ENDLESS), table).maximum <= console.width:
        return table
    table = _table(title, "phase", *worst.phases)
    for name, row in zip(names, figures, strict=True):
        table.add_row(name.replace("_", " "), *row)
    return table


def _stages_table(plan: Plan) -> Table:
    """What the GPUs of every pipeline stage hold."""
    split, layout = stages(plan.config.layout, plan.model.layers), plan.config.layout
    table = _table("GiB of a GPU by stage", "stage", "layers", "parameters", *plan.worst.phases)
    for stage in plan.stages:
        held = state_of(plan.model, plan.config, Coordinates(stage.stage)).parameters
        totals = (f"{sum(parts.values()) / GIB:.2f}" for parts in stage.phases.values())
        table.add_row(str(stage.stage), "+".join(map(str, split[stage.stage :: layout.pp])), f"{held:,}", *totals)
    return table


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="left" if column in ("phase", "layout") else "right")
    return table


def _show_verdict(plan: Plan, console: Console) -> None:
    worst, config = plan.worst, plan.config
    words = f"the fullest GPU is one of stage {worst.stage}, most of it {worst.largest.replace('_', ' ')}"
    if plan.fits is None:
        console.print(f"{words}; cluster.gpu.memory_gib is not given")
    elif plan.fits:
        console.print(f"fits, with {plan.margin / GIB:.1f} of {config.cluster.gpu.memory_gib:g} GiB to spare: {words}")
    else:
        console.print(f"does not fit: {words}")
    if worst.host:
        console.print(f"{worst.host / GIB:.1f} GiB of the CPU's memory a GPU hold offloaded optimizer state")
    engine, rollout = plan.engine, config.rollout
    if not rollout.endpoints:
        where = "beside the policy" if engine.shared else "on GPUs of their own"
        room = f"room for {engine.tokens:,} tokens" if plan.memory or engine.tokens else "a cache of unknown size"
        console.print(
            f"{_several(rollout.engines, 'engine')} of {_several(rollout.tp, 'GPU')} {where}: weights "
            f"{engine.weights / GIB:.2f} GiB a GPU, {room}{', asleep while it trains' if engine.sleeps else ''}"
        )


def _show_times(plan: Plan, console: Console) -> None:
    times = plan.times
    if times is None:
        console.print("no estimate of time: cluster.gpu.bf16_tflops and memory_gb_s are not given")
        return
    console.print(
        f"a step takes about {times.step_s:.0f} s: rollout {times.rollout_s:.0f}, training {times.train_s:.0f} "
        f"({times.update_s:.1f} an update of {times.micro_batches} micro-batches a replica, bubble "
        f"{100 * times.bubble:.0f} %), sync {times.sync_s:.1f}"
    )
    console.print(
        f"tokens/s: {times.train_tokens_per_s:,.0f} trained ({100 * times.mfu:.0f} % of "
        f"the bf16 peak), {times.rollout_tokens_per_s:,.0f} generated; with responses of half of rollout.max_tokens"
    )


def _search_table(plans: Sequence[Plan]) -> Table:
    table = _table(None, "step s", "update s", "GiB", "fits", "layout")
    for plan in plans:
        times = (f"{plan.times.step_s:.0f}", f"{plan.times.update_s:.1f}") if plan.times else ("", "")
        rollout = f" memory_fraction={plan.config.rollout.memory_fraction}" if plan.engine.shared else ""
        fits = {True: "yes", False: "no", None: "?"}[plan.fits]
        words = f"{_sizes(plan.config.layout)} recompute={plan.config.actor.recompute}{rollout}"
        table.add_row(*times, f"{plan.worst.total / GIB:.1f}", fits, words)
    return table
