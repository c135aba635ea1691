"""`rloop train`: check everything, lock the run directory, start the ranks with torchrun, watch them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from rloop_mcore import platform, validate
from rloop_mcore.compose import load_config
from rloop_mcore.config import GENERATED_MODEL, Config
from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.data.curriculum import load_sampler
from rloop_mcore.data.problems import digest_of_problems, load_problems, problem_sources
from rloop_mcore.data.prompts import check_lengths, check_vocabulary, solution_of
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.changes import take_changes, take_inputs
from rloop_mcore.main.crashes import CrashRecord
from rloop_mcore.main.deadline import check_job_end, in_words, job_end
from rloop_mcore.main.head import explain, first_rendezvous
from rloop_mcore.main.job_folder import JobFolder
from rloop_mcore.main.ranks import SCHEDULERS, Rendezvous, start_ranks
from rloop_mcore.main.run_directory import RunDirectory, check_not_removed, log_tail
from rloop_mcore.main.training_problems import template_warnings
from rloop_mcore.main.watchdog import STALLED, Watchdog, keep_all_stacks, kill_children
from rloop_mcore.planning.nodes import roles
from rloop_mcore.planning.plan import Plan
from rloop_mcore.planning.search import check_fit
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.platform.process import handling
from rloop_mcore.reward.verifiers import load_verifier
from rloop_mcore.run_config import to_yaml
from rloop_mcore.wandb_run import check_key
from rloop_mcore.weights.families import check_folder

_LOOK_S = 1.0
_GRACE_S = 60.0
_LEAST_GIB = 0.3  # of a process with torch


def train(overrides: Sequence[str], force: bool, job: JobFolder | None = None) -> int:
    """Run or resume one training run; returns the exit code. `force` takes unsafe changes.

    job: whose first node this is. Raises UserError, and Fault where the other nodes don't come.
    """
    config = load_config(overrides)
    validate.check_values(config)
    roles(config)
    if job is None and config.cluster.nodes > 1:
        raise UserError(f"cluster.nodes={config.cluster.nodes}: `rloop launch` starts a run on more than one node.")
    check_job_end(config.cluster)
    run = RunDirectory(Path(config.run.dir))
    model = run.model(config)
    made_here = config.model.path == GENERATED_MODEL and not model.exists()
    with TemporaryDirectory() as folder:  # until the run is not refused, and it is this start that has its directory
        checked = Path(folder) / GENERATED_MODEL if made_here else model
        if made_here:
            write_model(checked, seed=0)
        problems, digests = _check_inputs(config, checked)
    with run.lock():
        changed = take_changes(run, config, force)
        take_inputs(run, config, digests, force)
        crashes = CrashRecord(run, config)
        crashes.check(force)
        if made_here and not model.exists():
            write_model(model, seed=0)
        write_atomic(run.config, to_yaml(config))
        if not changed and _finished(run, config):  # a changed key may ask for less to be kept
            print(
                f"rloop: {run.path} is finished: see `rloop status` and `rloop report`; a larger "
                "algorithm.iterations goes on",
                file=sys.stderr,
            )
            return 0
        for warning in [*validate.warnings(config, problems), *template_warnings(config)]:
            print(f"rloop: warning: {warning}", file=sys.stderr, flush=True)
        # minutes may pass before the first word of a large model's ranks
        print(
            f"rloop: starting the ranks and engines of {run.path}; its *.log files say how", file=sys.stderr, flush=True
        )
        code, message = _supervise(run, config, job)
        if (code == 1 or message.startswith(STALLED)) and (enough := crashes.note(message)):
            code, message = 1, f"{message}; {enough}"
            run.write_ending(code, message)
        if message:
            print(f"rloop: {message}", file=sys.stderr)
        return code


def _finished(run: RunDirectory, config: Config) -> bool:
    """A run that has also said so: one that was killed before that has something left to clear up."""
    ended_well = (run.ending() or {"code": 1})["code"] == 0
    return ended_well and Journal(run.journal).finished(config.algorithm.iterations)


def _check_inputs(config: Config, model: Path) -> tuple[int, dict[str, str]]:
    """Read whatever the run will read, so that a mistake shows now.

    Returns the number of training problems, and digests of data and template by their keys.
    """
    if config.tracking.wandb_project:
        check_key(config.tracking.wandb_project)
    device = platform.choose(config.cluster.device)
    validate.check_device(config, device)
    if device == "cpu":
        _check_memory(config)
    if device == "cuda":
        platform.check_gpus(roles(config).ranks, config.precision)
    check_not_removed(model)
    sizes = validate.check_model(config, model)
    if device == "cuda":
        check_fit(Plan.of(sizes, config))
    check_folder(model, config.model.family)
    tokenizer = TextTokenizer(model)
    template = PromptTemplate(config.data.template, tokenizer)
    load_verifier(config.reward.verifier)
    if config.data.sampler is not None:
        load_sampler(config.data.sampler)
    sources = problem_sources(config)
    problems = {key: load_problems(source, limit) for key, (source, limit) in sources.items()}
    for key in sources.keys() - {"sft.demonstrations"}:
        check_lengths(problems[key], tokenizer, template, config.data.max_prompt_tokens)
    check_vocabulary(problems["data.train"][0], tokenizer, template, sizes.vocabulary)
    for demonstration in problems.get("sft.demonstrations", ()):
        solution_of(demonstration)
    digests = {key: digest_of_problems(found) for key, found in problems.items()}
    return len(problems["data.train"]), digests | {"data.template": sha256(template.text.encode()).hexdigest()[:16]}


def _check_memory(config: Config) -> None:
    """On a machine without GPUs nothing else bounds a layout: a slip of the finger would bring the machine down."""
    elsewhere = config.rollout.endpoints or config.rollout.nodes
    ranks, engines = roles(config).ranks, 0 if elsewhere else config.rollout.engines
    needed, here = (ranks + engines) * _LEAST_GIB, psutil.virtual_memory().total / 2**30
    if needed > here:
        raise UserError(
            f"layout.* starts {ranks} ranks on this machine, and rollout.engines={engines}: before they hold a weight "
            f"they need {needed:.0f} GiB of memory, and it has {here:.0f}. Lower layout.dp (tp, pp, cp) or the engines."
        )


def _supervise(run: RunDirectory, config: Config, job: JobFolder | None) -> tuple[int, str]:
    """Run the ranks to their end; the exit code, and what is to be said."""
    run.clear_ending()
    end, margin_s = job_end(config.cluster), config.cluster.stop_margin_s
    if end is not None and (left_s := end - time.time()) < margin_s:
        message = (
            f"not started: {in_words(end)}, in {left_s:.0f} s, less than cluster.stop_margin_s={margin_s:g}; the same "
            "command goes on in another job"
        )
        run.write_ending(75, message)
        return 75, message
    rendezvous, log, keeper = Rendezvous(roles(config).ranks), run.log, None
    if job is not None:
        try:
            (rendezvous, keeper), log = first_rendezvous(config, run, job), job.log("torchrun-0")
        except (UserError, Fault, OSError) as error:
            run.write_error(error)
            raise
    watchdog = Watchdog(run, config)
    ranks = start_ranks(run.path, rendezvous, log)
    with _stop_signals(run, ranks):
        code = _watch(run, ranks, keeper, watchdog, job, config.cluster.nodes)
    try:
        return _ending(run, job, config.cluster.nodes, code, log)
    except OSError as error:
        raise Fault(
            f"the ranks ended with exit code {code}, and {run.path} can't be read or written any more "
            f"({error.strerror}); the same command goes on from the last commit"
        ) from error


def _ending(run: RunDirectory, job: JobFolder | None, nodes: int, code: int, log: Path) -> tuple[int, str]:
    """After the ranks ended with `code`: the run's exit code, and what is to be said."""
    if job is not None:
        explain(run, job, nodes)
    ending = run.ending()
    if ending is not None:
        return int(ending["code"]), str(ending["message"])
    if run.stop_requested():  # whoever asked has killed the ranks too, as Slurm does to a cancelled job
        message = "killed when it was to stop; the same command goes on from the last commit"
        run.write_ending(75, message)
        return 75, message
    message = f"the ranks ended with exit code {code} without a word"
    run.write_ending(1, message, log_tail(log))
    return 1, f"{message}; the log is {log}, its end:\n{log_tail(log)}"


