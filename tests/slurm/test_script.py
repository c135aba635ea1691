"""The batch scripts that `rloop launch` writes: bash and shellcheck read them, values arrive as they are, bad ones are
refused."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from scripts import check, directives, run_body

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.cli import main
from rloop_mcore.slurm.script import Run, command_script, training_script

ROOT = Path(__file__).parents[2]

VARIANTS = {
    "plain": [],
    "sized": ["cluster.slurm.cpus_per_node=8", "cluster.gpus_per_node=8", "cluster.slurm.time=04:00:00"],
    "named": [f"cluster.slurm.{name}" for name in ("partition=gpu", "account=a", "qos=q", "constraint=h100")],
    "hetjob": ["cluster.nodes=3", "rollout.nodes=1", "cluster.slurm.hetjob=true", "layout.dp=2"],
    "resubmit": ["cluster.slurm.resubmit=true"],
    "as it is": ["cluster.slurm.preflight=false", "cluster.slurm.exclude_bad=false"],
    "pyxis": ["cluster.slurm.container=pyxis", "cluster.slurm.image='my image.sqsh'", "cluster.slurm.mounts=[/data]"],
    "apptainer": [
        *("cluster.slurm.container=apptainer", "cluster.slurm.image=/images/rloop.sif", "cluster.gpus_per_node=8"),
        "cluster.slurm.mounts=[/data:/data:ro,/scratch:/tmp]",
    ],
    "venv": ["cluster.slurm.venv=/envs/rloop", "cluster.slurm.setup=['module load cuda/12.8']"],
    "environment": ["cluster.slurm.environment=[HF_HOME,WANDB_API_KEY]"],
}


def configured(*overrides: str) -> Config:
    return load_config(["experiment=tiny", "run.dir=/runs/a", *overrides])


def script_of(*overrides: str) -> str:
    config = configured(*overrides)
    run = Run(Path("/runs/a"), ["experiment=tiny", "run.dir=/runs/a", *overrides])
    return training_script(config, [run], force=False)


@pytest.mark.parametrize("name", VARIANTS)
def test_bash_and_shellcheck_read_every_variant(name: str, tmp_path: Path) -> None:
    check(script_of(*VARIANTS[name]), tmp_path / "job.sh")
    check(command_script(configured(*VARIANTS[name]), ["evaluate", "--policy", "a b"]), tmp_path / "command.sh")


def test_the_scripts_of_the_repository_are_read_too() -> None:
    files = sorted((ROOT / "slurm").glob("*.sbatch"))
    assert {file.name for file in files} == {
        *("train.sbatch", "train_hetjob.sbatch", "evaluate.sbatch", "convert.sbatch", "sweep.sbatch")
    }
    for file in files:
        assert subprocess.run(["bash", "-n", str(file)]).returncode == 0
        lines = file.read_text().splitlines()
        assert sum("--exclusive" in line for line in lines) == sum("--mem=0" in line for line in lines)
        if shutil.which("shellcheck"):
            found = subprocess.run(["shellcheck", "--shell=bash", str(file)], capture_output=True, text=True)
            assert found.returncode == 0, found.stdout


def test_a_script_that_is_too_long_for_an_argument_is_run_where_it_stands(tmp_path: Path) -> None:
    """As one is that has hundreds of runs. What it starts has the standard input of the job."""
    script = "#!/bin/bash\n" + "# a line\n" * 30000 + "echo $$ $(cat)\n"
    (tmp_path / "script").write_text(script)
    (tmp_path / "rloop").write_text(f"#!/bin/bash\ncat {tmp_path}/script\n")
    (tmp_path / "rloop").chmod(0o755)
    environment = {"RLOOP": f"{tmp_path}/rloop", "SLURM_JOB_NUM_NODES": "1", "PATH": "/usr/bin:/bin"}
    for file in sorted((ROOT / "slurm").glob("*.sbatch")):
        variables = environment | {f"SLURM_JOB_NUM_NODES_HET_GROUP_{k}": "1" for k in (0, 1)}
        job = subprocess.Popen(["bash", str(file), "x"], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert job.communicate(b"in", timeout=60)[0].decode() == f"{job.pid} in\n", file


# -- what the job asks for -----------------------------------------------------------------------------------------


def test_a_whole_node_is_asked_for_where_nothing_is_said() -> None:
    lines = directives(script_of())
    assert {"--nodes=1", "--ntasks-per-node=1", "--exclusive", "--mem=0", "--requeue"} <= set(lines)
    assert "--signal=B:USR1@300" in lines
    assert "--open-mode=append" in lines
    assert "--output=/runs/a/slurm/%j.out" in lines
    assert not [line for line in lines if "partition" in line or "time" in line or "gpus" in line]


def test_what_is_said_is_asked_for() -> None:
    lines = directives(script_of(*VARIANTS["named"], *VARIANTS["sized"], "cluster.slurm.flags=['--exclude=n7','-xn8']"))
    expected = ("--partition=gpu", "--account=a", "--qos=q", "--constraint=h100", "--time=04:00:00", "--exclude=n7")
    assert {*expected, "-xn8", "--cpus-per-task=8", "--gpus-per-node=8"} <= set(lines)
    assert "--exclusive" not in lines


def test_a_heterogeneous_job_has_two_components() -> None:
    lines = directives(script_of(*VARIANTS["hetjob"], "cluster.slurm.engine_flags=['--partition=cheap']"))
    between = lines.index("hetjob")
    assert "--nodes=2" in lines[:between]
    assert "--nodes=1" in lines[between:]
    assert "--partition=cheap" in lines[between:]
    assert "--partition=cheap" not in lines[:between]
    assert "--requeue" in lines[:between]


def test_only_what_is_listed_is_forwarded_and_no_value_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-mine")
    script = script_of(*VARIANTS["environment"])
    (line,) = [line for line in directives(script) if line.startswith("--export=")]
    names = line.removeprefix("--export=").split(",")
    assert {"HF_HOME", "WANDB_API_KEY", "PATH", "HOME"} <= set(names)
    assert "ALL" not in names
    assert "secret-of-mine" not in script


def lines_with(script: str, *words: str) -> list[str]:
    return [line.strip() for line in script.splitlines() if all(word in line for word in words)]


def test_containers_wrap_the_same_commands() -> None:
    for command in ("node", "preflight"):
        (line,) = lines_with(script_of(*VARIANTS["pyxis"]), f"on_all_nodes {command} ")
        assert "--container-image='my image.sqsh'" in line
        assert f',/data:/data --container-workdir="$PWD" rloop {command} "${{overrides[@]}}"' in line
        (line,) = lines_with(script_of(*VARIANTS["apptainer"]), f"on_all_nodes {command} ")
        assert "apptainer exec --nv --bind " in line
        assert "/data:/data:ro,/scratch:/tmp" in line
        (line,) = lines_with(script_of(*VARIANTS["apptainer"], "cluster.gpus_per_node=0"), f"on_all_nodes {command} ")
        assert "apptainer exec --bind " in line
        assert f'/images/rloop.sif rloop {command} "${{overrides[@]}}"' in line
        (line,) = lines_with(script_of(*VARIANTS["venv"]), f"on_all_nodes {command} ")
        assert f"/envs/rloop/bin/rloop {command} " in line


def test_values_reach_the_command_as_they_are(tmp_path: Path) -> None:
    odd = "data.template='a b;$(touch hacked) \"c\" `d`'"
    config = load_config(["experiment=tiny", f"run.dir={tmp_path}/run", "cluster.slurm.preflight=false"])
    script = training_script(config, [Run(tmp_path / "run", [odd])], force=False)
    srun = 'printf "%s\\n" "${@: -1}" >seen; echo 0 >"$RLOOP_JOB_FOLDER/code"; touch "$RLOOP_JOB_FOLDER/node-0.out"'
    done = run_body(script, tmp_path, {"srun": srun, "squeue": "echo NONE"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "seen").read_text() == odd + "\n"
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cluster.slurm.partition='a b'", "'--partition=a b' can't stand in an #SBATCH line"),
        ("cluster.slurm.account='$(id)'", "can't stand in an #SBATCH line"),
        ("cluster.slurm.job_name='a#b'", "can't stand in an #SBATCH line"),
        ("cluster.slurm.setup=['cat <<END']", "is nothing that bash can run"),  # it would print the script
        ("cluster.slurm.setup=['module load a \\\\']", "is nothing that bash can run"),
        ("cluster.slurm.time=86400", "cluster.slurm.time=86400 is 60 days of minutes"),  # YAML's 24:00:00
        ("cluster.slurm.time=3600", "cluster.slurm.time=3600 is 2.5 days of minutes"),  # YAML's 1:00:00
        ("cluster.slurm.time=soon", "cluster.slurm.time=soon is no time limit"),
        ("cluster.slurm.time=5", "cluster.slurm.time=5 is 300 s, and cluster.slurm.signal_s=300"),
        ("cluster.slurm.time=4:30", "is 270 s"),
        ("cluster.slurm.time=0-0:05", "is 300 s"),
        ("cluster.slurm.signal_s=70000", "cluster.slurm.signal_s=70000 is more than"),
        ("cluster.slurm.flags=[exclude]", "cluster.slurm.flags holds 'exclude'"),
        ("cluster.slurm.flags=['--array=0-3']", "holds '--array=0-3': `rloop launch --sweep FILE`"),
        ("cluster.slurm.flags=['--export=NONE']", "holds '--export=NONE': list variables in cluster.slurm.environment"),
        ("cluster.slurm.flags=['-D/tmp']", "holds '-D/tmp': a job runs where"),
        ("cluster.slurm.engine_flags=['--node=3']", "cluster.slurm.engine_flags holds '--node=3': set cluster.nodes"),
        ("cluster.slurm.environment=['A=b']", "cluster.slurm.environment holds 'A=b'"),
        ("cluster.slurm.container=pyxis", "needs cluster.slurm.image"),
        ("cluster.slurm.image=x", "need cluster.slurm.container=pyxis or apptainer"),
        ("cluster.slurm.mounts=[/data]", "need cluster.slurm.container=pyxis or apptainer"),
        ("cluster.slurm.setup=['a\nb']", "cluster.slurm.setup holds 'a\\nb'"),
        ("cluster.slurm.setup=['module load \"cuda']", "is nothing that bash can run: line 1: unexpected EOF"),
        ("cluster.slurm.hetjob=true", "needs rollout.nodes"),
    ],
)
def test_bad_values_are_refused_in_a_sentence(override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        script_of(override)
    assert words in str(caught.value)


@pytest.mark.parametrize("limit", [["time=1440"], ["time=1-0", "signal_s=65535"]])
def test_the_longest_limits_are_taken(limit: list[str]) -> None:
    assert f"--{limit[0]}" in directives(script_of(*(f"cluster.slurm.{word}" for word in limit)))


def test_a_time_limit_in_which_no_run_would_be_started_is_refused() -> None:
    with pytest.raises(UserError, match=r"time=60 is 3600 s, and cluster\.stop_margin_s=3600 s before its end"):
        script_of("cluster.slurm.time=60", "cluster.stop_margin_s=3600")


@pytest.mark.parametrize("constraint", ["a100&ib", "[rack1|rack2]", "(x|y)&z"])
def test_a_constraint_of_several_features_stands_as_it_is(constraint: str) -> None:
    assert f"--constraint={constraint}" in directives(script_of(f"cluster.slurm.constraint='{constraint}'"))


@pytest.mark.parametrize(
    ("name", "container"), [("50%", "none"), ("a b", "none"), ("a#b", "none"), ("a:b", "apptainer"), ("a,b", "pyxis")]
)
def test_a_directory_that_a_job_would_not_find_is_refused(name: str, container: str) -> None:
    image = [] if container == "none" else [f"cluster.slurm.container={container}", "cluster.slurm.image=x"]
    with pytest.raises(UserError, match=f"run.dir=/runs/{name} cannot be a job's"):
        training_script(configured(*image), [Run(Path("/runs/a"), []), Run(Path(f"/runs/{name}"), [])], force=False)


@pytest.mark.parametrize("mount", ["data:/data", "/data:/data:rx", "/a,/b:/c"])
def test_mounts_that_are_none_are_refused(mount: str) -> None:
    with pytest.raises(UserError, match="mounts holds"):
        script_of("cluster.slurm.container=pyxis", "cluster.slurm.image=x", f"cluster.slurm.mounts=['{mount}']")


# -- what becomes of the job when it ends ----------------------------------------------------------------------------


class Ends:
    """A script whose `srun` ends the run with `code`, after `commits` more in the journal, which has every start."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        self.run = folder / "run"
        (self.run / "slurm").mkdir(parents=True)
        (self.run / "slurm/job.sh").write_text("kept by rloop launch")
        journal = Journal(folder / "records.jsonl")
        journal.record("started", previous=None)
        journal.record("commit", iteration=0, phase="explore", step=1, shards=[])
        self.lines = [shlex.quote(line) for line in journal.path.read_text().splitlines()]
        config = load_config(["experiment=tiny", f"run.dir={self.run}", "cluster.slurm.preflight=false", *overrides])
        self.script = training_script(config, [Run(self.run, [])], force=False).replace("sleep 300", "sleep 0")

    def start(self, code: str, commits: int = 0, **variables: str) -> tuple[int, list[str], str]:
        """(exit code, what was asked of scontrol and sbatch, standard error)"""
        srun = (
            f'printf "%s\\n" {" ".join([self.lines[0], *[self.lines[1]] * commits])} >>"{self.run}/journal.jsonl"; '
            'touch "$RLOOP_JOB_FOLDER/node-0.out"; '
            f'[[ -z "{code}" ]] || echo "{code}" >"$RLOOP_JOB_FOLDER/code"; exit {code or 1}'
        )
        asked = self.folder / "asked"
        asked.write_text("")
        record = f'echo "$(basename "$0") $*" >>"{asked}"'
        programs = {"srun": srun, "squeue": "echo NONE", "scontrol": record, "sbatch": record}
        done = run_body(self.script, self.folder, programs, **variables)
        return done.returncode, asked.read_text().splitlines(), done.stderr


