"""Overrides to a typed configuration; every mistake is one sentence that names the key."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config, load_config_over
from rloop_mcore.config import config_folder
from rloop_mcore.errors import UserError
from rloop_mcore.run_config import flat, read_config, to_yaml
from rloop_mcore.validate import check_values

NEEDED = ["run.dir=r", "model.path=m", "data.train=d"]
PAPER = "rloop_qwen2.5_math_7b"
CHOICES = sorted(f"{path.parent.name}={path.stem}" for path in config_folder().glob("*/*.yaml"))


@pytest.mark.parametrize("choice", CHOICES)
def test_every_shipped_choice_composes_and_is_valid(choice: str) -> None:
    sglang = f"rollout.python={sys.executable}"
    check_values(load_config([*NEEDED, choice, sglang]))


def test_a_group_is_chosen_beside_its_keys_whatever_their_order() -> None:
    groups = ["model=qwen2.5_7b", "cluster=h100_64", "layout=tp4", "rollout=sglang_colocated", "algorithm=grpo"]
    keys = ["model.path=/models/X", "cluster.threads=2", "layout.dp=16", "rollout.tp=2", "algorithm.clip_high=0.3"]
    first, last = (flat(load_config(["run.dir=r", "data.train=d", *both])) for both in (groups + keys, keys + groups))
    assert first == last
    wanted = {
        "model.architecture.hidden_size": 3584,
        "model.path": "/models/X",
        "cluster.nodes": 8,
        "cluster.gpu.memory_gb_s": 3350,
        "layout.tp": 4,
        "layout.dp": 16,
        "rollout.engine": "sglang",
        "rollout.tp": 2,
        "algorithm.aggregation": "sequence_mean",
        "algorithm.clip_high": 0.3,
    }
    assert wanted.items() <= first.items()


def test_a_group_on_the_command_line_replaces_the_experiments() -> None:
    config = load_config(
        [f"experiment={PAPER}", *NEEDED, "cluster=h200_8", "algorithm=dr_grpo", "precision=fp8_delayed"]
    )
    assert (config.cluster.gpu.name, config.cluster.nodes) == ("H200", 1)
    assert (config.algorithm.advantage, config.rft.enabled, config.precision) == ("group_mean", False, "fp8_delayed")
    assert config.algorithm.rl_steps == 200  # the experiment's own


def test_groups_of_ones_own_are_found(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    lines = f"# @package _global_\ndefaults:\n  - {PAPER}\n  - override /model: qwen3_8b\nlayout: {{dp: 3}}\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(lines)
    config = load_config([*NEEDED, f"hydra.searchpath=[{tmp_path}]", "experiment=mine"])
    assert (config.layout.dp, config.layout.tp, config.model.architecture.model_type) == (3, 4, "qwen3")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dapo_qwen2.5_math_7b", {"algorithm.iterations": 1, "algorithm.rl_steps": 600, "rft.enabled": False}),
        ("rft_qwen2.5_math_7b", {"algorithm.updates_per_step": 0, "algorithm.sampling_rounds": 1}),
        (f"{PAPER}_no_hard_filter", {"algorithm.hard_threshold": None}),
        (f"{PAPER}_no_reset", {"algorithm.reset": False}),
        (f"{PAPER}_nrl_50", {"algorithm.iterations": 12, "algorithm.rl_steps": 50}),
        (f"{PAPER}_nrl_100", {"algorithm.iterations": 6, "algorithm.rl_steps": 100}),
        (f"{PAPER}_nrl_300", {"algorithm.iterations": 2, "algorithm.rl_steps": 300}),
    ],
)
def test_a_comparison_changes_what_it_is_about_and_nothing_else(name: str, changes: dict[str, object]) -> None:
    paper, other = (flat(load_config([f"experiment={e}", "model.path=m"])) for e in (PAPER, name))
    assert other == {**paper, **changes, "experiment": name, "run.dir": f"runs/{name}"}
    assert name.startswith("rft") or paper["algorithm.rl_steps"] * paper["algorithm.iterations"] == (
        other["algorithm.rl_steps"] * other["algorithm.iterations"]
    )


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_another_algorithm_samples_what_it_trains_on_and_warms_up_for_as_many_steps(name: str) -> None:
    dapo, other = (
        load_config(["experiment=dapo_qwen2.5_math_7b", "model.path=m", *more]) for more in ([], [f"algorithm={name}"])
    )
    assert other.algorithm.sampled_per_step == other.algorithm.prompts_per_step == dapo.algorithm.prompts_per_step
    steps = [config.optimizer.warmup_updates / config.algorithm.updates_per_step for config in (dapo, other)]
    assert steps == [10, 10]
    assert (
        (other.algorithm.iterations, other.optimizer.lr) == (dapo.algorithm.iterations, dapo.optimizer.lr) == (1, 1e-6)
    )


def test_the_papers_run_is_what_the_schema_has_by_default() -> None:
    """Machines, data and saving apart: the numbers with their sources stand in YAML, and a bare run has them too."""
    machines = ("run.", "model.", "layout.", "rollout.", "data.", "cluster.", "checkpoint.", "experiment")
    paper, bare = (flat(load_config([*NEEDED, *more])) for more in ([f"experiment={PAPER}"], []))
    assert {
        key: (paper[key], bare[key]) for key in bare if paper[key] != bare[key] and not key.startswith(machines)
    } == {}


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
        (["experiment=quikstart"], ["experiment=quikstart", "did you mean quickstart", "tiny"]),
        (["model=qwen2.5_8b"], ["model=qwen2.5_8b", "did you mean qwen2.5_7b?", "llama3.1_405b"]),
        (["model=/models/X"], ["model=/models/X", "model.path"]),
        (["cluster=h100"], ["cluster=h100", "h100_8"]),
        (["rollout=sglang"], ["rollout=sglang", "sglang_colocated"]),
        (["layout=null"], ["layout=null", "configs/layout"]),
        (["layout=3"], ["layout=3", "configs/layout"]),
        (["rollout=[true]"], ["rollout=[true]", "configs/rollout"]),
        (["rollout=[{tp: 1}]"], ["rollout=[{tp: 1}]", "configs/rollout"]),
        (["algorithm.rl_steps=null"], ["algorithm.rl_steps can't be null"]),
        (["modle=qwen2.5_7b"], ["modle", "did you mean model?"]),
        (["algorithm.lr=1e-6"], ["did you mean optimizer.lr?"]),
        (["algorithm.steps=9"], ["did you mean algorithm.rl_steps?"]),
        (["data.val=heldout.jsonl"], ["did you mean data.validation?"]),
        (["partition=gpu"], ["did you mean cluster.slurm.partition?"]),
        (["nonsense"], ["nonsense", "key=value"]),
        (["run.dir=${nope}"], ["nope"]),
        (["run.deterministic=perhaps"], ["run.deterministic", "perhaps"]),
        (["evaluation.k=1,8"], ["evaluation.k=1,8", "evaluation.k=[A,B]"]),
        (["experiment=tiny,quickstart"], ["choose one experiment"]),
        (["evaluation.k=8"], ["evaluation.k is a list", "evaluation.k=[A,B]"]),
        (["run.dir=~/runs"], ["run.dir=$HOME/runs"]),
        (["data.train=café.jsonl"], ["data.train=café.jsonl", "\"data.train='VALUE'\""]),
        (["cluster.slurm.flags=[--exclude=n7]"], ["cluster.slurm.flags=['A','B']"]),
        (["hydra.searchpath=[/nowhere]"], ["hydra.searchpath", "/nowhere", "no folder"]),
        (["hydra.run.dir=runs/a"], ["hydra.run.dir is not a key", "did you mean run.dir?"]),
        (["~model.path"], ["~model.path takes a key away", "model.path=VALUE"]),
        (["=3"], ["'=3' is not an override", "key=value"]),
    ],
)
def test_a_mistake_is_one_sentence_naming_the_key(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config([*NEEDED, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_all_keys_that_are_missing_are_named_at_once() -> None:
    with pytest.raises(UserError, match=r"^no value for data.train, run.dir: give data.train=VALUE run.dir=VALUE on"):
        load_config(["model.path=m"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: [", "broken.yaml"),
        (b"caf\xe9: 1", "UTF-8"),
        (b"run: {seed: 1}", "'experiment/broken': the first line must be # @package _global_"),
        (
            b"# mine\n# @package _global_\ndefaults: [{override /model: qwen3_8b}]",
            "'experiment/broken': the first line must be # @package _global_",
        ),
        (b"5", r"experiment=broken: a file of the configuration holds no keys \(.* int\)"),
        (b"# @package _global_\n[1, 2]", "'experiment/broken': a list is where KEY: VALUE lines are wanted"),
        (b"run: &a\n  dir: *a", "experiment=broken: a file of the configuration holds itself"),
        (b"&a [*a]", "experiment=broken: a file of the configuration holds itself"),
        (b"defaults: [/experiment/broken]", "experiment=broken: a file of the configuration holds itself"),
        (b"defaults: 5", "'experiment/broken', defaults must be a list"),
        (b"run: {seed: " + b"9" * 5000 + b"}", "4300 digits"),
        (b"# @package _global_\nlayout: {stages: [[1]]}", r"layout\.stages holds \[1\]: its entries are single values"),
        (
            b"# @package _global_\nrun: {sed: 1}",
            r"'experiment/broken': run\.sed is not a key of .* did you mean run\.seed\?",
        ),
    ],
)
def test_a_mistake_in_a_file_of_ones_own_is_one_sentence(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load_config([f"hydra.searchpath=[{tmp_path}]", "experiment=broken", *NEEDED])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"run: {dir: caf\xe9}", b"run: [", b"run: {seed: 1}"])
def test_another_file_than_a_runs_configuration_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        read_config(tmp_path / "config.yaml")
    assert "command line" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("sed: 1", r"run\.sed is not a key of .* did you mean run\.seed\? Of a run of an older version, take"),
        ("seed: ${nope}", r"run\.seed: .*nope"),
    ],
)
def test_a_mistake_in_a_runs_configuration_is_one_sentence(line: str, words: str, tmp_path: Path) -> None:
    text = to_yaml(load_config(NEEDED)).replace("  seed: 0", f"  {line}", 1)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"config\.yaml: {words}") as caught:
        read_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_a_key_without_a_value_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        load_config(["run.dir=r", "model.path=m"])


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("evaluation={limit: 3}", {"evaluation.limit": 3}),  # the section's other keys stay the run's
        ("evaluation.limit=${rollout.max_tokens}", {"evaluation.limit": 17}),
        ("data.train=mine.jsonl", {"data.train": "mine.jsonl"}),
        ("rollout.server_args=['--a','b=c']", {"rollout.server_args": ["--a", "b=c"]}),
    ],
)
def test_what_is_put_over_a_runs_configuration_changes_nothing_else(
    override: str, changed: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(["experiment=tiny", "rollout.max_tokens=17"])))
    before = flat(read_config(tmp_path / "config.yaml"))
    assert flat(load_config_over(tmp_path / "config.yaml", [override])) == before | changed


def test_a_runs_configuration_with_single_keys_over_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(["experiment=tiny", "rollout.max_tokens=17"])))
    config = load_config_over(tmp_path / "config.yaml", ["evaluation.k=[1,2]", "rollout.top_p=0.5"])
    before = flat(read_config(tmp_path / "config.yaml"))
    assert flat(config) == {**before, "evaluation.k": [1, 2], "rollout.top_p": 0.5}
    assert before["rollout.max_tokens"] == 17
    for wrong, words in (
        ("experiment=tiny", "give single keys"),
        ("hydra.searchpath=[/tmp]", "give single keys"),
        ("rollout.topp=1", "did you mean"),
        ("x", "override"),
    ):
        with pytest.raises(UserError, match=words):
            load_config_over(tmp_path / "config.yaml", [wrong])
