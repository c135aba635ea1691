"""The parity suite: which layouts are trained, and how far each is from one process. Run it to print the table.

python tests/parallel/parity.py [--markdown OUT]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]

from parity_model import MODELS, write  # noqa: E402
from ranks import launch  # noqa: E402

QUANTITIES = ("logprobs", "loss", "gradients", "weights", "resumed")
BOTH, DENSE, MOE, SPARSE, EVERY = ("dense", "moe"), ("dense",), ("moe",), ("sparse",), ("dense", "qk norm", "moe")
# name: (models, layout, actor settings). Megatron trains mixture-of-experts models over TP with SP only.
LAYOUTS: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "TP1 PP1": ((*EVERY, *SPARSE), {}, {}),
    "recompute selective": (BOTH, {}, {"recompute": "selective"}),
    "recompute full": (BOTH, {}, {"recompute": "full"}),
    "one micro-batch": (BOTH, {}, {"micro_batch_tokens": 4096}),
    "TP2": (("dense", "qk norm"), {"tp": 2}, {}),
    "TP2 SP": (EVERY, {"tp": 2, "sp": True}, {}),
    "TP2 SP, recompute full": (BOTH, {"tp": 2, "sp": True}, {"recompute": "full"}),
    "PP2": (BOTH, {"pp": 2, "stages": [2, 2]}, {}),
    "PP2 uneven": (BOTH, {"pp": 2, "stages": [3, 1]}, {}),
    "PP2 VPP2": (BOTH, {"pp": 2, "vpp": 2, "stages": [1, 1, 1, 1]}, {}),
    "CP2": (BOTH, {"cp": 2}, {}),
    "CP2, recompute selective": (DENSE, {"cp": 2}, {"recompute": "selective"}),
    "DP2": (BOTH, {"dp": 2}, {"distributed_optimizer": False}),
    "DP2, distributed optimizer": (BOTH, {"dp": 2}, {}),
    "EP2": (MOE, {"dp": 2, "ep": 2}, {}),
    "CP2 EP2": (SPARSE, {"cp": 2, "ep": 2}, {}),
    "TP2 ETP2 SP": (MOE, {"tp": 2, "etp": 2, "sp": True}, {}),
    "TP4": (DENSE, {"tp": 4}, {}),
    "TP4 SP": (BOTH, {"tp": 4, "sp": True}, {}),
    "PP4": (BOTH, {"pp": 4, "stages": [1, 1, 1, 1]}, {}),
    "TP2 PP2": (DENSE, {"tp": 2, "pp": 2, "stages": [2, 2]}, {}),
    "TP2 PP2 SP": (MOE, {"tp": 2, "pp": 2, "sp": True, "stages": [2, 2]}, {}),
    "PP2 EP2, one empty": (MOE, {"pp": 2, "ep": 2, "dp": 2, "stages": [4, 0]}, {}),
    "PP2 EP2, one empty, plain": (
        MOE,
        {"pp": 2, "ep": 2, "dp": 2, "stages": [4, 0]},
        {"distributed_optimizer": False},
    ),
    "TP2 EP2 SP": (MOE, {"tp": 2, "ep": 2, "dp": 2, "sp": True}, {}),
    "PP2 VPP2 EP2": (SPARSE, {"pp": 2, "vpp": 2, "dp": 2, "ep": 2, "stages": [0, 2, 2, 0]}, {}),
    "EP2 ETP2 DP4": (MOE, {"dp": 4, "ep": 2, "etp": 2}, {}),
    "TP2 EP2 ETP2 SP": (MOE, {"tp": 2, "ep": 2, "etp": 2, "dp": 2, "sp": True}, {}),
    "TP2 CP2 SP": (BOTH, {"tp": 2, "cp": 2, "sp": True}, {}),
    "PP2 CP2": (DENSE, {"pp": 2, "cp": 2, "stages": [3, 1]}, {}),
    "PP2 VPP2 DP2, full": (BOTH, {"pp": 2, "vpp": 2, "dp": 2, "stages": [1, 1, 1, 1]}, {"recompute": "full"}),
}
REFERENCE = "TP1 PP1"


def train_all(folder: Path, models: Iterable[str] = tuple(MODELS)) -> dict[str, dict[str, Any]]:
    """What each "MODEL, LAYOUT" came to. A start a number of ranks; one process last, which resumes the others."""
    jobs: dict[int, list[dict[str, Any]]] = {}
    for model in models:
        write(model, folder / model)
        for layout_name, (of, layout, actor) in LAYOUTS.items():
            if model in of:
                name = f"{model}, {layout_name}"
                job = {"name": name, "model": model, "folder": str(folder / model), "layout": layout, "actor": actor}
                jobs.setdefault(math.prod(layout.get(k, 1) for k in ("tp", "pp", "cp", "dp")), []).append(job)
    for job in jobs[1]:
        if job["name"].endswith(REFERENCE):
            others = [other for ranks in jobs if ranks > 1 for other in jobs[ranks]]
            job["resume"] = [o["name"] for o in others if o["model"] == job["model"] and o["actor"] == job["actor"]]
    for ranks in sorted(jobs, reverse=True):
        launch(HERE / "worker_parity.py", json.dumps(jobs[ranks]), folder, processes=ranks)
    names = [job["name"] for ranks in sorted(jobs) for job in jobs[ranks]]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in names}


def distances(name: str, results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """max |difference| / max |reference| of a tensor, the greatest over the tensors; by quantity of `QUANTITIES`.

    resumed: the last of three updates after one process loaded this layout's checkpoint of the first two.
    """
    reference, result = results[f"{name.split(', ')[0]}, {REFERENCE}"], results[name]
    resumed = reference if f"resumed {name}" in reference else result
    return {
        "logprobs": tensor_distance(by_number(result["logprobs"]), by_number(reference["logprobs"])),
        "loss": abs(result["metrics"]["loss"] / reference["metrics"]["loss"] - 1.0),
        "gradients": tensor_distance(result["gradients"], reference["gradients"]),
        "weights": tensor_distance(result["weights"], reference["weights"]),
        "resumed": tensor_distance(resumed[f"resumed {name}"], reference["weights"]),
    }


def by_number(rows: Iterable[Iterable[float]]) -> dict[str, torch.Tensor]:
    return {"all": torch.tensor([value for row in rows for value in row])}


def tensor_distance(tensors: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    assert tensors.keys() == reference.keys()
    return max(float((tensors[n] - r).abs().max() / r.abs().max()) for n, r in reference.items())


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"| model, layout | {' | '.join(QUANTITIES)} |", "|---" * (1 + len(QUANTITIES)) + "|"]
    for name in results:
        values = distances(name, results)
        lines.append(f"| {name} | {' | '.join(f'{values[quantity]:.1e}' for quantity in QUANTITIES)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, metavar="OUT")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = table(train_all(Path(directory)))
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n", encoding="utf-8")
