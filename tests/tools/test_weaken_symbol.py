"""The tool that lets a library of the GPU kit load although another one lacks a symbol it names."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "weaken_symbol.py"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_loads_without_the_symbol(tmp_path: Path) -> None:
    source, library = tmp_path / "asks.c", tmp_path / "libasks.so"
    source.write_text("int nowhere(void); int asks(int call) { return call ? nowhere() : 7; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    with pytest.raises(OSError, match="undefined symbol: nowhere"):
        ctypes.CDLL(str(library))
    subprocess.run([sys.executable, TOOL, library, "nowhere"], check=True)
    assert ctypes.CDLL(str(library)).asks(0) == 7
    again = subprocess.run([sys.executable, TOOL, library, "elsewhere"], capture_output=True, text=True, check=False)
    assert (again.returncode, "does not ask for a symbol elsewhere" in again.stderr) == (1, True)
