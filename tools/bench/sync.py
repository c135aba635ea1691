"""The weight sync of a TP2 actor and two engines against a raw broadcast of the same bytes, checksums on.

Engines that the run starts on its own host take the weights from shared memory; others get them by broadcast.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Metric, arguments, at_least, at_most, report, write_qwen2
from sync_ranks import BUCKET_MIB

DEADLINE_S = 900


def main() -> None:
    options = arguments(__doc__ or "")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        layers = 6 if options.quick else 20  # of 15 M parameters
        write_qwen2(model, vocabulary=8192, hidden=1024, layers=layers, kv_heads=4)
        found, broadcast = (run(model, how, repeats=3 if options.quick else 7) for how in ("handles", "broadcast"))
    for how, seen in (("shared memory", found), ("broadcast", broadcast)):
        print(
            f"{seen['bytes'] / 1e9:.2f} GB of fp32 weights in buckets of {BUCKET_MIB} MiB by {how}: sync "
            f"{seen['sync']:.2f} s, raw broadcast {seen['raw']:.2f} s, checksums {seen['verify'] * 1e3:.0f} ms of it"
        )
    buckets = found["extra"] / (BUCKET_MIB * 2**20)
    metrics: list[Metric] = [
        at_least("sync_vs_raw", found["raw"] / found["sync"], 0.85, "raw gloo broadcast of the same bytes"),
        at_least("sync_broadcast_vs_raw", broadcast["raw"] / broadcast["sync"], 0.85, "likewise, by gloo itself"),
        at_most("verify_cost", found["verify"] / found["sync"], 0.05, "the whole sync"),
        at_most("sync_extra_buckets", buckets, 2.0, "a bucket: peak memory beyond rank 0's before"),
    ]
    report("sync", metrics, options.json)


def run(model: Path, how: str, repeats: int) -> dict[str, float]:
    """The medians of one way that weights get to the engines: handles of shared memory, or broadcast."""
    ranks, out = Path(__file__).with_name("sync_ranks.py"), model.with_name("result.json")
    command = [sys.executable, "-m", "rloop_mcore.platform.torchrun", "--nproc-per-node", "2", str(ranks)]
    subprocess.run([*command, str(model), str(out), str(repeats), how], check=True, timeout=DEADLINE_S)
    found: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
