"""Regenerates tests/golden/algorithm.json: `python tests/golden/make_algorithm.py`.

What a resumed or repeated run relies on to stay the same for ever, whatever the versions of Python and NumPy.
"""

import json
from pathlib import Path

from rloop_mcore.algorithm.minibatch import mini_batches
from rloop_mcore.algorithm.permutation import permutation
from rloop_mcore.algorithm.rft import batch_indices
from rloop_mcore.algorithm.seeds import derive_seed


def values() -> dict:
    return {
        "seeds": [derive_seed(7, "rollout", 1, step, f"gsm8k/ü{step}", 3) for step in range(4)],
        "permutation": permutation(12, seed=5),
        "mini_batches": mini_batches(10, updates=3, seed=1),
        "batch_indices": [batch_indices(update, examples=7, batch_size=3, seed=2) for update in range(6)],
    }


if __name__ == "__main__":
    Path(__file__).with_name("algorithm.json").write_text(json.dumps(values(), indent=1) + "\n")
