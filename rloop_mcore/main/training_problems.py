"""The problems a run trains on: those of `data.train` without what teaches nothing, or teaches the evaluation set."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rloop_mcore.config import Config
from rloop_mcore.data.overlap import contradicting, overlapping
from rloop_mcore.data.problems import load_problems
from rloop_mcore.data.templates import asks_for
from rloop_mcore.errors import UserError
from rloop_mcore.reward.golds import unverifiable
from rloop_mcore.types import Problem

log = logging.getLogger(__name__)

_SHOWN = 10
_BY_FORMAT = ("math", "exact", "choice")  # verifiers that heed reward.answer_format


def training_problems(config: Config, validation: Sequence[Problem], golds: Path) -> list[Problem]:
    """Load them; report overlap with `validation`, left out with `data.remove_overlap`, bad golds, left out, and
    problems that stand there with two answers, which stay.

    Bad golds of `validation` are reported too, and stay. Raises UserError if no problem is left to train on. The same
    problems at every start of a run: a gold that is merely slow stays. golds: the file that keeps which are bad.
    """
    report_bad_golds("data.validation", validation, config, golds.with_name(f"validation_{golds.name}"))
    problems = load_problems(config.data.train, config.data.limit)
    if shared := overlapping(problems, validation):
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(shared.values()).items()))
        done = "are left out" if config.data.remove_overlap else "stay (data.remove_overlap=true leaves them out)"
        _warn(
            f"{len(shared)} of {len(problems)} training problems are in data.validation too ({kinds}) and {done}",
            shared,
        )
        if config.data.remove_overlap:
            problems = [problem for problem in problems if problem.id not in shared]
    found = unverifiable(problems, config.reward, golds)
    bad = {name: reason for name, reason in found.items() if reason != "timeout"}
    if bad:
        _warn(f"{len(bad)} of {len(problems)} gold answers don't verify against themselves and are left out", bad)
    problems = [problem for problem in problems if problem.id not in bad]
    if twice := contradicting(problems):
        _warn(
            f"{len(twice)} of {len(problems)} training problems have the text of an earlier one and another answer: of "
            "each such pair one teaches what is wrong, unless the two answers mean the same; they stay",
            twice,
        )
    if not problems:
        raise UserError(f"no problem of data.train={config.data.train} is left to train on (see the warnings above)")
    return problems


def template_warnings(config: Config) -> list[str]:
    """Where the prompts ask for the answer in another form than it is looked for in: hardly any would be right.

    Raises UserError for a template that is not there.
    """
    template, given = config.data.template, config.reward.answer_format
    asked = asks_for(template)
    if config.reward.verifier not in _BY_FORMAT or asked in (None, given):
        return []
    return [f"data.template={template} asks for reward.answer_format={asked}; answers are looked for as {given}."]


def report_bad_golds(name: str, problems: Sequence[Problem], config: Config, golds: Path) -> int:
    """How many golds of a benchmark don't verify against themselves, which is said; the file `golds` keeps which.

    None is left out: results of a benchmark are over all of it, in every run and for every reader.
    """
    bad = unverifiable(problems, config.reward, golds)
    if bad:
        _warn(
            f"{len(bad)} of {len(problems)} gold answers of {name} don't verify against themselves: an "
            "answer counts as right only where it is spelled like them; they stay, so that Avg@N is over all problems",
            bad,
        )
    return len(bad)


def _warn(message: str, why: dict[str, str]) -> None:
    names = ", ".join(f"{name} ({reason})" for name, reason in list(why.items())[:_SHOWN])
    log.warning("%s: %s%s", message, names, ", ..." if len(why) > _SHOWN else "")
