"""docs/study/tables.md and the figures beside it, from the records that tools/study.py left in docs/study/seed*/."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from rloop_mcore.analysis.export import draw
from rloop_mcore.analysis.forgetting import block_averages, differential_matrix, forgetting_matrix, learning_matrix
from rloop_mcore.analysis.plots import DASHES, PERCENT, RL_STEP, Figure, colour, layout, matrix
from rloop_mcore.analysis.similarity import without_self_pairs
from rloop_mcore.evaluation.pass_at_k import average, pass_at_k
from rloop_mcore.platform.files import write_atomic

RECORDS = Path("docs/study")
ARMS = {
    "dapo": "DAPO",
    "rloop": "RLoop",
    "no_hard_filter": "no hard filter",
    "no_reset": "no reset",
    "rft_only": "RFT only",
}
CHECKPOINTS = {"picked": "picked by validation", "rl": "last RL policy", "theta": "last θ"}
HELD_OUT = {"test": "Held-out problems like the training problems", "hard": "Held-out problems with few solutions"}
COLUMNS = ("Avg@32", "pass@8", "pass@16", "pass@32")
WINDOW = 20  # RL steps at the beginning and end of a run that curves are averaged over
# Student's t, two-sided 95 %, by degrees of freedom
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Record = dict[str, Any]
Line = list[str]


@dataclass(frozen=True)
class Study:
    """`bases` by seed; `runs` by (training problems, arm), then seed."""

    bases: dict[int, Record]
    runs: dict[tuple[int, str], dict[int, Record]]

    @property
    def sizes(self) -> list[int]:
        return sorted({size for size, _ in self.runs})

    def arms(self, size: int) -> dict[str, dict[int, Record]]:
        """The arms of one size that have runs, in the order of `ARMS`."""
        return {arm: self.runs[size, arm] for arm in ARMS if (size, arm) in self.runs}


def read_study(folder: Path) -> Study:
    """The records that are there so far."""
    bases: dict[int, Record] = {}
    runs: dict[tuple[int, str], dict[int, Record]] = {}
    for path in sorted(folder.glob("seed*/*.json")):
        seed, record = int(path.parent.name.removeprefix("seed")), json.loads(path.read_text(encoding="utf-8"))
        if path.stem == "base":
            bases[seed] = record
        else:
            size, arm = path.stem.split("_", 1)
            runs.setdefault((int(size), arm), {})[seed] = record
    return Study(bases, runs)


def scores(right: Sequence[int], samples: int) -> np.ndarray:
    """Avg@n, pass@8, pass@16, pass@32 [4]: means over problems, in percent. `right` [problems] of `samples` each."""
    of_problems = [average(right, samples), *(pass_at_k(right, samples, k) for k in (8, 16, 32))]
    return np.array([100 * float(values.mean()) for values in of_problems])


def held_out(record: Record, checkpoint: str, benchmark: str) -> np.ndarray:
    """The scores [4] of a run's checkpoint."""
    found = record["held_out"][checkpoint]
    return scores(found[benchmark], found["samples"])


def spread(values: Sequence[float], digits: int = 1, sign: str = "") -> str:
    """Mean over seeds and, from two on, the half width of its 95 % t interval."""
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return "–"
    mean = f"{round(known.mean(), digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no negative zero
    return mean if len(known) == 1 else f"{mean} ± {half_width(known):.{digits}f}"


def half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of the mean of `values` [seeds], by Student's t."""
    return T_95[len(values) - 2] * float(values.std(ddof=1)) / sqrt(len(values))


def results(study: Study, size: int, benchmark: str) -> list[Line]:
    """The paper's Table 1: every arm's checkpoints, means over seeds."""
    rows = [["policy", "checkpoint", "seeds", *COLUMNS]]
    arms = study.arms(size)
    rows.append(_result("Base", "θ0", [held_out(each, "base", benchmark) for each in study.bases.values()]))
    for checkpoint, words in CHECKPOINTS.items():
        for arm, runs in arms.items():
            found = [held_out(run, checkpoint, benchmark) for run in runs.values() if checkpoint in run["held_out"]]
            if found and not (arm == "rft_only" and checkpoint == "rl"):  # it has no RL policy of its own
                rows.append(_result(ARMS[arm], words, found))
    return rows


def _result(name: str, checkpoint: str, found: Sequence[np.ndarray]) -> list[str]:
    return [name, checkpoint, str(len(found)), *(spread(column) for column in np.array(found).T.tolist())]


