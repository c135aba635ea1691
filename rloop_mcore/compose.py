"""From Hydra overrides to a checked `Config`; every mistake is one sentence that names the key."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

import rloop_mcore
from rloop_mcore.config import Config
from rloop_mcore.errors import UserError

# of their messages, what is about them and not about the configuration
_HYDRAS_OWN = ("Config search path", "provider=", "Set the env", "reference_type=", "object_type=")

ConfigStore.instance().store(name="schema", node=Config)


def config_folder() -> Path:
    """The shipped `configs/`: inside an installed package, or at the top of a checkout."""
    package = Path(rloop_mcore.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


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
            OmegaConf.structured(config)  # a list within a list of numbers passes up to here
            return config
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(_sentence(error)) from error
    except RecursionError:
        files = _files_of(overrides)
        raise UserError(f"{files}: a file of the configuration holds itself, or is nested too deep.") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{_files_of(overrides)}: a file of the configuration holds no keys ({error}).") from error


def load_config_over(path: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run directory (`config.yaml`), with the keys that `overrides` name changed.

    Raises UserError as `load_config` does, and for a group such as experiment=NAME: the run has its own.
    """
    changed = OmegaConf.structured(load_config([*overrides, "model.path=?", "data.train=?", "run.dir=?"]))
    config = OmegaConf.structured(read_config(path))
    for key in (override.key_or_group for override in OverridesParser.create().parse_overrides(list(overrides))):
        if (config_folder() / key).is_dir():
            raise UserError(f"{key}=... chooses a whole configuration, and {path} is one: give single keys.")
        OmegaConf.update(config, key, OmegaConf.select(changed, key))
    return _typed(config)


def read_config(path: Path) -> Config:
    """The resolved configuration that a run directory holds (`config.yaml`). Raises UserError for another file."""
    try:
        tree = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(path))
        if missing := OmegaConf.missing_keys(tree):
            raise UserError(f"{path} is no run's configuration: it has no {min(missing)}.")
        return cast(Config, OmegaConf.to_object(tree))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {_sentence(error)}") from error
    except RecursionError:
        raise UserError(f"{path} is nested too deep to be read.") from None


def to_yaml(config: Config) -> str:
    """The YAML text that `read_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat(config: Config) -> dict[str, Any]:
    """Every key by its dotted name, with its value."""
    return dict(_leaves(OmegaConf.structured(config)))


def _typed(tree: Any, absent: str | None = None) -> Config:
    missing = sorted(OmegaConf.missing_keys(tree))
    if absent is not None:
        for key in missing:
            OmegaConf.update(tree, key, absent)
    elif missing:
        raise UserError(f"{missing[0]} has no value: give {missing[0]}=VALUE on the command line.")
    return cast(Config, OmegaConf.to_object(tree))


def _leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key in map(str, node):
        name = f"{prefix}{key}"
        value = None if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, OmegaConf.to_container(value) if OmegaConf.is_list(value) else value


@functools.cache
def _keys() -> frozenset[str]:
    return frozenset(name for name, _ in _leaves(OmegaConf.structured(Config)))


def _check_keys(overrides: Sequence[str], folder: Path) -> None:
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    keys = _keys()
    sections = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    for text in overrides:
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except HydraException as error:
            raise UserError(_unreadable(text)) from error
        key = override.key_or_group
        if override.is_sweep_override():
            lists = f"write {key}=[A,B] for a list, \"{key}='A,B'\" for a text"
            raise UserError(f"{text} has several values: {f'choose one {key}' if key in groups else lists}.")
        if key == "hydra.searchpath":
            _check_folders(override.value())
        if key in groups and override.value() is None:
            raise UserError(f"{text} chooses nothing: leave {key} out, or take a file of configs/{key}.")
        if key.startswith("hydra.") or key in keys | groups | sections:
            continue
        raise UserError(_unknown(key, groups, f" (in {text!r})"))


def _unknown(key: str, groups: set[str], where: str = "") -> str:
    """That there is no such key, and what is meant: one that is nearly spelled so; else, as of algorithm.lr, one whose
    last word begins so; else the most alike."""
    names, word = _keys() if "." in key else _keys() | groups, key.rpartition(".")[2]
    alike = [name for name in names if name.rpartition(".")[2].startswith(word)]
    close = difflib.get_close_matches(key, sorted(names), n=1, cutoff=0.85)
    near = (close or difflib.get_close_matches(key, sorted(alike or names), n=1, cutoff=0.0))[0]
    return f"{key} is not a key of the configuration{where}: did you mean {near}?"


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
    """The cause of a Hydra or OmegaConf error, its key first, without their hints on Hydra's own options."""
    if isinstance(error, UnicodeDecodeError):
        return f"a configuration file has to be UTF-8 text ({error.reason}, byte {error.start})."
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
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = getattr(cause, "full_key", None)
    if "@experiment." in lines[0] or (where and key == "experiment"):
        return f"{str(error).partition(':')[0]}: the first line must be # @package _global_ (docs/configs.md)."
    if isinstance(cause, ConfigKeyError):
        return where + _unknown(str(key), set())
    if not key and lines[0] == "Cannot merge DictConfig with ListConfig":
        return f"{where}a list is where KEY: VALUE lines are wanted, or these where a list is."
    if key and "is not a ListConfig" in lines[0]:
        return f"{where}{key} is a list: write {key}=[A,B]."
    if key:
        return f"{where}{key}: {lines[0].rstrip('.')}."
    return where + " ".join(line for line in lines if line != "full_key:" and not line.startswith(_HYDRAS_OWN))
