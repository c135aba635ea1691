"""The policy that `--policy` means: an HF folder, a Megatron checkpoint, or one of a run's."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from rloop_mcore.errors import Fault, UserError
from rloop_mcore.journal import Journal
from rloop_mcore.kept_policies import best, removed
from rloop_mcore.main.run_directory import RunDirectory, check_not_removed
from rloop_mcore.platform.files import remove_abandoned
from rloop_mcore.platform.process import allow_many_files
from rloop_mcore.progress import ProgressDisplay

NEWEST, PICKED = "last", "best"
_MOST_THREADS = 8


@dataclass(frozen=True)
class Source:
    """Where a policy is. `run`: the run directory that was named, if one was."""

    path: Path
    run: RunDirectory | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether it is Megatron's and must be converted. Hubs keep a metadata.json of their own in some models."""
        own = (self.path / ".metadata").exists() or not (self.path / "config.json").exists()
        return own and (self.path / "metadata.json").exists()


def find_policy(path: Path, step: str | None) -> Source:
    """What `--policy PATH --step STEP` names; `step` is for run directories. Raises UserError."""
    run = RunDirectory(path)
    if not (run.config.is_file() and run.journal.is_file()):
        if step is not None:
            raise UserError(f"--step {step}: {path} is not a run directory, so it has one policy only.")
        check_not_removed(path)
        if not any((path / name).exists() for name in ("config.json", "metadata.json")):
            raise UserError(
                f"--policy {path} holds no config.json and no metadata.json: give the folder of a Hugging Face "
                "checkpoint, of a Megatron checkpoint or of a run."
            )
        return Source(path)
    known = _policies(run)
    if step == PICKED or step is None:
        picked = best(Journal(run.journal).records)
        if picked is None:
            raise UserError(f"{path} has evaluated no policy yet: say which one with --step {NEWEST} or --step NAME.")
        return Source(run.path / picked.path, run)
    if step == NEWEST and known:
        return Source(list(known.values())[-1], run)
    if step not in known:
        names = ", ".join([*list(known)[-8:], PICKED, NEWEST]) if known else "none yet"
        raise UserError(f"--step {step}: {path} has no such policy; it has (the newest) {names}.")
    return Source(known[step], run)


def as_hf_folder(source: Source, keep_in: Path, display: ProgressDisplay) -> Path:
    """The policy as an HF folder; a Megatron checkpoint, of any layout, is converted into `keep_in`, once.

    Raises UserError for a checkpoint that cannot be read, Fault where a live run removes it meanwhile.
    """
    if not source.is_checkpoint:
        return source.path
    target = keep_in / f"{source.path.resolve().name}-{_fingerprint(source.path)}"
    if target.exists():
        return target
    from rloop_mcore.weights import mcore_to_hf  # torch: for a conversion only

    keep_in.mkdir(parents=True, exist_ok=True)
    allow_many_files()  # every file of the checkpoint is open at once
    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    remove_abandoned(target)
    try:
        conversion = mcore_to_hf.plan(source.path, target, threads=threads, config=_config_folder(source.path))
        display.message(f"converting {source.path} to {target}")
        conversion.run(lambda size: None)
    except OSError as error:
        if target.exists():  # another evaluation of the checkpoint was quicker
            return target
        gone = "" if source.path.exists() else " (its run has removed it meanwhile: try again)"
        raise Fault(f"{source.path} was not converted: {error}{gone}.") from error
    return target


def _config_folder(checkpoint: Path) -> Path | None:
    """An HF folder with the model's config and tokenizer; None where the checkpoint has them itself.

    A run's checkpoints don't: its thetas have, of which theta_0 may be a model that was moved. Raises UserError for a
    checkpoint that neither `rloop convert` nor a run has written.
    """
    from rloop_mcore.weights.conversion import HF_FILES

    if (checkpoint / HF_FILES).is_dir():
        return None
    journal = Journal(checkpoint.absolute().parent.parent / "journal.jsonl")
    for record in reversed(journal.records):
        if record["event"] == "policy":
            return journal.path.parent / str(record["path"])
    raise UserError(
        f"{checkpoint} has no {HF_FILES}/ and is in no run's checkpoints/, so nothing says how its model is built: "
        "make it a folder with `rloop convert --config`."
    )


def _policies(run: RunDirectory) -> dict[str, Path]:
    """Every policy of a run that is there, by the name that `--step` takes; in the order of the journal.

    Named as in policies/ and checkpoints/: i1_explore_000100; theta_1 beside. A checkpoint is used where the policy was
    not kept as a folder.
    """
    records = Journal(run.journal).records
    gone = {run.path / path for path in removed(records)}
    folders: dict[str, Path] = {}
    checkpoints: dict[str, Path] = {}
    for record in records:
        if record["event"] == "commit":
            checkpoint = run.path / record["checkpoint"]
            checkpoints[checkpoint.name] = checkpoint
        if record["event"] in ("measured", "commit") and "path" in record:
            name = record.get("name") or Path(record["path"]).name
            folders[name] = run.path / record["path"]
        elif record["event"] == "policy":
            folders[f"theta_{record['iteration']}"] = run.path / record["path"]
    kept = {name: path for name, path in folders.items() if path not in gone and path.is_dir()}
    return {n: p for n, p in checkpoints.items() if n not in kept and p.is_dir()} | kept


def _fingerprint(folder: Path) -> str:
    """Of where a checkpoint is, and of its files' names, sizes and times."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(folder.resolve()), stats)).encode()).hexdigest()[:12]
