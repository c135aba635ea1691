"""What a resumed run may change of its configuration and data, and why it may not change the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rloop_mcore.config import ArchitectureConfig, Config, GpuConfig, PreflightConfig, SlurmConfig
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory, read_if_sound
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.run_config import flat


@dataclass(frozen=True)
class Rule:
    """Why these keys bind a run: from the first record of the phase `since` on (None: from the run's first)."""

    reason: str
    keys: tuple[str, ...]  # a key, or a section with its dot; the longest that fits counts
    since: str | None = None
    forcible: bool = True  # with --force


# Another layout, device, number of threads or of engines gives the same run up to rounding. A key that is free stands
# here by its own name: one that is new in a section must be thought about.
_FREE = (
    *("run.dir", "experiment", "algorithm.iterations", "evaluation.every", "evaluation.k"),
    *(f"layout.{name}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "sp", "stages")),
    *("actor.micro_batch_tokens", "actor.recompute"),
    *(f"rollout.{name}" for name in ("endpoints", "engines", "python", "tp", "dp", "ep", "memory_fraction", "gpus")),
    *(f"rollout.{name}" for name in ("sleep", "max_running", "bucket_mib", "start_timeout_s", "request_timeout_s")),
    *("optimizer.skip_grad", "rft.optimizer.skip_grad", "sft.optimizer.skip_grad"),
    *(f"guard.{name}" for name in ("patience", "policy", "entropy_low", "entropy_high")),
    *("guard.stall_factor", "guard.stall_floor_s"),
    *(f"preflight.{asked.name}" for asked in fields(PreflightConfig)),
    *("rollout.mismatch_gate", "rollout.mismatch_mean_gate", "reward.workers"),
    *("reward.max_failure_share", "reward.max_unparsable_share"),
    *(f"checkpoint.{name}" for name in ("every", "keep", "keep_best", "policy_steps", "asynchronous")),
    *(f"tracking.{name}" for name in ("tensorboard", "wandb_project", "progress")),
    *(f"cluster.{name}" for name in ("device", "threads", "collective_timeout_s", "job_end", "stop_margin_s")),
    *("cluster.nodes", "cluster.gpus_per_node", "rollout.nodes", "cluster.interface", "cluster.start_timeout_s"),
    *(f"cluster.slurm.{option.name}" for option in fields(SlurmConfig)),
    *(f"cluster.gpu.{size.name}" for size in fields(GpuConfig)),
    *(f"model.architecture.{size.name}" for size in fields(ArchitectureConfig)),  # model.path's own config.json counts
)
_RULES = (
    Rule("what was drawn until now followed from it", ("run.seed", "data.sampler")),
    Rule("the run would repeat bit for bit in one half and not in the other", ("run.deterministic",)),
    Rule("the weights, and the token ids in the cache, are this model's", ("model.",)),
    Rule("the steps so far were computed in it, and the checkpoint holds its state", ("precision", "fp8.")),
    Rule("the success rates of a phase would mix groups of both sizes", ("algorithm.group_size",)),
    Rule("the iterations would explore for different lengths", ("algorithm.rl_steps",), "explore"),
    Rule(
        "the phases would be half one algorithm and half another",
        ("algorithm.", "optimizer.", "reward.correct", "reward.wrong", "reward.format_penalty"),
        "explore",
    ),
    Rule(
        "the thetas would be made in two ways, and could not be compared",
        ("rft.", "algorithm.hard_threshold", "algorithm.reset"),
        "select",
    ),
    Rule("theta_0, which everything starts from, is made with it", ("sft.",)),
    Rule("the optimizer state in the checkpoint has the form that it gives", ("actor.",)),
    Rule("the updates so far used the experts that it says", ("actor.routing_replay",)),
    Rule("the trajectories in the cache were sampled with it: success rates would mix both", ("rollout.",)),
    Rule("the success rates of a phase would be over two sets of problems or prompts", ("data.",)),
    Rule("the verdicts in the cache are by it: success rates would mix both", ("reward.",)),
    Rule(
        "the measurements so far were made with it: checkpoints could not be compared, nor the best one picked",
        ("evaluation.", "data.validation"),
    ),
)
_TABLE: dict[str, Rule | None] = dict.fromkeys(_FREE) | {key: rule for rule in _RULES for key in rule.keys}


def take_changes(run: RunDirectory, config: Config, force: bool) -> bool:
    """Compare `config` with what the run has been made with; say and journal what has changed.

    Returns whether anything has. Raises UserError for a change that would make the run something that it doesn't say it
    is, unless forced.
    """
    changed = _changed(run, config)
    if not changed:
        return False
    with run.lock("lock.rank0"):  # a rank that was killed may still be on its way out, and the journal is its
        journal = Journal(run.journal)
        obstacles = _obstacles(run, changed, journal, force)
        for key, rule in obstacles.items():
            print(f"rloop: warning: {key}={_spelled(changed[key]['now'])} is forced: {rule.reason}.", file=sys.stderr)
        words = ", ".join(f"{key}={_spelled(c['now'])} (was {_spelled(c['before'])})" for key, c in changed.items())
        print(f"rloop: changed: {words}", file=sys.stderr, flush=True)
        fields = {"keys": changed, "forced": list(obstacles)}
        if not (journal.records and fields.items() <= journal.records[-1].items()):
            journal.record("changed", **fields)  # a kill before the new config.yaml is written comes here again
    return True


def check_changes(run: RunDirectory, config: Config, force: bool) -> None:
    """Raises UserError where `take_changes` will: for who only submits the run, which may be at work."""
    if changed := _changed(run, config):
        _obstacles(run, changed, Journal(run.journal), force)


def _changed(run: RunDirectory, config: Config) -> dict[str, dict[str, Any]]:
    """The keys that are others than the run has been made with: before, and now."""
    if not run.journal.exists():  # nothing has been done with an earlier configuration
        return {}
    before, now = flat(run.read_config()), flat(config)
    keys = [key for key in now if now[key] != before[key] and key != "run.dir"]
    return {key: {"before": before[key], "now": now[key]} for key in keys}


def _obstacles(
    run: RunDirectory, changed: Mapping[str, Mapping[str, Any]], journal: Journal, force: bool
) -> dict[str, Rule]:
    """What is against the changes. Raises UserError where they are not forced, or can't be."""
    found = {key: rule for key in changed if (rule := obstacle_to(key, changed[key]["now"], journal)) is not None}
    for key, rule in found.items():
        if not (force and rule.forcible):
            others = "choose another run.dir, or add --force" if rule.forcible else "or choose another run.dir"
            before, now = (_spelled(changed[key][when]) for when in ("before", "now"))
            raise UserError(
                f"{run.path} was started with {key}={before}, not {now}: {rule.reason}; resume it with the same "
                f"command, {others}."
            )
    return found


def take_inputs(run: RunDirectory, config: Config, digests: Mapping[str, str], force: bool) -> None:
    """Compare what the files hold that keys name, by its digest for each key, with what the run has been made with.

    Raises UserError where one holds something else now, the key being the same, unless forced; keeps the digests.
    """
    before, values = read_if_sound(run.inputs) or {}, flat(config)
    changed = [key for key, digest in digests.items() if before.get(key, digest) != digest]
    if changed and any(record["event"] != "started" for record in Journal(run.journal).records):
        with run.lock("lock.rank0"):  # as in `take_changes`
            journal = Journal(run.journal)
            for key in changed:
                rule = obstacle_to(key, values[key], journal)
                assert rule is not None, f"{key} binds a run from its start"
                what = f"{key}={_spelled(values[key])} holds something else than when {run.path} was started"
                if not force:
                    raise UserError(f"{what}: {rule.reason}; restore it, choose another run.dir, or add --force.")
                print(f"rloop: warning: {what}, which is forced: {rule.reason}.", file=sys.stderr)
            keys = {f"what {key} holds": {"before": before[key], "now": digests[key]} for key in changed}
            journal.record("changed", keys=keys, forced=list(keys))
    write_atomic(run.inputs, json.dumps(dict(digests)) + "\n")


def obstacle_to(key: str, value: Any, journal: Journal) -> Rule | None:
    """What is against a change of `key` to `value` where the journal stands."""
    places = journal.places()
    if key == "algorithm.iterations":
        begun = max((record["iteration"] + 1 for record in places), default=0)
        return Rule(f"{begun} iterations have begun", (key,), forcible=False) if value < begun else None
    if key == "algorithm.rl_steps" and value < (steps := _steps_under_way(journal)):
        return Rule(f"{steps} steps of this exploration are done", (key,), forcible=False)
    rule = rule_of(key)
    if rule is not None and rule.since is not None and all(record["phase"] != rule.since for record in places):
        return None
    return rule


def _steps_under_way(journal: Journal) -> int:
    """RL steps of the exploration that has begun and is not done; 0 where there is none."""
    commits = [commit for commit in journal.commits() if commit["phase"] == "explore"]
    return commits[-1]["step"] if commits and not journal.done(commits[-1]["iteration"], "explore") else 0


def rule_of(key: str) -> Rule | None:
    """The rule of a key; None where it may change. Raises KeyError where nobody has thought about it."""
    parts = key.split(".")
    sections = (f"{'.'.join(parts[:length])}." for length in range(len(parts) - 1, 0, -1))
    return _TABLE[next((name for name in (key, *sections) if name in _TABLE), key)]


def _spelled(value: Any) -> str:
    """As YAML and the command line have it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
