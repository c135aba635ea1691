"""The command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.main.arguments import parse

REPOSITORY = Path(__file__).parents[2]


def test_overrides_may_stand_between_options() -> None:
    options = parse(["plan", "experiment=tiny", "--json", "cluster=h100_8", "--search", "layout.dp=8"])
    assert options.overrides == ["experiment=tiny", "cluster=h100_8", "layout.dp=8"]
    assert options.json
    assert options.search


@pytest.mark.parametrize("words", [["plan", "a=1", "--jsn"], ["plan", "a=1", "--json", "b"], ["status", "RUN", "a=1"]])
def test_what_a_command_does_not_take_is_named(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    assert f"{words[-1]}: not known to rloop {words[0]}" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--version"])
    assert caught.value.code == 0
    assert f'version="{capsys.readouterr().out.split()[1]}"' in (REPOSITORY / "setup.py").read_text()


def test_a_job_of_another_command() -> None:
    options = parse(["launch", "--dry-run", "cluster.nodes=1", "--", "evaluate", "--policy", "p", "--json", "o"])
    assert options.overrides == ["cluster.nodes=1"]
    assert options.inner == ["evaluate", "--policy", "p", "--json", "o"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch", "--", "evalute", "--policy", "p"], "evalute"),
        (["launch", "--", "evaluate", "--data", "d"], "--policy"),
        (["launch", "--dry-run", "--"], "COMMAND"),
        (["launch", "--sweep", "f", "--", "trace", "r"], "--sweep"),
        (["launch", "--", "launch", "cluster.nodes=1"], "a job runs no rloop launch"),
        (["launch", "--", "node", "cluster.nodes=1"], "a job runs no rloop node"),
        (["report", "r", "--live", "--port", "65536"], "from 0 to 65535"),
        (["cache", "r", "--show", "-3"], "-3"),
    ],
)
def test_a_mistake_is_told_before_anything_is_done(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(words)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_a_link_to_what_a_process_has_open_is_not_replaced(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "stdout"  # as /dev/stdout, whose folder root can write to
    link.symlink_to("/proc/self/fd/1")
    assert link.is_file()  # standard output goes to one here
    with pytest.raises(SystemExit):
        parse(["trace", "r", "--out", str(link)])
    assert f"{link} is no ordinary file" in capfd.readouterr().err


def test_what_jobs_start_is_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert "train" in listed
    assert "node" not in listed


def test_the_help_of_train_names_places_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["train", "--help"])
    places = re.findall(r": (/.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [Path(place).name for place in places] == ["config.py", "experiment"]
    assert all(Path(place).exists() for place in places)


COMMANDS = ("train", "launch", "plan", "preflight", "status", "evaluate", "report", "compare", "cache", "trace")
COMMANDS += ("convert", "grade")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_as_it_reads_with_examples_that_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([command, "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "%%" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    examples = re.findall(rf"\brloop ({command} .*?)(?:  .*)?$", printed.partition("examples:")[2], re.MULTILINE)
    assert examples
    for example in examples:
        load_config(getattr(parse(shlex.split(example)), "overrides", []), absent="(not given)")
