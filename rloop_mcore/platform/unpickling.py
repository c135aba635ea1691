"""Reading pickles of known kinds, without running what they say."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import IO, Any

import torch

TORCH_DTYPES = {("torch", name): found for name, found in vars(torch).items() if isinstance(found, torch.dtype)}


class ListedUnpickler(pickle.Unpickler):
    """Knows the classes and functions of a list, by their exact names, and nothing else."""

    def __init__(self, file: IO[bytes], listed: Mapping[tuple[str, str], Any]) -> None:
        """listed: by module and name. Loading raises UnpicklingError where the pickle asks for anything else."""
        super().__init__(file)
        self._listed = listed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._listed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which nothing of this kind needs")
        return self._listed[module, name]
