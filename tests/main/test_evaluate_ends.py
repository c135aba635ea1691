"""How `rloop evaluate` ends where files fail it, and which servers it refuses."""

import argparse
import json
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.errors import DiskFull, Fault, UserError
from rloop_mcore.main.arguments import parse
from rloop_mcore.main.evaluate import _explained, evaluate, keys_of
from rloop_mcore.main.policies import Source
from rloop_mcore.main.policy_evaluation import PolicyEvaluation
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.run_config import to_yaml


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match="goes on from there"), _explained(Source(tmp_path), tmp_path):
        Path("/dev/full").write_text("x")


def test_a_policy_that_its_run_removes_is_a_sentence(tmp_path: Path) -> None:
    gone = tmp_path / "policies" / "i0_explore_000001"
    with pytest.raises(Fault, match="choose another --step"), _explained(Source(gone), tmp_path):
        (gone / "model.safetensors").read_bytes()


def test_other_failures_are_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), _explained(Source(tmp_path), tmp_path):
        (tmp_path / "x").read_bytes()


def test_an_evaluation_of_no_problem_is_refused(tmp_path: Path) -> None:
    options = argparse.Namespace(overrides=["evaluation.limit=0"], samples=None, k=None)
    with pytest.raises(UserError, match=r"evaluation\.limit=0 must be greater than 0, or null"):
        keys_of(options, Source(tmp_path))


def test_short_responses_may_be_asked_for_whatever_training_has(tmp_path: Path) -> None:
    model = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 2048}
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(model | sizes | {"num_key_value_heads": 2, "vocab_size": 8}))
    options = argparse.Namespace(overrides=["rollout.max_tokens=64"], samples=None, k=None)
    assert keys_of(options, Source(tmp_path)).rollout.max_tokens == 64


def test_a_model_evaluated_by_a_clusters_experiment_has_the_engines_of_one_node(tmp_path: Path) -> None:
    """As docs/slurm.md measures the base model, in a job of one node: 32 servers were to share its 8 GPUs."""
    options = argparse.Namespace(overrides=["experiment=rloop_qwen2.5_math_7b"], samples=None, k=None)
    config = keys_of(options, Source(tmp_path), elsewhere=True)
    assert (config.cluster.nodes, config.rollout.engines) == (1, 8)


def test_the_layout_of_training_holds_up_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(["experiment=rloop_qwen2.5_math_7b", "model.path=x"])))
    source = Source(tmp_path / "policies" / "theta_1", RunDirectory(tmp_path))
    options = argparse.Namespace(overrides=["cluster.nodes=1", "rollout.engines=8"], samples=None, k=None)
    assert keys_of(options, source, elsewhere=True).rollout.engines == 8
    options.overrides.pop()
    with pytest.raises(UserError, match=r"rollout\.engines=32 x rollout\.tp=1 is 32 GPUs, and cluster\.nodes has 8"):
        keys_of(options, source, elsewhere=True)


def test_the_servers_of_the_run_hold_other_weights(tmp_path: Path) -> None:
    config = load_config(["experiment=tiny", "rollout.engine=sglang", "rollout.endpoints=[http://127.0.0.1:1]"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    options = argparse.Namespace(overrides=[], samples=4, k="1,4", json=None)
    source = Source(tmp_path / "checkpoints" / "i0_explore_000001", RunDirectory(tmp_path))
    with pytest.raises(UserError, match="hold other weights"):
        keys_of(options, source)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("reward.verifier=mth", "reward.verifier='mth' is no known verifier"),
        ("data.template=chatt", "data.template 'chatt' not found"),
    ],
)
def test_a_misspelled_name_is_refused_before_a_checkpoint_is_converted(
    override: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes minutes, and so does the start of an engine, which came before the verifier's too."""
    write_model(tmp_path / "model", seed=0)
    monkeypatch.setattr("rloop_mcore.main.evaluate.as_hf_folder", None)
    typed = ["evaluate", "--policy", f"{tmp_path}/model", "--data", "countdown3:test", "experiment=tiny", override]
    with pytest.raises(UserError, match=words):
        evaluate(parse([*typed, "--out", f"{tmp_path}/out"]))


def test_a_benchmark_whose_prompts_are_too_long_is_refused_before_another_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", seed=0)
    (tmp_path / "long.jsonl").write_text(json.dumps({"problem": "1," * 20 + "=1", "answer": "1"}) + "\n")
    monkeypatch.setattr(PolicyEvaluation, "run", None)
    typed = ["evaluate", "--policy", f"{tmp_path}/model", "--data", "countdown3:test", "experiment=tiny"]
    with pytest.raises(UserError, match=r"all 1 prompts are longer than data\.max_prompt_tokens=16"):
        evaluate(parse([*typed, "--data", f"{tmp_path}/long.jsonl", "--out", f"{tmp_path}/out"]))
