"""Golds that don't verify against themselves."""

import json
from pathlib import Path

import pytest

from rloop_mcore.config import RewardConfig
from rloop_mcore.reward import golds as golds_module
from rloop_mcore.reward.golds import unverifiable
from rloop_mcore.types import Problem


def test_golds_that_only_their_own_spelling_matches() -> None:
    golds = {"good": r"\frac{1}{2}", "words": r"\text{Evelyn}", "cut": r"\frac{5055}{2^{15}", "group": r"\mathbb{Z}_8"}
    golds |= {"sentence": r"The number of such colourings is \(\boxed{6}\)."}
    problems = [Problem(name, "", gold) for name, gold in golds.items()]
    config = RewardConfig(workers=1)
    assert unverifiable(problems, config) == {"cut": "unparsable", "group": "unparsable"}
    assert unverifiable(problems, RewardConfig(verifier="countdown")) == {}
    assert unverifiable([], config) == {}


PROBLEMS = [Problem("good", "", "5"), Problem("bad", "", r"\mathbb{Z}_8")]


class NothingToGrade:
    """In place of the pool: says so when it is asked to grade."""

    def __init__(self, config: RewardConfig) -> None:
        raise RuntimeError("graded again")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a start before; from now on nothing can be graded."""
    kept = tmp_path / "golds.json"
    assert unverifiable(PROBLEMS, RewardConfig(workers=1), kept) == {"bad": "unparsable"}
    monkeypatch.setattr(golds_module, "RewardPool", NothingToGrade)
    return kept


def test_what_was_found_is_kept_with_the_run(kept: Path) -> None:
    assert unverifiable(PROBLEMS, RewardConfig(workers=3, correct=2.0), kept) == {"bad": "unparsable"}
    for problems in (PROBLEMS[:1], PROBLEMS[::-1], [*PROBLEMS, Problem("new", "", "7")], [Problem("good", "", "6")]):
        with pytest.raises(RuntimeError):
            unverifiable(problems, RewardConfig(), kept)
    for config in (RewardConfig(deadline_s=1.0), RewardConfig(memory_mib=1024)):
        with pytest.raises(RuntimeError):
            unverifiable(PROBLEMS, config, kept)


def test_another_version_of_a_verifier_grades_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golds_module, "version", lambda name: "99.0" if name == "sympy" else "1.0")
    with pytest.raises(RuntimeError):
        unverifiable(PROBLEMS, RewardConfig(), kept)


def test_a_damaged_file_grades_again(kept: Path) -> None:
    whole = kept.read_bytes()
    other = json.dumps(json.loads(whole) | {"unverifiable": {"good": "unparsable"}}).encode()
    for damaged in (
        b"",
        whole[: len(whole) // 2],
        b"[]",
        b"3",
        b"[" * 10**5,
        b'{"unverifiable": 3}',
        b"\xff\xfe",
        other,
    ):
        kept.write_bytes(damaged)
        with pytest.raises(RuntimeError):
            unverifiable(PROBLEMS, RewardConfig(), kept)
    kept.write_bytes(whole)
    assert unverifiable(PROBLEMS, RewardConfig(), kept) == {"bad": "unparsable"}
