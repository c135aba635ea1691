"""`rloop launch`: what it refuses, warns of and prints, and what becomes of an sbatch that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from scripts import check, directives, run_body

from rloop_mcore.compose import load_config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.journal import Journal
from rloop_mcore.main.cli import main
from rloop_mcore.main.crashes import CrashRecord
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.run_config import to_yaml


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["launch", "--dry-run", "experiment=tiny", f"run.dir={run}"]) == 0
    check(capsys.readouterr().out, tmp_path / "job.sh")
    assert not run.exists()


def test_what_cannot_run_is_refused_before_it_is_queued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["launch", "--dry-run", "experiment=qwen2.5_72b", f"run.dir={tmp_path}/run", "model.path=/models/72b"]
    words += ["cluster.slurm.container=pyxis", "cluster.slurm.image=i.sqsh"]  # which has SGLang's interpreter
    assert main(words) == 0
    assert main([*words, "layout.pp=1", "layout.dp=8"]) == 2
    assert "the nearest that fits has layout.pp=4 layout.dp=2" in capsys.readouterr().err
    assert main([*words, "layout.tp=16", "layout.pp=2", "layout.dp=2"]) == 2
    assert "layout.tp=16 does not divide num_key_value_heads=8" in capsys.readouterr().err
    assert main([*words, "precision=fp8_tensorwise", "fp8.simulate=true"]) == 2
    assert "fp8.simulate=true is for the CPU" in capsys.readouterr().err


def test_what_the_jobs_device_cannot_do_is_refused_where_that_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch", "--dry-run", "experiment=tiny", f"run.dir={tmp_path}/run", "precision=fp8_delayed"]
    assert main([*words, "cluster.device=cpu"]) == 2
    assert "precision=fp8_delayed needs CUDA" in capsys.readouterr().err
    for on_gpus in ("cluster.device=cuda", "cluster.gpus_per_node=1"):
        assert main([*words, on_gpus]) == 0
    assert main(words) == 0  # its nodes may have some


def test_files_that_are_not_there_where_a_run_is_submitted_are_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A typo is found now, not when the job starts. A container has other paths."""
    (tmp_path / "there.jsonl").write_text('{"problem": "1 + 1", "answer": "2"}\n')
    words = ["launch", "--dry-run", f"run.dir={tmp_path}/run", "model.path=/no/model", "data.train=/no/t.jsonl"]
    words += [f"data.validation={tmp_path}/there.jsonl", "data.template=/no/t.jinja", "cluster.slurm.venv=/no/env"]
    assert main(words) == 0
    found = capsys.readouterr().err.splitlines()
    assert [line.partition(" does not exist here")[0] for line in found] == [
        "rloop: warning: data.train=/no/t.jsonl",
        "rloop: warning: model.path=/no/model",
        "rloop: warning: data.template=/no/t.jinja",
        "rloop: warning: cluster.slurm.venv=/no/env",
    ]
    assert main([*words, "cluster.slurm.container=pyxis", "cluster.slurm.image=i.sqsh"]) == 0
    assert main(["launch", "--dry-run", "experiment=tiny", f"run.dir={tmp_path}/run"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.template=chatt", "data.template 'chatt' not found"),
        ("data.template=broken.jinja", "template broken.jinja: line 1: Expected an expression"),
        ("reward.verifier=mth", "reward.verifier='mth' is no known verifier"),
        ("reward.verifier=nowhere:f", "cannot import 'nowhere'"),
        ("data.sampler=easy", "data.sampler='easy' is no known sampler"),
        ("data.train=train.csv", "data source 'train.csv' must be a .jsonl"),
        ("data.validation=countdown3:dev", "countdown3 has the splits train"),
        ("data.train=numbers.jsonl", "numbers.jsonl:1: answer is int 2; it must be a string"),
        ("sft.demonstrations=countdown3:train", "sft.demonstrations: problem countdown_train/0 has no text"),
        ("model.path=headless", "headless/tokenizer.json does not exist"),
    ],
)
def test_a_mistake_that_can_be_seen_here_is_refused_before_it_is_queued(
    override: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job would wait for its nodes first, for days perhaps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "numbers.jsonl").write_text('{"problem": "1 + 1", "answer": 2}\n')
    (tmp_path / "broken.jinja").write_text("{% if %}{{ problem }}")
    for name in ("model", "headless"):
        write_model(tmp_path / name, seed=0)
    (tmp_path / "headless" / "tokenizer.json").unlink()
    command = ["launch", "--dry-run", "experiment=tiny", "model.path=model", "run.dir=run"]
    assert main(command) == 0
    assert main([*command, override]) == 2
    assert words in capsys.readouterr().err
    in_image = ["cluster.slurm.container=pyxis", "cluster.slurm.image=i.sqsh"]  # where names are all that is known here
    other_places = ("broken.jinja", "nowhere:f", "numbers.jsonl", "headless")
    assert main([*command, *in_image, override]) == (0 if override.endswith(other_places) else 2)


