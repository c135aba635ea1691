"""The responses of an evaluated checkpoint, from the Parquet file that the evaluation left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from rloop_mcore.errors import UserError
from rloop_mcore.platform.parquet import open_parquet

_COLUMNS = ["problem_id", "response_ids", "correct"]
_NO_TOKENS = np.empty(0, np.int32)  # an empty slice of some would keep them all in memory


@dataclass(frozen=True)
class Answers:
    """Graded responses, in columns.

    `problems` are the ids of the problems, sorted; `problem` [rows] are indices into them; `correct` [rows] the
    verdicts; response r is `tokens[starts[r]:starts[r + 1]]`, `starts` being [rows + 1].
    """

    problems: list[str]
    problem: np.ndarray
    correct: np.ndarray
    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.correct)

    def response(self, row: int | np.integer) -> np.ndarray:
        """The token ids of a row [response]."""
        return self.tokens[self.starts[row] : self.starts[row + 1]]

    def rows_of(self, problem_id: str) -> np.ndarray:
        """The rows that answer a problem; none if it was not asked."""
        return self._rows.get(problem_id, np.empty(0, np.int64))

    @cached_property
    def _rows(self) -> dict[str, np.ndarray]:
        """Of all problems in one go: looking for each one's among all rows takes minutes for 10,000 problems."""
        ends = np.cumsum(np.bincount(self.problem, minlength=len(self.problems)))
        return dict(zip(self.problems, np.split(np.argsort(self.problem, kind="stable"), ends)[:-1], strict=True))

    def only(self, problem_ids: Sequence[str]) -> Answers:
        """The rows that answer these problems."""
        wanted = [self.problems.index(name) for name in sorted(problem_ids)]
        rows = np.flatnonzero(np.isin(self.problem, wanted))
        lengths = np.diff(self.starts)[rows]
        pieces = [self.response(row) for row in rows]
        return Answers(
            problems=[self.problems[index] for index in wanted],
            problem=np.searchsorted(wanted, self.problem[rows]),
            correct=self.correct[rows],
            tokens=np.concatenate(pieces) if pieces else _NO_TOKENS,
            starts=np.concatenate([[0], np.cumsum(lengths)]),
        )

    def without_tokens(self) -> Answers:
        """The verdicts alone: every response is empty."""
        return Answers(self.problems, self.problem, self.correct, _NO_TOKENS, np.zeros_like(self.starts))


def make_answers(rows: Sequence[tuple[str, Sequence[int], bool]]) -> Answers:
    """Answers of (problem_id, response_ids, correct)."""
    columns = list(zip(*rows, strict=True)) or [(), (), ()]
    types = [pa.string(), pa.list_(pa.int32()), pa.bool_()]
    return from_table(pa.table([pa.array(c, t) for c, t in zip(columns, types, strict=True)], names=_COLUMNS))


def from_table(table: pa.Table) -> Answers:
    """Answers of a table with at least the columns problem_id, response_ids and correct."""
    table = table.combine_chunks()
    ids = table["problem_id"].to_pylist()
    problems = sorted(set(ids))
    places = {name: place for place, name in enumerate(problems)}
    lists = table["response_ids"].combine_chunks()
    return Answers(
        problems=problems,
        problem=np.array([places[id] for id in ids], np.int64),
        correct=table["correct"].to_numpy(),
        tokens=lists.flatten().to_numpy(),
        starts=np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy())]).astype(np.int64),
    )


def read_answers(path: Path) -> Answers:
    """The responses in an evaluation's Parquet file. Raises UserError for a damaged one."""
    with open_parquet(path) as file:
        if missing := set(_COLUMNS).difference(file.schema_arrow.names):
            raise UserError(f"{path} is no evaluation's: it has no column {', '.join(sorted(missing))}.")
        table = file.read(columns=_COLUMNS)
    return from_table(table)
