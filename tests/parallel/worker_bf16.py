"""Train the parity suite's dense policy in bf16, by steps far below its resolution: `worker_bf16.py FOLDER OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
from parity_model import experiences  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.actor import MegatronActor  # noqa: E402
from rloop_mcore.config import Config, OptimizerConfig  # noqa: E402
from rloop_mcore.weights.bridge import HfBridge  # noqa: E402

SLOW = OptimizerConfig(lr=1e-5, weight_decay=0.0)
UPDATES = 20


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    actor = MegatronActor(Config(precision="bf16"), HfBridge(folder))

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.gather().clone() for name, tensor in actor.export()}

    def train(updates: int) -> None:
        for _ in range(updates):
            actor.update(experiences(0))

    result = {}
    actor.begin(folder, SLOW, UPDATES)
    result["start"] = weights()
    train(1)
    result["one"] = weights()
    actor.start_save(out.with_suffix(".checkpoint"))
    actor.finish_save()
    train(UPDATES - 1)
    result["all"] = weights()
    actor.begin(folder, SLOW, UPDATES)
    actor.load(out.with_suffix(".checkpoint"))
    train(UPDATES - 1)
    result["resumed"] = weights()
    torch.save(result, out)
    parallel.destroy()


if __name__ == "__main__":
    main()
