"""A run's configuration as its `config.yaml` holds it, key by key; without Hydra, which takes a while to import."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from rloop_mcore.config import Config
from rloop_mcore.errors import UserError

# of their messages, what is about them and not about the configuration
_HYDRAS_OWN = ("Config search path", "provider=", "Set the env", "reference_type=", "object_type=")


def to_yaml(config: Config) -> str:
    """The YAML text that `read_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_config(path: Path) -> Config:
    """The resolved configuration that a run directory holds (`config.yaml`). Raises UserError for another file."""
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        if missing := OmegaConf.missing_keys(tree):
            raise UserError(f"{path} is no run's configuration: it has no {min(missing)}.")
        return cast(Config, OmegaConf.to_object(tree))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        old = " Of a run of an older version, take the line out." if isinstance(error, ConfigKeyError) else ""
        raise UserError(f"{path}: {sentence_of(error)}{old}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deep to be read.") from None


def flat(config: Config) -> dict[str, Any]:
    """Every key by its dotted name, with its value."""
    return dict(_leaves(asdict(config)))


@functools.cache
def key_names() -> frozenset[str]:
    return frozenset(flat(Config()))


def unknown_key(key: str, groups: Set[str], where: str = "") -> str:
    """That there is no such key, and what is meant: one that is nearly spelled so; else, as of algorithm.lr, one whose
    last word begins so; else the most alike."""
    names, word = key_names() if "." in key else key_names() | groups, key.rpartition(".")[2]
    alike = [name for name in names if name.rpartition(".")[2].startswith(word)]
    close = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.85)
    near = (close or difflib.get_close_matches(key, sorted(alike or names), n=1, cutoff=0.0))[0]
    return f"{key} is not a key of the configuration{where}: did you mean {near}?"


def sentence_of(error: BaseException) -> str:
    """The cause of an error of YAML or OmegaConf, its key first."""
    if isinstance(error, UnicodeDecodeError):
        return f"a configuration file has to be UTF-8 text ({error.reason}, byte {error.start})."
    while isinstance(error.__cause__, OmegaConfBaseException):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError):
        return unknown_key(str(key), frozenset())
    if not key and lines[0] == "Cannot merge DictConfig with ListConfig":
        return "a list is where KEY: VALUE lines are wanted, or these where a list is."
    if key and "is not Optional" in lines[0]:
        return f"{key} can't be null: give it a value."
    if key and "is not a ListConfig" in lines[0]:
        return f"{key} is a list: write {key}=[A,B]."
    if key:
        return f"{key}: {lines[0].rstrip('.')}."
    return " ".join(line for line in lines if line != "full_key:" and not line.startswith(_HYDRAS_OWN))


def _leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", None if value == MISSING else value
