"""The rooms of a training run, built and put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from rloop_mcore import platform
from rloop_mcore.actor import parallel
from rloop_mcore.actor.actor import MegatronActor
from rloop_mcore.config import Config
from rloop_mcore.data.curriculum import SampledCurriculum
from rloop_mcore.data.problems import content_id, load_problems
from rloop_mcore.data.prompts import TemplatePrompts
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import Interrupted, UserError
from rloop_mcore.evaluation.evaluate import EngineEvaluator, conditions_of
from rloop_mcore.journal import Journal
from rloop_mcore.loop import RLoop
from rloop_mcore.main.deadline import stop_requests
from rloop_mcore.main.engines import fleet_of, weight_channel
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.start_record import start_record
from rloop_mcore.main.training_problems import training_problems
from rloop_mcore.protocols import Actor, Rewards, Rollout
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.rl_step import RLStep
from rloop_mcore.rollout.controller import Server
from rloop_mcore.run_state import RunState
from rloop_mcore.timeline import Timeline
from rloop_mcore.tracking import Tracker
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.types import Policy, Problem, Sampling
from rloop_mcore.weights.bridge import HfBridge
from rloop_mcore.weights.digest import digest_of


def conduct(config: Config, run: RunDirectory, servers: Sequence[Server]) -> None:
    """Rank 0: build the rooms and run Algorithm 1. The engines' `servers` start while Megatron does."""
    deterministic = platform.deterministic(config.run.deterministic, platform.device().type)
    with RewardPool(config.reward, deterministic) as rewards:
        bridge = HfBridge(Path(config.model.path), config.model.family)
        channel = weight_channel(config, bridge.largest)
        with (
            conducted_actor(config, bridge) as actor,
            fleet_of(config, servers, channel, Path(config.model.path), deterministic) as fleet,
        ):
            run_algorithm(config, run, actor, fleet, rewards)


def follow(config: Config) -> None:
    """The other ranks: do with the actor what rank 0 does."""
    MegatronActor(config, HfBridge(Path(config.model.path), config.model.family)).follow()
    parallel.destroy()


@contextmanager
def conducted_actor(config: Config, bridge: HfBridge) -> Iterator[Actor]:
    """Rank 0's actor; the followers are released at the end."""
    actor = MegatronActor(config, bridge)
    try:
        yield actor
    except Interrupted:
        actor.close()
        parallel.destroy()
        raise
    actor.close()
    parallel.destroy()


def run_algorithm(config: Config, run: RunDirectory, actor: Actor, rollout: Rollout, rewards: Rewards) -> None:
    """Go on where the journal stands, to the end."""
    tokenizer = TextTokenizer(Path(config.model.path))
    template = PromptTemplate(config.data.template, tokenizer)

    def prompts_of(problems: Sequence[Problem]) -> TemplatePrompts:
        return TemplatePrompts(problems, tokenizer, template, config.run.seed, config.data.max_prompt_tokens)

    directory, journal = run.path.resolve(), Journal(run.journal.resolve())
    tracker, timeline = Tracker(directory, config.tracking, keys=asdict(config)), Timeline(directory)
    held_out = config.data.validation
    validation = [] if held_out is None else load_problems(held_out, config.evaluation.limit)
    prompts = prompts_of(training_problems(config, validation, run.golds))
    evaluator = None
    if held_out is not None:
        evaluator = EngineEvaluator(
            rollout=rollout,
            rewards=rewards,
            prompts=prompts_of(validation).prompts,
            decode=prompts.decode,
            config=config.evaluation,
            sampling=Sampling(
                config.rollout.max_tokens, config.evaluation.temperature, config.evaluation.top_p, template.stop
            ),
            seed=config.run.seed,
            directory=run.evaluation,
            at_once=2 * config.rollout.max_running,
            progress=lambda name, done, total: tracker.show(f"evaluation of {name}", done, total),
            # what was asked under an id: analyses pair two runs' answers by it
            conditions=conditions_of(config) | {"problem_digests": {each.id: content_id(each) for each in validation}},
        )
    cache = TrajectoryCache(run.cache.resolve())
    must_stop = stop_requests(config.cluster, run)
    state = RunState(config, directory, journal, actor, rollout, cache, evaluator, tracker, must_stop, timeline)
    state.recover()
    state.record_start(start_record(run, platform.device_name()))
    curriculum = None
    if config.data.sampler is not None:
        curriculum = SampledCurriculum(config.data.sampler, [prompt.problem for prompt in prompts.prompts])
    rl_step = RLStep(config, actor, rollout, rewards, prompts, cache, template.stop, timeline, curriculum)
    try:
        base, demonstrations = base_policy(config, journal), None
        if config.sft.demonstrations is not None and not journal.done(0, "base"):
            demonstrations = [
                prompts.example(problem) for problem in load_problems(config.sft.demonstrations, config.sft.limit)
            ]
        theta = RLoop(config, state, actor, rl_step).run(base, demonstrations)
        tracker.message(f"finished: {theta.path}")
    finally:
        tracker.close()
        timeline.close()


def base_policy(config: Config, journal: Journal) -> Policy:
    """The policy of model.path, later the theta of the iteration under way; its weights must be what they were.

    So must be those of the RL policy that the iteration has come to, where the run goes on from these.
    """
    model = Path(config.model.path).resolve()
    if not journal.done(0, "base"):
        return Policy(model, digest_of(model))
    # Not the newest theta: until its phase is done, that is made anew, and may be half there.
    exploited = [place for place in journal.places() if (place["event"], place["phase"]) == ("done", "exploit")]
    iteration = len(exploited)
    theta = journal.start_policy(iteration)
    if not theta.path.exists() and digest_of(model) == theta.digest:  # the model it is has been moved since
        journal.record("policy", iteration=iteration, path=str(model), digest=theta.digest, reason="model.path moved")
        theta = journal.start_policy(iteration)
    else:
        _check_weights(theta, journal)
    if journal.done(iteration, "explore") and not (config.algorithm.reset and config.rft.enabled):
        _check_weights(journal.endpoint(iteration), journal)
    return theta


def _check_weights(policy: Policy, journal: Journal) -> None:
    """Raises UserError where they are not those of which the journal has the digest."""
    if digest_of(policy.path) != policy.digest:
        raise UserError(
            f"{policy.path} holds other weights than {journal.path} says: restore them, or choose another run.dir."
        )
