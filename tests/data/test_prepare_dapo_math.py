"""The paper's problems, made of files in the form in which DAPO's authors publish them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.data.problems import load_problems
from rloop_mcore.data.templates import PromptTemplate

ROOT = Path(__file__).parents[2]


def prompt_of(problem: str) -> str:
    """As data/templates/dapo.jinja has it, without the chat's tokens around."""
    rendered = PromptTemplate("dapo").render(problem)
    return rendered.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")


def publish(path: Path, problems: list[tuple[str, str]]) -> None:
    """Rows for verl, as the hub has them."""
    rows = [
        {
            "data_source": "math_dapo",
            "prompt": [{"content": content, "role": "user"}],
            "ability": "MATH",
            "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
            "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
        }
        for content, answer in problems
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def prepare(folder: Path) -> subprocess.CompletedProcess[str]:
    tool = [sys.executable, str(ROOT / "tools" / "prepare_dapo_math.py"), "dapo.parquet", "aime.parquet"]
    return subprocess.run(tool, cwd=folder, capture_output=True, text=True, check=False, timeout=120)


def test_each_problem_comes_once_bare_and_where_the_configuration_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = [("What is $1+1$?\n\nIn words.", "2"), ("求 $x$。", "34")]
    publish(tmp_path / "dapo.parquet", [(prompt_of(problem), answer) for problem, answer in problems] * 100)
    publish(tmp_path / "aime.parquet", [(prompt_of("Find $n$."), "204")] * 32)
    done = prepare(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    config = load_config(["data=dapo_math_17k", "run.dir=r", "model.path=m"])
    monkeypatch.chdir(tmp_path)
    assert config.data.validation is not None
    found = [(problem.problem, problem.answer) for problem in load_problems(config.data.train)]
    assert found == problems
    assert [(p.problem, p.answer) for p in load_problems(config.data.validation)] == [("Find $n$.", "204")]


@pytest.mark.parametrize("content", ["Find $n$.", None])
def test_another_file_is_refused_and_nothing_written(tmp_path: Path, content: str | None) -> None:
    publish(tmp_path / "aime.parquet", [(prompt_of("Find $n$."), "204")])
    if content is None:
        pyarrow.parquet.write_table(pyarrow.table({"problem": ["p"], "answer": ["a"]}), tmp_path / "dapo.parquet")
    else:
        publish(tmp_path / "dapo.parquet", [(content, "204")])
    done = prepare(tmp_path)
    assert done.returncode == 2
    assert "dapo.parquet" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "data").exists()
