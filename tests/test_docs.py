"""README, CONTRIBUTING and docs/: what they name is there."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.main.arguments import parse

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = {"small", "mine"}  # experiments that a reader is told to write
FILES = {".py", ".md", ".json", ".jsonl", ".txt", ".yaml", ".safetensors"}  # which a word with a dot may be


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    lines = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line).lower().replace(" ", "-") for line in lines}


def keys_of(section: type, prefix: str = "") -> set[str]:
    found = set()
    for entry in fields(section):  # type: ignore[arg-type]
        kind = get_type_hints(section)[entry.name]
        inner = keys_of(kind, f"{prefix}{entry.name}.") if is_dataclass(kind) else set()
        found |= {f"{prefix}{entry.name}"} | inner
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text_of(page)):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_are_in_the_schema(page: Path) -> None:
    known = keys_of(Config)
    sections = "|".join(sorted(key for key in known if "." not in key))
    named = re.findall(rf"`(?:(?:{sections})\.[a-z_0-9.]+)(?=[`=])", text_of(page))
    for key in (name.strip("`") for name in named):
        assert key in known or Path(key).suffix in FILES, key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_choices_of_groups_are_there(page: Path) -> None:
    groups = "|".join(folder.name for folder in (ROOT / "configs").iterdir() if folder.is_dir())
    for group, choice in re.findall(rf"(?<=[` ])({groups})=([a-z][a-z0-9_.]*)(?=[`, ])", text_of(page)):
        assert choice in OWN or (ROOT / "configs" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_can_be_typed(page: Path) -> None:
    """Those without a placeholder (`...`, [OPTION], KEY=VALUE) are parsed, and their keys composed."""
    blocks = re.findall(r"^ *```\n(.*?)^ *```", text_of(page), re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        if (found := re.match(r"(?:\.venv/bin/)?rloop (.+)", line)) is None or re.search(r"\.\.\.|\[[^=]*\]|KEY", line):
            continue
        overrides = getattr(parse(shlex.split(found[1], comments=True)), "overrides", [])
        assert isinstance(load_config(overrides, absent="(not given)"), Config), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_experiments_can_be_copied(page: Path, tmp_path: Path) -> None:
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)):
        folder = tmp_path / "experiment"
        folder.mkdir(exist_ok=True)
        (folder / f"copied{number}.yaml").write_text(block, encoding="utf-8")
        overrides = [f"hydra.searchpath=[{tmp_path}]", f"experiment=copied{number}"]
        assert load_config(overrides, absent="(not given)").algorithm.iterations > 0
