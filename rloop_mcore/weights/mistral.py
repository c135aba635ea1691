"""Mistral without its sliding window (7B from v0.3 on): Llama's layers."""

from __future__ import annotations

from typing import Any

from rloop_mcore.weights import decoder
from rloop_mcore.weights.family import Family, HfConfig


def _architecture(config: HfConfig) -> dict[str, Any]:
    config.honour(decoder.HONOURED | {"sliding_window": None})
    return decoder.architecture(config)


FAMILY = Family("mistral", "MistralForCausalLM", _architecture, decoder.parameters)
