"""Stands in for `sgl_kernel` where SGLang runs on a CPU: the real package holds CUDA kernels and fails to load there.

SGLang imports names from it and its submodules at start, and has torch implementations to fall back on. So any name can
be imported; calling one raises.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _Stub(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*args, **kwargs):
            raise NotImplementedError(f"{self.__name__}.{name}: this process runs with stubbed CUDA kernels")

        return kernel


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule but scalar_type, whose absence SGLang provides for."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.startswith("sgl_kernel.") and fullname != "sgl_kernel.scalar_type":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        pass


__path__ = []
__version__ = "0.4.10"  # SGLang asks for this at least
sys.modules[__name__].__class__ = _Stub
sys.meta_path.insert(0, _Finder())
