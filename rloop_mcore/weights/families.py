"""The families that are described. Imports neither Megatron, which conversions don't need, nor torch."""

from __future__ import annotations

from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.weights import llama, mistral, qwen2, qwen3, qwen3_moe
from rloop_mcore.weights.family import Family, HfConfig
from rloop_mcore.weights.tensor_files import catalogue

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


def check_folder(folder: Path, family: str = "auto") -> None:
    """Raises UserError unless an HF folder holds a model that can be trained: by its config.json and the headers of its
    files, without reading a weight."""
    config = check_config(folder, family)
    choose_family(config, family).check_headers(config, catalogue(folder))


def check_config(folder: Path, family: str = "auto") -> HfConfig:
    """The config.json of an HF folder. Raises UserError where it can't be honoured, or engines take it for another
    family's than training: they go by its model_type."""
    config = HfConfig.read(folder)
    chosen = choose_family(config, family)
    if family == "auto" and config["model_type"] != chosen.name:
        raise UserError(
            f"{config.file}: model_type is {config['model_type']!r}, and architectures is of {chosen.name}: set "
            f"model_type to {chosen.name!r}, or architectures to the model's own."
        )
    chosen.architecture(config)
    return config
