"""Regenerates tests/golden/algorithm.json: `python tests/golden/make_algorithm.py`.

What a resumed or repeated run relies on to stay the same for ever, whatever the versions of Python and NumPy.
"""

import json
from pathlib import Path

from rloop_mcore.algorithm.advantage import group_advantages
from rloop_mcore.algorithm.aggregation import sequence_weights
from rloop_mcore.algorithm.experts import drawn
from rloop_mcore.algorithm.minibatch import mini_batches
from rloop_mcore.algorithm.permutation import permutation
from rloop_mcore.algorithm.rft import batch_indices
from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.types import ExpertQuery

ADVANTAGES = ("group_std", "group_mean", "leave_one_out")
AGGREGATIONS = ("token_mean", "sequence_mean", "dr_grpo")
EXPERTS = [(0, step, "ab"[step % 2], sample) for step in range(4) for sample in range(3)]


def values() -> dict:
    return {
        "seeds": [derive_seed(7, "rollout", 1, step, f"gsm8k/ü{step}", 3) for step in range(4)],
        "permutation": permutation(12, seed=5),
        "mini_batches": mini_batches(10, updates=3, seed=1),
        "batch_indices": [batch_indices(update, examples=7, batch_size=3, seed=2) for update in range(6)],
        "advantages": {kind: group_advantages([1.0, 0.0, -0.3, 0.1, 1.0], kind) for kind in ADVANTAGES},
        "experts": drawn(EXPERTS, ExpertQuery((0,), 0.1, max_per_problem=4, share=0.7, seed=3)),
        "sequence_weights": {kind: sequence_weights([3, 0, 7, 1], kind, max_tokens=9) for kind in AGGREGATIONS},
    }


if __name__ == "__main__":
    Path(__file__).with_name("algorithm.json").write_text(json.dumps(values(), indent=1) + "\n")
