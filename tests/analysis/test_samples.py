"""What the cache tells of hard problems and lengths, against loops over real trajectories in a real cache."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from rloop_mcore.analysis import samples as samples_module
from rloop_mcore.analysis.hard_set import HardSet, hard_problems, hard_sets
from rloop_mcore.analysis.lengths import QUANTILES, length_drift
from rloop_mcore.analysis.samples import read_rows, read_samples
from rloop_mcore.errors import UserError
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.quarantine import quarantine
from rloop_mcore.trajectory.schema import SCHEMA
from rloop_mcore.types import ExpertQuery, Trajectory

THRESHOLD = 0.25


def test_a_manifest_nested_without_end_is_none(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest\.json is not the manifest of a trajectory cache"):
        read_samples(tmp_path)


def trajectory(iteration: int, step: int, problem: int, sample: int, correct: bool, length: int) -> Trajectory:
    return Trajectory(
        iteration=iteration,
        step=step,
        problem_id=f"p{problem}",
        sample=sample,
        prompt_ids=(problem,),
        response_ids=tuple(range(length)),
        logprobs=(-0.5,) * length,
        finish_reason="stop",
        weight_versions=((1, length),),
        correct=correct,
        reward=float(correct),
        reason="correct" if correct else "wrong",
    )


@pytest.fixture
def rows() -> list[Trajectory]:
    generator = np.random.default_rng(5)
    ease = generator.random(12) ** 2
    return [
        trajectory(
            iteration, step, problem, sample, bool(generator.random() < ease[problem]), int(generator.integers(1, 9))
        )
        for iteration in range(3)
        for step in range(4)
        for problem in generator.choice(12, 6, replace=False).tolist()
        for sample in range(5)
    ]


@pytest.fixture
def cache(rows: list[Trajectory], tmp_path: Path) -> Path:
    found = TrajectoryCache(tmp_path / "cache")
    for iteration in range(3):
        for step in range(4):
            found.append([row for row in rows if (row.iteration, row.step) == (iteration, step)])
            found.seal()
    return tmp_path / "cache"


def test_hard_sets_are_the_problems_rft_learns_from(cache: Path, rows: list[Trajectory], tmp_path: Path) -> None:
    samples, before = read_samples(cache), set()
    with np.errstate(all="raise"):  # a problem that was not asked in an iteration is no warning
        sets = hard_sets(samples, THRESHOLD)
    for found in sets:
        verdicts = defaultdict(list)
        for row in rows:
            if row.iteration == found.iteration:
                verdicts[row.problem_id].append(row.correct)
        hard = {name for name, right in verdicts.items() if 0 < sum(right) / len(right) < THRESHOLD}
        never = sum(not any(right) for right in verdicts.values())
        assert {samples.problems[i] for i in np.flatnonzero(hard_problems(samples, found.iteration, THRESHOLD))} == hard
        assert (found.sampled, found.never, found.hard) == (len(verdicts), never, len(hard))
        assert found.others == len(verdicts) - never - len(hard)
        assert (found.entered, found.stayed, found.left) == (len(hard - before), len(hard & before), len(before - hard))
        assert found.turnover == pytest.approx(1 - len(hard & before) / len(hard | before))
        query = ExpertQuery((found.iteration,), THRESHOLD)
        selected = TrajectoryCache(cache).write_experts(query, tmp_path / f"i{found.iteration}")
        assert selected["problems"] == found.hard
        before = hard


def test_no_hard_problems_have_no_turnover() -> None:
    assert np.isnan(HardSet(1, sampled=5, never=0, hard=0, others=5, entered=0, stayed=0, left=0).turnover)


def test_lengths_by_step(cache: Path, rows: list[Trajectory]) -> None:
    drift = length_drift(read_samples(cache))
    assert [(each.iteration, each.step) for each in drift] == [(i, s) for i in range(3) for s in range(4)]
    for each in drift:
        mine = [row for row in rows if (row.iteration, row.step) == (each.iteration, each.step)]
        lengths = [len(row.response_ids) for row in mine]
        assert each.quantiles == pytest.approx([float(np.quantile(lengths, q)) for q in QUANTILES])
        for correct, mean in ((True, each.mean_correct), (False, each.mean_wrong)):
            assert mean == pytest.approx(np.mean([len(row.response_ids) for row in mine if row.correct == correct]))


def test_single_rows(cache: Path, rows: list[Trajectory], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_module, "_BATCH", 4)
    samples = read_samples(cache)
    by_key = {row.key: row for row in rows}
    wanted = np.flatnonzero(samples.shard == 7)[[3, 0, 11, 3]]
    found = read_rows(samples.shards[7], samples.row[wanted].tolist(), ["response_ids", "prompt_ids"])
    assert found.keys() == set(samples.row[wanted].tolist())
    for row in wanted:
        key = (samples.iteration[row], samples.step[row], samples.problems[samples.problem[row]], samples.sample[row])
        expected = {"prompt_ids": list(by_key[key].prompt_ids), "response_ids": list(by_key[key].response_ids)}
        assert found[samples.row[row]] == expected
    assert set(read_rows(samples.shards[7], [0])[0]) == set(SCHEMA.names)


def test_no_cache_and_a_damaged_one(cache: Path, tmp_path: Path) -> None:
    assert len(read_samples(tmp_path / "nothing")) == 0
    assert length_drift(read_samples(tmp_path / "nothing")) == []
    assert hard_sets(read_samples(tmp_path / "nothing"), 0.1) == []
    (cache / "shard-000003.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"shard-000003\.parquet is missing or damaged"):
        read_samples(cache)
    quarantine(cache)
    assert [path.name for path in read_samples(cache).shards] == [f"shard-{n:06d}.parquet" for n in range(12) if n != 3]


def test_a_flipped_bit_is_said_or_changes_nothing(cache: Path) -> None:
    def content() -> list:  # type: ignore[type-arg]
        samples = read_samples(cache)
        columns = [getattr(samples, name).tolist() for name in ("problem", "step", "sample", "correct", "length")]
        rows = np.flatnonzero(samples.shard == 0)
        return [samples.problems, *columns, read_rows(samples.shards[0], samples.row[rows].tolist(), ["response_ids"])]

    path, expected, said = cache / "shard-000000.parquet", content(), 0
    sound = path.read_bytes()
    for place in range(5, len(sound), 23):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            silent = content()
        except UserError:
            said += 1
        else:
            assert silent == expected, f"byte {place} of {len(sound)}"
    assert said > len(sound) / 23 / 3


def test_a_success_rate_of_the_threshold_is_not_hard(tmp_path: Path) -> None:
    cache = TrajectoryCache(tmp_path)  # 0.28 * 25 is more than 7 in floating point, 7 / 25 is 0.28
    cache.append([trajectory(0, 0, 0, sample, sample < 7, 1) for sample in range(25)])
    cache.seal()
    assert not hard_problems(read_samples(tmp_path), 0, 0.28).any()
