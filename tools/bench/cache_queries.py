"""Run by cache.py, in a process for each: `cache_queries.py ours|duckdb|resume CACHE SMALL_CACHE`; prints JSON.

A query runs on the small cache first, so that imports and the first use of a library are not timed.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

THRESHOLD = 0.1
SQL = """
with rate as (select problem_id, avg(correct::int) as rate from '{files}' where iteration = 0 group by problem_id),
     hit as (select row_number() over (partition by t.problem_id, response_ids order by step, sample) as copy, t.*
             from '{files}' t join rate using (problem_id) where iteration = 0 and correct and rate < {threshold})
select * exclude (copy) from hit where copy = 1 order by iteration, step, problem_id, sample
"""


def ours(cache: Path) -> int:
    """The experts, as Arrow tables; returns how many."""
    from rloop_mcore.trajectory.manifest import read_manifest
    from rloop_mcore.trajectory.selection import select_experts
    from rloop_mcore.types import ExpertQuery

    return sum(len(piece) for piece in select_experts(cache, read_manifest(cache), ExpertQuery((0,), THRESHOLD)))


def duckdb(cache: Path) -> int:
    """The same rows, as an Arrow table."""
    import duckdb

    experts = duckdb.sql(SQL.format(files=cache / "*.parquet", threshold=THRESHOLD))
    assert experts is not None  # it is for a statement that selects nothing
    return int(experts.to_arrow_table().num_rows)


def resume(cache: Path) -> int:
    """Open it and keep what the journal names: all."""
    from rloop_mcore.trajectory.cache import TrajectoryCache

    found = TrajectoryCache(cache)
    found.keep_only([path.name for path in sorted(cache.glob("*.parquet"))])
    return found.count()


def main() -> None:
    what, cache, small = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    query = {"ours": ours, "duckdb": duckdb, "resume": resume}[what]
    if query is not resume:
        query(small)
    begun = time.perf_counter()
    rows = query(cache)
    seconds = time.perf_counter() - begun
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert peak is not None
    print(json.dumps({"seconds": seconds, "rows": rows, "peak_gib": int(peak[1]) / 2**20}))


if __name__ == "__main__":
    main()
