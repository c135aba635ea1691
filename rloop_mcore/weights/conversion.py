"""What the conversions in both directions share: the plan, threads within a bound of memory, checksums."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from rloop_mcore.errors import Fault, UserError
from rloop_mcore.weights.hf_folder import TOKENIZER_FILES, bytes_of, is_finite

HF_FILES = "hf"  # folder in a checkpoint of ours: the config and tokenizer files of the model
AT_ONCE = 2  # of the largest tensor, in memory

Progress = Callable[[int], None]  # told how many bytes more are done


@dataclass(frozen=True)
class Conversion:
    """What a conversion is going to do."""

    source: Path
    target: Path
    tensors: int  # of the HF side
    files: dict[str, int]  # of the result, with their bytes of tensors
    largest: int  # bytes of the largest tensor
    warnings: list[str]
    run: Callable[[Progress], None]  # raises Fault where what was written is not what was read

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def memory(self) -> int:
        """Bytes that copies of tensors take at once, but for one that needs more by itself."""
        return AT_ONCE * self.largest


class Stopped(Exception):
    """Another thread failed, or the user gave up."""


class Memory:
    """Copies of tensors that exist at one time, in bytes; threads wait for room, and end here once they are to stop."""

    def __init__(self, limit: int) -> None:
        self._free = self._limit = limit
        self._changed = threading.Condition()
        self._stopped = False

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Room for `size` bytes, for the block; all there is where it is more than that. Raises Stopped."""
        size = min(size, self._limit)
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._free >= size)
            if self._stopped:
                raise Stopped
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def in_threads(work: Sequence[Callable[[], None]], threads: int, memory: Memory) -> None:
    """Run all of it. At the first error, or Ctrl-C, the rest ends where it next asks for `memory`; raises it."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            done, _ = wait([pool.submit(item) for item in work], return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            memory.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def checksum(tensor: torch.Tensor) -> str:
    """Of the bytes of a tensor in host memory."""
    return xxhash.xxh3_128(bytes_of(tensor)).hexdigest()


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A finite tensor in `dtype`. Raises UserError where that has no room for a value."""
    result = tensor.to(dtype)
    if dtype != tensor.dtype and not is_finite(result):
        word, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise UserError(f"{name} has values beyond {word}'s {most:g}: give another --dtype.")
    return result


def compare(name: str, tensor: torch.Tensor, expected: str, target: Path) -> None:
    """Raises Fault where a tensor that was written to `target` is not the one that was read."""
    if checksum(tensor) != expected:
        raise Fault(f"{target} was not written: {name}, mapped back from its files, is not what was read.")


def warnings(files: Path) -> list[str]:
    """What the user should know of the folder that has the model's config and tokenizer files."""
    if any((files / name).exists() for name in TOKENIZER_FILES):
        return []
    return [f"{files} has no tokenizer files, so the result has none either."]
