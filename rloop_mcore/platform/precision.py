"""What a value of `precision` means to torch, Megatron-Core and Transformer Engine (docs/precision.md).

Imports no torch: validation uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rloop_mcore.errors import UserError

if TYPE_CHECKING:
    import torch

RECIPES = {"fp8_delayed": "delayed", "fp8_tensorwise": "tensorwise", "fp8_blockwise": "blockwise", "mxfp8": "mxfp8"}
PRECISIONS = ("bf16", "fp32", *RECIPES)
FP8_BLOCK = 128  # rows and columns of a matrix of an FP8 checkpoint that share a scale
_TENSORS = {"scaling_fwd": 3, "scaling_bwd": 2}  # of a GEMM, as Transformer Engine keeps their scales


class Fp8(Protocol):
    """The keys `fp8.*`."""

    first_bf16_layers: int
    last_bf16_layers: int
    parameter_gather: bool
    simulate: bool


class Optimizer(Protocol):
    """The keys `actor.*` on which it depends whether parameters may be in FP8."""

    distributed_optimizer: bool
    optimizer_offload: float
    precision_aware_optimizer: bool


def check_precision(precision: str, fp8: Fp8, device: str, actor: Optimizer) -> None:
    """Raise UserError for what cannot run. `device`: cpu or cuda."""
    if fp8.simulate and precision not in RECIPES:
        raise UserError(
            f"fp8.simulate=true has nothing to simulate at precision={precision}: use one of {', '.join(RECIPES)}."
        )
    if precision not in RECIPES:
        if fp8.first_bf16_layers or fp8.last_bf16_layers or fp8.parameter_gather:
            raise UserError(
                f"precision={precision} has no FP8 for fp8.first_bf16_layers, fp8.last_bf16_layers or "
                f"fp8.parameter_gather to change: leave them out, or use one of {', '.join(RECIPES)}."
            )
        return
    if device == "cpu" and not fp8.simulate:
        raise UserError(
            f"precision={precision} needs CUDA and Transformer Engine: use bf16 or fp32 on the CPU, or set "
            "fp8.simulate=true for a simulation of its numerics."
        )
    if device == "cuda" and fp8.simulate:
        raise UserError("fp8.simulate=true is for the CPU; Transformer Engine does FP8 on CUDA: set it to false.")
    if precision == "fp8_delayed" and (fp8.first_bf16_layers or fp8.last_bf16_layers):
        raise UserError(
            "precision=fp8_delayed keeps no layers in bf16: set fp8.first_bf16_layers=0 and fp8.last_bf16_layers=0, "
            "or use fp8_tensorwise."
        )
    if fp8.parameter_gather:
        _check_parameter_gather(precision, fp8, actor)


def _check_parameter_gather(precision: str, fp8: Fp8, actor: Optimizer) -> None:
    if fp8.simulate:
        raise UserError("fp8.parameter_gather=true cannot be simulated: set it or fp8.simulate to false.")
    if precision == "fp8_blockwise":
        raise UserError(
            "fp8.parameter_gather=true loses the weights at precision=fp8_blockwise (docs/gpu.md): set it to false, or "
            "use fp8_delayed or fp8_tensorwise."
        )
    if not actor.distributed_optimizer:
        raise UserError("fp8.parameter_gather=true needs actor.distributed_optimizer=true.")
    if actor.optimizer_offload > 0 and precision != "fp8_delayed":
        raise UserError(
            f"fp8.parameter_gather=true at precision={precision} needs actor.optimizer_offload=0 (only fp8_delayed "
            "has both)."
        )
    if actor.precision_aware_optimizer and precision == "fp8_delayed":
        raise UserError(
            "fp8.parameter_gather=true at precision=fp8_delayed needs actor.precision_aware_optimizer=false: its "
            "main weights would begin as FP8 rounds them."
        )


def check_bf16_layers(fp8: Fp8, num_layers: int, pp: int) -> None:
    """Raise UserError where more layers stay in bf16, at one end, than the first or last pipeline stage is sure of."""
    for key in ("first_bf16_layers", "last_bf16_layers"):
        if getattr(fp8, key) > num_layers // pp:
            raise UserError(
                f"fp8.{key}={getattr(fp8, key)} must be at most {num_layers // pp}: the model's {num_layers} layers "
                f"over layout.pp={pp} stages."
            )


def check_fp8_sizes(precision: str, hf_config: Mapping[str, Any], tp: int, etp: int) -> None:
    """Raise UserError where a matrix, over `tp` ranks or an expert's over `etp`, has a side that no FP8 GEMM takes."""
    multiple = token_multiple(precision)
    if multiple == 1:
        return
    hidden, heads = hf_config.get("hidden_size", 0), hf_config["num_attention_heads"]
    head = hf_config.get("head_dim") or hidden // heads
    sides = [
        ("hidden_size", hidden, "tp", 1),
        ("num_attention_heads x head_dim", heads * head, "tp", tp),
        ("num_key_value_heads x head_dim", (hf_config.get("num_key_value_heads") or heads) * head, "tp", tp),
        ("moe_intermediate_size", hf_config["moe_intermediate_size"], "etp", etp)
        if hf_config.get("moe_intermediate_size")
        else ("intermediate_size", hf_config["intermediate_size"], "tp", tp),
    ]
    for name, size, key, ranks in sides:
        if size // ranks % multiple:
            split = f" over layout.{key}={ranks}" if ranks > 1 else ""
            raise UserError(
                f"precision={precision} needs matrices whose sides are multiples of {multiple}; {name}{split} is "
                f"{size // ranks}: use bf16."
            )


