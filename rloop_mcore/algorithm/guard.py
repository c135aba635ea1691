"""Whether a step has gone wrong, and how many in a row have: what ends a phase that diverges, or stops the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Streak:
    """Bad steps in a row up to now, and what was wrong with the last of them."""

    length: int = 0
    reason: str = ""

    def then(self, reason: str) -> Streak:
        """After one more step; `reason` is "" where it was sound."""
        return Streak(self.length + 1, reason) if reason else Streak()

    def is_due(self, patience: int) -> bool:
        """Whether the guard acts now: at every `patience` bad steps in a row."""
        return self.length > 0 and self.length % patience == 0


def what_is_wrong(metrics: Mapping[str, float], entropy_low: float | None, entropy_high: float | None) -> str:
    """Why a step is bad, from the metrics of an RL step or of a fine-tuning update; "" where it is not.

    It is where at least half of its `updates` (1 unless told) were skipped, or where the mean token entropy (nats) is
    outside the bounds; None: no bound. A step that had nothing to train on is not bad.
    """
    skipped, updates = metrics.get("skipped", 0.0), metrics.get("updates", 1.0)
    if updates and 2 * skipped >= updates:
        norm = metrics.get("grad_norm_max", metrics["grad_norm"])
        return f"{skipped:g} of {updates:g} updates skipped, loss {metrics['loss']:.3g}, gradient norm {norm:.3g}"
    entropy = metrics.get("entropy")
    if entropy is not None and entropy_low is not None and entropy < entropy_low:
        return f"entropy {entropy:.3g} below guard.entropy_low={entropy_low:g}"
    if entropy is not None and entropy_high is not None and entropy > entropy_high:
        return f"entropy {entropy:.3g} above guard.entropy_high={entropy_high:g}"
    return ""
