"""A run that ends with the same error at the same place again and again is not started for ever.

`crashes.json` in the run directory is the record: {"place", "error", "config", "times"}. It is about the newest kind of
end only; a run that got further, or has another configuration, or fails otherwise begins another.
"""

from __future__ import annotations

import json
import re
import time
from hashlib import blake2b
from typing import Any

from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory, read_if_sound
from rloop_mcore.platform.files import passing_over_a_full_disk, write_atomic
from rloop_mcore.run_config import flat

ENOUGH = 3
_VARYING = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?")  # pids, ports, seconds
_OF_A_JOB = ("cluster.job_end", "cluster.slurm.")  # keys that a launcher sets anew each time


class CrashRecord:
    def __init__(self, run: RunDirectory, config: Config) -> None:
        self._run, self._path = run, run.path / "crashes.json"
        kept = {key: value for key, value in flat(config).items() if not key.startswith(_OF_A_JOB)}
        self._config = blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()

    def check(self, force: bool) -> None:
        """Before a start. Raises UserError where the run would only end as it did; `force` forgets that."""
        record = self._read()
        if force:
            self._path.unlink(missing_ok=True)
        elif len(record["times"]) >= ENOUGH and self._key(record["error"]) == {**record, "times": []}:
            raise UserError(
                f"{self._run.path} ended {len(record['times'])} times in a row {_in_words(record['place'])}, with "
                f"the same error: {record['error']}; mend it and add --force, or change a key, to try again."
            )

    def note(self, message: str) -> str | None:
        """A run has ended with this error. In words, that it is enough; None while it is worth another start."""
        key, record = self._key(message), self._read()
        same = _alike(record["error"]) == _alike(key["error"]) and all(record[k] == key[k] for k in ("place", "config"))
        times = [*(record["times"] if same else []), round(time.time(), 3)]
        with passing_over_a_full_disk():
            write_atomic(self._path, json.dumps({**key, "times": times}) + "\n")
        if len(times) < ENOUGH:
            return None
        return (
            f"it has ended so {len(times)} times in a row {_in_words(key['place'])}: another start would end the same "
            "way; mend it and add --force, or change a key, to try again"
        )

    def _key(self, message: str) -> dict[str, Any]:
        """What makes two ends the same; an error's first line says what it is, the others where."""
        places = Journal(self._run.journal).places()
        place = [places[-1]["iteration"], places[-1]["phase"], places[-1].get("step", 0)] if places else []
        error = message.strip().partition("\n")[0]
        return {"place": place, "error": error, "config": self._config, "times": []}

    def _read(self) -> dict[str, Any]:
        nothing: dict[str, Any] = {"place": None, "error": "", "config": "", "times": []}
        record = read_if_sound(self._path)
        return record if record is not None and record.keys() == nothing.keys() else nothing


def _alike(error: str) -> str:
    """What comes after a semicolon is where to look."""
    return _VARYING.sub("#", error.partition("; ")[0])


def _in_words(place: list[Any]) -> str:
    return "after iteration {} {}, step {}".format(*place) if place else "before its first commit"
