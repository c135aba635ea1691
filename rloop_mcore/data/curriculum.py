"""How often problems are drawn, by how they went: weights from a function of the user's (`data.sampler`)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence

from rloop_mcore.errors import UserError
from rloop_mcore.platform.plugin import load_function
from rloop_mcore.types import Problem, Visit

# (problems, their visits by id, oldest first) -> a weight for each problem [problems]. A pure function: a resumed run
# calls it again with the same arguments, and must get the same weights.
Sampler = Callable[[Sequence[Problem], Mapping[str, Sequence[Visit]]], Sequence[float]]

SHIPPED = {"challenging": "rloop_mcore.data.challenging:weights"}


def load_sampler(name: str) -> Sampler:
    """The function behind `data.sampler`: a shipped name or `package.module:function`; else a UserError."""
    function: Sampler = load_function("data.sampler", name, SHIPPED)
    return function


class SampledCurriculum:
    """Implements `protocols.Curriculum` over the problems that there are prompts of, by the sampler `name`."""

    def __init__(self, name: str, problems: Sequence[Problem]) -> None:
        self._name, self._sampler, self._problems = name, load_sampler(name), problems
        self.begin([])

    def begin(self, visits: Iterable[tuple[str, Visit]]) -> None:
        """Start from these visits and no others."""
        self._visits: dict[str, list[Visit]] = {problem.id: [] for problem in self._problems}
        self._not_yet = deque(visits)  # what is newer than `weights` was last asked about

    def observe(self, visits: Iterable[tuple[str, Visit]]) -> None:
        """Take the visits of the step that follows."""
        self._not_yet.extend(visits)

    def weights(self, iteration: int, step: int) -> Sequence[float]:
        """The sampler's weights [problems] by the visits before a step, over the largest of them."""
        while self._not_yet:
            name, visit = self._not_yet[0]
            if (visit.iteration, visit.step) >= (iteration, step):
                break
            self._not_yet.popleft()
            if name in self._visits:
                self._visits[name].append(visit)
        weights = self._call(f"data.sampler={self._name} before step {step} of iteration {iteration}")
        largest = max(weights)
        return [weight / largest for weight in weights]

    def _call(self, who: str) -> list[float]:
        try:
            weights = [float(weight) for weight in self._sampler(self._problems, self._visits)]
        except Exception as error:
            raise UserError(f"{who} failed ({type(error).__name__}: {error})") from error
        if len(weights) != len(self._problems):
            raise UserError(f"{who} gave {len(weights)} weights for {len(self._problems)} problems: give one each")
        for problem, weight in zip(self._problems, weights, strict=True):
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(
                    f"{who} gave problem {problem.id} the weight {weight}: it must be finite and not negative"
                )
        if not any(weights):
            raise UserError(f"{who} gave every problem the weight 0: nothing is left to draw")
        return weights
