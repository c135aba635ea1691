"""Kept samples: which conditions share them, what happens to damaged ones, one process at a time."""

import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.sampling import Graded
from rloop_mcore.main.kept_samples import Conditions, KeptSamples, open_samples
from rloop_mcore.types import Problem, Trajectory
from tests.data.chat_tokenizer import write_chat_tokenizer

PROBLEMS = [Problem("a", "1+1", "2"), Problem("b", "2+2", "4")]


def template(config: Config) -> PromptTemplate:
    with tempfile.TemporaryDirectory() as folder:
        return PromptTemplate(config.data.template, write_chat_tokenizer(Path(folder)))


def conditions(*overrides: str, policy: str = "d0", data: str = "x.jsonl", problems: list[Problem] = PROBLEMS) -> str:
    config = load_config(["experiment=tiny", *overrides])
    return Conditions.of(config, policy, data, problems, template(config)).digest


@pytest.mark.parametrize(
    "override",
    [
        *("evaluation.temperature=0.5", "evaluation.top_p=0.9", "rollout.max_tokens=20", "data.template=r1_zero"),
        *("reward.verifier=math", "reward.answer_format=answer_line", "run.seed=3", "precision=bf16"),
    ],
)
def test_another_condition_is_another_set(override: str) -> None:
    assert conditions(override) != conditions()


def test_another_policy_or_problem_is_another_set() -> None:
    assert conditions(policy="d1") != conditions()
    assert conditions(problems=[PROBLEMS[0], Problem("b", "2+2", "5")]) != conditions()


@pytest.mark.parametrize(
    "override", ["evaluation.samples=9", "evaluation.k=[1]", "evaluation.limit=1", "rollout.max_running=1"]
)
def test_how_many_and_how_fast_is_the_same_set(override: str) -> None:
    assert conditions(override) == conditions()


def test_what_the_file_is_called_is_the_same_set() -> None:
    assert conditions(data="y.jsonl") == conditions()


def row(problem: str, sample: int) -> Trajectory:
    return Trajectory(0, 0, problem, sample, (1, 2), (3, 4), (-1.0, -0.5), "stop", ((0, 2),), True, 1.0, "correct")


def graded(*rows: Trajectory) -> list[Graded]:
    return [Graded.of(each) for each in rows]


Opened = Callable[..., AbstractContextManager[KeptSamples]]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    config = load_config(["experiment=tiny"])
    fixed = Conditions.of(config, "d0", "x.jsonl", PROBLEMS, template(config))
    return lambda tell=print, patience_s=0.0: open_samples(tmp_path, "x", fixed, tell, patience_s)


def test_what_was_added_is_there_and_a_damaged_file_is_missing(opened: Opened) -> None:
    with opened() as kept:
        kept.add([row("a", 1), row("a", 0)])
        kept.add([row("b", 0)])
    with opened() as kept:
        assert kept.rows == graded(row("a", 0), row("a", 1), row("b", 0))
        assert kept.lost == []
    shard = kept.folder / "samples" / "shard-000000.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with opened() as kept:
        assert kept.lost == ["shard-000000.parquet"]
        assert kept.rows == graded(row("b", 0))
        kept.add([row("a", 0), row("a", 1)])
    with opened() as kept:
        assert kept.rows == graded(row("a", 0), row("a", 1), row("b", 0))
        assert kept.lost == []


def test_what_is_in_memory_has_four_bytes_a_token(opened: Opened) -> None:
    long = replace(row("a", 0), response_ids=tuple(range(1000, 3000)), logprobs=(-0.1,) * 2000)
    with opened() as kept:
        kept.add([long, replace(long, sample=1)])
    with opened() as kept:
        first, second = kept.rows
        assert sys.getsizeof(first.response_ids) < 4 * 2000 + 200
        assert first.prompt_ids is second.prompt_ids
        assert not hasattr(first, "logprobs")


def test_a_file_that_the_manifest_lacks_is_not_there(opened: Opened) -> None:
    with opened() as kept:
        kept.add([row("a", 0)])
        (kept.folder / "samples" / "shard-000001.parquet").write_bytes(b"half")
        (kept.folder / "samples" / ".tmp-1-shard-000002.parquet").write_bytes(b"half")
    with opened() as kept:
        assert kept.rows == graded(row("a", 0))
        left = {path.name for path in (kept.folder / "samples").iterdir()}
        assert left == {"manifest.json", "shard-000000.parquet", "times"}
        kept.add([row("a", 1)])
    with opened() as kept:
        assert kept.rows == graded(row("a", 0), row("a", 1))


def test_one_evaluation_at_a_time(opened: Opened) -> None:
    said: list[str] = []
    with opened(), pytest.raises(UserError, match="was in use by another evaluation"), opened(said.append):
        pass
    assert len(said) == 1
