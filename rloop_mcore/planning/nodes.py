"""What each node of a job does: the first ones train, the rollout.nodes last ones have engines only."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rloop_mcore.config import Config, LayoutConfig
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
    """The roles in a job of cluster.nodes.

    Raises UserError where ranks or engines can't be shared out evenly, and what `check_gpus` does.
    """
    check_gpus(config)
    nodes, apart, rollout = config.cluster.nodes, config.rollout.nodes, config.rollout
    trainers, wanted = nodes - apart, processes(config.layout)
    if wanted % trainers:
        raise UserError(f"layout.* asks for {wanted} processes, which {trainers} nodes can't share evenly.")
    if apart and rollout.endpoints:
        raise UserError(f"rollout.nodes={apart} and rollout.endpoints both say where the engines are: keep one.")
    hosts = 0 if rollout.endpoints else apart or (nodes if nodes > 1 else 0)
    if hosts and rollout.engines % hosts:
        raise UserError(f"rollout.engines={rollout.engines} must be a multiple of the {hosts} nodes that have them.")
    return Roles(nodes, trainers, wanted // trainers, rollout.engines // hosts if hosts else 0)


def on_one_node(config: Config) -> Config:
    """The configuration of who only generates, on a single node with the engines that a node of the job has.

    Raises UserError where these need more GPUs than it has.
    """
    engines = max(1, config.rollout.engines // (config.rollout.nodes or config.cluster.nodes))
    alone = replace(
        config,
        layout=LayoutConfig(),
        cluster=replace(config.cluster, nodes=1),
        rollout=replace(config.rollout, nodes=0, engines=engines),
    )
    check_gpus(alone)
    return alone


def check_gpus(config: Config) -> None:
    """Raises UserError where the trainer's processes, or the engines, have fewer GPUs than they need."""
    cluster, rollout, wanted = config.cluster, config.rollout, processes(config.layout)
    if rollout.nodes >= cluster.nodes:
        raise UserError(
            f"rollout.nodes={rollout.nodes} leaves the trainer none of cluster.nodes={cluster.nodes}: raise "
            "cluster.nodes, or set rollout.nodes=0 to share them."
        )
    if wanted > (gpus := (cluster.nodes - rollout.nodes) * cluster.gpus_per_node) > 0:
        away = f" - rollout.nodes={rollout.nodes}" if rollout.nodes else ""
        raise UserError(
            f"layout.tp x pp x cp x dp is {wanted} processes, and the trainer has {gpus} GPUs "
            f"(cluster.nodes={cluster.nodes}{away}, cluster.gpus_per_node={cluster.gpus_per_node}): lower layout.dp or "
            "take more nodes."
        )
    if rollout.engine != "sglang" or rollout.endpoints:
        return
    if rollout.tp > cluster.gpus_per_node > 0:
        raise UserError(
            f"rollout.tp={rollout.tp} is more than cluster.gpus_per_node={cluster.gpus_per_node}: a server is on one "
            "node."
        )
    taken = rollout.engines * rollout.tp
    if taken > (gpus := (rollout.nodes or cluster.nodes) * cluster.gpus_per_node) > 0:
        raise UserError(
            f"rollout.engines={rollout.engines} x rollout.tp={rollout.tp} is {taken} GPUs, and "
            f"{'rollout' if rollout.nodes else 'cluster'}.nodes has {gpus}: lower rollout.engines or take more nodes."
        )


def trainer_gpus(config: Config) -> int:
    """GPUs that the policy may train on; as many as it does where cluster.gpus_per_node doesn't say."""
    nodes = config.cluster.nodes - config.rollout.nodes
    return nodes * config.cluster.gpus_per_node or processes(config.layout)


def node_gpus(config: Config) -> int:
    """GPUs of a node; the usual 8 where cluster.gpus_per_node doesn't say."""
    return config.cluster.gpus_per_node or 8


def idle_gpus(config: Config) -> list[str]:
    """A warning where the policy trains on half of its GPUs or fewer."""
    used, gpus = processes(config.layout), trainer_gpus(config)
    if 2 * used > gpus:
        return []
    return [f"the policy trains on {used} of {gpus} GPUs: raise layout.dp, or choose a smaller cluster."]


def split_groups(config: Config) -> list[str]:
    """A warning where tensor parallel ranks, whose traffic is the heaviest, are on different nodes."""
    ranks = processes(config.layout) // (config.cluster.nodes - config.rollout.nodes)
    tp = config.layout.tp
    if ranks % tp == 0:
        return []
    return [
        f"layout.tp={tp} splits layers between nodes, which have {ranks} ranks each: slow, unless their number is a "
        "multiple of layout.tp."
    ]
