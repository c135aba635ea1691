"""What a resumed run may change: every key has been thought about, and the journal says what was changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.changes import _TABLE, rule_of, take_changes, take_inputs
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.run_config import flat, to_yaml

EXPLORING = [("done", 0, "base"), ("commit", 0, "explore")]  # up to step 120


def configure(run_dir: Path, *overrides: str) -> Config:
    return load_config([f"run.dir={run_dir}", "model.path=m", "data.train=d", *overrides])


def begun(run_dir: Path, places: Sequence[tuple[str, int, str]] = EXPLORING, *overrides: str) -> RunDirectory:
    """A run of the default configuration, as far as `places` say."""
    run = RunDirectory(run_dir)
    run.path.mkdir()
    run.config.write_text(to_yaml(configure(run_dir, *overrides)))
    for event, iteration, phase in places:
        Journal(run.journal).record(event, iteration=iteration, phase=phase, step=120)
    return run


def changes(run: RunDirectory) -> list[dict[str, Any]]:
    return [record for record in Journal(run.journal).records if record["event"] == "changed"]


def test_every_key_is_free_or_has_a_reason() -> None:
    """`rule_of` raises KeyError for a key that nobody has thought about."""
    for key in flat(Config()):
        rule_of(key)


def test_no_rule_is_about_nothing_and_no_section_is_free() -> None:
    keys = flat(Config())
    for entry, rule in _TABLE.items():
        section = entry.endswith(".")
        assert any(key == entry or (section and key.startswith(entry)) for key in keys), entry
        assert rule is not None or not section, entry


def test_the_nearest_rule_counts() -> None:
    assert rule_of("actor.recompute") is None
    for key, words in [("actor.routing_replay", "experts"), ("actor.optimizer_offload", "optimizer state")]:
        rule = rule_of(key)
        assert rule is not None
        assert words in rule.reason
    with pytest.raises(KeyError, match=r"tracking\.new"):
        rule_of("tracking.new")


def test_a_safe_change_is_taken_and_journaled_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path / "run")
    config = configure(run.path, "layout.tp=2", "checkpoint.keep=3", "tracking.wandb_project=p")
    for _ in range(2):  # a kill before config.yaml is written repeats it
        take_changes(run, config, force=False)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "rloop: changed: layout.tp=2 (was 1), checkpoint.keep=3 (was 1), tracking.wandb_project=p (was null)"
    )
    (record,) = changes(run)
    assert record["keys"]["layout.tp"] == {"before": 1, "now": 2}
    assert record["forced"] == []


def test_the_same_configuration_in_a_moved_directory_is_no_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.path.rename(tmp_path / "moved")
    moved = RunDirectory(tmp_path / "moved")
    take_changes(moved, configure(moved.path), force=False)
    assert changes(moved) == []


def test_an_unsafe_change_is_refused_with_its_reason(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(UserError, match=r"group_size=16, not 4: the success rates of a phase would mix.*--force"):
        take_changes(run, configure(run.path, "algorithm.group_size=4", "layout.tp=2"), force=False)
    assert changes(run) == []


def test_a_forced_change_is_a_warning_and_journaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path / "run")
    take_changes(run, configure(run.path, "algorithm.group_size=4", "layout.tp=2"), force=True)
    assert "rloop: warning: algorithm.group_size=4 is forced: the success rates" in capsys.readouterr().err
    (record,) = changes(run)
    assert record["forced"] == ["algorithm.group_size"]
    assert record["keys"]["algorithm.group_size"] == {"before": 16, "now": 4}


def test_what_cannot_work_is_not_even_forced(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    with pytest.raises(UserError, match=r"rl_steps=200, not 100: 120 steps .* command, or choose another run\.dir\."):
        take_changes(run, configure(run.path, "algorithm.rl_steps=100"), force=True)
    with pytest.raises(UserError, match=r"iterations=3, not 0: 1 iterations have begun; .*, or choose another"):
        take_changes(run, configure(run.path, "algorithm.iterations=0"), force=True)
    with pytest.raises(UserError, match=r"rl_steps=200, not 130: .* or add --force\."):
        take_changes(run, configure(run.path, "algorithm.rl_steps=130"), force=False)
    take_changes(run, configure(run.path, "algorithm.rl_steps=130"), force=True)
    Journal(run.journal).record("done", iteration=0, phase="explore", step=120)
    take_changes(run, configure(run.path, "algorithm.rl_steps=100"), force=True)


@pytest.mark.parametrize(
    ("override", "places", "free"),
    [
        ("rft.batch_size=7", EXPLORING, True),
        ("rft.optimizer.lr=1", EXPLORING, True),
        ("algorithm.reset=false", EXPLORING, True),
        ("algorithm.hard_threshold=0.2", [*EXPLORING, ("done", 0, "select")], False),
        ("rft.batch_size=7", [*EXPLORING, ("done", 0, "select")], False),
        ("algorithm.clip_high=0.3", EXPLORING[:1], True),
        ("algorithm.rl_steps=100", EXPLORING[:1], True),
        ("algorithm.rl_steps=100", [("commit", 0, "sft")], True),
        ("algorithm.clip_high=0.3", EXPLORING, False),
        ("optimizer.lr=1", EXPLORING, False),
        ("reward.wrong=-1", EXPLORING, False),
        ("reward.wrong=-1", EXPLORING[:1], True),
        ("reward.max_unparsable_share=0.5", EXPLORING, True),
        ("sft.epochs=3", EXPLORING[:1], False),
        ("algorithm.iterations=4", EXPLORING, True),
        ("algorithm.iterations=1", EXPLORING, True),
        ("algorithm.iterations=1", [*EXPLORING, ("commit", 1, "explore")], False),
    ],
)
def test_a_key_binds_from_the_phase_on_that_uses_it(
    override: str, places: list[tuple[str, int, str]], free: bool, tmp_path: Path
) -> None:
    run = begun(tmp_path / "run", places)
    if free:
        take_changes(run, configure(run.path, override), force=False)
        return
    with pytest.raises(UserError, match=override.partition("=")[0]):
        take_changes(run, configure(run.path, override), force=False)


INPUTS = {"data.train": "t", "data.validation": "v", "sft.demonstrations": "s", "data.template": "p"}


@pytest.mark.parametrize("key", INPUTS)
def test_a_file_that_holds_something_else_is_refused_like_another_file(key: str, tmp_path: Path) -> None:
    run, other = begun(tmp_path / "run"), INPUTS | {key: "another"}
    config = configure(run.path)
    take_inputs(run, config, INPUTS, force=False)
    take_inputs(run, config, INPUTS, force=False)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"^{key}=.* holds something else than when .*run was started: .*--force"):
            take_inputs(run, config, other, force=False)
    assert changes(run) == []
    take_inputs(run, config, other, force=True)
    take_inputs(run, config, other, force=False)
    (record,) = changes(run)
    assert record["keys"] == {f"what {key} holds": {"before": INPUTS[key], "now": "another"}}
    assert record["forced"] == list(record["keys"])


def test_before_anything_was_made_of_them_files_may_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", [])
    take_inputs(run, configure(run.path), INPUTS, force=False)
    Journal(run.journal).record("started")
    take_inputs(run, configure(run.path), INPUTS | {"data.train": "another"}, force=False)
    assert json.loads(run.inputs.read_text()) == INPUTS | {"data.train": "another"}
    assert changes(run) == []


def test_a_run_without_its_configuration_is_refused(tmp_path: Path) -> None:
    run = begun(tmp_path / "run")
    run.config.unlink()
    with pytest.raises(UserError, match=r"run is not a run directory, .*: it holds no config\.yaml"):
        take_changes(run, configure(run.path), force=True)


def test_before_the_first_record_everything_may_change(tmp_path: Path) -> None:
    run = begun(tmp_path / "run", [])
    take_changes(run, configure(run.path, "run.seed=5"), force=False)
    assert not run.journal.exists()
