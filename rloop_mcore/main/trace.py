"""`rloop trace`: the timeline of a run as a file for Perfetto."""

from __future__ import annotations

import json
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.main.run_directory import output_in
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.timeline import FILE, chrome_trace, read_spans


def trace(run: Path, out: Path | None) -> int:
    """Write the Chrome trace of the run directory `run` and say where. Raises UserError where there is none."""
    path = run / FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the directory of a training run that has done something.")
    out = out or output_in(run, "trace.json")
    lines = read_spans(path)
    write_atomic(out, json.dumps(chrome_trace(lines)))
    print(f"{out}: {len(lines)} spans; open it at https://ui.perfetto.dev or in chrome://tracing")
    return 0
