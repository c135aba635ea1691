"""Bytes that autograd keeps of a forward pass of the actor's model on the CPU: `saved_bytes.py JOBS`.

JOBS is a file with a JSON list of {"architecture" (config.json's keys), "layout", "precision", "actor", "lengths"}: one
packed micro-batch of rows of these lengths, of which all tokens but the first are responses. Rank 0 is played over fake
process groups; in several ranks (ranks.py) they are real, as routing needs. The last line of the output is a list of
bytes, the mean over the ranks: so it does not depend on who got how many tokens.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from rloop_mcore.actor.losses import policy_update_loss  # noqa: E402
from rloop_mcore.actor.model import build_model, packed_sequences, wrap_for_training  # noqa: E402
from rloop_mcore.actor.packing import Row, Share, micro_batches  # noqa: E402
from rloop_mcore.config import ActorConfig, AlgorithmConfig, Config, LayoutConfig  # noqa: E402
from rloop_mcore.planning.layouts import processes, stages  # noqa: E402
from rloop_mcore.weights.families import choose_family  # noqa: E402
from rloop_mcore.weights.family import HfConfig  # noqa: E402


def saved(job: dict[str, Any]) -> int:
    """What the graph of one micro-batch holds: every storage once, without the weights."""
    hf = HfConfig(Path("config.json"), job["architecture"])
    architecture = choose_family(hf, job["architecture"]["model_type"]).architecture(hf)
    layout = LayoutConfig(**job["layout"])
    layout = replace(layout, stages=stages(layout, job["architecture"]["num_hidden_layers"]))
    config = Config(layout=layout, precision=job["precision"], actor=ActorConfig(**job["actor"]))
    chunk = wrap_for_training(build_model(architecture, config), config)[0]
    rows = [Row([1], [2] * (n - 1) + [3], 1.0, 1.0, [-1.0] * n, [-1.0] * n) for n in job["lengths"]]
    share = Share(max_tokens=1 << 30, cp=layout.cp, multiple=layout.tp if layout.sp else 1)
    (batch,) = micro_batches(rows, share)
    weights = {p.untyped_storage()._cdata for p in chunk.parameters()}
    kept: dict[int, int] = {}
    held = []  # so that no storage's place is used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            held.append(tensor)
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = chunk(batch.tokens[None], None, None, packed_seq_params=packed_sequences(batch))
        values = chunk.module.token_logprobs(hidden, batch, job["architecture"]["vocab_size"], 1.0)
        loss = policy_update_loss(AlgorithmConfig(), parallel_state.get_context_parallel_group())
        graph, _ = loss(batch, *values)
    logits = values[0].grad_fn.logits  # type: ignore[union-attr]  # an attribute of the context, no saved tensor
    del graph
    return sum(kept.values()) + (0 if logits is None else logits.untyped_storage().nbytes())


def main() -> None:
    found, real = [], "RANK" in os.environ
    if real:
        dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        layout = LayoutConfig(**job["layout"])
        if not dist.is_initialized():
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes(layout))
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=real,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        found.append(saved(job))
        if real:
            mean = torch.tensor(found[-1], dtype=torch.float64)
            dist.all_reduce(mean)
            found[-1] = int(mean) // dist.get_world_size()
        parallel_state.destroy_model_parallel()
        if not real:
            dist.destroy_process_group()
    if real:
        dist.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
