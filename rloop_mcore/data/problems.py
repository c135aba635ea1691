"""Problems from JSONL, Parquet, a Hugging Face data set or a generated task, all of one schema.

The schema: {id, problem, answer, source, meta}; only problem and answer are required.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rloop_mcore.config import Config
from rloop_mcore.data.countdown import standard_splits
from rloop_mcore.data.dapo import from_dapo_row, is_dapo_row
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import parse_json
from rloop_mcore.types import Problem

log = logging.getLogger(__name__)

HF_PREFIX = "hf:"
GENERATED = ("countdown", "countdown3")
FILES = (".jsonl", ".parquet")  # how the name of a file of problems ends
BAD_ROWS_SHOWN = 10
COLUMNS = ("id", "problem", "answer", "source", "meta")
DAPO_COLUMNS = ("prompt", "reward_model", "data_source")

Row = tuple[str, Any]  # where it stands ("FILE:LINE"), its content


class BadRow(Exception):
    """What is wrong with one row."""


def problem_sources(config: Config) -> dict[str, tuple[str, int | None]]:
    """What a run reads problems from, by key: the source, and how many of its rows (None: all)."""
    found = {
        "data.train": (config.data.train, config.data.limit),
        "data.validation": (config.data.validation, config.evaluation.limit),
        "sft.demonstrations": (config.sft.demonstrations, config.sft.limit),
    }
    return {key: (source, limit) for key, (source, limit) in found.items() if source is not None}


def load_problems(source: str, limit: int | None = None) -> list[Problem]:
    """Load the first `limit` problems (None: all) of a file, of `hf:NAME[:SPLIT]` or of `countdown:SPLIT`.

    A row without an id gets a hash of its content. A row that repeats an earlier one (its id, problem and answer) is
    left out and counted in a warning. Raises UserError that lists the bad rows with file and line, for an id that
    stands for two problems, and for an empty source.
    """
    problems: list[Problem] = []
    seen: dict[str, tuple[str, Problem]] = {}
    bad: list[str] = []
    repeated = 0
    for where, row in _rows(source):
        if len(problems) == limit:
            break
        try:
            problem = parse_row(row)
            if problem.id in seen:
                first, earlier = seen[problem.id]
                if (problem.problem, problem.answer) != (earlier.problem, earlier.answer):
                    raise BadRow(f"id {problem.id!r} stands already at {first}, for another problem")
                repeated += 1
                continue
        except BadRow as error:
            bad.append(f"{where}: {error}")
            continue
        seen[problem.id] = where, problem
        problems.append(problem)
    if bad:
        more = [f"... and {len(bad) - BAD_ROWS_SHOWN} more"] if len(bad) > BAD_ROWS_SHOWN else []
        raise UserError("\n".join([f"{source} has {len(bad)} bad rows:", *bad[:BAD_ROWS_SHOWN], *more]))
    if repeated:
        log.warning("%s: %d rows repeat an earlier one and are left out; %d are left", source, repeated, len(problems))
    if not problems:
        raise UserError(f"{source} is empty: it must hold at least one problem")
    return problems


def parse_row(row: Any) -> Problem:
    """One row as a Problem; raises BadRow."""
    if isinstance(row, BadRow):
        raise row
    if is_dapo_row(row):
        row = from_dapo_row(row)
    if not isinstance(row, dict):
        raise BadRow(f"must be an object with problem and answer, not {type(row).__name__}")
    meta = row.get("meta")
    if isinstance(meta, str):  # Parquet has no free-form objects: there meta may be a JSON string
        try:
            meta = parse_json(meta)
        except ValueError:
            raise BadRow("meta is a string that is not JSON") from None
    if meta is not None and not isinstance(meta, dict):
        raise BadRow(f"meta must be an object, not {type(meta).__name__}")
    problem = Problem(
        id=_text(row, "id", required=False),
        problem=_text(row, "problem"),
        answer=_text(row, "answer"),
        source=_text(row, "source", required=False),
        meta=meta or {},
    )
    return problem if problem.id else replace(problem, id=content_id(problem))


def content_id(problem: Problem) -> str:
    """A hash of a problem's text and answer: the id of one that came without."""
    content = json.dumps([problem.problem, problem.answer])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def digest_of_problems(problems: Iterable[Problem]) -> str:
    """A hash of all that a run makes of problems; their order plays no part."""
    contents = sorted(json.dumps([each.id, each.problem, each.answer, each.meta], default=str) for each in problems)
    return hashlib.sha256("\n".join(contents).encode()).hexdigest()[:16]


