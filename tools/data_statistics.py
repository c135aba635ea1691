"""Statistics of problem files: repetitions, golds that don't verify against themselves, overlap between files.

python tools/data_statistics.py FILE... prints a Markdown table, and the golds that fail on stderr.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from rloop_mcore.config import RewardConfig
from rloop_mcore.data.overlap import overlapping
from rloop_mcore.data.problems import load_problems
from rloop_mcore.errors import UserError
from rloop_mcore.reward.golds import unverifiable


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    files = parser.parse_args().files
    try:
        sets = {Path(file).stem: load_problems(file) for file in files}
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print("| file | problems | characters, median | repeated texts | golds that fail | in other files |")
    print("|---|---|---|---|---|---|")
    for name, problems in sets.items():
        length = statistics.median(len(problem.problem) for problem in problems)
        repeated = len(problems) - len({problem.problem.strip() for problem in problems})
        bad = unverifiable(problems, RewardConfig())
        shared = {
            other: kinds for other, held in sets.items() if other != name and (kinds := overlapping(problems, held))
        }
        words = ", ".join(
            f"{other} {len(kinds)} ({sum(kind == 'exact' for kind in kinds.values())} exact)"
            for other, kinds in shared.items()
        )
        print(f"| {name} | {len(problems)} | {length:.0f} | {repeated} | {len(bad)} | {words} |", flush=True)
        for problem in problems:
            if problem.id in bad:
                print(f"{name} {problem.id}: {bad[problem.id]}: {problem.answer!r:.120}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
