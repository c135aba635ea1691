"""Overrides to a typed configuration; every mistake is one sentence that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from rloop_mcore.compose import config_folder, flat, load_config, read_config, to_yaml
from rloop_mcore.errors import UserError
from rloop_mcore.validate import check_values

NEEDED = ["run.dir=r", "model.path=m", "data.train=d"]
EXPERIMENTS = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_shipped_experiment_is_valid(name: str) -> None:
    config = load_config([f"experiment={name}", *NEEDED])
    check_values(config)
    assert config.experiment == name


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
