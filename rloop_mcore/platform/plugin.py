"""Functions that a configuration names: shipped ones by a word, the user's by a dotted path."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from typing import Any

from rloop_mcore.errors import UserError


def load_function(key: str, name: str, shipped: Mapping[str, str]) -> Any:
    """The function behind `key`=`name`: one of `shipped` (word -> dotted path), or `package.module:function`.

    The user's module may be a file of the working directory. Raises UserError where there is none.
    """
    module_name, _, function_name = shipped.get(name, name).partition(":")
    known = f"use {', '.join(shipped)} or a dotted path package.module:function"
    if not module_name or not function_name:
        raise UserError(f"{key}={name!r} is no known {key.rpartition('.')[2]}: {known}")
    if name not in shipped and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise UserError(f"{key}={name!r}: cannot import {module_name!r} ({cause}); {known}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{key}={name!r}: module {module_name!r} has no function {function_name!r}; {known}")
    return function
