"""What the loop needs of each room, and what one room needs of another: rooms never import each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rloop_mcore.types import (
    Completion,
    Example,
    Experience,
    ExpertQuery,
    Policy,
    Problem,
    Prompt,
    SampleRequest,
    Sampling,
    Trajectory,
    Verdict,
    Visit,
)

if TYPE_CHECKING:
    import torch

    from rloop_mcore.config import OptimizerConfig

    ScatteredTensors = Iterator[tuple[str, "Scattered"]]
    NamedTensors = Iterator[tuple[str, "torch.Tensor | Scattered"]]

T = TypeVar("T")

# Of completions that have come: the numbers of their requests, and they. Called on the engines' thread, which it must
# not hold up.
Answered = Callable[[Sequence[int], Sequence[Completion]], None]


class Scattered(Protocol):
    """A full HF tensor, on rank 0, whose shards are on one or more ranks; good until the stream of them goes on."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device:
        """Of the shards."""

    def gather_into(self, place: torch.Tensor) -> None:
        """Lay it at `place`, which has its shape, in the place's dtype."""

    def gather(self) -> torch.Tensor:
        """The tensor, in memory of its own, or a view of the weights."""


class Actor(Protocol):
    """The trained policy. Every method is collective: rank 0 calls, the other ranks follow."""

    def begin(self, policy: Path, optimizer: OptimizerConfig, total_updates: int) -> None:
        """Take the weights of an HF folder and a fresh optimizer with its schedule over `total_updates`."""

    def logprobs(self, batch: Sequence[Trajectory], of_reference: bool) -> list[tuple[float, ...]]:
        """log pi(response) [response] of each trajectory under the policy, or under the one `begin` took."""

    def update(self, batch: Sequence[Experience]) -> dict[str, float]:
        """One DAPO update on a mini-batch. Returns metrics."""

    def fine_tune(self, batch: Sequence[Example], loss: str) -> dict[str, float]:
        """One SFT update: negative log-likelihood of the responses, weighted as `rft.loss` says. Returns metrics."""

    def make_room(self) -> None:
        """Give back the device memory that is kept for later: engines on the same devices need it now."""

    def export(self) -> ScatteredTensors:
        """Stream the full weights as (HF name, tensor to be gathered), in the family's fixed order."""

    def save_policy(self, path: Path) -> Policy:
        """Write the weights as an HF folder that transformers and SGLang open, atomically."""

    def start_save(self, path: Path) -> None:
        """Copy weights, optimizer, schedule and RNG, and begin to write them as a Megatron checkpoint; one at a time.

        Updates may follow at once: they change nothing of what is written.
        """

    def finish_save(self) -> None:
        """Wait until what `start_save` began is whole and durable at its path. Raises Fault where it can't be."""

    def load(self, path: Path) -> None:
        """Restore what was saved, at any layout."""


class WeightBridge(Protocol):
    """The description of a model family, as the actor needs it; lives in `weights/`."""

    def architecture(self) -> dict[str, Any]:
        """The HF config as Megatron's: `{"transformer": TransformerConfig fields, "gpt": GPTModel arguments}`."""

    def load(self, chunks: Sequence[torch.nn.Module], path: Path) -> None:
        """Fill this rank's shards of every pipeline chunk from the safetensors of an HF folder."""

    def export(self, chunks: Sequence[torch.nn.Module]) -> ScatteredTensors:
        """Collective: rank 0 yields the HF tensors, each to be gathered before the next, the others nothing."""

    def save(self, tensors: ScatteredTensors, path: Path) -> Policy:
        """Rank 0: write an HF folder (safetensors, config, tokenizer files) atomically and digest it."""


