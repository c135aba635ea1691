"""Keep the problems of a data file that a policy solves sometimes: a filter by base success.

RESULT is what `rloop evaluate --json RESULT` wrote about DATA; a problem stays whose success rate is in [LOW, HIGH].
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rloop_mcore.data.problems import load_problems
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import write_atomic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the problems that were evaluated")
    parser.add_argument("result", type=Path, metavar="RESULT", help="JSON of rloop evaluate")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--low", type=float, default=0.01)
    parser.add_argument("--high", type=float, default=0.5)
    parser.add_argument("--limit", type=int, help="the first N that qualify")
    arguments = parser.parse_args()
    try:
        counts = json.loads(arguments.result.read_text(encoding="utf-8"))["counts"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{arguments.result} is not a result of rloop evaluate ({error!r}).") from None
    measured = [problem for problem in load_problems(arguments.data) if problem.id in counts]
    kept = [p for p in measured if arguments.low <= counts[p.id][0] / counts[p.id][1] <= arguments.high]
    kept = kept[: arguments.limit]
    if not kept:
        raise UserError(f"none of the {len(measured)} measured problems lies in [{arguments.low}, {arguments.high}].")
    write_atomic(arguments.out, "".join(json.dumps(asdict(problem)) + "\n" for problem in kept))
    print(f"{len(kept)} of {len(measured)} measured problems kept in {arguments.out}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"select_problems: {error}", file=sys.stderr)
        sys.exit(2)
