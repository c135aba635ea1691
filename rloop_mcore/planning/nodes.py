"""What each node of a job does: the first ones train, the rollout.nodes last ones have engines only."""

from __future__ import annotations

from dataclasses import dataclass

from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.planning.layouts import processes


@dataclass(frozen=True)
class Roles:
    nodes: int
    trainers: int  # nodes 0 .. trainers - 1
    ranks: int  # of a trainer
    engines: int  # of each node that has some; 0 where rank 0 starts them beside itself

    @property
    def hosts(self) -> range:
        """The nodes whose engines the trainer finds by what they publish: all where none has engines only."""
        return range(self.trainers if self.trainers < self.nodes else 0, self.nodes) if self.engines else range(0)

    def engines_of(self, node: int) -> range:
        """The numbers of the engines of `node`."""
        first = (node - self.hosts.start) * self.engines
        return range(first, first + self.engines) if node in self.hosts else range(0)


def roles(config: Config) -> Roles:
    """The roles in a job of cluster.nodes. Raises UserError where ranks or engines can't be shared out evenly."""
    nodes, apart, rollout = config.cluster.nodes, config.rollout.nodes, config.rollout
    if apart >= nodes:
        raise UserError(f"rollout.nodes={apart} leaves no node of cluster.nodes={nodes} to train on.")
    trainers, ranks = nodes - apart, processes(config.layout)
    if ranks % trainers:
        raise UserError(f"layout.* asks for {ranks} processes, which {trainers} nodes can't share evenly.")
    if apart and rollout.endpoints:
        raise UserError(f"rollout.nodes={apart} and rollout.endpoints both say where the engines are: keep one.")
    hosts = 0 if rollout.endpoints else apart or (nodes if nodes > 1 else 0)
    if hosts and rollout.engines % hosts:
        raise UserError(f"rollout.engines={rollout.engines} must be a multiple of the {hosts} nodes that have them.")
    gpus = config.cluster.gpus_per_node
    if gpus and ranks // trainers > gpus:
        raise UserError(f"layout.* asks for {ranks // trainers} processes a node, and cluster.gpus_per_node={gpus}.")
    return Roles(nodes, trainers, ranks // trainers, rollout.engines // hosts if hosts else 0)