def _text(row: dict[str, Any], column: str, required: bool = True) -> str:
    value = row.get(column)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        if column not in row:
            raise BadRow(f"{column} is missing among {', '.join(row) or 'no columns'}; it must be a string")
        found = "null" if value is None else f"{type(value).__name__} {value!r:.40}"
        raise BadRow(f"{column} is {found}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{column} holds a lone surrogate, which is not a character") from None
    if required and not value.strip():
        raise BadRow(f"{column} is blank")
    return value


def _rows(source: str) -> Iterator[Row]:
    if source.startswith(HF_PREFIX) and source.removeprefix(HF_PREFIX).partition(":")[0]:
        return _hf_rows(source)
    if source.partition(":")[0] in GENERATED:
        return _generated_rows(source)
    path = Path(source)
    if path.suffix not in FILES:
        raise UserError(f"data source {source!r} must be a .jsonl or .parquet file, hf:NAME[:SPLIT] or countdown:SPLIT")
    if not path.is_file():
        raise UserError(f"data file {source} does not exist")
    return _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row: Any
            try:
                row = parse_json(line.decode("utf-8-sig"))  # some editors begin a file with a mark
            except UnicodeDecodeError as error:
                row = BadRow(f"not UTF-8 (byte {error.start} of the line)")
            except ValueError as error:
                row = BadRow(f"not JSON ({error})")
            yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    from rloop_mcore.platform.parquet import open_parquet  # takes a while

    with open_parquet(path) as file:
        columns = [name for name in COLUMNS + DAPO_COLUMNS if name in file.schema_arrow.names]
        _require_columns(str(path), file.schema_arrow.names)
        rows = (row for batch in file.iter_batches(columns=columns) for row in batch.to_pylist())
        yield from ((f"{path}:{number}", row) for number, row in enumerate(rows, start=1))


def _hf_rows(source: str) -> Iterator[Row]:
    name, _, split = source.removeprefix(HF_PREFIX).partition(":")
    dataset = hub_dataset(name, None, split or "train")
    _require_columns(source, dataset.column_names)
    yield from ((f"{source}:{number}", row) for number, row in enumerate(dataset, start=1))


def hub_dataset(name: str, subset: str | None, split: str) -> Any:
    """A data set of Hugging Face's hub, or of a folder like one there. Raises UserError where it cannot be had."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"data set {name!r} needs the datasets package: pip install 'rloop-mcore[hf-datasets]'")
    import datasets

    # Of a folder whose README describes its files the library would give what it has kept of them, changed or not.
    mode = "force_redownload" if Path(name).is_dir() else None
    try:
        return datasets.load_dataset(name, subset, split=split, download_mode=mode)
    except Exception as error:  # datasets raises many kinds for a wrong name, split or network
        raise UserError(f"data set {name!r}, split {split!r}, could not be loaded ({error!s:.200})") from error


def _generated_rows(source: str) -> Iterator[Row]:
    task, _, name = source.partition(":")
    splits = standard_splits(task)
    if name not in splits:
        raise UserError(f"data source {source!r}: {task} has the splits {', '.join(splits)}")
    for problem in splits[name]:
        yield problem.id, asdict(problem)


def _require_columns(source: str, names: list[str]) -> None:
    if twice := [name for name in COLUMNS + DAPO_COLUMNS if names.count(name) > 1]:
        raise UserError(f"{source} has several columns called {twice[0]}: leave one")
    if {"prompt", "reward_model"} <= set(names):
        return
    missing = [column for column in ("problem", "answer") if column not in names]
    if missing:
        raise UserError(f"{source} has no column {' nor '.join(missing)}; it has {', '.join(names)}")
