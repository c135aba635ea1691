"""The model that conversions begin with."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_folder(tmp_path / "source", "qwen2", kv_heads=2, ratio=2, tied=False)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"