def test_the_users_own_lines_may_use_unset_variables_and_end_at_errors(tmp_path: Path) -> None:
    """As conda's activation scripts do; and what they set is not the script's."""
    ends = Ends(tmp_path, "cluster.slurm.setup=['set -e','export SEEN=$SET_NOWHERE']")
    assert ends.start("75", commits=1)[:2] == (75, ["scontrol requeue 7"])


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_run_that_is_done_or_wrong_is_not_started_again(code: str, tmp_path: Path) -> None:
    assert Ends(tmp_path).start(code) == (int(code), [], "")


def test_a_run_that_has_checkpointed_is_requeued(tmp_path: Path) -> None:
    code, asked, _ = Ends(tmp_path).start("75", commits=2)
    assert code == 75
    assert asked == ["scontrol requeue 7"]


def test_a_task_of_an_array_requeues_itself_only(tmp_path: Path) -> None:
    _, asked, _ = Ends(tmp_path).start("75", 2, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="0")
    assert asked[0] == "scontrol requeue 5_0"


def test_faults_are_retried_with_back_off_until_they_bring_nothing(tmp_path: Path) -> None:
    """Slurm's own two minutes are waited for by nobody; what is longer is, here, before the requeue."""
    ends = Ends(tmp_path, "cluster.slurm.retries=2", "cluster.slurm.backoff_s=100")
    ends.script = ends.script.replace('|| sleep "', f'|| echo >>{tmp_path}/asked "slept ')
    assert ends.start("1")[1] == ["scontrol requeue 7"]
    assert ends.start("")[1] == ["slept 80", "scontrol requeue 7"]  # the first node was killed before it said anything
    assert ends.start("1", commits=1)[1] == ["scontrol requeue 7"], "a commit starts the count anew"
    ends.start("1")
    ends.start("1")
    code, asked, error = ends.start("1")
    assert (code, asked) == (1, [])
    assert "given up: 3 starts in a row without a new commit" in error
    assert ends.start("1", SLURM_JOB_ID="8")[1], "a job that the user submits counts anew"


