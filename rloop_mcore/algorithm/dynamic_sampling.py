"""DAPO's dynamic sampling: only groups that can teach something enter the update."""

from __future__ import annotations

from collections.abc import Sequence

from rloop_mcore.types import Group


def is_informative(correct: Sequence[bool]) -> bool:
    """Whether some, but not all, responses of a group [group] are correct (DAPO, arXiv 2503.14476, eq. 11).

    The criterion is on accuracy, not on the shaped reward: a group of correct answers of which some are overlong
    is dropped too.
    """
    return 0 < sum(correct) < len(correct)


def informative_groups(groups: Sequence[Group], limit: int, dynamic_sampling: bool = True) -> list[Group]:
    """The first `limit` informative groups, in the order given; fewer where there are fewer.

    Without dynamic sampling every group counts as informative.
    """
    kept = [
        group for group in groups if not dynamic_sampling or is_informative([t.correct for t in group.trajectories])
    ]
    return kept[:limit]
