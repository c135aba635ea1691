"""Mistral without its sliding window (7B from v0.3 on): Llama's layers."""

from __future__ import annotations

from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.weights import decoder
from rloop_mcore.weights.family import Family, HfConfig


def _architecture(config: HfConfig) -> dict[str, Any]:
    # with layer_types, transformers takes it for a Ministral, which has a window
    config.honour(decoder.HONOURED | {"sliding_window": None, "layer_types": None})
    if "sliding_window" not in config.values:
        raise UserError(
            f"{config.file} has no sliding_window, which transformers takes for 4096: set it to null where the model "
            "has none."
        )
    return decoder.architecture(config)


FAMILY = Family("mistral", "MistralForCausalLM", _architecture, decoder.parameters)