def test_the_back_off_ends_before_the_job_does(tmp_path: Path) -> None:
    """Slurm would kill it at its limit, asleep, and start it no more."""
    ends = Ends(tmp_path, "cluster.slurm.backoff_s=1000")
    ends.script = ends.script.replace('|| sleep "', f'|| echo >>{tmp_path}/asked "slept ')
    assert ends.start("1")[1] == ["slept 880", "scontrol requeue 7"]
    slept, requeued = ends.start("1", SLURM_JOB_END_TIME=str(int(time.time()) + 60))[1]
    assert 30 <= int(slept.removeprefix("slept ")) <= 40
    assert requeued == "scontrol requeue 7"
    assert ends.start("1", SLURM_JOB_END_TIME=str(int(time.time()) + 10))[1] == ["scontrol requeue 7"]


def test_a_job_that_checkpoints_without_progress_is_given_up_too(tmp_path: Path) -> None:
    ends = Ends(tmp_path, "cluster.slurm.retries=1")
    assert ends.start("75")[1]
    assert ends.start("75")[:2] == (75, [])


def test_where_nothing_is_requeued_the_job_is_submitted_again(tmp_path: Path) -> None:
    ends = Ends(tmp_path, "cluster.slurm.resubmit=true")
    assert ends.start("1", 1)[1] == [f"sbatch --dependency=afterany:7 --begin=now+60seconds {ends.run}/slurm/job.sh"]


