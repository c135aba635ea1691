"""Counter-based seeds: what is drawn depends on what it is for, never on the order in which it was asked for."""

from __future__ import annotations

import json
from hashlib import blake2b


def derive_seed(run_seed: int, purpose: str, *counters: int | str) -> int:
    """A seed in [0, 2**31) that is a pure function of its arguments, the same on every machine and version.

    A sample's seed is `derive_seed(run_seed, "rollout", iteration, step, problem_id, sample)`. 2**31 bounds it because
    engines take a signed 32-bit seed. Different argument lists are independent draws.
    """
    name = json.dumps([run_seed, purpose, *counters])
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 33
