"""Reading pickles of known kinds, without running what they say."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from enum import Enum
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


def member_of(kind: Any, name: str) -> Enum:
    """Stands for getattr: Python 3.11.0 to 3.11.3 pickle a member of an enumeration as that. Raises UnpicklingError for
    anything else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it asks for {name!r} of {kind!r}, which is no member of an enumeration")
    return kind[name]
