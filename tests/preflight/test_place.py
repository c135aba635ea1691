"""Which node this is: lists of names as Slurm writes them, and its variables."""

from __future__ import annotations

import pytest

from rloop_mcore.errors import UserError
from rloop_mcore.preflight.place import Place, expand, place_of


@pytest.mark.parametrize(
    ("text", "names"),
    [  # as `scontrol show hostnames` prints them
        ("n1", "n1"),
        ("n1,n2", "n1 n2"),
        ("n[1-3]", "n1 n2 n3"),
        ("n[08-10,7],m1", "n08 n09 n10 n7 m1"),
        ("a[1-2]b[3-4]", "a1b3 a1b4 a2b3 a2b4"),
        ("gpu-a[001,003]-ib", "gpu-a001-ib gpu-a003-ib"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
    ],
)
def test_lists_of_names(text: str, names: str) -> None:
    assert expand(text) == names.split()


@pytest.mark.parametrize("text", ["n[1-", "n[3-1]", "n[a-b]", "n1,,n2", "n]1["])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(UserError, match="--names"):
        expand(text)


def test_slurms_variables() -> None:
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[1-4]", "SLURM_NODEID": "0"}
    step = job | {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NODELIST": "n[2-4]", "SLURM_NODEID": "2"}
    assert place_of(None, None, None, None, step) == Place(3, 2, "n2", 30845, ("n2", "n3", "n4"))
    assert place_of(2, 1, "10.0.0.1:99", "a,b", step) == Place(2, 1, "10.0.0.1", 99, ("a", "b"))
    assert place_of(2, 1, "10.0.0.1:99", None, step) == Place(2, 1, "10.0.0.1", 99, ())
    with pytest.raises(UserError, match="the job has 4 nodes: write `srun --ntasks-per-node=1 rloop preflight"):
        place_of(None, None, None, None, job)  # as in its batch script
    assert place_of(1, 0, None, None, job).nodes == 1
    assert place_of(None, None, None, None, {}) == Place(1, 0, "127.0.0.1", 0, ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((0, 0, None, None), "--nodes 0 must be at least 1"),
        ((2, 0, None, None), "needs --master"),
        ((2, 2, "h:1", None), "--node-rank 2 must be from 0 to 1"),
        ((2, 0, "h", None), "write HOST:PORT"),
        ((2, 0, "h:1", "a,b,c"), "are 3 names"),
        ((2, 0, "h:1", "a,a"), "names a node twice"),
    ],
)
def test_a_bad_option_is_one_sentence(options: tuple[int, int, str | None, str | None], words: str) -> None:
    with pytest.raises(UserError, match=words):
        place_of(*options, {})
