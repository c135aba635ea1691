"""The samples of a policy on a benchmark, kept on disk: an evaluation goes on where it stood, and grows.

A folder holds what was sampled under one set of conditions (`set.json`), named by their digest:

    DIR/aime24-0123456789ab/set.json, samples/ (a trajectory cache), result.json
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rloop_mcore.config import Config
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.evaluate import conditions_of
from rloop_mcore.evaluation.sampling import Graded
from rloop_mcore.platform.files import try_lock, write_atomic
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.quarantine import quarantine
from rloop_mcore.types import Problem, Sampling, Trajectory

_POLL_S = 0.5


@dataclass(frozen=True)
class Conditions:
    """What a sample and its verdict depend on. How many there are, and of which of the problems, is not in it."""

    policy_digest: str
    data: str
    data_digest: str
    template: str
    template_digest: str
    answer_format: str
    verifier: str
    sampling: Sampling
    seed: int
    engine: str
    precision: str

    @classmethod
    def of(
        cls, config: Config, policy_digest: str, data: str, problems: Sequence[Problem], template: PromptTemplate
    ) -> Conditions:
        """Of a configuration; `problems` are all of the data, before evaluation.limit."""
        evaluation = config.evaluation
        contents = [[problem.id, problem.problem, problem.answer] for problem in problems]
        return cls(
            policy_digest=policy_digest,
            data=data,
            data_digest=_digest(contents),
            template_digest=_digest(template.text),
            sampling=Sampling(config.rollout.max_tokens, evaluation.temperature, evaluation.top_p, template.stop),
            seed=config.run.seed,
            engine=config.rollout.engine,
            precision=config.precision,
            **conditions_of(config),
        )

    @property
    def digest(self) -> str:
        """Not of what the data is called: of what it holds."""
        return _digest({key: value for key, value in asdict(self).items() if key not in ("data", "template")})


class KeptSamples:
    """The samples in `folder`. One process at a time: see `open_samples`.

    `rows` are those that were there before, by problem and number. `lost` are the files that were damaged and set
    aside: their samples are missing, and can be drawn again. Raises UserError where the manifest is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lost: list[str] = []
        try:
            self._cache, self.rows = _open(folder / "samples")
        except UserError:
            self.lost = [shard.name for shard in quarantine(folder / "samples")]
            self._cache, self.rows = _open(folder / "samples")

    def add(self, rows: Sequence[Trajectory]) -> None:
        """Make more of them durable."""
        self._cache.append(rows)
        self._cache.seal()


@contextmanager
def open_samples(
    directory: Path, name: str, conditions: Conditions, tell: Callable[[str], None], patience_s: float = 3600.0
) -> Iterator[KeptSamples]:
    """The samples of a benchmark `name` under these conditions, and no others; held until the end of the block.

    Where another process has them, `tell` is told and its end is awaited: it leaves what this one wants. Raises
    UserError where that takes longer than `patience_s`, or where the folder cannot be made.
    """
    folder = directory / f"{name}-{conditions.digest[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"--out {directory}: {folder} cannot be made ({error.strerror}); give another.") from error
    try:
        _wait_for(lock, folder, tell, patience_s)
        write_atomic(folder / "set.json", json.dumps(asdict(conditions), indent=1) + "\n")
        yield KeptSamples(folder)
    finally:
        os.close(lock)


def _wait_for(lock: int, folder: Path, tell: Callable[[str], None], patience_s: float) -> None:
    if try_lock(lock):
        return
    tell(f"{folder} is in use by another evaluation: waiting for it")
    deadline = time.monotonic() + patience_s
    while not try_lock(lock):
        if time.monotonic() > deadline:
            raise UserError(f"{folder} was in use by another evaluation for {patience_s:.0f} s: give another --out.")
        time.sleep(_POLL_S)


def _open(samples: Path) -> tuple[TrajectoryCache, list[Graded]]:
    cache = TrajectoryCache(samples)
    cache.keep_only(cache.seal())  # what a killed evaluation left unfinished goes
    rows, prompts = [], dict[tuple[int, ...], tuple[int, ...]]()
    for row in map(Graded.of, cache.rows()):
        rows.append(replace(row, prompt_ids=prompts.setdefault(row.prompt_ids, row.prompt_ids)))  # a problem's once
    return cache, sorted(rows, key=lambda row: (row.problem_id, row.sample))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
