"""RLoop, Algorithm 1: explore with RL from theta_i, select the hard-won successes, fine-tune the SAME theta_i."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rloop_mcore.algorithm.rft import batch_indices, update_count
from rloop_mcore.config import Config, FineTuneConfig
from rloop_mcore.protocols import Actor
from rloop_mcore.rl_step import RLStep
from rloop_mcore.run_state import RunState
from rloop_mcore.types import Example, Policy


@dataclass
class RLoop:
    config: Config
    state: RunState
    actor: Actor
    rl_step: RLStep

    def run(self, base: Policy, demonstrations: Sequence[Example] | None) -> Policy:
        """Go on from wherever the journal stands; returns theta_I. SFT on `demonstrations` makes theta_0 of `base`."""
        done, start_policy = self.state.journal.done, self.state.journal.start_policy
        if not done(0, "base"):
            self.prepare(base, demonstrations)
        for iteration in range(self.config.algorithm.iterations):
            start = start_policy(iteration)
            if not done(iteration, "explore"):
                self.explore(iteration, start)
            if not done(iteration, "select"):
                self.state.select(iteration)  # D_expert(i): the successes of problems that stayed hard over the phase
            if not done(iteration, "exploit"):
                self.exploit(iteration, start)
            if not done(iteration, "evaluate"):
                self.evaluate(iteration)
        return start_policy(self.config.algorithm.iterations)

    def prepare(self, base: Policy, demonstrations: Sequence[Example] | None) -> None:
        """theta_0: the base model, or what SFT on the demonstrations makes of it."""
        theta, reason = base, "the base model"
        if demonstrations is not None:
            theta = self.fine_tune(0, "sft", base, self.config.sft, demonstrations)
            reason = f"the base model fine-tuned on {len(demonstrations)} demonstrations"
        self.state.record_theta(0, theta, reason)
        self.state.measure(0, "base", 0, theta)
        self.state.finish(0, "base")

    def explore(self, iteration: int, start: Policy) -> None:
        """N_RL steps of DAPO from theta_i, fewer if the guard ends it; every trajectory goes to the cache."""
        algorithm, every = self.config.algorithm, self.config.evaluation.every
        total = algorithm.rl_steps
        step = self.state.begin(iteration, "explore", start, self.config.optimizer, total, algorithm.updates_per_step)
        with self.rl_step.feed(iteration, step, total, self.state.position) as feed:
            while not self.state.over(step, total):
                version = self.state.version(iteration, step)
                feed.settle(version)
                if step and every and step % every == 0:
                    self.state.measure(iteration, "explore", step)
                metrics = self.state.sync(iteration, step)
                batch = feed.take(step)
                metrics |= self.rl_step.train(iteration, step, batch, version)
                self.state.position = batch.position
                step += 1
                self.state.commit(iteration, "explore", step, total, metrics)
        self.state.measure(iteration, "explore", step)
        self.state.finish(iteration, "explore", step=step)

    def exploit(self, iteration: int, start: Policy) -> None:
        """theta_{i+1}: theta_i fine-tuned on D_expert(i); an empty set leaves theta_i, and says so."""
        endpoint, experts = self.state.journal.endpoint(iteration), self.state.experts(iteration)
        origin = start if self.config.algorithm.reset else endpoint
        if not self.config.rft.enabled:
            theta, reason = endpoint, "rft.enabled=false: the RL endpoint"
        elif not experts:
            theta, reason = origin, "no expert trajectory: nothing to fine-tune on"
        else:
            theta = self.fine_tune(iteration, "exploit", origin, self.config.rft, experts)
            reason = f"fine-tuned on {len(experts)} expert trajectories"
        self.state.record_theta(iteration + 1, theta, reason)
        self.state.finish(iteration, "exploit")

    def evaluate(self, iteration: int) -> None:
        """theta_{i+1} on the validation problems (the RL endpoint was measured already)."""
        if self.config.rft.enabled:
            self.state.measure(iteration, "exploit", 0, self.state.journal.start_policy(iteration + 1))
        self.state.finish(iteration, "evaluate")

    def fine_tune(
        self, iteration: int, phase: str, start: Policy, config: FineTuneConfig, examples: Sequence[Example]
    ) -> Policy:
        """SFT from `start`: `config.epochs` passes over the examples in seeded order."""
        seed, count, size = self.state.seed(phase, iteration), len(examples), config.batch_size
        total = update_count(count, size, config.epochs)
        update = self.state.begin(iteration, phase, start, config.optimizer, total)
        while not self.state.over(update, total):
            batch = [examples[i] for i in batch_indices(update, count, size, seed)]
            metrics = self.actor.fine_tune(batch, config.loss)
            update += 1
            self.state.commit(iteration, phase, update, total, metrics)
        return self.state.save_policy(f"theta_{0 if phase == 'sft' else iteration + 1}")
