"""What SGLang has for GPUs only and its tests here need: FP8 in blocks, experts of other ranks, and idle ranks of data
parallel attention.

Python imports this module at start where its folder is on PYTHONPATH; it patches three of SGLang's modules as they are
imported. Weights stay as they were loaded, as on a Hopper GPU; what multiplies with them is plain torch.
"""

import importlib.abc
import importlib.machinery
import sys


def _fp8(module):
    from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

    def linear(input, weight, block_size, weight_scale, input_scale=None, bias=None):
        import torch

        whole = block_quant_dequant(weight, weight_scale, block_size, input.dtype)
        return torch.nn.functional.linear(input, whole, bias)

    module.dispatch_w8a8_block_fp8_linear = lambda *args, **kwargs: linear
    module.Fp8LinearMethod.process_weights_after_loading_block_quant = lambda self, layer: None

    def experts(self, layer, dispatch_output):
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

        x, block = dispatch_output.hidden_states, self.weight_block_size
        w13 = block_quant_dequant(layer.w13_weight, layer.w13_weight_scale_inv, block, x.dtype)
        w2 = block_quant_dequant(layer.w2_weight, layer.w2_weight_scale_inv, block, x.dtype)
        return StandardCombineInput(_experts(x, dispatch_output.topk_output, w13, w2))

    module.Fp8MoEMethod.apply = experts
    module.Fp8MoEMethod.process_weights_after_loading_block_quant = lambda self, layer: None


def _experts(x, routes, w13, w2):
    """What the experts of this rank add for each token. Expert -1 is one of another rank: the kernels skip it too."""
    from torch.nn.functional import linear, silu

    out = x.new_zeros(x.shape)
    for expert, (gate_up, down) in enumerate(zip(w13, w2, strict=True)):
        token, choice = (routes.topk_ids == expert).nonzero(as_tuple=True)
        gate, up = linear(x[token], gate_up).chunk(2, dim=-1)
        weight = routes.topk_weights[token, choice, None].to(x.dtype)
        out.index_add_(0, token, weight * linear(silu(gate) * up, down))
    return out


def _fused_moe_native(module):
    module.moe_forward_native = lambda layer, x, routes, config: _experts(x, routes, layer.w13_weight, layer.w2_weight)


def _torch_native_backend(module):
    module.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1


_PATCHES = {
    "sglang.srt.layers.quantization.fp8": _fp8,
    "sglang.srt.layers.moe.fused_moe_native": _fused_moe_native,
    "sglang.srt.layers.attention.torch_native_backend": _torch_native_backend,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _PATCHES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _PATCHES[fullname](module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder())
