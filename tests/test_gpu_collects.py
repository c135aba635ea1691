"""The GPU tests on a machine that has what the kit brings: not the packages that only tests of other rooms need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
import pytest
sys.modules["hypothesis"] = None
sys.exit(pytest.main(["--collect-only", "tests/gpu"]))
"""


def test_they_are_collected_without_hypothesis() -> None:
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "test_gpu_parity.py" in done.stdout