def test_what_a_verifier_prints_is_no_part_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """slurm/*.sbatch run what is printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talkative.py").write_text("print('hello')\ndef right(*_):\n    return True, 'correct'\n")
    command = ["launch", "--dry-run", "experiment=tiny", "run.dir=run", "reward.verifier=talkative:right"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert (out.partition("\n")[0], err) == ("#!/bin/bash", "hello\n")


def test_a_run_that_would_be_refused_is_not_queued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For a key that must stay, or since it has failed alike three times."""
    run = RunDirectory(tmp_path / "run")
    command = ["launch", "--dry-run", "experiment=tiny", f"run.dir={run.path}"]
    config = load_config(command[2:])
    run.create()
    run.config.write_text(to_yaml(config))
    Journal(run.journal).record("commit", iteration=0, phase="explore", step=1)
    kept = run.journal.read_bytes()
    assert main([*command, "algorithm.iterations=3", "cluster.slurm.time=60"]) == 0
    assert main([*command, "algorithm.group_size=8"]) == 2
    assert "was started with algorithm.group_size=16, not 8" in capsys.readouterr().err
    assert main([*command, "algorithm.group_size=8", "--force"]) == 0
    for _ in range(3):
        CrashRecord(run, config).note("out of memory")
    assert main(command) == 2
    assert "ended 3 times in a row" in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    assert main(command) == 2  # it is the job's start that tries again
    assert run.journal.read_bytes() == kept


def test_a_sweep_is_an_array_with_a_run_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"run.dir={tmp_path}/a run.seed=1\n\n# a comment\nrun.dir='{tmp_path}/b' run.seed=2\n")
    words = ["launch", "--dry-run", "experiment=tiny", "cluster.slurm.preflight=false", "--sweep", str(sweep)]
    assert main(words) == 0
    script = capsys.readouterr().out
    check(script, tmp_path / "job.sh")
    assert "--array=0-1" in directives(script)
    srun = 'printf "%s\\n" "${@: -1}" >seen; echo 0 >"$RLOOP_JOB_FOLDER/code"; touch "$RLOOP_JOB_FOLDER/node-0.out"'
    done = run_body(script, tmp_path, {"srun": srun, "squeue": ""}, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text() == "run.seed=2\n"
    assert (tmp_path / "b/slurm/5_1.0/code").exists()


def test_a_sweep_into_one_directory_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("run.seed=1\nrun.seed=2\n")
    assert main(["launch", "--dry-run", "experiment=tiny", "--sweep", str(sweep)]) == 2
    assert "runs 1 and 2 of the sweep have one run.dir=" in capsys.readouterr().err


def test_a_mistake_in_a_sweep_is_told_with_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"run.dir={tmp_path}/a\n# the second\nrun.dir={tmp_path}/b layout.tp=0\n")
    assert main(["launch", "--dry-run", "experiment=tiny", "--sweep", str(sweep)]) == 2
    assert f"{sweep}, line 3: layout.tp=0 must be greater than 0." in capsys.readouterr().err
    for content, words in (
        (b"run.dir=a\nrun.dir='b\n", f"{sweep}, line 2: no words of a shell (No closing quotation)."),
        (b"run.dir=caf\xe9\n", f"--sweep {sweep} has to be UTF-8 text (invalid continuation byte, byte 11)."),
    ):
        sweep.write_bytes(content)
        assert main(["launch", "--dry-run", "experiment=tiny", "--sweep", str(sweep)]) == 2
        assert capsys.readouterr().err == f"rloop: {words}\n"


