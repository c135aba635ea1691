from collections.abc import Callable
from pathlib import Path

import numpy as np

from rloop_mcore.analysis.pick import base, last_rl_policy, last_theta, pick
from rloop_mcore.analysis.read_run import read_run


def picked(path: Path) -> str:
    evaluation = pick(read_run(path).evaluations)
    assert evaluation is not None
    return evaluation.name


def test_the_highest_average_wins_whether_rl_or_rft(make_run: Callable[..., Path], tmp_path: Path) -> None:
    rl = {"base": 0.1, "i0_explore_000004": 0.3, "i0_exploit_000000": 0.2}
    rft = {"base": 0.1, "i0_explore_000004": 0.3, "i0_exploit_000000": 0.4, "i1_explore_000004": 0.35}
    assert picked(make_run(tmp_path / "rl", rl)) == "i0_explore_000004"
    assert picked(make_run(tmp_path / "rft", rft)) == "i0_exploit_000000"


def test_of_equals_the_earlier_in_training(make_run: Callable[..., Path], tmp_path: Path) -> None:
    equal = {"base": 0.1, "i1_explore_000002": 0.3, "i0_exploit_000000": 0.3, "i0_explore_000004": 0.2}
    assert picked(make_run(tmp_path / "run", equal)) == "i0_exploit_000000"


def test_as_many_successes_of_other_problems_are_equal(make_run: Callable[..., Path], tmp_path: Path) -> None:
    earlier, later = (float(np.mean(np.array(right) / 10)) for right in ([3, 0, 0], [1, 2, 0]))
    assert later > earlier  # by one bit
    equal = {"base": 0.05, "i0_explore_000002": earlier, "i0_explore_000004": later}
    assert picked(make_run(tmp_path / "run", equal)) == "i0_explore_000002"


def test_theta_0_is_no_result_of_the_run(make_run: Callable[..., Path], tmp_path: Path) -> None:
    assert picked(make_run(tmp_path / "worse", {"base": 0.9, "i0_explore_000004": 0.3})) == "i0_explore_000004"
    assert picked(make_run(tmp_path / "untrained", {"base": 0.9})) == "base"
    assert pick([]) is None


def test_the_checkpoints_beside_it(rloop_run: Path, dapo_run: Path) -> None:
    rloop, dapo = read_run(rloop_run).evaluations, read_run(dapo_run).evaluations
    names = [found.name if (found := role(rloop)) else None for role in (base, last_theta, last_rl_policy)]
    assert names == ["base", "i1_exploit_000000", "i1_explore_000004"]
    assert last_theta(dapo) is None
    assert base(dapo[1:]) is None
