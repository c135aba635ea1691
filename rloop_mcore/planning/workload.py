"""How much there is to compute in a step: rows, their lengths, tokens, multiplications."""

from __future__ import annotations

from dataclasses import dataclass

from rloop_mcore.config import Config
from rloop_mcore.planning.architecture import Architecture

# Unknown before a run, and assumed: how long a prompt and a response are on average, as shares of their limits.
_PROMPT_SHARE, _RESPONSE_SHARE = 0.25, 0.5


def longest_row(config: Config) -> int:
    """Positions of the longest sequence; its last token is a target only."""
    return config.data.max_prompt_tokens + config.rollout.max_tokens - 1


def mean_lengths(config: Config) -> tuple[float, float]:
    """Tokens of a prompt and of a response, on average."""
    return _PROMPT_SHARE * config.data.max_prompt_tokens, _RESPONSE_SHARE * config.rollout.max_tokens


def rows_of_update(config: Config) -> int:
    """Trajectories of one update of the RL steps; of the fine-tuning, where there are none."""
    algorithm = config.algorithm
    if not (algorithm.iterations and algorithm.rl_steps and algorithm.updates_per_step):
        return config.rft.batch_size
    return -(-algorithm.prompts_per_step * algorithm.group_size // algorithm.updates_per_step)


@dataclass(frozen=True)
class TokenWork:
    """Floating-point operations of a token's forward pass: of a layer's matrices, its attention, the output layer."""

    layer: float
    attention: float
    output: float

    @classmethod
    def of(cls, model: Architecture, length: float) -> TokenWork:
        """In rows of `length` tokens, of which one sees half on average: PaLM's count (arXiv 2204.02311, app. B)."""
        attention = model.hidden * (model.queries + 2 * model.keys) + model.queries * model.hidden
        mlp = 3 * model.hidden * model.ffn
        if model.experts:
            mlp = model.hidden * (3 * model.expert_ffn * model.top_k + model.experts)
        return cls(2.0 * (attention + mlp), 2.0 * length * model.queries, 2.0 * model.hidden * model.vocabulary)
