"""The sizes that a configuration states for a model (`model.architecture`), against those of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from rloop_mcore.config import ArchitectureConfig
from rloop_mcore.errors import UserError

# Not sizes: base and instruct models of one size, or their later releases, differ in them, and config.json counts.
_OF_A_RELEASE = ("max_position_embeddings", "rope_theta", "rms_norm_eps")
SIZES = tuple(size.name for size in fields(ArchitectureConfig) if size.name not in _OF_A_RELEASE)


def check_architecture(stated: ArchitectureConfig, found: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where the config.json `found` in `file` has another size than `stated`.

    A size that one of them leaves out is not compared; of head_dim, which many leave out, the usual value counts.
    """
    values = dict(found)
    if values.get("num_experts") is None:  # transformers 5 writes num_local_experts
        values["num_experts"] = values.get("num_local_experts")
    if values.get("head_dim") is None and values.get("hidden_size") and values.get("num_attention_heads"):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    for name in SIZES:
        wanted, value = getattr(stated, name), values.get(name)
        if wanted is not None and value is not None and wanted != value:
            raise UserError(
                f"model.architecture.{name}={_text(wanted)}, and {file} says {_text(value)}: model.path is not the "
                "model that was chosen with model=."
            )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
