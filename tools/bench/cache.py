"""The trajectory cache against bare pyarrow, DuckDB and compressed JSON lines, on generated data.

Writing, size and a step's overhead: 10,000 trajectories a shard with a long-tailed spread of response lengths up to
2,048 tokens. Selection and resume: 3.3 million rows with short token lists, since neither may read tokens that it does
not need; each in processes of its own, for the peak of their memory.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import Metric, arguments, at_least, at_most, report

from rloop_mcore.journal import Journal
from rloop_mcore.platform.files import fsync_path
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.schema import FIELDS, SCHEMA
from rloop_mcore.types import Trajectory

GROUP = 16
STEP_S = 60.0  # of training, for which a step's share of writing is reckoned
UPDATE_S = 10.0  # of it the updates, which need no data of the cache: less than there are
STEP_ROWS = 16_000  # about 1,000 problems


def main() -> None:
    options = arguments((__doc__ or "").partition("\n")[0])
    with tempfile.TemporaryDirectory(dir=".") as folder:
        metrics = [*writing(Path(folder), 2 if options.quick else 10), *reading(Path(folder), options.quick)]
    report("cache", metrics, options.json)


def writing(folder: Path, shards: int) -> list[Metric]:
    """Seal shards, and write the same rows with pyarrow and as JSON lines, by turns."""
    seconds: dict[str, list[float]] = {"ours": [], "pyarrow": []}
    sizes = {"ours": 0, "jsonl": 0}
    cache = TrajectoryCache(folder / "long")
    for number in range(1 + shards):
        rows = step_rows(number, problems=625, lengths=long_tailed)
        begun = time.perf_counter()
        cache.append(rows)
        cache.seal()
        seconds["ours"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        bare_pyarrow(rows, folder / "bare.parquet")
        seconds["pyarrow"].append(time.perf_counter() - begun)
        with pa.output_stream(str(folder / "rows.jsonl.zst"), compression="zstd") as file:
            for row in rows:
                file.write(json.dumps({name: getattr(row, name) for name in FIELDS}).encode() + b"\n")
        sizes["jsonl"] += (folder / "rows.jsonl.zst").stat().st_size
    sizes["ours"] = cache.bytes()
    shutil.rmtree(folder / "long")
    seconds = {name: found[1:] for name, found in seconds.items()}  # the first calls pay for imports
    waits, cpu = step_overhead(folder / "steps", steps=shards // 2)
    speed = statistics.median(seconds["pyarrow"]) / statistics.median(seconds["ours"])
    return [
        at_least("write_vs_pyarrow", speed, 0.8, "pa.array, pq.write_table (zstd), fsync of the same columns"),
        at_most("size_vs_zstd_jsonl", sizes["ours"] / sizes["jsonl"], 0.6, "the same rows as zstd JSON lines"),
        at_most("overhead_share", waits, 0.01, f"a step of {STEP_S:.0f} s with {STEP_ROWS} trajectories"),
        Metric("overhead_cpu_share", round(cpu, 4), "x", "none", "one core for that long: what the thread takes", True),
    ]


def step_overhead(folder: Path, steps: int) -> tuple[float, float]:
    """Medians over steps of what the trainer waits for cache and journal, and of the CPU time they take, as shares."""
    cache, journal = TrajectoryCache(folder / "cache"), Journal(folder / "journal.jsonl")
    waits, cpu = [], []
    for step in range(1 + steps):
        rows = step_rows(step, problems=STEP_ROWS // GROUP, lengths=long_tailed)
        used, begun = time.process_time(), time.perf_counter()
        cache.append(rows)
        waited = time.perf_counter() - begun
        time.sleep(UPDATE_S)
        begun = time.perf_counter()
        shards = cache.seal()
        journal.record("commit", iteration=0, phase="explore", step=step, shards=shards[-1:])
        waits.append((waited + time.perf_counter() - begun) / STEP_S)
        cpu.append((time.process_time() - used) / STEP_S)
    shutil.rmtree(folder)
    return statistics.median(waits[1:]), statistics.median(cpu[1:])


def reading(folder: Path, quick: bool) -> list[Metric]:
    """Selection of the experts, and what a resume asks of the cache, large and small."""
    large, small = folder / "large", folder / "small"
    fill(large, 20 if quick else 200)
    fill(small, 1)
    repeats = 3 if quick else 11  # a query takes 0.3 s, and one in four is half as long again
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(repeats):
        for name, what, where in (
            ("ours", "ours", large),
            ("duckdb", "duckdb", large),
            ("large", "resume", large),
            ("small", "resume", small),
        ):
            found.setdefault(name, []).append(in_own_process(what, where, small))
    middle = {
        name: {key: statistics.median(r[key] for r in results) for key in results[0]} for name, results in found.items()
    }
    assert middle["ours"]["rows"] == middle["duckdb"]["rows"]
    return [
        at_most("select_vs_duckdb", middle["ours"]["seconds"] / middle["duckdb"]["seconds"], 1.2, "DuckDB's SQL"),
        at_most("select_gib", middle["ours"]["peak_gib"], 1.0, "1 GiB of resident memory, imports included"),
        at_most("resume_vs_small", middle["large"]["process_s"] / middle["small"]["process_s"], 1.1, "16,500 rows"),
    ]


def in_own_process(what: str, where: Path, small: Path) -> dict[str, float]:
    """What `cache_queries.py` found, and the seconds that its whole process took."""
    command = [sys.executable, str(Path(__file__).with_name("cache_queries.py")), what, str(where), str(small)]
    begun = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    return {"process_s": time.perf_counter() - begun, **json.loads(done.stdout)}


def fill(directory: Path, shards: int) -> None:
    """A step a shard, of 1,031 problems with short answers: 16,496 rows."""
    cache = TrajectoryCache(directory)
    for step in range(shards):
        cache.append(step_rows(step, problems=1031, lengths=short))
        cache.seal()


def step_rows(step: int, problems: int, lengths: Callable[[np.random.Generator, int], np.ndarray]) -> list[Trajectory]:
    """A step's groups over 17,000 problems, half of which are solved now and then only."""
    draw = np.random.default_rng(step)
    chosen = draw.choice(17_000, problems, replace=False)
    rate = np.where(chosen % 2, chosen / 17_000, 0.15 * chosen / 17_000)
    rows = []
    for problem, chance in zip(chosen.tolist(), rate.tolist(), strict=True):
        prompt = tuple(draw.integers(0, 150_000, 8).tolist())
        correct, sizes = (draw.random(GROUP) < chance).tolist(), lengths(draw, GROUP).tolist()
        for sample in range(GROUP):
            # Words repeat: a tenth of the vocabulary makes most of a text.
            ids = tuple((15_000 * draw.random(sizes[sample]) ** 3).astype(np.int32).tolist())
            logprobs = tuple((-draw.exponential(0.3, sizes[sample])).astype(np.float32).tolist())
            reason = "correct" if correct[sample] else "wrong"
            place = (0, step, f"problem/{problem}", sample, prompt, ids, logprobs, "stop")
            rows.append(Trajectory(*place, ((step, len(ids)),), correct[sample], float(correct[sample]), reason))
    return rows


def long_tailed(draw: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(draw.lognormal(6.3, 0.6, count), 16, 2048).astype(int)


def short(draw: np.random.Generator, count: int) -> np.ndarray:
    return draw.integers(2, 8, count)


def bare_pyarrow(rows: list[Trajectory], path: Path) -> None:
    """The same columns by pyarrow's own conversions and defaults, zstd and fsync."""
    columns = []
    for field in SCHEMA:
        name = {"prompt_tokens": "prompt_ids", "response_tokens": "response_ids"}.get(field.name, field.name)
        values = [getattr(row, name) for row in rows]
        if name != field.name:
            values = [len(ids) for ids in values]
        if field.name == "weight_versions":
            values = [[{"version": version, "tokens": tokens} for version, tokens in runs] for runs in values]
        columns.append(pa.array(values, field.type))
    pq.write_table(pa.table(columns, schema=SCHEMA), path, compression="zstd")
    fsync_path(path)


if __name__ == "__main__":
    main()
