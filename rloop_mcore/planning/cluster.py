"""The GPUs of a cluster: how many the trainer has and how many the engines, and whether that is enough."""

from __future__ import annotations

from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.planning.layouts import processes


def trainer_gpus(config: Config) -> int:
    """GPUs that the policy may train on; 0 where cluster.gpus_per_node doesn't say."""
    return (config.cluster.nodes - config.rollout.nodes) * config.cluster.gpus_per_node


def engine_gpus(config: Config) -> int:
    """GPUs that engines may be on: of their own nodes, or the trainer's; 0 where cluster.gpus_per_node doesn't say."""
    return (config.rollout.nodes or config.cluster.nodes) * config.cluster.gpus_per_node


def check_cluster(config: Config) -> None:
    """Raises UserError where the trainer's processes, or the engines, have fewer GPUs than they need."""
    cluster, rollout = config.cluster, config.rollout
    if rollout.nodes >= cluster.nodes:
        raise UserError(
            f"rollout.nodes={rollout.nodes} leaves the trainer none of cluster.nodes={cluster.nodes}: raise "
            "cluster.nodes, or set rollout.nodes=0 to share them."
        )
    needed, gpus = processes(config.layout), trainer_gpus(config)
    if needed > gpus > 0:
        away = f" - rollout.nodes={rollout.nodes}" if rollout.nodes else ""
        raise UserError(
            f"layout.tp x pp x cp x dp is {needed} processes, and the trainer has {gpus} GPUs "
            f"(cluster.nodes={cluster.nodes}{away}, cluster.gpus_per_node={cluster.gpus_per_node}): lower layout.dp or "
            "take more nodes."
        )
    if rollout.engine != "sglang" or rollout.endpoints:
        return
    needed, gpus = rollout.engines * rollout.tp, engine_gpus(config)
    if needed > gpus > 0:
        raise UserError(
            f"rollout.engines={rollout.engines} x rollout.tp={rollout.tp} is {needed} GPUs, and "
            f"{'rollout' if rollout.nodes else 'cluster'}.nodes has {gpus}: lower rollout.engines or take more nodes."
        )


def idle_gpus(config: Config) -> list[str]:
    """A warning where the policy trains on half of its GPUs or fewer."""
    used, gpus = processes(config.layout), trainer_gpus(config)
    if 2 * used > gpus:
        return []
    return [f"the policy trains on {used} of {gpus} GPUs: raise layout.dp, or choose a smaller cluster."]
