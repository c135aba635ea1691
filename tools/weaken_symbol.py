"""Let a shared library load where another library lacks a symbol that it names: the symbol becomes weak.

Python loads libraries with all symbols resolved at once. A weak symbol that nobody has is then no error but a null
pointer: whoever calls it crashes.
"""

from __future__ import annotations

import mmap
import struct
from argparse import ArgumentParser

DYNSYM, WEAK = 11, 2


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("library")
    parser.add_argument("symbol")
    options = parser.parse_args()
    path, symbol = options.library, options.symbol.encode()
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as library:
        if library[:6] != b"\x7fELF\x02\x01":
            raise SystemExit(f"{path} is no 64-bit little-endian ELF file.")
        (sections,) = struct.unpack_from("<Q", library, 0x28)
        size, count = struct.unpack_from("<HH", library, 0x3A)
        headers = [struct.unpack_from("<IIQQQQIIQQ", library, sections + size * n) for n in range(count)]
        for _, kind, _, _, start, length, strings, _, _, entry in headers:
            if kind != DYNSYM:
                continue
            names = headers[strings][4]
            for at in range(start, start + length, entry):
                name = names + struct.unpack_from("<I", library, at)[0]
                undefined = struct.unpack_from("<H", library, at + 6)[0] == 0
                if undefined and library[name : name + len(symbol) + 1] == symbol + b"\0":
                    library[at + 4] = WEAK << 4 | library[at + 4] & 15
                    return
    raise SystemExit(f"{path} does not ask for a symbol {options.symbol}.")


if __name__ == "__main__":
    main()
