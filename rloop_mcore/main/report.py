"""`rloop report`: one HTML file about one or more runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rloop_mcore.analysis.report import write_report


def report(runs: Sequence[Path], out: Path | None) -> int:
    """Write the report and say where it is. Raises UserError for a folder that is no run."""
    target = out or runs[0] / "report.html"
    write_report(runs, target)
    print(f"report: {target}")
    return 0