def differences(study: Study, size: int, benchmark: str) -> list[Line]:
    """Each arm minus DAPO on the same checkpoint, paired by seed, and in how many seeds it is above."""
    rows = [["minus DAPO", "checkpoint", *COLUMNS]]
    arms = study.arms(size)
    vanilla = arms.get("dapo", {})
    for checkpoint in ("picked", "rl"):
        for arm, runs in arms.items():
            if arm == "dapo" or (arm == "rft_only" and checkpoint == "rl"):
                continue
            shared = sorted(seed for seed in set(runs) & set(vanilla) if checkpoint in runs[seed]["held_out"])
            pairs = [(runs[seed], vanilla[seed]) for seed in shared]
            gains = np.array(
                [held_out(a, checkpoint, benchmark) - held_out(b, checkpoint, benchmark) for a, b in pairs]
            )
            if len(gains):
                cells = [f"{spread(gain, sign='+')} ({(gain > 0).sum()} of {len(gain)})" for gain in gains.T]
                rows.append([ARMS[arm], CHECKPOINTS[checkpoint], *cells])
    return rows


def rl_checkpoints(record: Record) -> list[Record]:
    """theta_0 and the RL checkpoints, in the order of training."""
    return [each for each in record["checkpoints"] if each["phase"] in ("base", "explore")]


def solved(record: Record) -> np.ndarray:
    """bool [RL checkpoints, validation problems]."""
    return np.array([each["right"] for each in rl_checkpoints(record)]) > 0


