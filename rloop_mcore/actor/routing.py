"""Routing replay: every update of a step sends a token to the experts that the step's first forward pass chose.

Rounding or an update in between may flip a near tie between experts, and a token's logprob jumps; with the choice kept,
the importance ratio measures the policy and not the router (Ma et al., arXiv 2510.11370).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplayAction

from rloop_mcore import platform
from rloop_mcore.actor.packing import MicroBatch, Row
from rloop_mcore.types import Key, Trajectory

_AT_ONCE = 1 << 28  # bytes that travel between the ranks


class RoutingReplay:
    """The experts [positions, layers, top-k] of each trajectory of the current step, in this rank's host memory.

    The layers are those of this pipeline stage. A step's choices may be as many bytes as the policy has: they are never
    on the device at once.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module], top_k: int, experts: int) -> None:
        layers = [layer for chunk in chunks for layer, _ in _routers(chunk)]
        self._columns = {layer: column for column, layer in enumerate(layers)}
        self._shape = len(layers), top_k
        self._dtype = torch.uint8 if experts <= 256 else torch.int32
        self._kept: dict[Key, torch.Tensor] = {}

    def recording(self, rows: Sequence[Row]) -> Recording:
        """For a forward pass over `rows`. What was kept before goes: two steps' choices may be more than there is."""
        self._kept = {}
        return Recording(torch.zeros(sum(map(len, rows)), *self._shape, dtype=self._dtype), self._columns)

    def keep(self, recording: Recording, trajectories: Sequence[Trajectory], rows: Sequence[Row]) -> None:
        """Collective: put together what the stage's ranks recorded, and keep it."""
        if self._columns:
            group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
            for part in recording.experts.split(max(1, _AT_ONCE // recording.experts[0].nbytes)):
                whole = part.to(platform.device())
                dist.all_reduce(whole, group=group)  # a token's choice of a layer is on one rank only
                part.copy_(whole)
        parts = recording.experts.split([len(row) for row in rows])
        self._kept = {t.key: part for t, part in zip(trajectories, parts, strict=True)}

    def replaying(self, trajectories: Sequence[Trajectory]) -> Replaying:
        """For an update on trajectories of the step that was recorded."""
        experts = torch.cat([self._kept[t.key] for t in trajectories]).to(platform.device())
        return Replaying(experts, self._columns)


class Recording:
    """Around a chunk's forward pass: notes what its routers choose."""

    def __init__(self, experts: torch.Tensor, columns: Mapping[int, int]) -> None:
        self.experts = experts
        self._columns = columns

    def before(self, chunk: torch.nn.Module, batch: MicroBatch) -> None:
        for _, router in _routers(chunk):
            router.router_replay.set_router_replay_action(RouterReplayAction.RECORD)

    def after(self, chunk: torch.nn.Module, batch: MicroBatch) -> None:
        places = _places(batch).to(self.experts.device)
        real = places >= 0
        for layer, router in _routers(chunk):
            chosen = router.router_replay.get_recorded_indices().to(self.experts)
            self.experts[places[real], self._columns[layer]] = chosen[real]
            _forget(router)


class Replaying:
    """Around a chunk's forward pass: has its routers choose as noted, in a recomputation too."""

    def __init__(self, experts: torch.Tensor, columns: Mapping[int, int]) -> None:
        self._experts = experts
        self._columns = columns

    def before(self, chunk: torch.nn.Module, batch: MicroBatch) -> None:
        places = _places(batch)
        padding = torch.arange(self._experts.size(-1), device=places.device)
        for layer, router in _routers(chunk):
            chosen = self._experts[places, self._columns[layer]].long()
            router.router_replay.set_target_indices(torch.where(places[:, None] >= 0, chosen, padding))
            router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def after(self, chunk: torch.nn.Module, batch: MicroBatch) -> None:
        for _, router in _routers(chunk):
            if router.config.recompute_granularity == "full":
                router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
            else:  # no router is asked again, and Megatron would keep what this one was told for its backward pass
                _forget(router)

    def finish(self, chunks: Iterable[torch.nn.Module]) -> None:
        """After the backward passes: the routers choose by themselves again."""
        for chunk in chunks:
            for _, router in _routers(chunk):
                _forget(router)


def _forget(router: TopKRouter) -> None:
    router.router_replay.clear_router_replay_action()
    router.router_replay.clear_indices()


def _routers(chunk: torch.nn.Module) -> Iterable[tuple[int, TopKRouter]]:
    """(layer, from 0 over the whole model; its router)."""
    return [(m.layer_number - 1, m) for m in chunk.modules() if isinstance(m, TopKRouter)]


def _places(batch: MicroBatch) -> torch.Tensor:
    """Of the tokens that this rank's routers see: under sequence parallelism a part of the micro-batch."""
    parts = batch.places.chunk(parallel_state.get_tensor_model_parallel_world_size())
    return parts[parallel_state.get_tensor_model_parallel_rank()]
