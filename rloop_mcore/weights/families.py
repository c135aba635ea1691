"""The families that are described. Imports no Megatron: conversions need none."""

from __future__ import annotations

from rloop_mcore.errors import UserError
from rloop_mcore.weights import llama, mistral, qwen2, qwen3, qwen3_moe
from rloop_mcore.weights.family import Family, HfConfig

FAMILIES = (qwen2.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY, llama.FAMILY, mistral.FAMILY)


def choose_family(config: HfConfig, family: str = "auto") -> Family:
    """The family of that name; auto: the one that config.json names. Raises UserError where there is none."""
    if family != "auto":
        named = {candidate.name: candidate for candidate in FAMILIES}
        if family not in named:
            raise UserError(f"model.family is {family!r}; it is one of auto, {', '.join(sorted(named))}.")
        others = [other.name for other in FAMILIES if config.get("architectures", []) == [other.hf_architecture]]
        if others and others != [family]:
            raise UserError(f"model.family is {family!r}, and {config.file} is of {others[0]}: leave it at auto.")
        return named[family]
    architectures = config["architectures"]
    for candidate in FAMILIES:
        if architectures == [candidate.hf_architecture]:
            return candidate
    supported = ", ".join(candidate.hf_architecture for candidate in FAMILIES)
    raise UserError(f"{config.file}: architectures is {architectures}; supported are {supported}.")