def windows(steps: Sequence[int], phase: int) -> list[int]:
    """The iteration that each RL step [checkpoints] falls in where one has `phase` steps; theta_0 is in the first."""
    return [max(0, step - 1) // phase for step in steps]


def phase_steps(record: Record) -> int:
    """RL steps of one of three iterations."""
    return len(record["steps"]["success_rate"]) // 3


def forgetting(record: Record) -> tuple[float, float]:
    """Mean forgetting (within an iteration, between iterations), in percent; one long phase is cut alike."""
    iterations = windows([each["rl_steps"] for each in rl_checkpoints(record)], phase_steps(record))
    within, between = block_averages(forgetting_matrix(solved(record)), iterations)
    return 100 * within, 100 * between


def similarity(record: Record) -> tuple[float, float, float]:
    """(within the first RL checkpoint, within the last, mean between two of them): pairs of different solutions."""
    values = np.array(record["similarity"]["matrix"])
    samples = record["checkpoints"][0]["samples"]
    within = [without_self_pairs(value, samples) for value in np.diag(values)]
    return within[1], within[-1], float(values[1:, 1:][np.triu_indices(len(values) - 1, 1)].mean())


def analyses(study: Study, size: int) -> list[Line]:
    """What the paper says of stability: on the training steps and the 100 validation problems."""
    # heading, digits, value
    columns: list[tuple[str, int, Callable[[Record], float]]] = [
        ("train success, first", 0, lambda run: 100 * float(np.mean(run["steps"]["success_rate"][:WINDOW]))),
        ("last, %", 0, lambda run: 100 * float(np.mean(run["steps"]["success_rate"][-WINDOW:]))),
        ("entropy, first", 2, lambda run: _edge(run, "entropy", slice(WINDOW))),
        ("last", 2, lambda run: _edge(run, "entropy", slice(-WINDOW, None))),
        ("gradient norm, first", 2, lambda run: _edge(run, "grad_norm", slice(WINDOW))),
        ("last", 2, lambda run: _edge(run, "grad_norm", slice(-WINDOW, None))),
        ("largest", 2, lambda run: float(max(_steps(run, "grad_norm_max"), default=np.nan))),
        ("forgotten within, %", 0, lambda run: forgetting(run)[0]),
        ("between, %", 0, lambda run: forgetting(run)[1]),
        ("similarity, first", 2, lambda run: similarity(run)[0]),
        ("last", 2, lambda run: similarity(run)[1]),
        ("between", 2, lambda run: similarity(run)[2]),
    ]
    rows = [["arm", *(heading for heading, _, _ in columns)]]
    for arm, runs in study.arms(size).items():
        cells = [spread([value(run) for run in runs.values()], digits) for _, digits, value in columns]
        rows.append([ARMS[arm], *cells])
    return rows


def _steps(run: Record, key: str) -> np.ndarray:
    return np.array([value for value in run["steps"][key] if value is not None], float)


def _edge(run: Record, key: str, part: slice) -> float:
    values = _steps(run, key)[part]
    return float(values.mean()) if len(values) else np.nan


def cost(study: Study, size: int) -> list[Line]:
    """What each arm sampled and trained on."""
    rows = [
        [
            "arm",
            "trajectories sampled, thousands",
            "tokens sampled, M",
            "tokens of RL updates, M",
            "tokens of RFT, thousands",
            "RFT's share of tokens trained on, %",
            "expert trajectories by iteration",
            "their problems",
        ]
    ]
    for arm, runs in study.arms(size).items():
        costs = [run["cost"] for run in runs.values()]
        trained = [100 * each["rft_tokens"] / (each["rft_tokens"] + each["rl_tokens"] or np.nan) for each in costs]
        experts = [run["experts"] for run in runs.values()]
        rows.append(
            [
                ARMS[arm],
                spread([each["sampled"] / 1e3 for each in costs]),
                spread([each["sampled_tokens"] / 1e6 for each in costs], 2),
                spread([each["rl_tokens"] / 1e6 for each in costs], 2),
                spread([each["rft_tokens"] / 1e3 for each in costs]),
                spread(trained, 2),
                *(_by_iteration([each[key] for each in experts]) for key in ("trajectories", "problems")),
            ]
        )
    return rows


def _by_iteration(counts: Sequence[Sequence[int]]) -> str:
    return ", ".join(f"{mean:.0f}" for mean in np.mean(counts, axis=0)) if any(map(any, counts)) else "–"


def by_phase(study: Study, size: int) -> list[Line]:
    """The RL policies at the ends of the three windows of equal length, on the validation problems."""
    ends = (1, 2, 3)
    rows = [["RL policy after", *(f"Avg@32, {end} x N" for end in ends), *(f"pass@32, {end} x N" for end in ends)]]
    for arm, runs in study.arms(size).items():
        if arm == "rft_only":
            continue
        values = np.array([[_at(run, end * phase_steps(run)) for end in ends] for run in runs.values()])
        rows.append([ARMS[arm], *(spread(column) for metric in (0, 3) for column in values[:, :, metric].T.tolist())])
    return rows


def _at(run: Record, steps: int) -> np.ndarray:
    (found,) = (each for each in run["checkpoints"] if each["phase"] == "explore" and each["rl_steps"] == steps)
    return scores(found["right"], found["samples"])


def seeds_table(study: Study, size: int, benchmark: str) -> list[Line]:
    """Every run by itself."""
    rows = [["seed", "arm", "checkpoint", *COLUMNS]]
    for seed, base in sorted(study.bases.items()):
        of_seed = {arm: runs[seed] for arm, runs in study.arms(size).items() if seed in runs}
        if of_seed:
            rows.append([str(seed), "Base", "θ0", *_plain(held_out(base, "base", benchmark))])
        for arm, run in of_seed.items():
            for checkpoint in run["held_out"]:
                name = f"{CHECKPOINTS[checkpoint]}: `{run['held_out'][checkpoint]['checkpoint']}`"
                rows.append([str(seed), ARMS[arm], name, *_plain(held_out(run, checkpoint, benchmark))])
    return rows


def _plain(values: np.ndarray) -> Iterator[str]:
    return (f"{value:.1f}" for value in values)


def to_markdown(rows: Sequence[Line]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(study: Study) -> str:
    """docs/study/tables.md."""
    parts = [
        "# The study's tables",
        "Made by `python tools/study_tables.py` from the records beside this file; "
        "[study.md](../study.md) says what they mean. Percent where nothing else is said; mean over seeds ± half of "
        "the 95 % interval (Student's t over seeds); differences are paired by seed.",
    ]
    for size in study.sizes:
        parts.append(f"## {size:,} training problems")
        for benchmark, title in HELD_OUT.items():
            parts += [f"### {title}", to_markdown(results(study, size, benchmark))]
            parts.append(to_markdown(differences(study, size, benchmark)))
        parts += ["### By phase, validation problems", to_markdown(by_phase(study, size))]
        parts += ["### Stability", to_markdown(analyses(study, size)), "### Cost", to_markdown(cost(study, size))]
    for size in study.sizes:
        for benchmark, title in HELD_OUT.items():
            parts += [f"## Each run, {size:,} training problems: {title.lower()}"]
            parts.append(to_markdown(seeds_table(study, size, benchmark)))
    return "\n\n".join(parts) + "\n"


def curves(study: Study, size: int) -> Iterator[Figure]:
    """Of each arm, the mean over seeds: validation over RL steps, and the training metrics."""
    for column, name in ((0, "Validation Avg@32"), (3, "Validation pass@32")):
        means = {arm: _validation(runs, column) for arm, runs in study.arms(size).items()}
        yield _lines(f"{name}, {size} training problems", means, {**PERCENT})
    for key, name, axis in (
        ("success_rate", "Training success", {**PERCENT}),
        ("entropy", "Token entropy", {"rangemode": "tozero"}),
        ("grad_norm", "Gradient norm", {"rangemode": "tozero"}),
    ):
        means = {arm: _smooth(runs, key) for arm, runs in study.arms(size).items()}
        yield _lines(f"{name}, {size} training problems", means, axis)


def _validation(runs: Mapping[int, Record], column: int) -> tuple[list[int], list[float | None]]:
    """RL steps and means over seeds; each iteration's line begins at its own theta."""
    by_seed = [
        [scores(each["right"], each["samples"])[column] / 100 for each in run["checkpoints"]] for run in runs.values()
    ]
    x: list[int] = []
    y: list[float | None] = []
    for checkpoint, mean in zip(next(iter(runs.values()))["checkpoints"], np.mean(by_seed, axis=0), strict=True):
        if checkpoint["phase"] == "exploit":
            x.append(checkpoint["rl_steps"])
            y.append(None)
        x.append(checkpoint["rl_steps"])
        y.append(round(float(mean), 4))
    return x, y


def _smooth(runs: Mapping[int, Record], key: str) -> tuple[list[int], list[float | None]]:
    """Means over seeds and five RL steps."""
    steps = np.array([run["steps"][key] for run in runs.values()], float)
    if not steps.size:
        return [], []
    means = steps.mean(axis=0)
    means = means[: len(means) // 5 * 5].reshape(-1, 5).mean(axis=1)
    return list(range(3, 5 * len(means), 5)), [round(float(mean), 4) for mean in means]


def _lines(title: str, series: Mapping[str, tuple[list[int], list[float | None]]], y_axis: dict[str, Any]) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": ARMS[arm],
            "x": x,
            "y": y,
            "line": {"color": colour(index), "dash": DASHES[index], "width": 2},
        }
        for index, (arm, (x, y)) in enumerate(series.items())
        if x
    ]
    return Figure(title, "", {"data": data, "layout": layout(RL_STEP, "", y_axis)})


def matrices(study: Study, size: int) -> Iterator[Figure]:
    """Means over seeds: learning, forgetting, their difference, similarity."""
    arms = {arm: list(runs.values()) for arm, runs in study.arms(size).items() if arm in ("dapo", "rloop")}
    if len(arms) < 2:
        return
    one = arms["rloop"][0]
    steps = [each["rl_steps"] for each in rl_checkpoints(one)]
    iterations, labels = windows(steps, phase_steps(one)), [str(step) if step else "θ0" for step in steps]
    forgotten = {arm: np.mean([forgetting_matrix(solved(run)) for run in runs], axis=0) for arm, runs in arms.items()}
    learnt = {arm: np.mean([learning_matrix(solved(run)) for run in runs], axis=0) for arm, runs in arms.items()}
    alike = {arm: np.mean([run["similarity"]["matrix"] for run in runs], axis=0) for arm, runs in arms.items()}
    for name, found, unit in (
        ("Forgetting", forgotten, ".0%"),
        ("Learning", learnt, ".0%"),
        ("Similarity", alike, ".2f"),
    ):
        largest = max(float(np.nanmax(values)) for values in found.values())
        for arm, values in found.items():
            title = f"{name}, {ARMS[arm]}, {size} training problems"
            yield _by_step(matrix(title, "", values, labels, iterations, largest, unit))
    difference = differential_matrix(forgotten["dapo"], forgotten["rloop"])
    largest = float(np.nanmax(np.abs(difference)))
    title = f"Differential forgetting, DAPO − RLoop, {size} training problems"
    yield _by_step(matrix(title, "", difference, labels, iterations, largest, "+.0%", signed=True))


def _by_step(figure: Figure) -> Figure:
    """Its checkpoints are labelled by RL steps over all iterations."""
    figure.spec["layout"]["xaxis"]["title"]["text"] = f"j: {RL_STEP}"
    return figure


def main() -> None:
    ArgumentParser(description=__doc__).parse_args()  # there are none, and --help writes nothing
    study = read_study(RECORDS)
    write_atomic(RECORDS / "tables.md", tables(study))
    figures = [figure for size in study.sizes for make in (curves, matrices) for figure in make(study, size)]
    print(f"{RECORDS}/tables.md, {len(figures)} figures {draw(figures, RECORDS, ('svg',))}")


if __name__ == "__main__":
    main()
