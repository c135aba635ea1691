"""Overrides to a typed configuration; every mistake is one sentence that names the key."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rloop_mcore.compose import config_folder, flat, load_config, load_config_over, read_config, to_yaml
from rloop_mcore.errors import UserError
from rloop_mcore.validate import check_values

NEEDED = ["run.dir=r", "model.path=m", "data.train=d"]
EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_is_valid(name: str) -> None:
    config = load_config([f"experiment={name}", *NEEDED, f"rollout.python={sys.executable}"])
    check_values(config)
    assert config.experiment == name


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("paper_dapo", {"algorithm.iterations": 1, "algorithm.rl_steps": 600, "rft.enabled": False}),
        ("paper_rft", {"algorithm.updates_per_step": 0, "algorithm.sampling_rounds": 1}),
        ("paper_no_hard_filter", {"algorithm.hard_threshold": None}),
        ("paper_no_reset", {"algorithm.reset": False}),
        ("paper_nrl_50", {"algorithm.iterations": 12, "algorithm.rl_steps": 50}),
        ("paper_nrl_100", {"algorithm.iterations": 6, "algorithm.rl_steps": 100}),
        ("paper_nrl_300", {"algorithm.iterations": 2, "algorithm.rl_steps": 300}),
    ],
)
def test_a_comparison_changes_what_it_is_about_and_nothing_else(name: str, changes: dict[str, object]) -> None:
    paper, other = (flat(load_config([f"experiment={e}", "model.path=m", "data.train=d"])) for e in ("paper", name))
    assert other == {**paper, **changes, "experiment": name, "run.dir": f"runs/paper/{name.removeprefix('paper_')}"}
    assert name == "paper_rft" or paper["algorithm.rl_steps"] * paper["algorithm.iterations"] == (
        other["algorithm.rl_steps"] * other["algorithm.iterations"]
    )


def test_a_written_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config([*NEEDED, "optimizer.lr=3e-5", "evaluation.k=[1,2]", "run.deterministic=true"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read_config(tmp_path / "config.yaml") == config
    assert flat(config)["optimizer.lr"] == 3e-5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.itertions=3"], ["algorithm.itertions", "algorithm.iterations"]),
        (["+algorithm.itertions=3"], ["algorithm.itertions", "algorithm.iterations"]),
        (["algorithm.iterations=many"], ["algorithm.iterations", "many", "Integer"]),
        (["evaluation.k=[1,x]"], ["evaluation.k", "x"]),
        (["experiment=quikstart"], ["quikstart", "quickstart"]),
        (["nonsense"], ["nonsense", "key=value"]),
        (["run.dir=${nope}"], ["nope"]),
        (["run.deterministic=perhaps"], ["run.deterministic", "perhaps"]),
    ],
)
def test_a_mistake_is_one_sentence_naming_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config([*NEEDED, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_key_without_a_value_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        load_config(["run.dir=r", "model.path=m"])


def test_a_runs_configuration_with_single_keys_over_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(["experiment=tiny", "rollout.max_tokens=17"])))
    config = load_config_over(tmp_path / "config.yaml", ["evaluation.k=[1,2]", "rollout.top_p=0.5"])
    before = flat(read_config(tmp_path / "config.yaml"))
    assert flat(config) == {**before, "evaluation.k": [1, 2], "rollout.top_p": 0.5}
    assert before["rollout.max_tokens"] == 17
    for wrong, words in (
        ("experiment=paper", "give single keys"),
        ("rollout.topp=1", "did you mean"),
        ("x", "override"),
    ):
        with pytest.raises(UserError, match=words):
            load_config_over(tmp_path / "config.yaml", [wrong])
