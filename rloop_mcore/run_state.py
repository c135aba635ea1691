"""What survives a kill, and how: checkpoints, policies, shards and measurements become durable first, then the
journal names them; whatever the journal doesn't name is discarded at start."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rloop_mcore.algorithm.experts import narrowed
from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.config import Config, OptimizerConfig
from rloop_mcore.journal import Journal
from rloop_mcore.platform.files import fsync_path
from rloop_mcore.protocols import Actor, Cache, Evaluator, Rollout
from rloop_mcore.timeline import Timeline
from rloop_mcore.tracking import Tracker
from rloop_mcore.types import Policy, Trajectory


class Interrupted(Exception):
    """The run was asked to stop; everything up to the last step is committed."""


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
    position: int = 0  # prompts drawn so far
    _synced: int | None = field(default=None, init=False)
    _pending: dict[str, Any] | None = field(default=None, init=False)  # the commit whose checkpoint is being written

    def recover(self) -> None:
        """Discard what a killed run left beyond its journal."""
        self.journal.make_durable()
        commits = [record for record in self.journal.records if record["event"] == "commit"]
        self.cache.keep_only(self.journal.shards())
        self.position = commits[-1]["position"] if commits else 0
        offsets = [record["metrics_offset"] for record in self.journal.records if "metrics_offset" in record]
        self.tracker.rewind(offsets[-1] if offsets else 0)
        named = {record["checkpoint"] for record in commits[-self.config.checkpoint.keep :]}
        for record in self.journal.records:
            named.add(record.get("path"))
            if record["event"] == "measured":
                named |= {f"evaluation/{record['name']}.{suffix}" for suffix in ("json", "parquet")}
        for folder in ("checkpoints", "policies", "evaluation"):
            for path in (self.directory / folder).glob("*"):
                if f"{folder}/{path.name}" not in named:
                    _remove(path)

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
        """Put the actor where the phase stands: at `start`, or at the last commit. Returns the steps done."""
        self._synced = None
        self._engines_sleep()
        self.actor.begin(start.path, optimizer, steps * updates_per_step)
        commit = self.journal.last_commit(iteration, phase)
        if commit is None:
            return 0
        self.actor.load(self.directory / commit["checkpoint"])
        return int(commit["step"])

    def commit(self, iteration: int, phase: str, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Log a step and, every `checkpoint.every` steps, make everything up to it durable.

        With `checkpoint.asynchronous` that takes until the next commit, which comes at the latest where anything else
        is journaled: at the end of the phase, before a measurement, when the run is asked to stop.

        Raises Interrupted, after committing, when the run was asked to stop.
        """
        self.tracker.log(iteration, phase, step, self._global_step(iteration, phase, step), metrics, total)
        stopping = self.stop_requested()
        every = self.config.evaluation.every
        measured_next = phase == "explore" and every and step % every == 0
        if not (stopping or measured_next or step % self.config.checkpoint.every == 0 or step == total):
            return
        self._commit_pending()
        name = f"checkpoints/i{iteration}_{phase}_{step:06d}"
        known = set(self.journal.shards())
        shards = self.cache.seal()
        with self.timeline.span("trainer", "start of the checkpoint", checkpoint=name):
            self.actor.start_save(self.directory / name)
        self._pending = {
            "iteration": iteration,
            "phase": phase,
            "step": step,
            "checkpoint": name,
            "shards": [shard for shard in shards if shard not in known],
            "position": self.position,
            "metrics_offset": self.tracker.offset(),
        }
        if stopping or measured_next or step == total or not self.config.checkpoint.asynchronous:
            self._commit_pending()
        if stopping:
            raise Interrupted

    def _commit_pending(self) -> None:
        """Wait for the checkpoint that is being written, if one is, and journal it as of when it was started."""
        if self._pending is None:
            return
        with self.timeline.span("trainer", "end of the checkpoint", checkpoint=self._pending["checkpoint"]):
            self.actor.finish_save()
        self.journal.record("commit", **self._pending)
        self._pending = None
        commits = [record["checkpoint"] for record in self.journal.records if record["event"] == "commit"]
        for obsolete in commits[: -self.config.checkpoint.keep][-1:]:
            _remove(self.directory / obsolete)

    def finish(self, iteration: int, phase: str, **facts: Any) -> None:
        """Record that a phase of an iteration is complete."""
        self.journal.record("done", iteration=iteration, phase=phase, **facts)

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

    def version(self, iteration: int, step: int) -> int:
        """The weight version of the policy after `step` RL steps of `iteration`."""
        return self._global_step(iteration, "explore", step) + iteration + 1

    def experts(self, iteration: int) -> list[Trajectory]:
        """D_expert(i), in a fixed order."""
        rft, threshold = self.config.rft, self.config.algorithm.hard_threshold
        return narrowed(self.cache.select_experts(iteration, threshold, rft.deduplicate), rft, self.config.run.seed)

    def save_policy(self, name: str) -> Policy:
        """Write the actor's weights as `policies/{name}`."""
        return self.actor.save_policy(self.directory / "policies" / name)

    def record_theta(self, index: int, policy: Policy, reason: str = "the base model") -> None:
        """Name theta_index in the journal, once: a crash right after it repeats the end of the phase."""
        fields = {"iteration": index, "path": self._name(policy.path), "digest": policy.digest, "reason": reason}
        if any(record["event"] == "policy" and fields.items() <= record.items() for record in self.journal.records):
            return
        self.journal.record("policy", **fields)
        self.tracker.message(f"theta_{index}: {reason}")

    def endpoint(self, iteration: int) -> Policy:
        """The RL policy at the end of an exploration phase."""
        name = _measurement("explore", iteration, self.config.algorithm.rl_steps)
        record = next(r for r in self.journal.records if r["event"] == "measured" and r["name"] == name)
        return Policy(self.directory / record["path"], record["digest"])

    def measure(self, iteration: int, phase: str, step: int, policy: Policy | None = None) -> None:
        """Keep a policy (the actor's own, unless given) and evaluate it on the validation problems, once."""
        name = _measurement(phase, iteration, step)
        if any(record["event"] == "measured" and record["name"] == name for record in self.journal.records):
            return
        if policy is None:
            policy = self.save_policy(name)
        metrics: dict[str, float] = {}
        if self.evaluator is not None:
            if phase != "explore":
                self._engines_sleep()
                self.actor.begin(policy.path, self.config.optimizer, 1)
                self._synced = None
            self.sync(iteration + (phase == "exploit"), step)
            with self.timeline.span("trainer", "evaluate", measurement=name):
                metrics = self.evaluator.evaluate(name, self._name(policy.path))
            self.tracker.log(iteration, "evaluate", step, self._global_step(iteration, phase, step), metrics)
        self.journal.record(
            "measured",
            name=name,
            path=self._name(policy.path),
            digest=policy.digest,
            metrics=metrics,
            metrics_offset=self.tracker.offset(),
        )

    def _name(self, path: Path) -> str:
        """A path as files name it: relative to the run directory, so that a run can be moved, where it lies inside."""
        return str(path.relative_to(self.directory) if path.is_relative_to(self.directory) else path.resolve())

    def _global_step(self, iteration: int, phase: str, step: int) -> int:
        """RL steps taken in the run so far: the x axis of every curve."""
        steps = self.config.algorithm.rl_steps
        return {"base": 0, "sft": step, "explore": iteration * steps + step}.get(phase, (iteration + 1) * steps)


def _remove(path: Path) -> None:
    if path.is_dir():
        # A kill amid the removal must leave nothing that the journal names (and `checkpoint.keep` may be raised then).
        nameless = path.with_name(f".tmp-removed-{path.name}")
        os.replace(path, nameless)
        fsync_path(path.parent)
        shutil.rmtree(nameless)
    else:
        path.unlink(missing_ok=True)


def _measurement(phase: str, iteration: int, step: int) -> str:
    return "base" if phase == "base" else f"i{iteration}_{phase}_{step:06d}"
