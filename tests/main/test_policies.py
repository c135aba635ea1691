"""Which policy `--policy` and `--step` mean, and a checkpoint's as an HF folder."""

import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.cli import main
from rloop_mcore.main.policies import Source, as_hf_folder, find_policy
from rloop_mcore.progress import ProgressDisplay
from rloop_mcore.run_config import to_yaml
from rloop_mcore.weights import mcore_to_hf
from rloop_mcore.weights.conversion import HF_FILES, Conversion
from rloop_mcore.weights.digest import digest_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two RL checkpoints, of which the first is the better one, the second not kept as a folder; then theta_1."""
    path = tmp_path / "run"
    for folder in ("policies/base", "policies/i0_explore_000002", "policies/i0_exploit_000000"):
        (path / folder).mkdir(parents=True)
    (path / "checkpoints" / "i0_explore_000004").mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(load_config(["experiment=tiny"])))
    journal = Journal(path / "journal.jsonl")
    journal.record("policy", iteration=0, path="policies/base", digest="0")
    measured = {"digest": "1", "metrics": {"avg@8": 0.1}}
    journal.record("measured", name="base", path="policies/base", **measured)
    commit = {"iteration": 0, "phase": "explore", "shards": []}
    journal.record("commit", step=2, checkpoint="checkpoints/i0_explore_000002", **commit)
    measured["metrics"] = {"avg@8": 0.3}
    journal.record("measured", name="i0_explore_000002", path="policies/i0_explore_000002", **measured)
    journal.record("commit", step=4, checkpoint="checkpoints/i0_explore_000004", **commit)
    measured["metrics"] = {"avg@8": 0.2}
    journal.record("measured", name="i0_explore_000004", path="policies/i0_explore_000004", **measured)
    journal.record("removed", paths=["policies/i0_explore_000004"])
    journal.record("policy", iteration=1, path="policies/i0_exploit_000000", digest="2")
    return path


@pytest.mark.parametrize(
    ("step", "found"),
    [
        (None, "policies/i0_explore_000002"),
        ("best", "policies/i0_explore_000002"),
        ("last", "policies/i0_exploit_000000"),
        ("theta_0", "policies/base"),
        ("theta_1", "policies/i0_exploit_000000"),
        ("i0_explore_000002", "policies/i0_explore_000002"),
        ("i0_explore_000004", "checkpoints/i0_explore_000004"),
    ],
)
def test_a_runs_policies_by_name(run: Path, step: str | None, found: str) -> None:
    assert find_policy(run, step).path == run / found


def test_a_checkpoint_stands_for_a_folder_that_is_gone(run: Path) -> None:
    (run / "policies" / "i0_explore_000002").rmdir()
    (run / "checkpoints" / "i0_explore_000002").mkdir()
    assert find_policy(run, "i0_explore_000002").path == run / "checkpoints" / "i0_explore_000002"


def test_a_runs_checkpoint_has_the_config_of_the_last_theta(run: Path, tmp_path: Path) -> None:
    theta, checkpoint = run / "policies" / "i0_exploit_000000", run / "checkpoints" / "i0_explore_000004"
    theta.rmdir()
    checkpoint.rmdir()
    write_model(theta, seed=0)
    assert main(["convert", str(theta), str(checkpoint)]) == 0
    shutil.rmtree(checkpoint / HF_FILES)  # as a run writes it
    source = find_policy(run, "i0_explore_000004")
    assert digest_of(as_hf_folder(source, tmp_path / "converted", ProgressDisplay())) == digest_of(theta)
    (run / "journal.jsonl").unlink()
    as_hf_folder(source, tmp_path / "converted", ProgressDisplay())  # once is enough
    with pytest.raises(UserError, match="in no run's checkpoints/"):
        as_hf_folder(source, tmp_path / "again", ProgressDisplay())


def test_what_a_run_lacks_is_told_with_what_it_has(run: Path) -> None:
    with pytest.raises(UserError, match=r"i3_explore_000001: .*i0_explore_000002.*theta_1, best, last"):
        find_policy(run, "i3_explore_000001")


def test_a_run_without_a_measurement_has_no_best(run: Path) -> None:
    (run / "journal.jsonl").write_text("")
    with pytest.raises(UserError, match="has evaluated no policy yet"):
        find_policy(run, None)


def test_a_folder_has_no_steps(run: Path) -> None:
    with pytest.raises(UserError, match=r"--policy .*base holds no config\.json"):
        find_policy(run / "policies" / "base", None)
    (run / "policies" / "base" / "config.json").touch()
    assert find_policy(run / "policies" / "base", None).run is None
    with pytest.raises(UserError, match="not a run directory"):
        find_policy(run / "policies" / "base", "last")
    with pytest.raises(UserError, match="was removed"):
        find_policy(run / "policies" / "i0_explore_000004", None)


def test_a_folder_with_the_hubs_metadata_is_no_checkpoint(tmp_path: Path) -> None:
    """`rloop convert` knew so; `rloop evaluate` refused it for want of a manifest.json."""
    write_model(tmp_path / "model", seed=0)
    (tmp_path / "model" / "metadata.json").write_text("{}")
    source = find_policy(tmp_path / "model", None)
    assert as_hf_folder(source, tmp_path / "converted", ProgressDisplay()) == tmp_path / "model"


def test_a_checkpoint_may_have_as_many_files_as_this_machine_lets_it(tmp_path: Path) -> None:
    """One of a thousand ranks has more than the 1,024 that a process may usually open."""
    write_model(tmp_path / "model", seed=0)
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "checkpoint")]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        as_hf_folder(Source(tmp_path / "checkpoint"), tmp_path / "converted", ProgressDisplay())
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_two_evaluations_of_a_checkpoint_convert_it_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one takes the quicker one's folder, and what a killed one had begun goes."""
    write_model(tmp_path / "base", seed=0)
    assert main(["convert", str(tmp_path / "base"), str(tmp_path / "checkpoint")]) == 0
    source, plan = Source(tmp_path / "checkpoint"), mcore_to_hf.plan
    begun: list[Path] = []

    def also_done_elsewhere(path: Path, target: Path, **options: Any) -> Conversion:
        begun.append(target)
        plan(path, target, **options).run(lambda size: None)
        return plan(path, target, **options)

    monkeypatch.setattr(mcore_to_hf, "plan", also_done_elsewhere)
    folder = as_hf_folder(source, tmp_path / "first", ProgressDisplay())
    assert digest_of(folder) == digest_of(tmp_path / "base")

    monkeypatch.setattr(mcore_to_hf, "plan", plan)
    left = tmp_path / "second" / f".tmp-1-{begun[0].name}"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    as_hf_folder(source, tmp_path / "second", ProgressDisplay())
    assert not left.exists()
