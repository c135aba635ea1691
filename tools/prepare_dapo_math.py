"""Make the paper's problems (configs/data/dapo_math_17k.yaml) of the Parquet files that DAPO's authors publish.

DAPO is BytedTsinghua-SIA/DAPO-Math-17k's data/dapo-math-17k.parquet, AIME is BytedTsinghua-SIA/AIME-2024's
data/aime-2024.parquet: rows for verl, every problem many times over, in a prompt that asks for "Answer:". OUT_DIR
(data) gets dapo_math_17k.jsonl and aime_2024.jsonl: each problem once, as its first row has it, without that prompt.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.compute
import pyarrow.parquet

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import write_atomic

BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
ROWS_AT_ONCE = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dapo", type=Path, metavar="DAPO.parquet")
    parser.add_argument("aime", type=Path, metavar="AIME.parquet")
    parser.add_argument("--out", type=Path, default=Path("data"), metavar="OUT_DIR")
    arguments = parser.parse_args()
    sources = {"dapo_math_17k": arguments.dapo, "aime_2024": arguments.aime}
    answers = {name: distinct_problems(file) for name, file in sources.items()}
    for name, of_problem in answers.items():
        rows = [
            {"id": f"{name}_{number}", "problem": problem, "answer": answer, "source": name}
            for number, (problem, answer) in enumerate(of_problem.items())
        ]
        path = arguments.out / f"{name}.jsonl"
        write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"wrote {path}: {len(rows)} problems")


def distinct_problems(path: Path) -> dict[str, str]:
    """The answer of every problem of a file for verl, in the order of their first rows. Raises UserError."""
    answers: dict[str, str] = {}  # by the whole prompt: rows repeat byte for byte
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=["prompt", "reward_model"]):
                contents = pyarrow.compute.list_element(batch["prompt"], 0).field("content").to_pylist()
                golds = batch["reward_model"].field("ground_truth").to_pylist()
                for content, gold in zip(contents, golds, strict=True):
                    if content not in answers:
                        answers[content] = gold
    except (OSError, pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path} is no Parquet file with verl's columns prompt and reward_model ({error}).") from None
    problems: dict[str, str] = {}
    for content, gold in answers.items():
        problems.setdefault(_problem(content, path), gold)
    return problems


def _problem(content: str, path: Path) -> str:
    if not (content.startswith(BEFORE) and content.endswith(AFTER)):
        raise UserError(f"{path} has a prompt that is not DAPO's: {content[:80]!r}.")
    return content.removeprefix(BEFORE).removesuffix(AFTER).strip()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"prepare_dapo_math: {error}", file=sys.stderr)
        sys.exit(2)
