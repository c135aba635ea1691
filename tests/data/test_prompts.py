import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rloop_mcore.data.prompts import TemplatePrompts, prompt_of
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.types import Problem

WORDS = ["<s>", "</s>", ",", *map(str, range(100))]


def write_tokenizer(folder: Path, eos: object = "</s>", bos: bool = False) -> TextTokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return TextTokenizer(folder)


class SpacedComma(PromptTemplate):
    """The tokenizer of these tests splits at spaces."""

    def render(self, problem: str) -> str:
        return f"{problem} ,"


def make(
    tokenizer: TextTokenizer, count: int = 10, seed: int = 0, limit: int = 64, reverse: bool = False
) -> TemplatePrompts:
    problems = [Problem(id=f"p{n}", problem=" ".join(["7"] * (n + 1)), answer="1") for n in range(count)]
    return TemplatePrompts(
        problems[:: -1 if reverse else 1], tokenizer, SpacedComma("countdown", tokenizer), seed, limit
    )


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return write_tokenizer(tmp_path)


def ids(prompts: TemplatePrompts, position: int, count: int) -> list[str]:
    drawn, after = prompts.draw(position, count)
    assert after == position + count
    return [prompt.problem.id for prompt in drawn]


def test_every_epoch_is_a_new_permutation(tokenizer: TextTokenizer) -> None:
    prompts = make(tokenizer)
    epochs = [ids(prompts, 10 * epoch, 10) for epoch in range(5)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 10 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_a_draw_depends_on_seed_and_position_alone(tokenizer: TextTokenizer) -> None:
    prompts = make(tokenizer)
    whole = ids(prompts, 0, 35)
    fresh = make(tokenizer)
    assert ids(fresh, 23, 9) == whole[23:32]  # across an epoch's end, nothing drawn before
    assert [one for start in range(0, 35, 5) for one in ids(fresh, start, 5)] == whole
    assert ids(prompts, 7, 3) == whole[7:10]  # going back
    assert ids(prompts, 7, 0) == []
    assert ids(make(tokenizer, seed=1), 0, 35) != whole
    assert ids(make(tokenizer, reverse=True), 0, 35) == whole  # nor on the order of the file


def test_first_places_are_spread_over_the_problems(tokenizer: TextTokenizer) -> None:
    firsts = Counter(ids(make(tokenizer, count=4, seed=seed), 0, 1)[0] for seed in range(400))
    assert len(firsts) == 4
    assert min(firsts.values()) > 60  # 100 expected, standard deviation 8.7


def test_long_prompts_are_counted_and_left_out(tokenizer: TextTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert make(tokenizer).too_long == 0
        assert caplog.text == ""
        prompts = make(tokenizer, limit=5)  # problem n has n + 1 numbers and a comma
    assert [prompt.problem.id for prompt in prompts.prompts] == ["p0", "p1", "p2", "p3"]
    assert prompts.too_long == 6
    assert "6 of 10 prompts are longer than data.max_prompt_tokens=5" in caplog.text
    with pytest.raises(UserError, match=r"all 10 prompts .* data\.max_prompt_tokens=1; the shortest has 2"):
        make(tokenizer, limit=1)


def test_prompt_example_and_decode(tokenizer: TextTokenizer) -> None:
    prompts = make(tokenizer)
    problem = Problem("x", "3 4", "7", meta={"solution": "12 , 7"})
    word = {text: n for n, text in enumerate(WORDS)}
    assert prompt_of(problem, prompts.tokenizer, prompts.template).ids == (word["3"], word["4"], word[","])
    example = prompts.example(problem)
    assert example.prompt_ids == prompt_of(problem, prompts.tokenizer, prompts.template).ids
    assert example.response_ids == (word["12"], word[","], word["7"], word["</s>"])
    assert prompts.decode(example.response_ids) == "12 , 7"
    for meta in ({}, {"solution": " \n"}, {"solution": 7}):
        with pytest.raises(UserError, match=r"problem y has no text in meta\.solution"):
            prompts.example(Problem("y", "3 4", "7", meta=meta))


def test_bos_is_what_the_tokenizer_itself_adds(tmp_path: Path) -> None:
    prompts = make(write_tokenizer(tmp_path, bos=True))
    problem = Problem("x", "3", "3", meta={"solution": "3"})
    assert prompt_of(problem, prompts.tokenizer, prompts.template).ids == (0, WORDS.index("3"), WORDS.index(","))
    assert prompts.example(problem).response_ids == (WORDS.index("3"), 1)  # none inside


@pytest.mark.parametrize("asked", ["truncation", "padding"])
def test_what_an_earlier_call_asked_of_a_saved_tokenizer_is_not_asked_again(tmp_path: Path, asked: str) -> None:
    write_tokenizer(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    saved = Tokenizer.from_file(file)
    if asked == "truncation":
        saved.enable_truncation(2)
    else:
        saved.enable_padding(length=9)
    saved.save(file)
    assert TextTokenizer(tmp_path).encode("7 7 7 ,") == (10, 10, 10, 2)


def test_eos_may_be_described_by_an_object(tmp_path: Path) -> None:
    assert write_tokenizer(tmp_path, eos={"content": "</s>", "lstrip": False}).eos_id == 1


def test_a_folder_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"  # as UTF-8 is in another locale
    folder.mkdir()
    assert write_tokenizer(tmp_path).encode("7") == (10,)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(folder / name)
    assert TextTokenizer(folder).encode("7") == (10,)


def test_bad_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        TextTokenizer(tmp_path)
    for eos in (None, "<nothing>", 5, ["</s>"], {}, {"content": 5}):
        with pytest.raises(UserError, match="eos_token is"):
            write_tokenizer(tmp_path, eos=eos)
    write_tokenizer(tmp_path)
    for content in (b"", b"[]", b"\xff", b"[" * 100_000):
        (tmp_path / "tokenizer_config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"tokenizer_config\.json is no JSON object"):
            TextTokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot encode 'what"):
        write_tokenizer(tmp_path).encode("what ?")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        TextTokenizer(tmp_path)