def test_another_command_is_a_job_of_one_task(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["launch", "--dry-run", "cluster.slurm.time=60", "--", "evaluate", "--policy", "a b", "--data", "x.jsonl"]
    assert main(words) == 0
    script = capsys.readouterr().out
    check(script, tmp_path / "job.sh")
    assert script.rstrip().endswith("evaluate --policy 'a b' --data x.jsonl")
    assert "--time=60" in directives(script)


def test_what_another_command_reads_and_is_not_there_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    words = ["evaluate", "--policy", f"{tmp_path}/run", "--data", "hf:a/b", "--data", "x.jsonl", "--json", "out.json"]
    assert main(["launch", "--dry-run", "--", *words]) == 0
    warning = "does not exist here: the job ends at once unless its nodes see it."
    assert capsys.readouterr().err == f"rloop: warning: x.jsonl {warning}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate", "--policy", "p", "--data", "x.jsonl", "rollout.max_tokns=5"], "rollout.max_tokns is not a key"),
        (["evaluate", "--policy", "p", "--data", "x.jsonl", "--k", "1,x"], "--k 1,x: give whole numbers"),
        (["evaluate", "--policy", "p", "--data", "x.jsonl", "--samples", "0"], "evaluation.samples=0 must be"),
        (["evaluate", "--policy", "p", "--benchmarks", "aime24,amie25"], "'amie25' is none of aime24"),
        (["evaluate", "--policy", "p"], "nothing to evaluate on"),
        (["evaluate", "--policy", "p", "--data", "x.jsonl", "reward.verifier=mth"], "'mth' is no known verifier"),
        (["evaluate", "--policy", "p", "--data", "x.jsonl", "data.template=chatt"], "'chatt' not found"),
        (["evaluate", "--policy", "run", "--data", "x.jsonl", "experiment=tiny"], "give single keys"),
        (["train", "experiment=tiny", "layout.tp=0"], "layout.tp=0 must be greater than 0"),
        (["preflight", "experiment=tniy"], "experiment=tniy: did you mean tiny?"),
    ],
)
def test_the_keys_of_another_command_are_refused_before_it_is_queued(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(to_yaml(load_config(["experiment=tiny", "run.dir=run"])))
    assert main(["launch", "--dry-run", "--", *words]) == 2
    assert said in capsys.readouterr().err
    # of a run that may have policies once the job starts
    right = ["evaluate", "--policy", "run", "--data", "hf:a/b", "rollout.max_tokens=5"]
    assert main(["launch", "--dry-run", "--", *right]) == 0


def test_a_key_of_wandb_that_the_job_may_not_get_is_told_before_it_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("HOME", str(tmp_path)), ("WANDB_API_KEY", "0" * 40)):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def said(*words: str) -> str:
        run = ["experiment=tiny", f"run.dir={tmp_path}/run", "tracking.wandb_project=loops"]
        assert main(["launch", "--dry-run", *run, *words]) == 0
        return capsys.readouterr().err

    warning = said()
    assert "No API key configured" in warning
    assert "cluster.slurm.environment=[WANDB_API_KEY] gives it what is set here." in warning
    assert "0" * 40 not in warning
    assert said("cluster.slurm.environment=[WANDB_API_KEY]") == said("cluster.slurm.environment=[ALL]") == ""
    assert said("cluster.slurm.setup=['. ~/key']") == ""
    assert said("cluster.slurm.container=pyxis", "cluster.slurm.image=i.sqsh") == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert said() == ""  # as slurm/train.sbatch prints it, in the job
    monkeypatch.delenv("WANDB_API_KEY")
    assert "No API key configured" in said()


