"""What survives a kill, and how: checkpoints, policies, shards and measurements become durable first, then the
journal names them; whatever the journal doesn't name is discarded at start."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rloop_mcore.algorithm.guard import Streak, what_is_wrong
from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.commits import Commits, remove
from rloop_mcore.config import Config, OptimizerConfig
from rloop_mcore.errors import Fault, Interrupted, UserError
from rloop_mcore.journal import Journal
from rloop_mcore.kept_policies import removable, removed
from rloop_mcore.protocols import Actor, Cache, Evaluator, Rollout
from rloop_mcore.space import Space, bytes_of
from rloop_mcore.timeline import Timeline
from rloop_mcore.tracking import Tracker
from rloop_mcore.types import Example, ExpertQuery, Policy, PolicyName

# What a run itself makes in its folders: all else there is somebody's, a policy that was converted, say.
_OURS = re.compile(r"\.tmp-.+|(base|theta_\d+|i\d+(_[a-z]+_\d+)?)(\.json|\.parquet)?")
_FULL_DISK_WAITS = 12  # collective timeouts that a run waits for space


@dataclass
class RunState:
    """The run directory, as the loop moves it from one durable state to the next."""

    config: Config
    directory: Path
    journal: Journal
    actor: Actor
    rollout: Rollout
    cache: Cache
    evaluator: Evaluator | None
    tracker: Tracker
    stop_requested: Callable[[], bool]
    timeline: Timeline = field(default_factory=Timeline)
    position: int = 0  # of the endless order of prompts: from there on they are drawn
    space: Space = field(init=False)
    commits: Commits = field(init=False)
    _streak: Streak = field(default_factory=Streak, init=False)
    _synced: int | None = field(default=None, init=False)
    _policy_bytes: int = field(default=0, init=False)  # of the policy that the phase began with

    def __post_init__(self) -> None:
        # The other ranks wait for the next call that long, and longer.
        patience_s = _FULL_DISK_WAITS * self.config.cluster.collective_timeout_s
        self.space = Space(self.directory, self.tracker.message, self.stop_requested, patience_s)
        keep = self.config.checkpoint.keep
        self.commits = Commits(self.directory, self.journal, self.actor, self.space, self.timeline, keep)

    def recover(self) -> None:
        """Discard what a killed run left beyond its journal."""
        self.journal.make_durable()
        commits = self.journal.commits()
        self.cache.keep_only(self.journal.shards())
        self.position = commits[-1]["position"] if commits else 0
        offsets = [record["metrics_offset"] for record in self.journal.records if "metrics_offset" in record]
        self.tracker.rewind(offsets[-1] if offsets else 0)
        named = {record["checkpoint"] for record in commits[-self.config.checkpoint.keep :]}
        for record in self.journal.records:
            named.add(record.get("path"))
            if record["event"] == "measured":
                named |= {f"evaluation/{record['name']}.{suffix}" for suffix in ("json", "parquet")}
        named -= removed(self.journal.records)
        for folder in ("checkpoints", "policies", "evaluation", "experts"):
            for path in (self.directory / folder).glob("*"):
                if _OURS.fullmatch(path.name) and f"{folder}/{path.name}" not in named:
                    remove(path)
        self._remove_policies()

    def record_start(self, facts: Mapping[str, Any]) -> None:
        """Say in the journal that the run starts, or goes on, and in what circumstances."""
        self._record("started", **facts)

    def seed(self, purpose: str, iteration: int) -> int:
        """The seed of a draw that happens once an iteration."""
        return derive_seed(self.config.run.seed, purpose, iteration)

    def begin(
        self,
        iteration: int,
        phase: str,
        start: Policy,
        optimizer: OptimizerConfig,
        steps: int,
        updates_per_step: int = 1,
    ) -> int:
        """Put the actor where the phase stands: at `start`, or at the last commit. Returns the steps done.

        Raises Fault where the guard stopped the run there, and `guard` still says so; UserError where the commit's
        checkpoint is gone.
        """
        commit = self.journal.newest("commit", iteration, phase)
        self._streak = Streak(**(commit or {}).get("streak", {}))
        if commit is not None:
            self._check_checkpoint(commit)
            self._heed_guard(iteration, phase, commit["step"], steps)
        self._synced = None
        self._policy_bytes = bytes_of(start.path.glob("*.safetensors"))
        self._engines_sleep()
        self.actor.begin(start.path, optimizer, steps * updates_per_step)
        if commit is None:
            return 0
        self.actor.load(self.directory / commit["checkpoint"])
        return int(commit["step"])

    def _check_checkpoint(self, commit: Mapping[str, Any]) -> None:
        """Raises UserError where it is gone: by hand, or with `checkpoint.keep` newer ones that the journal lost."""
        if (checkpoint := self.directory / commit["checkpoint"]).is_dir():
            return
        phase = commit["iteration"], commit["phase"]
        first = next(r["n"] for r in self.journal.commits() if (r["iteration"], r["phase"]) == phase)
        raise UserError(
            f"{checkpoint} is gone, from which the run would go on: restore it, or cut {self.journal.path} before line "
            f"{first + 1} to begin this phase (iteration {phase[0]} {phase[1]}) anew."
        )

    def commit(self, iteration: int, phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Log a step and, every `checkpoint.every` steps, make everything up to it durable.

        With `checkpoint.asynchronous` that takes until the next commit, which comes at the latest where anything else
        is journaled: at the end of the phase, before a measurement, when the guard acts or the run is asked to stop.

        Raises, after committing, Fault where the guard stops the run, and Interrupted when it was asked to stop.
        """
        guard = self.config.guard
        self._streak = self._streak.then(what_is_wrong(metrics, guard.entropy_low, guard.entropy_high))
        metrics = {**metrics, "bad_steps": float(self._streak.length)}
        self.tracker.log(iteration, phase, step, self._global_step(iteration, phase, step), metrics, total)
        stopping = self.stop_requested()
        every = self.config.evaluation.every
        measured_next = phase == "explore" and every and step % every == 0
        kept = phase == "explore" and step in self.config.checkpoint.policy_steps
        needed_now = stopping or measured_next or step == total or self._streak.is_due(guard.patience)
        if not (needed_now or kept or step % self.config.checkpoint.every == 0):
            return
        self.commits.settle()
        name = f"checkpoints/{PolicyName(iteration, phase, step)}"
        known = set(self.journal.shards())
        shards = self.space.write("the trajectory cache", self.cache.seal)
        policy = {}
        if kept and not measured_next and step < total:  # else it is measured, and kept for that
            saved = self.save_policy(str(PolicyName(iteration, phase, step)))
            policy = {"path": self._name(saved.path), "digest": saved.digest}
        commit = {
            "iteration": iteration,
            "phase": phase,
            "step": step,
            "checkpoint": name,
            "shards": [shard for shard in shards if shard not in known],
            "position": self.position,
            "metrics_offset": self._metrics_offset(),
            "streak": asdict(self._streak),
            **policy,
        }
        wait = needed_now or bool(policy) or not self.config.checkpoint.asynchronous
        self.commits.take(commit, wait)
        self._heed_guard(iteration, phase, step, total)
        if stopping:
            raise Interrupted

    def _heed_guard(self, iteration: int, phase: str, step: int, total: int) -> None:
        """Where the guard acts at this committed step: journal it, once, and raise Fault if it stops the run."""
        guard, streak = self.config.guard, self._streak
        if not streak.is_due(guard.patience):
            return
        fields = {"iteration": iteration, "phase": phase, "step": step, "policy": guard.policy}
        fields |= {"bad_steps": streak.length, "reason": streak.reason, "early": step < total}
        text = f"iteration {iteration} {phase}, step {step}: {streak.length} bad in a row, the last: {streak.reason}"
        if not self._has("guard", fields):
            self._record("guard", **fields)
            self.tracker.message(f"{text} (guard.policy={guard.policy})")
        if guard.policy == "stop":
            raise Fault(
                f"{text}. The run is committed up to this step: the same command goes on to the next phase with "
                "guard.policy=end_phase, and in this one with guard.policy=skip; or start another run with a lower "
                "learning rate."
            )

    def over(self, step: int, total: int) -> bool:
        """Whether the phase ends after `step` steps: all `total` are done, or the guard ends it."""
        guard = self.config.guard
        return step >= total or (guard.policy == "end_phase" and self._streak.is_due(guard.patience))

    def finish(self, iteration: int, phase: str, **facts: Any) -> None:
        """Record that a phase of an iteration is complete."""
        self._record("done", iteration=iteration, phase=phase, **facts)
        self._remove_policies()

    def sync(self, iteration: int, step: int) -> dict[str, float]:
        """Bring the engines to the actor's weights: the policy after `step` RL steps of `iteration`.

        Returns the metrics of the sync; none where the engines held these weights already.
        """
        version = self.version(iteration, step)
        if version == self._synced:
            return {}
        if self.config.rollout.sleep:
            self.actor.make_room()
        with self.timeline.span("trainer", "sync", version=version):
            metrics = self.rollout.sync(self.actor.export, version)
        self._synced = version
        return metrics

    def _engines_sleep(self) -> None:
        """With `rollout.sleep`: before the actor takes memory."""
        if self.config.rollout.sleep:
            self.rollout.sleep()

    def _record(self, event: str, **fields: Any) -> None:
        self.space.write("the journal", lambda: self.journal.record(event, **fields))

    def _metrics_offset(self) -> int:
        return self.space.write("the metrics", self.tracker.offset)

    def version(self, iteration: int, step: int) -> int:
        """The weight version of the policy after `step` RL steps of `iteration`."""
        return self._global_step(iteration, "explore", step) + iteration + 1

    def select(self, iteration: int) -> None:
        """Write D_expert(i) as files of the run, and record that: the `select` phase. Empty without RFT."""
        facts: dict[str, Any] = {"experts": 0, "problems": 0}
        if self.config.rft.enabled:
            folder = self.directory / "experts" / f"i{iteration}"
            query = expert_query(self.config, iteration)
            facts |= self.space.write("the expert trajectories", lambda: self.cache.write_experts(query, folder))
            facts |= {"path": self._name(folder)}
        self.finish(iteration, "select", **facts)

    def experts(self, iteration: int) -> Sequence[Example]:
        """D_expert(i) as it was selected, in a fixed order."""
        done = self.journal.newest("done", iteration, "select")
        return self.cache.experts(self.directory / done["path"]) if done and "path" in done else []

    def save_policy(self, name: str) -> Policy:
        """Write the actor's weights as `policies/{name}`."""
        path = self.directory / "policies" / name
        return self.space.write(f"policies/{name}", lambda: self.actor.save_policy(path), self._policy_bytes)

    def record_theta(self, index: int, policy: Policy, reason: str) -> None:
        """Name theta_index in the journal, once: a crash right after it repeats the end of the phase."""
        fields = {"iteration": index, "path": self._name(policy.path), "digest": policy.digest, "reason": reason}
        if self._has("policy", fields):
            return
        self._record("policy", **fields)
        self.tracker.message(f"theta_{index}: {reason}")

    def measure(self, iteration: int, phase: str, step: int, policy: Policy | None = None) -> None:
        """Keep a policy (the actor's own, unless given) and evaluate it on the validation problems, once."""
        name = str(PolicyName(iteration, phase, step))
        if self._has("measured", {"name": name}):
            return
        if policy is None:
            policy = self._kept(name) or self.save_policy(name)
        metrics: dict[str, float] = {}
        if self.evaluator is not None:
            if phase != "explore":
                self._engines_sleep()
                self.actor.begin(policy.path, self.config.optimizer, 1)
                self._synced = None
            self.sync(iteration + (phase == "exploit"), step)
            with self.timeline.span("trainer", "evaluate", measurement=name):
                evaluate, kept = self.evaluator.evaluate, self._name(policy.path)
                metrics = self.space.write(f"evaluation/{name}", lambda: evaluate(name, kept))
            reached = self._global_step(iteration, phase, step)
            self.tracker.log(iteration, "evaluate", step, reached, metrics, checkpoint=name)
        self._record(
            "measured",
            name=name,
            path=self._name(policy.path),
            digest=policy.digest,
            metrics=metrics,
            metrics_offset=self._metrics_offset(),
        )
        self._remove_policies()

    def _kept(self, name: str) -> Policy | None:
        """What a commit has kept as `policies/{name}`, for `checkpoint.policy_steps`."""
        path = f"policies/{name}"
        commits = self.journal.commits()
        return next((Policy(self.directory / path, r["digest"]) for r in commits if r.get("path") == path), None)

    def _remove_policies(self) -> None:
        """Remove the policies that `checkpoint.keep_best` leaves no place for.

        The journal says so first: of what it calls removed, `recover` discards whatever a kill left.
        """
        if paths := removable(self.journal, self.config.checkpoint):
            self._record("removed", paths=paths)
            for path in paths:
                remove(self.directory / path)

    def _name(self, path: Path) -> str:
        """A path as files name it: relative to the run directory, so that a run can be moved, where it lies inside."""
        return str(path.relative_to(self.directory) if path.is_relative_to(self.directory) else path.resolve())

    def _global_step(self, iteration: int, phase: str, step: int) -> int:
        """RL steps taken in the run so far: the x axis of every curve. The guard may end an exploration early."""
        done = (r for r in self.journal.records if r["event"] == "done" and r["phase"] == "explore")
        explored = {record["iteration"]: record["step"] for record in done}
        before = sum(steps for earlier, steps in explored.items() if earlier < iteration)
        return {"base": 0, "sft": step, "explore": before + step}.get(phase, before + explored.get(iteration, 0))

    def _has(self, event: str, fields: Mapping[str, Any]) -> bool:
        """Whether the journal holds such a record."""
        return any(record["event"] == event and fields.items() <= record.items() for record in self.journal.records)


def expert_query(config: Config, iteration: int) -> ExpertQuery:
    """What RFT of the iteration draws from."""
    rft = config.rft
    return ExpertQuery(
        iterations=tuple(range(max(0, iteration - rft.earlier_iterations), iteration + 1)),
        hard_threshold=config.algorithm.hard_threshold,
        deduplicate=rft.deduplicate,
        steps=tuple(rft.steps),
        min_tokens=rft.min_tokens,
        max_per_problem=rft.max_per_problem,
        share=rft.share,
        seed=config.run.seed,
    )
