"""The plan of a run: where its memory goes, whether it fits, how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rloop_mcore.config import Config
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.engines import GIB, EnginePlan, engine_plan
from rloop_mcore.planning.memory import StageMemory, stage_memory
from rloop_mcore.planning.time import StepTimes, step_times


@dataclass(frozen=True)
class Plan:
    """Of a configuration whose layout is legal; `stages`: one entry a pipeline stage, memory in bytes."""

    model: Architecture
    config: Config
    engine: EnginePlan
    stages: list[StageMemory]

    @classmethod
    def of(cls, model: Architecture, config: Config) -> Plan:
        """Pure arithmetic: needs no GPU, weights or data."""
        engine = engine_plan(model, config, config.cluster.gpu.memory_gib * GIB)
        stages = [stage_memory(model, config, stage, engine) for stage in range(config.layout.pp)]
        return cls(model, config, engine, stages)

    @cached_property
    def worst(self) -> StageMemory:
        """The stage whose GPUs need the most."""
        return max(self.stages, key=lambda stage: stage.total)

    @cached_property
    def times(self) -> StepTimes | None:
        """None where `cluster.gpu` has no rates."""
        return step_times(self.model, self.config, self.engine)

    @property
    def memory(self) -> float:
        """Bytes of a GPU; 0 where `cluster.gpu.memory_gib` is not given."""
        return self.config.cluster.gpu.memory_gib * GIB

    @property
    def margin(self) -> float:
        """Bytes that stay free on the fullest GPU; below 0 where it is too small."""
        return self.memory - self.worst.total

    @property
    def fits(self) -> bool | None:
        """None where the memory of a GPU is not given."""
        return None if not self.memory else self.margin >= 0 and not self.short_of_cache

    @property
    def short_of_cache(self) -> bool:
        """Whether an engine can't hold one whole sequence."""
        longest = self.config.data.max_prompt_tokens + self.config.rollout.max_tokens
        return not self.config.rollout.endpoints and self.engine.tokens < longest
