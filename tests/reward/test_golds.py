"""Golds that don't verify against themselves."""

from rloop_mcore.config import RewardConfig
from rloop_mcore.reward.golds import unverifiable
from rloop_mcore.types import Problem


def test_golds_that_only_their_own_spelling_matches() -> None:
    golds = {"good": r"\frac{1}{2}", "words": r"\text{Evelyn}", "cut": r"\frac{5055}{2^{15}", "group": r"\mathbb{Z}_8"}
    problems = [Problem(name, "", gold) for name, gold in golds.items()]
    config = RewardConfig(workers=1)
    assert unverifiable(problems, config) == {"cut": "unparsable", "group": "unparsable"}
    assert unverifiable(problems, RewardConfig(verifier="countdown")) == {}
    assert unverifiable([], config) == {}
