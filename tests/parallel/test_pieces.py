"""The vocabulary-parallel logprobs against NumPy, and the conductor, on two ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch

VOCABULARY, TEMPERATURE = 9, 0.7


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("pieces") / "out.pt"
    launch(Path(__file__).with_name("worker_pieces.py"), out, processes=2)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize(
    "way", range(5), ids=["chunks", "chunks, entropy", "kept", "kept, entropy", "a shard of padding"]
)
def test_logprobs_entropy_and_gradients_match_the_whole_softmax(result: dict[str, Any], way: int) -> None:
    values, vocabulary = result["logprobs"][way], 4 if way == 4 else VOCABULARY
    given = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    log_p = (hidden @ weight[:vocabulary].T / TEMPERATURE).log_softmax(-1)
    logprobs, entropy = log_p[range(len(hidden)), given["targets"]], -(log_p.exp() * log_p).sum(-1)
    (logprobs * given["weights"][0] + entropy * given["weights"][1]).sum().backward()
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(given["logprobs"], logprobs.detach())
    close(given["entropy"], entropy.detach())
    close(given["of_hidden"], hidden.grad)
    close(given["of_weight"], weight.grad)
    assert (given["of_weight"][vocabulary:] == 0).all()


def test_followers_repeat_every_call_and_drain_every_stream(result: dict[str, Any]) -> None:
    """They go on after a full disk, as rank 0 may; a call that they would repeat without its arguments is refused."""
    said = ["total is collective: pass its arguments by position", "no space"]
    assert result["conducted"] == {"said": said, "total": 5.0, "stream": [0.0, 2.0, 4.0], "seen": [5, 5]}
