"""Blank the GPU code of all architectures but one in a shared library, so that a wheel of it compresses well.

CUDA's "fatbin" containers hold the same kernels once for each architecture, as machine code (cubin) or PTX. An entry
that is not machine code for the architecture is overwritten with zeros, in place; nothing moves, its header stays. On
another GPU the first kernel fails.
"""

from __future__ import annotations

import mmap
import struct
from argparse import ArgumentParser
from collections.abc import Iterator

MAGIC = struct.pack("<IHH", 0xBA55ED50, 1, 16)  # with the container's version and header size
CUBIN = 2  # PTX is 1


def entries(library: mmap.mmap) -> Iterator[tuple[int, int, int, int]]:
    """(kind, architecture, where its code starts, bytes) of every entry of every container."""
    at = library.find(MAGIC)
    while at != -1:
        end = at + 16 + struct.unpack_from("<Q", library, at + 8)[0]
        entry = at + 16
        while entry + 64 <= min(end, len(library)):
            kind, header, size = struct.unpack_from("<HxxIQ", library, entry)
            architecture = struct.unpack_from("<I", library, entry + 28)[0]
            if kind not in (1, CUBIN) or header < 64 or entry + header + size > len(library):
                break  # the bytes of the magic number by chance
            yield kind, architecture, entry + header, size
            entry += header + size
        at = library.find(MAGIC, max(entry, at + 16))


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("architecture", type=int, help="90 for an H100 or H200")
    options = parser.parse_args()
    path, architecture = options.library, options.architecture
    kept = blanked = 0
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as library:
        for kind, of, start, size in list(entries(library)):
            if kind == CUBIN and of == architecture:
                kept += size
            else:
                library[start : start + size] = bytes(size)
                blanked += size
    print(f"{path}: kept {kept / 1e6:.1f} MB of sm_{architecture}, blanked {blanked / 1e6:.1f} MB")
    if kept == 0:
        raise SystemExit(f"{path} has no machine code for sm_{architecture}.")


if __name__ == "__main__":
    main()
