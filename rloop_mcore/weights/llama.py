"""Llama and what is built like it (SmolLM2): a dense decoder without biases."""

from __future__ import annotations

from typing import Any

from rloop_mcore.weights import decoder
from rloop_mcore.weights.family import Family, HfConfig


def _architecture(config: HfConfig) -> dict[str, Any]:
    config.honour(decoder.HONOURED | {"attention_bias": False, "mlp_bias": False})
    return decoder.architecture(config)


FAMILY = Family("llama", "LlamaForCausalLM", _architecture, decoder.parameters)
