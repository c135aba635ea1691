"""The benchmarks that have a name: where their problems are, on Hugging Face's hub or in a folder of files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rloop_mcore.data.problems import BadRow, hub_dataset, load_problems, parse_row
from rloop_mcore.errors import UserError
from rloop_mcore.types import Problem

FORMS = {
    "integer": re.compile(r"[0-9]{1,3}"),  # 0 to 999
    "number": re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?"),
    "latex": re.compile(r".+", re.DOTALL),
}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`file` in a folder of the project's schema, or `dataset` on the hub, with its `subset` and `split`.

    `answers` is the form of its gold answers, a key of FORMS.
    """

    file: str
    dataset: str
    split: str
    answers: str
    subset: str | None = None


BENCHMARKS = {
    "aime24": Benchmark("aime24.jsonl", "HuggingFaceH4/aime_2024", "train", "integer"),
    "aime25": Benchmark("aime25.jsonl", "math-ai/aime25", "test", "integer"),
    "amc23": Benchmark("amc23.jsonl", "math-ai/amc23", "test", "number"),
    "math500": Benchmark("math500.jsonl", "HuggingFaceH4/MATH-500", "test", "latex"),
    "minerva_math": Benchmark("minerva_math.jsonl", "math-ai/minervamath", "test", "latex"),
    "omni_math": Benchmark("omni_math_rule.jsonl", "KbsdJames/Omni-MATH", "test", "latex"),
    "olympiadbench": Benchmark("olympiadbench.jsonl", "Hothan/OlympiadBench", "train", "latex", "OE_TO_maths_en_COMP"),
    "gsm8k": Benchmark("gsm8k_test.jsonl", "openai/gsm8k", "test", "number", "main"),
}

# What data sets call the columns of the project's schema, and of `meta`.
_PROBLEM, _ANSWER = ("problem", "question"), ("answer", "final_answer")
_META = {"level": ("level", "difficulty"), "subject": ("subject", "subfield", "domain")}
_ID = ("unique_id", "id")


def check_name(name: str) -> None:
    """Raises UserError where no benchmark is called so."""
    if name not in BENCHMARKS:
        raise UserError(f"--benchmarks: {name!r} is none of {', '.join(BENCHMARKS)}; give other problems with --data.")


def load_benchmark(name: str, folder: Path | None = None) -> list[Problem]:
    """The problems of a benchmark by its name, from its file in `folder`, else from the hub.

    Rows of the hub without a gold answer (Omni-MATH has some) are left out. Raises UserError for a name that is none,
    and for what cannot be had or read.
    """
    check_name(name)
    benchmark = BENCHMARKS[name]
    problems = _from_hub(name, benchmark) if folder is None else load_problems(str(folder / benchmark.file))
    for problem in problems:
        if not FORMS[benchmark.answers].fullmatch(problem.answer):
            raise UserError(
                f"benchmark {name}, problem {problem.id}: the gold answer {problem.answer!r:.80} is no "
                f"{benchmark.answers}, as this benchmark's are; give another file with --benchmark-files."
            )
    return problems


def _from_hub(name: str, benchmark: Benchmark) -> list[Problem]:
    where = f"{benchmark.dataset}, split {benchmark.split}"
    try:
        rows = enumerate(hub_dataset(benchmark.dataset, benchmark.subset, benchmark.split))
        problems = [_problem(name, number, row) for number, row in rows if _first(row, _ANSWER) not in ("", [])]
        if len(ids := Counter(problem.id for problem in problems)) < len(problems):
            raise UserError(f"several problems have the id {ids.most_common(1)[0][0]!r}")
        return problems
    except (BadRow, UserError) as error:
        raise UserError(f"benchmark {name} ({where}): {error}; give it as a file with --benchmark-files.") from None


def _problem(name: str, number: int, row: Mapping[str, Any]) -> Problem:
    """A row of the hub in the project's schema. Raises BadRow."""
    found = _first(row, _ID)
    meta = {key: _first(row, columns) for key, columns in _META.items()}
    return parse_row(
        {
            "id": f"{name}/{number if found is None else found}",
            "problem": _first(row, _PROBLEM),
            "answer": _gold(_first(row, _ANSWER)),
            "source": name,
            "meta": {key: value for key, value in meta.items() if value is not None},
        }
    )


def _gold(value: Any) -> Any:
    """The gold answer as text: of a list all of it; of GSM8K's solutions what follows the hashes."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    return value.rpartition("#### ")[2].strip() if isinstance(value, str) else value


def _first(row: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    return next((row[column] for column in columns if row.get(column) is not None), None)
