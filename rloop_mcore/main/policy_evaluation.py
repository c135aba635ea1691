"""The evaluation of one policy on one benchmark after the other, resumable: what `rloop evaluate` does."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rloop_mcore import platform
from rloop_mcore.config import Config
from rloop_mcore.data.prompts import TemplatePrompts
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.evaluation.sampling import Graded, Sampler, still_wanted, votes_of
from rloop_mcore.evaluation.scores import breakdown, intervals, majorities, scores_of, summary
from rloop_mcore.main.engines import fleet_of, start_servers, with_engines_for_routers
from rloop_mcore.main.kept_samples import Conditions, KeptSamples, open_samples
from rloop_mcore.main.training_problems import report_bad_golds
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.progress import ProgressDisplay, seconds_left
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.reward.verifiers import VOTES
from rloop_mcore.types import Problem
from rloop_mcore.weights.digest import digest_of

if TYPE_CHECKING:
    from rloop_mcore.rollout.fleet import Fleet


class PolicyEvaluation:
    """Of the policy in the HF folder `policy`, called `label` in the results; its samples are kept under `out`.

    The engine and the verifiers start when they are first needed, and serve all benchmarks; `stack` ends them.
    """

    def __init__(
        self, config: Config, policy: Path, label: str, out: Path, display: ProgressDisplay, stack: ExitStack
    ) -> None:
        self._config, self._policy, self._label, self._out = config, policy, label, out
        self._display, self._stack = display, stack
        self._tokenizer = TextTokenizer(policy)
        self._template = PromptTemplate(config.data.template, self._tokenizer)
        self._digest = digest_of(policy)

    def prompts(self, name: str, problems: Sequence[Problem]) -> TemplatePrompts:
        """The first `evaluation.limit` problems of the benchmark `name` as prompts. Raises UserError where none is."""
        config, limit = self._config, self._config.evaluation.limit
        if limit is not None and limit < len(problems):  # a run's own is for its validation, and easily forgotten
            self._display.message(f"{name}: the first {limit} of {len(problems)} problems, by evaluation.limit={limit}")
        return TemplatePrompts(
            problems[:limit], self._tokenizer, self._template, config.run.seed, config.data.max_prompt_tokens
        )

    def run(self, name: str, data: str, problems: Sequence[Problem], prompts: TemplatePrompts) -> dict[str, Any]:
        """The record of the benchmark `name`, `problems` of `data`: its kept samples count, missing ones are drawn."""
        config, started = self._config, time.monotonic()
        conditions = Conditions.of(config, self._digest, data, problems, self._template)
        with open_samples(self._out, name, conditions, self._display.message) as kept:
            if kept.lost:
                self._display.message(f"{kept.folder}: {', '.join(kept.lost)} damaged: those samples are drawn again")
            rows = self._rows(name, prompts, conditions, kept)
            golds = [prompt.problem for prompt in prompts.prompts]
            record = {
                "name": name,
                "policy": self._label,
                **self._numbers(prompts, rows),
                **asdict(conditions),
                "sampling": {**asdict(conditions.sampling), "samples": config.evaluation.samples},
                "too_long": prompts.too_long,
                "bad_golds": report_bad_golds(name, golds, config, self._out / f"golds_{name}.json"),
                "samples": str(kept.folder),
                "seconds": round(time.monotonic() - started, 3),
            }
            write_atomic(kept.folder / "result.json", json.dumps(record, indent=1) + "\n")
        return record

    def _rows(self, name: str, prompts: TemplatePrompts, conditions: Conditions, kept: KeptSamples) -> list[Graded]:
        """The wanted samples in the order of the problems; every batch that is drawn is kept at once."""
        samples = self._config.evaluation.samples
        wanted = still_wanted(prompts.prompts, samples, kept.rows)
        drawn: list[Graded] = []
        if wanted:
            total = len(prompts.prompts) * samples
            at_once, seed = 2 * self._config.rollout.max_running, conditions.seed
            sampler = Sampler(self._fleet, self._rewards, prompts.decode, conditions.sampling, seed, at_once)
            show = _progress(self._display, name, total - len(wanted), total)
            show(drawn)
            for batch in sampler.batches(wanted):
                kept.add(batch)
                drawn += map(Graded.of, batch)
                show(drawn)
        places = {prompt.problem.id: place for place, prompt in enumerate(prompts.prompts)}
        rows = [row for row in [*kept.rows, *drawn] if row.problem_id in places and row.sample < samples]
        return sorted(rows, key=lambda row: (places[row.problem_id], row.sample))

    def _numbers(self, prompts: TemplatePrompts, rows: Sequence[Graded]) -> dict[str, Any]:
        evaluation, seed = self._config.evaluation, self._config.run.seed
        problems = [prompt.problem for prompt in prompts.prompts]
        scores = scores_of(rows, evaluation.samples, evaluation.k)
        if self._config.reward.verifier in VOTES and max(evaluation.k, default=1) > 1:
            votes = votes_of(rows, prompts.prompts, self._rewards, prompts.decode)
            scores |= majorities(rows, votes, evaluation.k)
        return {
            "metrics": intervals(scores, seed),
            "problems": len(problems),
            **summary(rows),
            "groups": breakdown(problems, rows, scores, seed),
            "scores": {key: dict(zip((p.id for p in problems), values, strict=True)) for key, values in scores.items()},
        }

    @cached_property
    def _rewards(self) -> RewardPool:
        return self._stack.enter_context(RewardPool(self._config.reward))

    @cached_property
    def _fleet(self) -> Fleet:
        """An engine that serves the policy folder as it is: no actor, no weight sync."""
        config = with_engines_for_routers(self._config)
        logs = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        servers = start_servers(config, self._policy, logs)
        deterministic = platform.deterministic(config.run.deterministic, platform.choose(config.cluster.device))
        fleet = fleet_of(config, servers, None, self._policy, deterministic)
        self._stack.enter_context(fleet)
        fleet.adopt_weights(self._policy)
        return fleet


def _progress(display: ProgressDisplay, name: str, before: int, total: int) -> Callable[[Sequence[Graded]], None]:
    """Show how many of the samples there are; the time left follows from the pace of those drawn now."""
    begun = time.monotonic()

    def show(drawn: Sequence[Graded]) -> None:
        seconds, done = max(time.monotonic() - begun, 1e-6), before + len(drawn)
        left = seconds_left(seconds, len(drawn), total - done)
        tokens = sum(len(row.response_ids) for row in drawn)
        display.show(name, done, total, left, {"tokens_per_s": tokens / seconds} if drawn else {})

    return show