def test_a_job_without_gpus_on_nodes_that_have_some_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_for_sbatch(tmp_path / "bin", "echo 7", monkeypatch)
    (tmp_path / "bin/sinfo").write_text(
        "#!/bin/bash\n"
        "rows='cpu* (null)\ngpu gpu:h100:8(S:0-1),nvme:2\ngpu gpu:a100:4(S:0,1)\n'\n"
        '[[ $* != *--partition=gpu* ]] && printf "$rows" || printf "$rows" | grep ^gpu\n'
    )
    (tmp_path / "bin/sinfo").chmod(0o755)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run, gpu = ["experiment=tiny", f"run.dir={tmp_path}/run"], "cluster.slurm.partition=gpu"

    def said(*words: str) -> str:
        assert main(["launch", *words]) == 0
        return capsys.readouterr().err

    assert "asks for no GPU; its partition's nodes have some (gpu:a100:4, gpu:h100:8)" in said(*run, gpu)
    assert "asks for no GPU" in said(*run, gpu, "--dry-run")
    assert "asks for no GPU" in said(gpu, "--", "preflight", *run)
    for more in ([], [gpu, "cluster.gpus_per_node=8"], [gpu, "cluster.device=cpu"]):
        assert said(*run, *more) == ""
    assert said(*run, gpu, "cluster.slurm.flags=['--gres=gpu:8']") == ""
    assert said(gpu, "--", "grade", str(tmp_path / "bin/sinfo")) == ""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert said(*run, gpu, "--dry-run") == ""


def test_without_slurm_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["launch", "experiment=tiny", f"run.dir={tmp_path}/run"]) == 2
    assert "sbatch is not on PATH here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def stand_in_for_sbatch(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_where_a_jobs_log_will_be_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words against the script's own --output."""
    stand_in_for_sbatch(tmp_path / "bin", "echo '7;cluster'", monkeypatch)
    (tmp_path / "sweep").write_text(f"run.dir={tmp_path}/a\nrun.dir={tmp_path}/b\n")
    for words, task in (
        (["experiment=tiny", f"run.dir={tmp_path}/one"], ""),
        (["experiment=tiny", f"run.dir={tmp_path}/one", "cluster.slurm.flags=['--out=/l/%j','-o/l/of-%j']"], ""),
        (["experiment=tiny", "--sweep", str(tmp_path / "sweep")], "K"),
        (["--", "trace", "r"], ""),
    ):
        assert main(["launch", "--dry-run", *words]) == 0
        (output,) = {line for line in directives(capsys.readouterr().out) if line.startswith("--output=")}
        log = output.removeprefix("--output=").replace("%A", "7").replace("%j", "7").replace("%a", task)
        assert main(["launch", *words]) == 0
        assert log.startswith("/l/of-7") == ("-o/l" in " ".join(words))
        assert f"submitted job 7; its log is {log}" in capsys.readouterr().out


def test_a_job_that_sbatch_refuses_leaves_the_script_of_the_one_before_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With cluster.slurm.resubmit=true that one submits it when it ends."""
    saved = tmp_path / "run/slurm/job.sh"
    stand_in_for_sbatch(tmp_path / "bin", f"cmp {saved} - >&2 && echo 7", monkeypatch)  # there before the job is
    words = ["launch", "experiment=tiny", f"run.dir={tmp_path}/run"]
    assert main(words) == 0
    script = saved.read_text()
    (tmp_path / "bin/sbatch").write_text("#!/bin/bash\necho invalid partition >&2; exit 1\n")
    assert main([*words, "cluster.slurm.partition=gup"]) == 2
    assert "sbatch refuses the job: invalid partition" in capsys.readouterr().err
    assert saved.read_text() == script


def test_a_first_job_that_sbatch_refuses_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in_for_sbatch(tmp_path / "bin", "exit 1", monkeypatch)
    assert main(["launch", "experiment=tiny", f"run.dir={tmp_path}/run"]) == 2
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/preflight.json").touch()
    assert main(["launch", "experiment=tiny", f"run.dir={tmp_path}/run"]) == 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preflight.json"]


def test_an_sbatch_that_does_not_answer_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in_for_sbatch(tmp_path / "bin", "exec sleep 60", monkeypatch)
    monkeypatch.setattr("rloop_mcore.main.launch._SUBMIT_S", 0.2)
    assert main(["launch", "experiment=tiny", f"run.dir={tmp_path}/run"]) == 1
    assert "squeue" in capsys.readouterr().err


def test_a_run_on_many_nodes_is_not_started_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=tiny", f"run.dir={tmp_path}/run", "cluster.nodes=2", "rollout.nodes=1"]) == 2
    assert "`rloop launch` starts a run on more than one node" in capsys.readouterr().err