def test_a_job_that_could_not_be_submitted_again_says_so_before_it_starts(tmp_path: Path) -> None:
    """As by the sbatch files, which run what --dry-run prints."""
    ends = Ends(tmp_path, "cluster.slurm.resubmit=true")
    (ends.run / "slurm/job.sh").unlink()
    code, asked, error = ends.start("1")
    assert (code, asked, (ends.run / "journal.jsonl").exists()) == (2, [], False)
    assert f"cluster.slurm.resubmit=true needs {ends.run}/slurm/job.sh, which rloop launch writes" in error


def test_a_job_that_is_submitted_again_is_not_told_when_the_one_before_it_ends(tmp_path: Path) -> None:
    """Slurm hands on its own variables, and before 22.05.9 says no other end."""
    ends = Ends(tmp_path, "cluster.slurm.resubmit=true")
    said = f'echo "${{SLURM_JOB_END_TIME:-none}} ${{SLURM_RESTART_COUNT:-none}}" >{tmp_path}/asked'
    commit = f'touch "$RLOOP_JOB_FOLDER/node-0.out"; echo {ends.lines[1]} >>{ends.run}/journal.jsonl'
    end = str(int(time.time()) + 600)
    run_body(ends.script, tmp_path, {"srun": commit, "sbatch": said}, SLURM_JOB_END_TIME=end, SLURM_RESTART_COUNT="2")
    assert (tmp_path / "asked").read_text() == "none none\n"


