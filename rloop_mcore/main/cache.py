"""`rloop cache`: what a run's trajectory cache holds, whether it is sound, and its rows as text or JSON lines."""

from __future__ import annotations

import json
from argparse import Namespace
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rloop_mcore.config import Config
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.cache_upkeep import iterations_lost, merge_small, set_damaged_aside, steps_lost
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.platform.files import atomic_path
from rloop_mcore.run_state import expert_query
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.reader import damaged
from rloop_mcore.trajectory.schema import FIELDS
from rloop_mcore.types import Trajectory

_BARS = "·▁▂▃▄▅▆▇█"
_WIDTH = 80  # of the summary, at least: less would cut its figures


def cache(options: Namespace) -> int:
    """Do what the options ask for; a summary where they ask for nothing.

    Raises UserError where there is no run, or a shard is damaged or gone.
    """
    if not (options.show or options.export) and (options.iteration, options.problem) != (None, None):
        raise UserError("--iteration and --problem say which trajectories to --show or to --export: add one of these.")
    run = RunDirectory(options.run)
    config, console = run.read_config(), Console()
    say = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    for wanted, work in ((options.quarantine, set_damaged_aside), (options.compact, merge_small)):
        for line in work(run) if wanted else ():
            say(line)
    named = Journal(run.journal).shards()  # before the cache: a run at work seals first
    found = TrajectoryCache(run.cache)
    found.check_holds(named)
    if options.verify:
        if damage := found.verify():
            raise damaged(run.cache, damage)
        for line in (
            f"{run.cache} is sound: {found.count()} trajectories, every byte as it was sealed",
            *steps_lost(found.losses()),
        ):
            say(line)
    if options.export:
        count = _export(found, options.export, options.iteration, options.problem)
        say(f"{options.export}: {count} trajectories")
    if options.show:
        _show(console, found, run.model(config), options)
    if not (options.verify or options.export or options.show or options.quarantine or options.compact):
        Console(width=max(console.width, _WIDTH)).print(summary(found, config))
        for line in iterations_lost(found.losses()):
            say(line)
    return 0


def summary(found: TrajectoryCache, config: Config) -> Table:
    """A row a phase. "success": problems by success rate, from 0 on the left to 1, ten bins of equal width."""
    title = f"{found.count()} trajectories, {found.bytes() / 1e6:.1f} MB"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("iteration", "steps", "sampled", "problems", "correct", "truncated", "experts", "success"):
        table.add_column(name, justify="left" if name == "success" else "right", no_wrap=True)
    for phase in found.phases():
        histogram = found.success_histogram(phase.iteration)
        table.add_row(
            str(phase.iteration),
            str(len(phase.steps)),
            str(phase.trajectories),
            str(sum(histogram)),
            f"{phase.correct / phase.trajectories:.1%}",
            f"{phase.truncated / phase.trajectories:.1%}",
            str(found.count_experts(expert_query(config, phase.iteration))),
            "".join(_BARS[-(-count * 8 // max(histogram))] for count in histogram),
        )
    return table


def _export(found: TrajectoryCache, out: Path, iteration: int | None, problem: str | None) -> int:
    """Write the rows as JSON lines, atomically; returns how many."""
    count = 0
    with atomic_path(out) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for count, row in enumerate(found.rows(iteration, problem), start=1):  # noqa: B007
            file.write(json.dumps({name: getattr(row, name) for name in FIELDS}, ensure_ascii=False) + "\n")
    return count


def _show(console: Console, found: TrajectoryCache, model: Path, options: Namespace) -> None:
    """The first trajectories as text, by the tokenizer of the run's model."""
    tokenizer = TextTokenizer(model)
    rows = list(islice(found.rows(options.iteration, options.problem), options.show))
    if not rows:
        console.print("no trajectory is of that iteration and problem")
    for row in rows:
        # whole, and the texts as they are, however narrow what they are shown on is
        console.print(Text(f"── {_heading(row)}", style="bold"), soft_wrap=True)
        prompt, response = (tokenizer.decode(ids) for ids in (row.prompt_ids, row.response_ids))
        console.print(prompt, style="dim", markup=False, highlight=False, soft_wrap=True, end="")
        console.print(response, markup=False, highlight=False, soft_wrap=True)


def _heading(row: Trajectory) -> str:
    place = f"iteration {row.iteration}, step {row.step}, {row.problem_id}, sample {row.sample}"
    return f"{place}: {row.reason}, {len(row.response_ids)} tokens, {row.finish_reason}"
