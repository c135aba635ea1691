"""What SGLang has for GPUs only and its tests here need: FP8 in blocks, and idle ranks of data parallel attention.

Python imports this module at start where its folder is on PYTHONPATH; it patches two of SGLang's modules as they are
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


def _torch_native_backend(module):
    module.TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda self: 1


_PATCHES = {
    "sglang.srt.layers.quantization.fp8": _fp8,
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
