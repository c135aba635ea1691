"""The values of `precision`: what is refused, and that this Megatron takes the fields they turn into."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rloop_mcore import platform
from rloop_mcore.config import ActorConfig, Fp8Config
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
    scales,
    set_scales,
    token_multiple,
    transformer_settings,
)

platform.setup("cpu", threads=1)


@pytest.mark.parametrize(
    ("precision", "fp8", "device", "key"),
    [
        ("fp8_tensorwise", Fp8Config(), "cpu", "fp8.simulate=true"),
        ("bf16", Fp8Config(simulate=True), "cpu", "fp8.simulate"),
        ("mxfp8", Fp8Config(simulate=True), "cuda", "fp8.simulate"),
        ("mxfp8", Fp8Config(simulate=True, parameter_gather=True), "cpu", "fp8.parameter_gather"),
        ("fp8_delayed", Fp8Config(last_bf16_layers=1), "cuda", "fp8.last_bf16_layers=0"),
        ("bf16", Fp8Config(first_bf16_layers=1), "cuda", "has no FP8 for fp8.first_bf16_layers"),
        ("fp32", Fp8Config(parameter_gather=True), "cpu", "fp8.parameter_gather"),
        ("fp8_blockwise", Fp8Config(parameter_gather=True), "cuda", "fp8.parameter_gather"),
    ],
)
def test_refusals_name_the_key(precision: str, fp8: Fp8Config, device: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        check_precision(precision, fp8, device, ActorConfig())


def test_parameter_gather_needs_the_distributed_optimizer() -> None:
    gather = Fp8Config(parameter_gather=True)
    with pytest.raises(UserError, match=r"actor\.distributed_optimizer"):
        check_precision("mxfp8", gather, "cuda", ActorConfig(distributed_optimizer=False))
    with pytest.raises(UserError, match=r"actor\.optimizer_offload"):
        check_precision("mxfp8", gather, "cuda", ActorConfig(optimizer_offload=0.5))
    check_precision("fp8_delayed", gather, "cuda", ActorConfig(optimizer_offload=0.5))
    with pytest.raises(UserError, match=r"actor\.precision_aware_optimizer=false"):
        check_precision("fp8_delayed", gather, "cuda", ActorConfig(precision_aware_optimizer=True))
    check_precision("fp8_tensorwise", gather, "cuda", ActorConfig(precision_aware_optimizer=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_can_run_is_let_through(precision: str) -> None:
    check_precision(precision, Fp8Config(), "cuda", ActorConfig())
    check_precision(precision, Fp8Config(simulate=precision in RECIPES), "cpu", ActorConfig())


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
    code = "import sys, rloop_mcore.platform.precision; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"


def test_fp8_refuses_matrices_whose_sides_its_gemms_cannot_take() -> None:
    sizes = {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    check_fp8_sizes("mxfp8", sizes, tp=2, etp=1)
    check_fp8_sizes("bf16", sizes | {"hidden_size": 7}, tp=1, etp=1)
    with pytest.raises(UserError, match=r"multiples of 32; num_key_value_heads x head_dim is 16"):
        check_fp8_sizes("mxfp8", sizes | {"head_dim": 8, "num_attention_heads": 16}, tp=1, etp=1)
    with pytest.raises(UserError, match=r"multiples of 16; intermediate_size over layout.tp=2 is 2440"):
        check_fp8_sizes("fp8_tensorwise", sizes | {"intermediate_size": 4880}, tp=2, etp=1)
    experts = sizes | {"moe_intermediate_size": 48, "intermediate_size": 7}  # whose matrices tp does not split
    check_fp8_sizes("fp8_tensorwise", experts, tp=2, etp=1)
    with pytest.raises(UserError, match=r"moe_intermediate_size over layout.etp=2 is 24"):
        check_fp8_sizes("fp8_tensorwise", experts, tp=2, etp=2)


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


@pytest.mark.parametrize(("values", "scale"), [([1.0, -2.0], 224.0), ([0.0, 0.0], 1.0)])
def test_a_delayed_fp8_parameter_is_quantised_by_its_own_values(values: list[float], scale: float) -> None:
    """Not by the scale of what it was before: it is set when the value comes."""

    class Fp8Parameter(torch.nn.Parameter):
        _quantizer = SimpleNamespace(scale=torch.ones(()))

        def copy_(self, value: torch.Tensor, non_blocking: bool = False) -> Fp8Parameter:
            self.scale_then = float(self._quantizer.scale)
            return self

    parameter = Fp8Parameter(torch.zeros(2), requires_grad=False)
    assign(parameter, torch.tensor(values))
    assert parameter.scale_then == scale


class Grouped(torch.nn.Module):
    """What of Transformer Engine's GroupedLinear keeps its scales: tensor t of GEMM g is number g * tensors + t."""

    def __init__(self, gemms: int, settings: dict[str, Any], numbered: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(fp8=None, fp8_recipe=None)
        self.config.__dict__.update(settings)
        self.fp8_meta: dict[str, Any] = {"num_gemms": gemms}
        for key, tensors in {"scaling_fwd": 3, "scaling_bwd": 2}.items():
            size = gemms * tensors
            scale = torch.arange(size, dtype=torch.float32) if numbered else torch.ones(size)
            self.fp8_meta[key] = SimpleNamespace(scale=scale, amax_history=100 + scale[None])

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        pass


def test_scales_of_experts_move_to_a_module_of_fewer_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As over ep=2: the second rank's module has the last two of four experts."""
    monkeypatch.setattr("megatron.core.fp8_utils.get_fp8_recipe", lambda config: None)
    settings = transformer_settings("fp8_delayed", Fp8Config())
    saved = scales(Grouped(4, settings, numbered=True))
    module = Grouped(2, settings)
    set_scales(module, saved[2:])
    assert module.fp8_meta["scaling_fwd"].scale.tolist() == [6, 7, 8, 9, 10, 11]
    assert module.fp8_meta["scaling_bwd"].scale.tolist() == [4, 5, 6, 7]
    assert module.fp8_meta["scaling_bwd"].amax_history.tolist() == [[104, 105, 106, 107]]


@pytest.mark.parametrize("precision", ["bf16", "fp8_tensorwise"])
def test_another_precision_has_no_use_for_scales(precision: str) -> None:
    saved = scales(Grouped(1, transformer_settings("fp8_delayed", Fp8Config()), numbered=True))
    module = Grouped(1, transformer_settings(precision, Fp8Config()))
    set_scales(module, saved)
    assert module.fp8_meta["scaling_fwd"].scale.tolist() == [1, 1, 1]