def test_a_run_that_is_not_out_before_the_limit_is_requeued_while_it_can_be(tmp_path: Path) -> None:
    """Slurm starts no job again that it has killed at its limit."""
    ends = Ends(tmp_path)
    asked = tmp_path / "asked"
    commit = f'touch "$RLOOP_JOB_FOLDER/node-0.out"; echo {ends.lines[1]} >>{ends.run}/journal.jsonl'
    programs = {
        "srun": f"{commit}; exec sleep 59 >/dev/null 2>&1",
        "scontrol": f'echo "$*" >>{asked}',
    }
    begun = time.monotonic()
    done = run_body(ends.script, tmp_path, programs, SLURM_JOB_END_TIME=str(int(time.time()) + 23))
    assert time.monotonic() - begun < 30
    assert done.returncode == 75
    assert asked.read_text().splitlines()[0] == "requeue 7"


def test_nothing_is_left_that_waits_for_the_end_of_a_job_that_is_over(tmp_path: Path) -> None:
    ends = Ends(tmp_path)
    assert ends.start("0", SLURM_JOB_END_TIME=str(int(time.time()) + 600))[0] == 0
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("RLOOP_JOB_FOLDER", "").startswith(str(tmp_path)):
                left.append(process)
    assert not psutil.wait_procs(left, timeout=10)[1]


BAD = """{"ok": false,
 "bad_nodes": [
  "n3",
  "n5"
 ],
 "problems": [{"nodes": ["n9"]}]}"""


def test_bad_nodes_are_left_out_of_the_next_start_and_the_run_is_not_begun(tmp_path: Path) -> None:
    """Of all components, each of which may leave out some already."""
    ends = Ends(tmp_path, "cluster.slurm.preflight=true")
    (ends.run / "preflight.json").write_text(BAD)
    srun = 'cd "$RLOOP_JOB_FOLDER"; touch preflight-0.out; [[ "$*" != *" node "* ]] || touch begun; exit 69'
    shown = [f"JobId={job} ExcNodeList={nodes} StdErr=x" for job, nodes in ((7, "n1"), (8, "(null)"), (9, "n1"))]
    scontrol = f"""echo "$*" >>{tmp_path}/asked; [[ $* != "show job"* ]] || printf "%s\\n" {shlex.join(shown)}"""
    done = run_body(
        ends.script,
        tmp_path,
        {"srun": srun, "squeue": "echo NONE", "scontrol": scontrol},
        SLURM_JOB_NODELIST="n[1-5]",
    )
    assert done.returncode == 69
    assert not list(ends.run.rglob("begun"))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked[-2:] == ["requeue 7", "update JobId=7 ExcNodeList=n1,n3,n5"]


def test_force_is_for_the_first_start_of_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    words = ("experiment=tiny", f"run.dir={run}", "cluster.slurm.preflight=false")
    assert main(["launch", "--dry-run", "--force", *words]) == 0
    script = capsys.readouterr().out
    srun = 'echo "${@: -1}" >>seen; echo 0 >"$RLOOP_JOB_FOLDER/code"; touch "$RLOOP_JOB_FOLDER/node-0.out"'
    (run / "slurm").mkdir(parents=True)
    for variables in ({}, {"SLURM_RESTART_COUNT": "1"}, {"RLOOP_CHAIN": "3"}):
        assert run_body(script, tmp_path, {"srun": srun, "squeue": "echo NONE"}, **variables).returncode == 0
    assert (tmp_path / "seen").read_text().splitlines() == ["--force", words[-1], words[-1]]
