"""From Hydra overrides to a checked `Config`; every mistake is one sentence that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rloop_mcore.config import Config, config_folder
from rloop_mcore.errors import UserError
from rloop_mcore.run_config import flat, key_names, read_config, sentence_of, unknown_key

ConfigStore.instance().store(name="schema", node=Config)


def load_config(overrides: Sequence[str], absent: str | None = None) -> Config:
    """Compose the shipped YAML with `overrides` (`key=value`, `group=choice`).

    Raises UserError for an unknown key, an unknown choice, a value of the wrong type or a key that has no value; with
    `absent` such a key gets that: for a command that needs neither files nor a run directory.
    """
    folder = config_folder()
    _check_keys(overrides, folder)
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            config = _typed(compose("config", list(overrides)), absent)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(_sentence(error)) from error
    except RecursionError:
        files = _files_of(overrides)
        raise UserError(f"{files}: a file of the configuration holds itself, or is nested too deep.") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{_files_of(overrides)}: a file of the configuration holds no keys ({error}).") from error
    _check_lists(config)
    return config


def load_config_over(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run directory (`config.yaml`), with the keys that `overrides` name changed.

    Raises UserError as `load_config` does, and for a group such as experiment=NAME: the run has its own.
    """
    load_config(overrides, absent="?")  # for what it raises: they are of the run's keys, not of the shipped ones
    config = OmegaConf.structured(read_config(path))
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key == "hydra.searchpath" or (config_folder() / key).is_dir():
            raise UserError(f"{key}=... is for choosing a whole configuration, and {path} is one: give single keys.")
        OmegaConf.update(config, key, override.value())
    return _typed(config)


def _typed(tree: Any, absent: str | None = None) -> Config:
    missing = sorted(OmegaConf.missing_keys(tree))
    if absent is not None:
        for key in missing:
            OmegaConf.update(tree, key, absent)
    elif missing:
        wanted = " ".join(f"{key}=VALUE" for key in missing)
        raise UserError(f"no value for {', '.join(missing)}: give {wanted} on the command line.")
    return cast(Config, OmegaConf.to_object(tree))


def _check_lists(config: Config) -> None:
    """OmegaConf takes a list within a list of numbers for one."""
    for key, value in flat(config).items():
        for entry in value if isinstance(value, list) else ():
            if isinstance(entry, list | dict):
                raise UserError(f"{key} holds {entry}: its entries are single values, {key}=[A,B].")


def _check_keys(overrides: Sequence[str], folder: Path) -> None:
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    keys = key_names()
    sections = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise UserError(_unreadable(text)) from error
        key = override.key_or_group
        if not key:
            raise UserError(_unreadable(text))
        if override.is_delete():
            raise UserError(f"{text} takes a key away, and a run has them all: leave it out, or write {key}=VALUE.")
        if override.is_sweep_override():
            lists = f"write {key}=[A,B] for a list, \"{key}='A,B'\" for a text"
            raise UserError(f"{text} has several values: {f'choose one {key}' if key in groups else lists}.")
        value = override.value()
        if key == "hydra.searchpath":
            _check_folders(value)
        choices = value if isinstance(value, list) else [value]
        if key in groups and not isinstance(value, dict) and not all(isinstance(choice, str) for choice in choices):
            raise UserError(f"{text} chooses nothing: leave {key} out, or take a file of configs/{key}.")
        if key not in keys | groups | sections | {"hydra.searchpath"}:
            raise UserError(unknown_key(key, groups, f" (in {text!r})"))


def _unreadable(text: str) -> str:
    """Why Hydra's grammar does not take an override."""
    key, sign, value = text.partition("=")
    if not (key and sign):
        return f"{text!r} is not an override: write key=value, e.g. run.seed=1."
    if value.startswith("~"):
        return f"{key}={value}: ~ is not expanded here: write {key}=$HOME{value[1:]}."
    return (
        f"{key}={value} cannot be read: letters beyond ASCII and signs such as = and ( need quotes within the shell's, "
        f"\"{key}='VALUE'\", and so does each entry of a list that has some, \"{key}=['A','B']\"."
    )


def _files_of(overrides: Sequence[str]) -> str:
    """The choices among `overrides` of what to read, where an error doesn't say which it is about."""
    groups = {path.name for path in config_folder().iterdir() if path.is_dir()}
    return ", ".join(text for text in overrides if text.partition("=")[0] in groups)


def _check_folders(searchpath: Any) -> None:
    """Hydra would only warn of a folder that is not there, and say that what is in it is unknown."""
    for place in searchpath if isinstance(searchpath, list) else ():
        path = str(place).removeprefix("file://")
        if "://" not in path and not Path(path).is_dir():
            raise UserError(f"hydra.searchpath holds {path}, which is no folder.")


def _sentence(error: Exception) -> str:
    """The cause of an error in composing, its key first, without Hydra's hints on its own options."""
    cause: BaseException = error
    where = ""
    if str(error).startswith("In '") and isinstance(error.__context__, OmegaConfBaseException):
        where, cause = f"{str(error).partition(':')[0]}: ", error.__context__  # In 'experiment/mine': ...
    while isinstance(cause.__cause__, (HydraException, OmegaConfBaseException)):
        cause = cause.__cause__
    if isinstance(cause, MissingConfigException) and cause.missing_cfg_file and cause.options:
        group, _, name = cause.missing_cfg_file.partition("/")
        if group == "model" and "/" in name:
            return f"model={name} is no file of configs/model: give a model's folder as model.path={name}."
        near = difflib.get_close_matches(name, cause.options, n=1, cutoff=0.0)[0]
        return f"{group}={name}: did you mean {near}? There are {', '.join(cause.options)}."
    of_experiment = where and getattr(cause, "full_key", None) == "experiment"
    if of_experiment or "@experiment." in str(cause).strip().partition("\n")[0]:
        return f"{str(error).partition(':')[0]}: the first line must be # @package _global_ (docs/configs.md)."
    return where + sentence_of(cause)
