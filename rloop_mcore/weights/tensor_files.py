"""Which tensors the safetensors of a Hugging Face folder hold, and where in its files. Imports no torch."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import parse_json, read_json

# of an element
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARDS = "model-*-of-*.safetensors"
FLOATS = ("F32", "BF16", "F16")  # what the weights of a model may be


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: bytes `begin` up to `end`, row-major, little-endian. `dtype` as safetensors names it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def catalogue(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of an HF folder by name, from the file headers alone. Raises UserError for a broken folder."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.exists():
        return _indexed(index)
    if single.exists():
        if shards := sorted(folder.glob(_SHARDS)):
            raise UserError(f"{folder} has {SINGLE_FILE} and {shards[0].name}: remove what is not the model's.")
        return read_header(single)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give a Hugging Face model folder (config.json and safetensors).")
    if any(folder.glob("*.bin")):
        raise UserError(
            f"{folder} has its weights in .bin files, which are pickles and may run code when loaded; save them as "
            "safetensors first."
        )
    raise UserError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}.")


def check_tensors(
    folder: Path,
    entries: Mapping[str, TensorEntry],
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
) -> None:
    """Raise UserError unless exactly the tensors `expected` (name -> shape) are among `entries`, the folder's, as
    floating-point numbers.

    Those in `ignored` may be there too, and those whose name ends with one of them that begins with a dot.
    """
    for name, shape in expected.items():
        entry = entries.get(name)
        if entry is None:
            raise UserError(f"{folder} lacks tensor {name} {list(shape)}, which its config.json calls for.")
        if entry.shape != shape:
            raise UserError(
                f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json calls for {list(shape)}."
            )
        if entry.dtype not in FLOATS:
            raise UserError(f"{entry.file}: tensor {name} is {entry.dtype}; it has to be F32, BF16 or F16.")
    names = tuple(ignored)
    suffixes = tuple(name for name in names if name.startswith("."))
    for name in sorted(entries.keys() - expected.keys() - set(names)):
        if not name.endswith(suffixes):
            raise UserError(f"{entries[name].file} holds tensor {name}, which this family does not know.")


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file: 8 bytes of header length, the JSON header, then the data."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise UserError(f"{file} is not a whole safetensors file: its header does not fit in its {size} bytes.")
        raw = stream.read(length)
    try:
        header = parse_json(raw)
        entries = {
            name: TensorEntry(
                file,
                str(entry["dtype"]),
                tuple(_whole(n) for n in entry["shape"]),
                *(8 + length + _whole(offset) for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a safetensors file: its header is unreadable ({error}).") from None
    end = max((entry.end for entry in entries.values()), default=0)
    if end > size:
        raise UserError(f"{file} is cut off: its header names {end} bytes and it has {size}.")
    _check_places(file, entries, 8 + length, size)
    return entries


def _check_places(file: Path, entries: dict[str, TensorEntry], begin: int, size: int) -> None:
    """Raises UserError unless the tensors follow one another without gaps, each as long as it has to be."""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        wanted = prod(entry.shape) * _BYTES.get(entry.dtype, 0)
        if entry.begin != begin or (entry.dtype in _BYTES and entry.end - begin != wanted):
            raise UserError(
                f"{file}: tensor {name} {entry.dtype} {list(entry.shape)} is at bytes {entry.begin} to {entry.end}; it "
                f"should begin at {begin} and have {wanted}."
            )
        begin = entry.end
    if begin != size:
        raise UserError(f"{file} has {size} bytes, and its tensors end at {begin}.")


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _indexed(index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map (tensor name to file name).")
    if any(
        not isinstance(file_name, str) or not file_name or Path(file_name).name != file_name
        for file_name in weight_map.values()
    ):
        raise UserError(f"{index}: weight_map has to name files of its own folder.")
    headers: dict[str, dict[str, TensorEntry]] = {}
    for file_name in sorted(set(weight_map.values())):
        file = index.parent / file_name
        if not file.is_file():
            raise UserError(f"{index} names {file_name}, which is not in the folder.")
        headers[file_name] = read_header(file)
    for file in sorted([*index.parent.glob(_SHARDS), *index.parent.glob(SINGLE_FILE)]):
        if file.name not in weight_map.values():
            raise UserError(f"{index} does not name {file.name}, which is in the folder.")
    for name, file_name in weight_map.items():
        if name not in headers[file_name]:
            raise UserError(f"{index} places tensor {name} in {file_name}, which does not hold it.")
    for file_name, header in headers.items():
        for name in header:
            if weight_map.get(name) != file_name:
                raise UserError(f"{index} does not place tensor {name}, which {file_name} holds.")
    return {name: headers[file_name][name] for name, file_name in weight_map.items()}
