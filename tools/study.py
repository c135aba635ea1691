"""The runs of docs/study.md: RLoop, plain DAPO and three ablations at equal RL steps, over seeds and training sets.

Every run leaves a short file of numbers, docs/study/seed0/200_rloop.json and so on, which tools/study_tables.py reads.
Stopped at any point, the same command goes on. What has its file is not run again: remove docs/study/seed* to do so.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from jobs import Job, progress_view, run_together, training
from rich.progress import Progress
from study_record import held_out_counts, record_of

from rloop_mcore.analysis.pick import base, last_rl_policy, last_theta, pick
from rloop_mcore.analysis.read_run import Evaluation, read_run
from rloop_mcore.platform.files import write_atomic

ROOT = Path("runs/study")
RECORDS = Path("docs/study")
HELD_OUT = ("countdown:test", "countdown:hard")  # like the training problems; with few solutions each
# Every arm is the quickstart's RLoop but for what its name says. None was tuned.
ARMS = {
    "dapo": ["experiment=quickstart_dapo"],
    "rloop": ["experiment=quickstart"],
    "no_hard_filter": ["experiment=quickstart", "algorithm.hard_threshold=null"],
    "no_reset": ["experiment=quickstart", "algorithm.reset=false"],
    # what configs/algorithm/rft.yaml says; the policy moves between phases only
    "rft_only": ["experiment=quickstart", "algorithm.updates_per_step=0", "algorithm.sampling_rounds=1"],
}
EVERY = 20  # RL steps between checkpoints that are evaluated: the matrices' resolution


@dataclass(frozen=True)
class Planned:
    """A run: the job that trains it, and where its numbers go."""

    seed: int
    run: Path
    record: Path
    job: Job


def record_path(seed: int, name: str) -> Path:
    """Where the numbers of a seed's run go."""
    return RECORDS / f"seed{seed}" / f"{name}.json"


def base_run(seed: int) -> Planned:
    """SFT to theta_0, where all arms of a seed start."""
    run = ROOT / f"seed{seed}" / "base"
    overrides = ["experiment=quickstart_base", f"run.dir={run}", f"run.seed={seed}"]
    job = training(f"seed {seed}: base", overrides, run.with_suffix(".log"))
    return Planned(seed, run, record_path(seed, "base"), job)


def arm_run(seed: int, size: int, arm: str, theta_0: Path) -> Planned:
    """An arm on `size` training problems."""
    run = ROOT / f"seed{seed}" / str(size) / arm
    overrides = [*ARMS[arm], f"run.dir={run}", f"run.seed={seed}", f"data.limit={size}", f"model.path={theta_0}"]
    overrides.append(f"evaluation.every={0 if arm == 'rft_only' else EVERY}")
    job = training(f"seed {seed}, {size} problems: {arm}", overrides, run.with_suffix(".log"))
    return Planned(seed, run, record_path(seed, f"{size}_{arm}"), job)


def carry_out(planned: Planned, after: Future[None] | None, view: Progress) -> None:
    """Train, measure, and write the record. `after`: the base that it starts from."""
    if after is not None:
        after.result()
    finish(planned.job, view)
    if planned.record.exists():  # a base's, whose arms are wanted
        return
    evaluations = read_run(planned.run).evaluations
    if after is None:
        chosen = {"base": base(evaluations)}
    else:
        chosen = {"picked": pick(evaluations), "theta": last_theta(evaluations), "rl": last_rl_policy(evaluations)}
    write_record(planned, chosen, view)


def write_record(planned: Planned, chosen: dict[str, Evaluation | None], view: Progress) -> None:
    """The numbers of a finished run; its `chosen` checkpoints are measured on the held-out problems first."""
    run, held_out, measured = planned.run, {}, {}
    for name, checkpoint in chosen.items():
        if checkpoint is None or checkpoint.policy is None:
            continue
        if checkpoint.name not in measured:
            result = run / f"held_out_{checkpoint.name}.json"
            data = [word for source in HELD_OUT for word in ("--data", source)]
            overrides = ["experiment=quickstart", "evaluation.limit=null", f"run.seed={planned.seed}"]
            arguments = ["evaluate", "--policy", str(run / checkpoint.policy), *data, "--json", str(result)]
            arguments += ["--out", str(run / "held_out"), *overrides]
            finish(Job(f"{planned.job.title}: held out, {name}", arguments, run.with_suffix(".log")), view)
            measured[checkpoint.name] = held_out_counts(result)
        held_out[name] = {"checkpoint": checkpoint.name, **measured[checkpoint.name]}
    planned.record.parent.mkdir(parents=True, exist_ok=True)
    record = record_of(run) | {"held_out": held_out}
    write_atomic(planned.record, json.dumps(record, separators=(",", ":")) + "\n")


def finish(job: Job, view: Progress) -> None:
    """Run a job to its end and take its bar away."""
    run_together(view, [job])
    for task in view.tasks:
        if task.description == job.title:
            view.remove_task(task.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[200, 2000], help="training problems")
    parser.add_argument("--at-once", type=int, default=os.cpu_count(), help="runs side by side, one core each")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ROOT.mkdir(parents=True, exist_ok=True)
    with progress_view() as view, ThreadPoolExecutor(options.at_once) as pool:
        bases: dict[int, tuple[Path, Future[None]]] = {}
        arms = []
        for size, seed, arm in product(options.sizes, range(options.seeds), ARMS):
            if record_path(seed, f"{size}_{arm}").exists():
                continue
            if seed not in bases:
                planned = base_run(seed)
                bases[seed] = planned.run / "policies" / "theta_0", pool.submit(carry_out, planned, None, view)
            policy, after = bases[seed]
            arms.append(pool.submit(carry_out, arm_run(seed, size, arm, policy), after, view))
        whole = view.add_task("runs", total=len(arms), note="")
        try:
            for ended in as_completed(arms):
                ended.result()
                view.advance(whole)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