class WeightChannel(Protocol):
    """The trainer's end of the weight broadcast; lives in `weights/`."""

    group_name: str  # the engines join under the same name

    def open(self, world_size: int) -> tuple[str, int]:
        """Start the rendezvous for a group of `world_size` (trainer rank 0 + engine ranks); returns (address, port)."""

    def join(self) -> None:
        """Join the group as rank 0; blocks, with a deadline, until every engine rank has joined."""

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Broadcast the tensors from rank 0, one broadcast a tensor, in order."""

    def close(self) -> None:
        """Leave the group."""


class Rollout(Protocol):
    """The engines, behind SGLang's HTTP contract."""

    def sleep(self) -> None:
        """Have the engines give up their memory until the next sync; nothing may be under way."""

    def sync(self, export: Callable[[], NamedTensors], version: int) -> dict[str, float]:
        """Bring every engine to the weights that `export` streams, stamped `version`. Returns metrics (seconds, bytes).

        `export` may be called again, later too: engines that had to be restarted get the weights from it, in `wait`.
        """

    def submit(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        enough: int | None = None,
        answered: Answered | None = None,
    ) -> Future[list[Completion]]:
        """Start to generate one completion a request, in their order.

        enough: once that many groups are complete the rest is aborted, and comes back as far as it is. answered: told
        of completions as they come, once of each that is finished.
        """

    def wait(self, future: Future[T], version: int | None = None) -> T:
        """The result of what the engines are working on, to be waited for on the actor's thread.

        version: of the weights `export` gives now, where it is another than that of the last sync.
        """

    def cancel(self) -> None:
        """Give up everything that was submitted; its futures are cancelled."""

    def generate(
        self, requests: Sequence[SampleRequest], sampling: Sampling, answered: Answered | None = None
    ) -> list[Completion]:
        """One completion a request, in the order of the requests; `answered` as for `submit`."""


class Rewards(Protocol):
    """The verifiers, in a pool of processes."""

    def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
        """Grade (problem, response text, truncated) items; one verdict each, in order. Never raises for an answer.

        An item is graded from the moment it is given, while the next one may still be waited for.
        """

    def votes(self, items: Sequence[tuple[Problem, str, bool]]) -> list[str]:
        """What each of such items votes for in a majority, in order; "" for nothing."""


class Prompts(Protocol):
    """The training problems, rendered and tokenised."""

    def draw(self, position: int, count: int, weights: Sequence[float] | None = None) -> tuple[list[Prompt], int]:
        """The next `count` problems from a place of the endless seeded order on (a new permutation each epoch).

        weights [problems]: chances from 0 to 1, one of them 1, that a problem is taken where its turn comes; None: all
        are. Returns the place after the last one, too.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response ids, special tokens dropped."""


class Curriculum(Protocol):
    """How often problems are drawn, by how they went: `data.sampler`."""

    def begin(self, visits: Iterable[tuple[str, Visit]]) -> None:
        """Start from these visits of problems (by id) and no others; in the order of the steps."""

    def observe(self, visits: Iterable[tuple[str, Visit]]) -> None:
        """Take the visits of the step that follows. On the actor's thread; `weights` may run on another."""

    def weights(self, iteration: int, step: int) -> Sequence[float]:
        """For `Prompts.draw`, by what went before RL step `step` of `iteration`, whatever else was observed since.

        Its calls come in the order of the steps. Raises UserError where the user's function gives no weights.
        """


class Cache(Protocol):
    """The sharded trajectory cache."""

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        """Take every sampled trajectory of a step."""

    def seal(self) -> list[str]:
        """Make what was appended durable; returns the names of all shards sealed so far, oldest first."""

    def keep_only(self, shards: Sequence[str]) -> None:
        """Discard whatever a crash left that is not in `shards`."""

    def visits(self) -> Iterable[tuple[str, Visit]]:
        """What is sealed of every problem (by id) and RL step; in the order of the steps."""

    def write_experts(self, query: ExpertQuery, folder: Path) -> dict[str, int]:
        """Select trajectories for RFT and make them the content of `folder`, durably. Returns experts and problems."""

    def experts(self, folder: Path) -> Sequence[Example]:
        """What `write_experts` wrote, in a fixed order; the tokens are made Python's as they are asked for."""


class Evaluator(Protocol):
    """Avg@k and pass@k of whatever policy the engines hold."""

    def evaluate(self, name: str, policy: str) -> dict[str, float]:
        """Sample, grade, write `evaluation/{name}.json` about the policy folder `policy` (relative to the run).

        Returns the headline metrics, e.g. {"avg@32": .., "pass@8": ..}; then, where the problems are of several
        sources, each one's, e.g. {"avg@32/aime24": ..}.
        """