def _watch(
    run: RunDirectory,
    ranks: subprocess.Popen[bytes],
    keeper: subprocess.Popen[bytes] | None,
    watchdog: Watchdog,
    job: JobFolder | None,
    nodes: int,
) -> int:
    """Wait for the end of this node's ranks, and bring it about where they stall, where nobody keeps its engines any
    more, or where the run has been ended on another node for a while; returns their exit code."""
    ended = None
    while True:
        try:
            return ranks.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            with suppress(OSError):  # of a file server that is away: whether the run can go on is for its ranks to find
                if (why := watchdog.look()) is not None:
                    print(f"rloop: {why}: collecting stacks", file=sys.stderr, flush=True)
                    try:
                        kept = keep_all_stacks(run, job, nodes)
                        # first: the ranks of other nodes, which lose these, would say so where nothing stands yet
                        run.write_ending(75, f"{why}; {kept}; the same command goes on from the last commit")
                    finally:
                        kill_children()
                if job is not None and keeper is not None and keeper.poll() is not None and run.ending() is None:
                    log = job.log("engines-0")
                    run.write_ending(1, f"the keeper of the engines of node 0 ended; its log is {log}", log_tail(log))
                if ended is None and run.ending() is not None:
                    ended = time.monotonic()
            if ended is not None and time.monotonic() > ended + _GRACE_S:
                ranks.kill()  # torchrun waits for minutes for a node that has gone, at a good end too


@contextmanager
def _stop_signals(run: RunDirectory, ranks: subprocess.Popen[bytes]) -> Iterator[None]:
    """A signal: finish the step, checkpoint, exit 75. A second SIGTERM or SIGINT: kill at once (a resume still works).

    SIGUSR1 and SIGUSR2 are for schedulers, which tell a job so that it will soon be killed, perhaps more than once. A
    terminal that is closed sends SIGHUP, more than once too; nohup has it ignored.
    """
    insisted = False
    hang_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    repeated = (*SCHEDULERS, *hang_up)

    def handle(signum: int, frame: Any) -> None:
        nonlocal insisted
        if insisted and signum not in repeated:
            run.write_ending(75, "killed as asked; the same command goes on from the last commit")
            ranks.kill()
            return
        insisted = insisted or signum not in repeated
        try:
            if not run.stop_requested():
                run.request_stop(f"{signal.Signals(signum).name} came")
        except OSError as error:
            print(f"rloop: the run cannot be told to stop ({error}): again to kill it", file=sys.stderr, flush=True)
            return
        print("rloop: stopping after this step; Ctrl-C or SIGTERM again to kill at once", file=sys.stderr, flush=True)

    with handling((signal.SIGTERM, signal.SIGINT, *repeated), handle):
        yield
