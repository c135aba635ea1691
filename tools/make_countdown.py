"""Write the countdown task (rloop_mcore/data/countdown.py) and a tiny random-initialised model for it.

OUT_DIR gets train.jsonl, validation.jsonl, test.jsonl, hard.jsonl, demonstrations.jsonl (solutions in meta.solution,
for the base model's SFT) and model/, a Hugging Face Qwen2 folder. The same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rloop_mcore.data.countdown import generate
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.types import Problem


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    write_atomic(path, "".join(json.dumps(asdict(problem)) + "\n" for problem in problems))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=200, help="a smaller split is a prefix of a larger one")
    parser.add_argument("--validation", type=int, default=200)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--hard", type=int, default=200, help="problems with few distinct solutions")
    parser.add_argument("--demonstrations", type=int, default=20_000)
    arguments = parser.parse_args()
    sizes = {name: value for name, value in vars(arguments).items() if name not in ("out", "seed")}
    for name, size in sizes.items():
        if size < 0:
            raise UserError(f"--{name} is {size}; it must be 0 or more")
    try:
        splits = generate(arguments.seed, **sizes)
    except ValueError as error:
        raise UserError(str(error)) from None
    for field in fields(splits):
        problems = getattr(splits, field.name)
        write_problems(arguments.out / f"{field.name}.jsonl", problems)
        print(f"wrote {arguments.out}/{field.name}.jsonl: {len(problems)} problems")
    parameters = write_model(arguments.out / "model", arguments.seed)
    print(f"wrote {arguments.out}/model: qwen2, {parameters:,} parameters")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"make_countdown: {error}", file=sys.stderr)
        sys.exit(2)
