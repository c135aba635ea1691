"""The values of `precision`: what is refused, and that this Megatron takes the fields they turn into."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from rloop_mcore import platform
from rloop_mcore.config import Fp8Config
from rloop_mcore.errors import UserError
from rloop_mcore.platform.precision import (
    PRECISIONS,
    RECIPES,
    assign,
    check_bf16_layers,
    check_fp8_sizes,
    check_precision,
    ddp_settings,
    optimizer_settings,
    parameter_dtype,
    token_multiple,
    transformer_settings,
)

platform.setup("cpu", threads=1)


@pytest.mark.parametrize(
    ("precision", "fp8", "device", "key"),
    [
        ("fp16", Fp8Config(), "cuda", "precision"),
        ("fp8_tensorwise", Fp8Config(), "cpu", "fp8.simulate=true"),
        ("bf16", Fp8Config(simulate=True), "cpu", "fp8.simulate"),
        ("mxfp8", Fp8Config(simulate=True), "cuda", "fp8.simulate"),
        ("mxfp8", Fp8Config(simulate=True, parameter_gather=True), "cpu", "fp8.parameter_gather"),
        ("mxfp8", Fp8Config(first_bf16_layers=-1), "cuda", "fp8.first_bf16_layers=-1"),
        ("bf16", Fp8Config(last_bf16_layers=-2), "cpu", "fp8.last_bf16_layers=-2"),
        ("fp8_delayed", Fp8Config(last_bf16_layers=1), "cuda", "fp8.last_bf16_layers=0"),
        ("bf16", Fp8Config(first_bf16_layers=1), "cuda", "has no FP8 for fp8.first_bf16_layers"),
        ("fp32", Fp8Config(parameter_gather=True), "cpu", "fp8.parameter_gather"),
        ("fp8_blockwise", Fp8Config(parameter_gather=True), "cuda", "fp8.parameter_gather"),
    ],
)
def test_refusals_name_the_key(precision: str, fp8: Fp8Config, device: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_precision(precision, fp8, device)


def test_parameter_gather_needs_the_distributed_optimizer() -> None:
    gather = Fp8Config(parameter_gather=True)
    with pytest.raises(UserError, match=r"actor\.distributed_optimizer"):
        check_precision("mxfp8", gather, "cuda", distributed_optimizer=False)
    with pytest.raises(UserError, match=r"actor\.optimizer_offload"):
        check_precision("mxfp8", gather, "cuda", optimizer_offload=0.5)
    check_precision("fp8_delayed", gather, "cuda", optimizer_offload=0.5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_can_run_is_let_through(precision: str) -> None:
    check_precision(precision, Fp8Config(), "cuda")
    check_precision(precision, Fp8Config(simulate=precision in RECIPES), "cpu")


def test_bf16_layers_fit_the_first_and_last_stage() -> None:
    check_bf16_layers(Fp8Config(first_bf16_layers=2, last_bf16_layers=2), num_layers=8, pp=4)
    with pytest.raises(UserError, match=r"fp8\.last_bf16_layers=3 must be at most 2"):
        check_bf16_layers(Fp8Config(last_bf16_layers=3), num_layers=8, pp=4)


@pytest.mark.parametrize("precision", sorted(RECIPES))
@pytest.mark.parametrize("gather", [False, True])
def test_megatron_accepts_the_settings(precision: str, gather: bool) -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer import TransformerConfig

    bf16_layers = 0 if precision == "fp8_delayed" else 1
    fp8 = Fp8Config(parameter_gather=gather, first_bf16_layers=bf16_layers)
    wanted = transformer_settings(precision, fp8)
    config = TransformerConfig(num_layers=4, hidden_size=8, num_attention_heads=1, **wanted)
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert (config.fp8 == "hybrid") == (precision in ("fp8_delayed", "fp8_tensorwise"))
    assert DistributedDataParallelConfig(**ddp_settings(precision, fp8)).fp8_param_gather is gather
    assert OptimizerConfig(**optimizer_settings(precision, fp8)).fp8_recipe == config.fp8_recipe


@pytest.mark.parametrize("precision", sorted(RECIPES))
def test_tokens_are_aligned_as_megatron_aligns_them(precision: str) -> None:
    from megatron.core.enums import Fp8Recipe
    from megatron.core.fp8_utils import get_fp8_align_size

    assert token_multiple(precision) == get_fp8_align_size(Fp8Recipe[RECIPES[precision]])


def test_delayed_scaling_is_megatrons_default() -> None:
    from megatron.core.transformer import TransformerConfig

    default = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    settings = transformer_settings("fp8_delayed", Fp8Config())
    names = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
    assert [settings[name] for name in names] == [default[name] for name in names]


def test_without_transformer_engine_nothing_is_set() -> None:
    for precision, fp8 in (("bf16", Fp8Config()), ("fp32", Fp8Config()), ("mxfp8", Fp8Config(simulate=True))):
        assert transformer_settings(precision, fp8) == {}
        assert ddp_settings(precision, fp8) == {}
        assert optimizer_settings(precision, fp8) == {}


def test_dtypes_and_multiples() -> None:
    import torch

    assert [str(parameter_dtype(p)) for p in PRECISIONS] == ["torch.bfloat16", "torch.float32"] + 4 * ["torch.bfloat16"]
    assert [token_multiple(p) for p in ("bf16", "fp32")] == [1, 1]
    assert parameter_dtype("fp32") is torch.float32


def test_validation_needs_no_torch() -> None:
    code = "import sys, rloop_mcore.platform.precision; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_fp8_refuses_matrices_whose_sides_its_gemms_cannot_take() -> None:
    sizes = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    check_fp8_sizes("mxfp8", sizes, tp=2)
    check_fp8_sizes("bf16", sizes | {"hidden_size": 7}, tp=1)
    with pytest.raises(UserError, match=r"multiples of 32; num_key_value_heads x head_dim over layout.tp=1 is 16"):
        check_fp8_sizes("mxfp8", sizes | {"head_dim": 8, "num_attention_heads": 16}, tp=1)
    with pytest.raises(UserError, match=r"multiples of 16; intermediate_size over layout.tp=2 is 2440"):
        check_fp8_sizes("fp8_tensorwise", sizes | {"intermediate_size": 4880}, tp=2)


def test_an_fp8_parameters_high_precision_value_is_replaced_too() -> None:
    """Transformer Engine's parameters have this method; Megatron makes the main weights of what it returns."""

    class Fp8Parameter(torch.nn.Parameter):
        def get_high_precision_init_val(self) -> torch.Tensor:
            return self._high_precision_init_val

    parameter = Fp8Parameter(torch.zeros(2), requires_grad=False)
    value = torch.tensor([1.0, 2.0])
    assign(parameter, value)
    value.zero_()
    assert parameter.tolist() == [1.0, 2.0]
    assert parameter.get_high_precision_init_val().tolist() == [1.0, 2.0]