def parameter_dtype(precision: str) -> torch.dtype:
    """The dtype of parameters and activations; FP8 exists only inside the GEMMs (and in the parameter gather)."""
    import torch

    return torch.float32 if precision == "fp32" else torch.bfloat16


def element_bytes(precision: str) -> int:
    """Of an element of `parameter_dtype`."""
    return 4 if precision == "fp32" else 2


def token_multiple(precision: str) -> int:
    """What the number of tokens that reach a GEMM must be a multiple of: the weight gradient's GEMM sums over them.

    The rule of Megatron's `get_fp8_align_size`. Under sequence parallelism it holds for every rank's part.
    """
    if precision not in RECIPES:
        return 1
    return 32 if precision == "mxfp8" else 16


def transformer_settings(precision: str, fp8: Fp8) -> dict[str, Any]:
    """The TransformerConfig fields that switch Transformer Engine's FP8 on; none for bf16, fp32 and a simulation."""
    if precision not in RECIPES or fp8.simulate:
        return {}
    settings: dict[str, Any] = {
        # hybrid: gradients in E5M2, for its range. A scale for every block makes E4M3's range do.
        "fp8": "hybrid" if precision in ("fp8_delayed", "fp8_tensorwise") else "e4m3",
        "fp8_recipe": RECIPES[precision],
        "fp8_param": fp8.parameter_gather,
        "first_last_layers_bf16": bool(fp8.first_bf16_layers or fp8.last_bf16_layers),
        "num_layers_at_start_in_bf16": fp8.first_bf16_layers,
        "num_layers_at_end_in_bf16": fp8.last_bf16_layers,
    }
    if precision == "fp8_delayed":
        settings |= {"fp8_margin": 0, "fp8_amax_history_len": 1, "fp8_amax_compute_algo": "most_recent"}
    return settings


def ddp_settings(precision: str, fp8: Fp8) -> dict[str, Any]:
    """The DistributedDataParallelConfig fields of an FP8 parameter gather."""
    if precision not in RECIPES or not fp8.parameter_gather:
        return {}
    # An MXFP8 parameter has two quantised copies, so it cannot be a view of the gather buffer: the gradients' serves.
    return {"fp8_param_gather": True, "reuse_grad_buf_for_mxfp8_param_ag": precision == "mxfp8"}


def optimizer_settings(precision: str, fp8: Fp8) -> dict[str, Any]:
    """Megatron's OptimizerConfig fields for FP8."""
    if precision not in RECIPES or fp8.simulate:
        return {}
    return {
        "fp8_recipe": RECIPES[precision],
        "reuse_grad_buf_for_mxfp8_param_ag": fp8.parameter_gather and precision == "mxfp8",
    }


def assign(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    """Give a parameter its value.

    Where Transformer Engine keeps it in FP8 it also keeps a value in high precision, of which Megatron makes the main
    weights: that is the initial, random one unless it is replaced too. And fp8_delayed's scale is the one of what the
    parameter was before, at first 1, where small weights keep few bits.
    """
    import torch

    scale = getattr(getattr(parameter, "_quantizer", None), "scale", None)
    if scale is not None:
        greatest = float(value.abs().max())
        scale.fill_(torch.finfo(torch.float8_e4m3fn).max / greatest if greatest > 0 else 1.0)
    parameter.copy_(value)
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = value.clone()  # type: ignore[attr-defined]


def reset_scales(chunks: Iterable[torch.nn.Module], precision: str) -> None:
    """fp8_delayed: have Transformer Engine forget what it saw, as a new phase does; others: no effect."""
    if precision == "fp8_delayed":
        for module in (module for chunk in chunks for module in chunk.modules()):
            if hasattr(module, "reset_fp8_meta_tensors"):
                module.reset_fp8_meta_tensors()  # type: ignore[operator]


def scales(module: torch.nn.Module) -> list[torch.Tensor]:
    """fp8_delayed: of each GEMM of a module of Transformer Engine, what the next update's scales come from.

    [10] in fp32: scale and greatest value of input, weight and output, then of the two gradients. None for a module
    that has not run yet, or another recipe.
    """
    import torch

    meta: Any = getattr(module, "fp8_meta", {})
    if not all(hasattr(meta.get(key), "amax_history") for key in _TENSORS):
        return []
    parts = [part for key in _TENSORS for part in (meta[key].scale, meta[key].amax_history[0])]
    gemms = meta["num_gemms"]  # the tensors of one after those of another, as GroupedLinear numbers them
    return list(torch.cat([part.view(gemms, -1) for part in parts], dim=1).cpu())


def set_scales(module: torch.nn.Module, values: Sequence[torch.Tensor]) -> None:
    """What `scales` gave, into a module of Transformer Engine that may not have run yet; others have no use for it.

    Not by its `set_extra_state`, which runs a pickle.
    """
    import torch
    from megatron.core.fp8_utils import get_fp8_recipe

    config: Any = module.config
    if not config.fp8 or config.fp8_recipe != RECIPES["fp8_delayed"]:
        return
    meta: Any = module.fp8_meta
    meta["num_gemms"] = len(values)
    meta["recipe"] = get_fp8_recipe(module.config)  # type: ignore[no-untyped-call]
    module.init_fp8_meta_tensors(meta["recipe"])  # type: ignore[operator]
    rows = torch.stack(list(values))
    for key, of_tensors in zip(_TENSORS, rows.split([2 * count for count in _TENSORS.values()], dim=1), strict=True):
        scale, history = of_tensors.chunk(2, dim=1)
        meta[key].scale.copy_(scale.flatten())
        meta[key].amax_history[0].copy_(history.flatten())
