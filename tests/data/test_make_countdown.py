"""The countdown folder as the command writes it, opened as its users will open it."""

import hashlib
import json
import runpy
import sys
from pathlib import Path

import pytest

from rloop_mcore.data.problems import load_problems
from rloop_mcore.data.prompts import TemplatePrompts
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.types import Problem

TOOL = Path(__file__).parents[2] / "tools" / "make_countdown.py"
SIZES = {"train": 20, "validation": 10, "test": 10, "hard": 10, "demonstrations": 30}
# Regenerate after a wanted change: the digest that the failing test prints.
GOLDEN_DIGEST = "d86c07b2c9b6106bf38a103444ce79533104b703a974466b5f4b79f4bfd5d622"


def make(folder: Path, *arguments: str) -> None:
    """Run the command in this process."""
    sizes = [f"--{name}={size}" for name, size in SIZES.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["make_countdown.py", str(folder), *sizes, *arguments])
        runpy.run_path(str(TOOL), run_name="__main__")


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of all files below a folder."""
    result = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        result.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return result.hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("countdown")
    make(folder)
    return folder


def test_same_bytes_everywhere(folder: Path) -> None:
    assert digest(folder) == GOLDEN_DIGEST


def test_another_seed_gives_other_problems_and_weights(folder: Path, tmp_path: Path) -> None:
    make(tmp_path, "--seed=1")
    for name in ("train.jsonl", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() != (folder / name).read_bytes()


def test_files_load_with_their_sizes(folder: Path) -> None:
    assert {name: len(load_problems(str(folder / f"{name}.jsonl"))) for name in SIZES} == SIZES


def test_prompts_and_solutions_survive_the_tokenizer(folder: Path) -> None:
    tokenizer = TextTokenizer(folder / "model")
    problems = load_problems(str(folder / "demonstrations.jsonl"))
    prompts = TemplatePrompts(problems, tokenizer, PromptTemplate("countdown", tokenizer), seed=0, max_prompt_tokens=10)
    assert prompts.too_long == 0
    for problem in problems:
        example = prompts.example(problem)
        assert prompts.decode(example.prompt_ids) == f"{problem.problem},"
        assert prompts.decode(example.response_ids) == problem.meta["solution"]
        assert len(example.response_ids) == 18  # 3 steps of 5 tokens, 2 commas, the end token
        assert example.response_ids[-1] == tokenizer.eos_id


def test_a_text_without_any_known_token_is_refused(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "bare.jinja"
    template.write_text("{{ problem }}")
    tokenizer, words = TextTokenizer(folder / "model"), Problem("x", "only words", "1")
    with pytest.raises(UserError, match="makes no token of problem x: 'only words'"):
        TemplatePrompts([words], tokenizer, PromptTemplate(str(template), tokenizer), seed=0, max_prompt_tokens=10)


def test_transformers_opens_the_model_folder(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = TextTokenizer(folder / "model")
    theirs = AutoTokenizer.from_pretrained(folder / "model")
    text = "3,4,5,8=19,3*5=15,15+8=23,23-4=19"
    assert tuple(theirs(text)["input_ids"]) == ours.encode(text)
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == json.loads((folder / "model" / "config.json").read_text())["vocab_size"] == 48

    model, report = AutoModelForCausalLM.from_pretrained(folder / "model", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == 231_264
    assert model.generation_config.eos_token_id == ours.eos_id
    with torch.no_grad():
        logprobs = model(torch.tensor([ours.encode(text)])).logits.log_softmax(-1)
    assert (-logprobs.mean() - torch.log(torch.tensor(48.0))).abs() < 0.05  # random weights: about uniform


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--train=-1", "--train is -1; it must be 0 or more"), ("--hard=99999", "too few for these")],
)
def test_impossible_sizes_exit_2_with_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        make(tmp_path, argument)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
