"""The FP8 simulation against FP8 in NumPy, inside Megatron's own linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fp8_reference as reference
import numpy as np
import pytest
import torch
from ranks import launch

from rloop_mcore import platform
from rloop_mcore.config import Fp8Config

platform.setup("cpu", threads=1)

import torch.distributed as dist  # noqa: E402
from fp8_models import LAYERS, gpt, linear, loss_and_gradients  # noqa: E402
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel  # noqa: E402
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402

from rloop_mcore.platform.fp8_simulation import (  # noqa: E402
    E4M3,
    E5M2,
    SIMULATED,
    finish_update,
    reset,
    simulate_fp8,
    through_fp8,
)

FORMATS = [(E4M3, reference.E4M3), (E5M2, reference.E5M2)]
PRECISIONS = sorted(SIMULATED)


@pytest.fixture(autouse=True, scope="module")
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def wide(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal values over many magnitudes, so that every recipe meets large, small and underflowing ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 2.0 ** (6 * torch.randn(shape, generator=generator))


# --- values and scales


@pytest.mark.parametrize(("dtype", "format"), FORMATS)
def test_rounding_is_to_nearest_even_and_saturates(dtype: torch.dtype, format: tuple[int, int]) -> None:
    values = reference.positive_values(format)
    middles = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middles, middles * (1 - 1e-6), middles * (1 + 1e-6), values[-1:] * 3])
    x = np.concatenate([x, -x]).astype(np.float32)[None]
    got = through_fp8(torch.from_numpy(x), dtype, amax=torch.tensor(values[-1], dtype=torch.float32))  # the scale is 1
    np.testing.assert_array_equal(got.numpy(), reference.nearest(x, format))


@pytest.mark.parametrize(("dtype", "format"), FORMATS)
@pytest.mark.parametrize("tile", [(1, 32), (32, 1), (1, 128), (128, 1), (128, 128)])
@pytest.mark.parametrize("shape", [(64, 256), (131, 77), (1, 5)])
def test_tiles_share_a_power_of_two_scale(
    dtype: torch.dtype, format: tuple[int, int], tile: tuple[int, int], shape: tuple[int, int]
) -> None:
    x = wide(*shape)
    np.testing.assert_array_equal(through_fp8(x, dtype, tile).numpy(), reference.tiled(x.numpy(), format, tile))


@pytest.mark.parametrize(("dtype", "format"), FORMATS)
def test_a_tensor_shares_a_float32_scale(dtype: torch.dtype, format: tuple[int, int]) -> None:
    x = wide(37, 41)
    np.testing.assert_array_equal(through_fp8(x, dtype).numpy(), reference.per_tensor(x.numpy(), format))
    stale = torch.tensor(0.01)  # of a tensor that was much smaller: the large values saturate
    got = through_fp8(x, dtype, amax=stale)
    np.testing.assert_array_equal(got.numpy(), reference.per_tensor(x.numpy(), format, 0.01))
    torch.testing.assert_close(got.abs().max(), stale)


@pytest.mark.parametrize("tile", [None, (1, 32), (128, 128)])
def test_zeros_stay_and_what_is_not_finite_is_not_hidden(tile: tuple[int, int] | None) -> None:
    assert not through_fp8(torch.zeros(3, 40), E4M3, tile).any()
    assert through_fp8(torch.zeros(0, 40), E4M3, tile).shape == (0, 40)
    x = wide(3, 40)
    x[0, 0], x[1, 1], x[2, 2] = torch.inf, -torch.inf, torch.nan
    got = through_fp8(x, E5M2, tile)
    torch.testing.assert_close(got.isfinite(), x.isfinite())
    assert torch.equal(got[:2][~x[:2].isfinite()], x[:2][~x[:2].isfinite()])
    assert got[2, 2].isnan()


@pytest.mark.parametrize("tile", [None, (1, 32)])
def test_the_smallest_numbers_need_no_infinite_scale(tile: tuple[int, int] | None) -> None:
    x = torch.full((1, 32), 1e-38)
    torch.testing.assert_close(through_fp8(x, E4M3, tile), x, rtol=0.07, atol=0)


# --- one linear layer


def expected(
    precision: str, x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, amax: Any = (None,) * 3
) -> dict[str, torch.Tensor]:
    """The three GEMMs by hand on operands from NumPy; x [tokens, in], gradient [tokens, out]."""
    tensors = {"input": (x, amax[0]), "weight": (weight, amax[1]), "gradient": (gradient, amax[2])}

    def operand(role: str, summed: int) -> torch.Tensor:
        tensor, largest = tensors[role]
        # Copied into torch's memory: the last bits of a product depend on the operands' alignment.
        return torch.tensor(reference.operand(tensor.detach().numpy(), precision, role, summed, largest))

    return {
        "out": operand("input", 1) @ operand("weight", 1).t(),
        "input": operand("gradient", 1) @ operand("weight", 0),
        "weight": operand("gradient", 0).t() @ operand("input", 0),
    }


def run(module: Any, x: torch.Tensor, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().unsqueeze(1).requires_grad_()
    module.zero_grad()
    out, _ = module(x)
    out.backward(gradient.unsqueeze(1))
    return {"out": out.squeeze(1).detach(), "input": x.grad.squeeze(1), "weight": module.weight.grad.clone()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("parallel", ["column", "row"])
def test_all_three_gemms_see_quantised_operands(precision: str, parallel: str) -> None:
    module = linear(parallel, 160, 96)
    plain = run(module, x := wide(50, 160, seed=1), gradient := wide(50, 96, seed=2))
    simulate_fp8([in_layer(module)], precision, Fp8Config(), num_layers=1)
    got = run(module, x, gradient)
    for name, value in expected(precision, x, module.weight, gradient).items():
        assert torch.equal(got[name], value), name
        assert not torch.allclose(got[name], plain[name], rtol=1e-3), name


def test_bias_is_added_and_summed_unquantised() -> None:
    module = linear("column", 64, 32, bias=True)
    torch.nn.init.normal_(module.bias)
    simulate_fp8([in_layer(module)], "mxfp8", Fp8Config(), num_layers=1)
    got = run(module, x := wide(32, 64), gradient := wide(32, 32, seed=2))
    assert torch.equal(got["out"], expected("mxfp8", x, module.weight, gradient)["out"] + module.bias)
    assert torch.equal(module.bias.grad, gradient.sum(0))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bf16_comes_and_goes_and_an_empty_expert_runs(precision: str) -> None:
    module = linear("row", 64, 32, dtype=torch.bfloat16)
    simulate_fp8([in_layer(module)], precision, Fp8Config(), num_layers=1)
    got = run(module, wide(32, 64).bfloat16(), wide(32, 32).bfloat16())
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    empty = run(module, torch.zeros(0, 64).bfloat16(), torch.zeros(0, 32).bfloat16())
    assert empty["out"].shape == (0, 32)
    assert not empty["weight"].any()
    finish_update([module])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_bad_gradient_reaches_the_optimizer(precision: str, bad: float) -> None:
    module = linear("column", 64, 32)
    simulate_fp8([in_layer(module)], precision, Fp8Config(), num_layers=1)
    gradient = wide(32, 32)
    gradient[3, 5] = bad
    got = run(module, wide(32, 64), gradient)
    assert not got["weight"][5].isfinite().any()
    assert not got["input"][3].isfinite().any()


# --- delayed scaling


def largest(*tensors: torch.Tensor) -> list[float]:
    return [tensor.abs().max().item() for tensor in tensors]


def test_delayed_scales_are_the_last_updates() -> None:
    module = linear("column", 64, 32)
    chunk = in_layer(module)
    simulate_fp8([chunk], "fp8_delayed", Fp8Config(), num_layers=1)
    batches = [(wide(16, 64, seed=i), wide(16, 32, seed=10 + i)) for i in range(4)]

    def check(index: int, amax: Any) -> None:
        x, gradient = batches[index]
        got = run(module, x, gradient)
        for name, value in expected("fp8_delayed", x, module.weight, gradient, amax).items():
            assert torch.equal(got[name], value), name

    none_yet = (None, None, None)
    check(0, none_yet)
    check(1, none_yet)  # a second micro-batch of the first update
    finish_update([chunk])
    first = largest(torch.cat([batches[0][0], batches[1][0]]), module.weight, torch.cat([b[1] for b in batches[:2]]))
    check(2, first)
    with torch.no_grad():
        module(1e6 * batches[2][0].unsqueeze(1))  # no backward pass: not a part of training
    finish_update([chunk])
    second = largest(batches[2][0], module.weight, batches[2][1])
    check(3, second)

    run(module, batches[3][0], batches[3][1] * torch.inf)  # skipped by the optimizer, and no scale for the next
    finish_update([chunk])
    check(2, (max(largest(batches[3][0])), second[1], second[2]))
    finish_update([chunk])
    finish_update([chunk])  # an update that saw nothing changes nothing
    check(3, second)
    reset([chunk])
    check(0, none_yet)


def in_layer(module: torch.nn.Module, number: int = 1) -> torch.nn.Module:
    """A chunk of one layer that holds only `module`."""
    layer = torch.nn.Module()
    layer.inner, layer.layer_number = module, number
    chunk = torch.nn.Module()
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = torch.nn.ModuleList([layer])
    return chunk


# --- whole models


@pytest.mark.parametrize("experts", [None, 4])
def test_the_layers_linears_are_simulated_and_nothing_else(experts: int | None) -> None:
    model = gpt(experts=experts)
    simulate_fp8([model], "mxfp8", Fp8Config(first_bf16_layers=1, last_bf16_layers=2), LAYERS)
    simulated = {name for name, module in model.named_modules() if "_forward_impl" in vars(module)}
    mlps = [f"mlp.experts.local_experts.{i}" for i in range(experts)] if experts else ["mlp"]
    inner = [f"self_attention.linear_{name}" for name in ("qkv", "proj")]
    inner += [f"{mlp}.linear_{name}" for mlp in mlps for name in ("fc1", "fc2")]
    assert simulated == {f"decoder.layers.{i}.{name}" for i in range(1, LAYERS - 2) for name in inner}
    assert isinstance(model.output_layer, ColumnParallelLinear)
    assert all(isinstance(model.get_submodule(name), ColumnParallelLinear | RowParallelLinear) for name in simulated)


def test_layers_of_a_later_stage_keep_their_number() -> None:
    module = linear("row", 32, 32)
    simulate_fp8([in_layer(module, number=5)], "mxfp8", Fp8Config(first_bf16_layers=1, last_bf16_layers=1), 6)
    assert "_forward_impl" in vars(module)
    last = linear("row", 32, 32)
    simulate_fp8([in_layer(last, number=6)], "mxfp8", Fp8Config(last_bf16_layers=1), 6)
    assert "_forward_impl" not in vars(last)


def test_foreign_layers_are_not_silently_left_alone() -> None:
    with pytest.raises(RuntimeError, match="no Megatron linear layers"):
        simulate_fp8([in_layer(torch.nn.Linear(2, 2))], "mxfp8", Fp8Config(), 1)


def one_update(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    gradients = loss_and_gradients(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    finish_update([model])
    return gradients


def test_a_restored_run_continues_bit_identically(tmp_path: Path) -> None:
    """The scales travel in Megatron's own checkpoint of the model, experts' too."""
    original, restored = gpt(experts=4), gpt(experts=4, seed=1)
    for model in (original, restored):
        simulate_fp8([model], "fp8_delayed", Fp8Config(), LAYERS)
    one_update(original, seed=1)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    dist_checkpointing.save({"model": original.sharded_state_dict(metadata=metadata)}, str(tmp_path))
    state = dist_checkpointing.load({"model": restored.sharded_state_dict(metadata=metadata)}, str(tmp_path))
    restored.load_state_dict(state["model"])
    wanted, got = one_update(original, seed=2), one_update(restored, seed=2)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    reset([restored])  # the scales mattered
    one_update(original, seed=3)
    wanted, got = one_update(original, seed=4), one_update(restored, seed=4)
    assert not all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_recomputation_changes_nothing() -> None:
    results = []
    for recompute in (False, True):
        model = gpt(recompute=recompute)
        simulate_fp8([model], "fp8_delayed", Fp8Config(), LAYERS)
        one_update(model, seed=1)
        results.append(one_update(model, seed=2) | dict(model.named_buffers()))
    plain, recomputed = results
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_relative_errors_of_a_small_model() -> None:
    """The table of docs/precision.md: `pytest -s -k relative_errors tests/platform/test_fp8_simulation.py`."""
    exact = loss_and_gradients(gpt(), seed=1)
    output, gradient, outliers = {}, {}, {}
    for precision in PRECISIONS:
        got = loss_and_gradients(simulated(precision), seed=1)
        output[precision] = relative_error(got, exact, "out")
        gradient[precision] = relative_error(got, exact, "weight")
        hard = loss_and_gradients(simulated(precision, outlier=2.0**16), seed=1)  # computes the same if exact
        outliers[precision] = relative_error(hard, exact, "out")
        print(f"{precision} | {output[precision]:.1%} | {gradient[precision]:.1%} | {outliers[precision]:.1%}")
    assert all(0.02 < error < 0.12 for error in output.values())
    # Gradients in E4M3 have one bit more than in E5M2.
    e5m2 = min(gradient["fp8_tensorwise"], gradient["fp8_delayed"])
    assert max(gradient["mxfp8"], gradient["fp8_blockwise"]) < 0.95 * e5m2 < 0.2
    # One outlier costs its tensor, its block of 128 or its block of 32 the small values.
    assert output["mxfp8"] < outliers["mxfp8"] < 0.8 * outliers["fp8_blockwise"]
    assert outliers["fp8_blockwise"] < 0.8 * outliers["fp8_tensorwise"]


def simulated(precision: str, outlier: float = 1.0) -> torch.nn.Module:
    """The model of seed 0; delayed scales are another batch's. One feature of what enters qkv and fc1 is `outlier`
    times as large and their weights for it as much smaller: without quantisation nothing changes.
    """
    model = gpt()
    with torch.no_grad():
        for layer in model.decoder.layers:
            for norm, into in (
                (layer.input_layernorm, layer.self_attention.linear_qkv),
                (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
            ):
                norm.weight[0] *= outlier
                into.weight[:, 0] /= outlier
    simulate_fp8([model], precision, Fp8Config(), LAYERS)
    loss_and_gradients(model, seed=7)
    finish_update([model])
    return model


def relative_error(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], kind: str) -> float:
    """|got - exact| / |exact|, Frobenius norms over all tensors of the kind."""
    names = [name for name in exact if name.endswith(kind)]
    difference = sum((got[name] - exact[name]).square().sum() for name in names)
    return float((difference / sum(exact[name].square().sum() for name in names)).sqrt())


# --- two ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("fp8") / "out.pt"
    launch(Path(__file__).with_name("worker_fp8.py"), out, processes=2, timeout_s=200)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("parallel", ["column", "row"])
def test_tensor_parallel_ranks_compute_the_same_product(
    two_ranks: dict[str, Any], parallel: str, sequence_parallel: bool
) -> None:
    """Where the shards are whole blocks, as wide as needed here, splitting a matrix changes no scale."""
    given = two_ranks[f"{parallel} sp={sequence_parallel}"]
    for name, value in expected("mxfp8", given["x"], given["full_weight"], given["gradient"]).items():
        torch.testing.assert_close(given[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


def test_ranks_agree_on_delayed_scales(two_ranks: dict[str, Any]) -> None:
    given = two_ranks["delayed"]
    assert given["scales"] == [[3.0, 5.0, 7.0]] * 2
    assert given["expert_scales"] == [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]  # one expert a rank: nothing to agree on
