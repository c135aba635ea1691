"""Two results of `rloop evaluate`, benchmark by benchmark and problem by problem."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.paired import compare_paired
from rloop_mcore.platform.files import parse_json

Record = dict[str, Any]
Asked = tuple[Collection[str], Collection[str]]  # of a benchmark: the ids of its problems, the names of its metrics

# Where these differ, so does what was measured, and not the policies alone.
_CONDITIONS = ("data_digest", "template", "template_digest", "answer_format", "verifier", "engine", "precision", "seed")
_SAMPLING = ("max_tokens", "temperature", "top_p")


def read_result(path: Path) -> dict[str, Record]:
    """The records of a file that `rloop evaluate --json` wrote, by benchmark. Raises UserError for another file."""
    try:
        result = parse_json(path.read_text(encoding="utf-8"))
        records = dict(result["benchmarks"]) if "benchmarks" in result else {result["name"]: result}
        for record in records.values():
            if (
                not record["scores"]
                or not isinstance(record["sampling"], dict)
                or not isinstance(record["policy"], str)
            ):
                raise ValueError("no scores")
            for scores in record["scores"].values():  # now: what takes hours comes before they are compared
                if not all(isinstance(scores[id], int | float) for id in dict(record["counts"])):
                    raise ValueError("scores that are no numbers")
    except OSError as error:
        raise UserError(f"--against {path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(  # not repr(error): of a file that is not UTF-8 that is all of its bytes
            f"--against {path} is not what `rloop evaluate --json` of this version writes ({type(error).__name__}: "
            f"{error})."
        ) from None
    return records


def check_comparable(asked: Mapping[str, Asked], others: Mapping[str, Record]) -> None:
    """Raises UserError where no benchmark is in both, or of one no problem or no metric."""
    if not any(name in others for name in asked):
        raise UserError(f"--against: the other result has {', '.join(others)}, and none of these is evaluated now.")
    for name, (ids, metrics) in asked.items():
        if name not in others:
            continue
        theirs = others[name]
        if not any(id in theirs["counts"] for id in ids):
            raise UserError(f"--against: the two results of {name} have no problem in common.")
        if not any(metric in theirs["scores"] for metric in metrics):
            raise UserError(
                f"--against: the two results of {name} have no metric in common ({', '.join(metrics)} and "
                f"{', '.join(theirs['scores'])}): give --k with the other's."
            )


def compare(records: Sequence[Record], others: Mapping[str, Record], seed: int) -> dict[str, Record]:
    """{benchmark: the other policy, how many problems both have, what differs beside the policies, and by metric
    {"mean", "low", "high", "p_value"} of this policy's score minus the other's}.

    Benchmarks that the other result lacks are left out. Raises UserError as `check_comparable` does.
    """
    check_comparable({record["name"]: (record["counts"], record["scores"]) for record in records}, others)
    return {
        record["name"]: _one(record, others[record["name"]], seed) for record in records if record["name"] in others
    }


def _one(record: Record, other: Record, seed: int) -> Record:
    metrics = {}
    shared = [id for id in record["counts"] if id in other["counts"]]
    for key in [key for key in record["scores"] if key in other["scores"]]:
        mine, theirs = record["scores"][key], other["scores"][key]
        difference = compare_paired([mine[id] for id in shared], [theirs[id] for id in shared], seed)
        metrics[key] = {**asdict(difference.interval), "p_value": difference.p_value}
    differing = {key: [record.get(key), other.get(key)] for key in _CONDITIONS if record.get(key) != other.get(key)}
    sampling, theirs = record["sampling"], other["sampling"]
    differing |= {key: [sampling[key], theirs.get(key)] for key in _SAMPLING if sampling[key] != theirs.get(key)}
    return {
        "policy": record["policy"],
        "other": other["policy"],
        "problems": len(shared),
        "problems_each": [len(record["counts"]), len(other["counts"])],
        "differing": differing,
        "metrics": metrics,
    }
