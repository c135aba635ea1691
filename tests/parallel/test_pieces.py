"""The vocabulary-parallel logprobs against NumPy, and the conductor, on two ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from launch import HERE, launch

VOCABULARY, TEMPERATURE = 9, 0.7


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("pieces") / "out.pt"
    launch([str(HERE / "worker_pieces.py"), str(out)], processes=2)
    return torch.load(out, weights_only=True)


def test_logprobs_entropy_and_gradient_match_the_formulas(result: dict[str, Any]) -> None:
    given = {name: tensor.double().numpy() for name, tensor in result["logprobs"].items()}
    logits = given["logits"][:, :VOCABULARY] / TEMPERATURE
    targets = given["targets"].astype(int)
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    one_hot = np.eye(VOCABULARY)[targets]
    gradient = (one_hot - p) * given["weights"][:, None] / TEMPERATURE

    np.testing.assert_allclose(given["logprobs"], (log_p * one_hot).sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given["entropy"], -(p * log_p).sum(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(given["gradient"][:, :VOCABULARY], gradient, rtol=1e-5, atol=1e-5)
    assert (given["gradient"][:, VOCABULARY:] == 0).all()


def test_followers_repeat_every_call_and_drain_every_stream(result: dict[str, Any]) -> None:
    assert result["conducted"] == {"total": 5.0, "stream": [0.0, 2.0, 4.0], "seen": [4, 4]}
