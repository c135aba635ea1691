"""Fixtures of the rollout tests.

The contract tests take `endpoint` only. RLOOP_TEST_ENGINE=sglang starts the real server for them; RLOOP_TEST_ENDPOINT
(with RLOOP_ENGINE_KEY and RLOOP_TEST_MODEL, the folder it serves) points them at any other one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from served_model import Endpoint, endpoint_of, make_model, start_server
from transformers import AutoModelForCausalLM, PreTrainedModel

from rloop_mcore.rollout.launch import EmbeddedServer, SGLangServer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("RLOOP_TEST_MODEL")
    return Path(given) if given else make_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.fixture(scope="session")
def reference(model_path: Path) -> PreTrainedModel:
    """The independent reference: transformers' own attention and cache."""
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def other_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another policy of the same shape."""
    return make_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="session")
def other_model(other_path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(other_path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="session")
def server(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer | SGLangServer]:
    server = start_server(model_path, tmp_path_factory.mktemp("server"), "engine")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    if "RLOOP_TEST_ENDPOINT" in os.environ:
        return Endpoint(os.environ["RLOOP_TEST_ENDPOINT"], os.environ.get("RLOOP_ENGINE_KEY"))
    return endpoint_of(request.getfixturevalue("server"))
