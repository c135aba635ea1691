"""Mistral without its sliding window (7B from v0.3 on): Llama's layers."""

from __future__ import annotations

from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.weights import decoder
from rloop_mcore.weights.family import Family, HfConfig


def _architecture(config: HfConfig) -> dict[str, Any]:
    config.honour(decoder.HONOURED | {"sliding_window": None})
    if "sliding_window" not in config.values:
        raise UserError(
            f"{config.file} has no sliding_window, which transformers takes for 4096: set it to null where the model "
            "has none."
        )
    return decoder.architecture(config)


FAMILY = Family("mistral", "MistralForCausalLM", _architecture, decoder.parameters)
