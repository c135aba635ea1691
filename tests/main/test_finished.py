"""What starts a run and what doesn't: a finished one with nothing left to do, a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main import train
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.run_config import to_yaml


@pytest.mark.parametrize(
    ("override", "code", "starts"),
    [
        ("run.seed=0", 0, False),
        ("algorithm.iterations=3", 0, True),
        ("checkpoint.keep_best=1", 0, True),
        ("run.seed=0", 1, True),  # it failed after its last record
        ("run.seed=0", None, True),  # it was killed there
    ],
)
def test_what_starts_a_finished_run(
    override: str,
    code: int | None,
    starts: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = ["experiment=tiny", f"run.dir={tmp_path / 'run'}"]
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.config.write_text(to_yaml(load_config(tiny)))
    for iteration in range(2):
        Journal(run.journal).record("done", iteration=iteration, phase="evaluate")
    if code is not None:
        run.write_ending(code, "")
    begun: list[RunDirectory] = []
    monkeypatch.setattr(train, "_supervise", lambda run, config, job: begun.append(run) or (0, ""))
    assert train.train([*tiny, override], force=False) == 0
    assert bool(begun) == starts
    assert ("rloop: starting" in capsys.readouterr().err) == starts


def test_a_run_does_not_go_on_with_other_data_or_another_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, template = tmp_path / "train.jsonl", tmp_path / "mine.jinja"
    data.write_text('{"problem": "1,2,3=6", "answer": "6", "id": "a"}\n')
    template.write_text("{{ problem }},")
    command = ["experiment=tiny", f"run.dir={tmp_path / 'run'}", f"data.train={data}", f"data.template={template}"]
    monkeypatch.setattr(train, "_supervise", lambda run, config, job: (0, ""))
    assert train.train(command, force=False) == 0
    Journal(RunDirectory(tmp_path / "run").journal).record("commit", iteration=0, phase="sft", step=1)
    for file, key in ((data, r"data\.train"), (template, r"data\.template")):
        before = file.read_text()
        file.write_text(before.replace("=6", "=5").replace("},", "}:"))
        with pytest.raises(UserError, match=f"^{key}=.* holds something else"):
            train.train(command, force=False)
        file.write_text(before)
    assert train.train(command, force=False) == 0


def test_a_refused_run_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nope\.jsonl does not exist"):
        train.train(["experiment=tiny", f"run.dir={tmp_path / 'run'}", "data.train=nope.jsonl"], force=False)
    assert not (tmp_path / "run").exists()


def test_a_refused_start_takes_no_model_from_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They begin at the same moment in one new directory, and one of them is a mistake."""
    command = ["experiment=tiny", f"run.dir={tmp_path / 'run'}"]
    monkeypatch.setattr(train, "_supervise", lambda run, config, job: (0, ""))
    check = train._check_inputs

    def meanwhile(config: Config, model: Path) -> NoReturn:
        monkeypatch.setattr(train, "_check_inputs", check)
        assert train.train(command, force=False) == 0
        raise UserError("a mistake")

    monkeypatch.setattr(train, "_check_inputs", meanwhile)
    with pytest.raises(UserError, match="a mistake"):
        train.train(command, force=False)
    assert (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize(
    "name", ["timeline.jsonl", "metrics.jsonl", "journal.jsonl", "cache", "policies", "tensorboard"]
)
def test_what_stands_where_a_run_writes_is_found_before_it_starts(name: str, tmp_path: Path) -> None:
    run, place = RunDirectory(tmp_path), tmp_path / name
    run.config.touch()
    place.mkdir() if "." in name else place.touch()
    with pytest.raises(UserError, match=f"{name} has to be a {'file' if '.' in name else 'folder'}"):
        train.train(["experiment=tiny", f"run.dir={tmp_path}"], force=False)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.max_prompt_tokens=2", r"all \d+ prompts are longer than data.max_prompt_tokens=2"),
        ("sft.demonstrations=countdown3:validation", "has no text in meta.solution"),
    ],
)
def test_prompts_and_demonstrations_are_looked_at_before_the_ranks_start(
    override: str, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=sentence):
        train.train(["experiment=tiny", f"run.dir={tmp_path / 'run'}", override], force=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["engine.log", "ranks.log", "engine-1.log", "inputs.json", "fault.txt", "lock.rank0"])
def test_a_folder_where_a_file_of_the_run_goes_is_a_mistake(name: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.create()
    (tmp_path / "lock").touch()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"/{name} has to be a file of the run's"):
        run.create()
