"""The metrics in Weights & Biases: a view of them that may fail while the run goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from rloop_mcore.errors import UserError

_FINISH_S = 60  # to send what has not been sent yet; the rest stays on disk


def check_key(project: str) -> None:
    """Raises UserError where `WandbRun` would find no key, or one that can't be. Asks nothing of a network."""
    import wandb

    try:
        from wandb.sdk import wandb_setup
        from wandb.sdk.lib import wbauth

        settings = wandb_setup.singleton().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return
        host = settings.base_url
        found = wbauth.authenticate_session(host=host, source="rloop", prompt=False, update_session=False)
    except wandb.Error as error:
        raise UserError(_without_key(project, str(error))) from error
    except (ImportError, AttributeError, TypeError):
        return  # of a version that has these elsewhere: the start of its run will tell
    if found is None:
        raise UserError(_without_key(project, "No API key configured."))


class WandbRun:
    """One W&B run for a run directory, the same again after a resume.

    Where W&B can't be reached its files stay in the run directory, for `wandb sync`. Raises UserError where there is no
    key.
    """

    def __init__(self, project: str, run_dir: Path, keys: Mapping[str, Any], tell: Callable[[str], None]) -> None:
        """keys: the configuration, for W&B's table of runs; tell: lets the person who watches know what went wrong."""
        import wandb

        def start(mode: Literal["offline"] | None) -> Any:
            return wandb.init(
                project=project,
                name=run_dir.name,
                id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
                resume="allow",
                dir=str(run_dir),
                config={**keys},
                allow_val_change=True,  # of keys that a resume has changed
                mode=mode,
                settings=wandb.Settings(console="off", finish_timeout=_FINISH_S),
            )

        try:
            self._run = start(None)
        except wandb.Error as error:
            if not isinstance(error, wandb.errors.CommError) or isinstance(error, wandb.errors.AuthenticationError):
                raise UserError(_without_key(project, str(error))) from error
            tell(f"W&B can't be reached ({error}); `wandb sync {run_dir}/wandb/offline-run-*` sends its files later")
            wandb.teardown()  # its process holds on to the run that it could not begin
            self._run = start("offline")
        self._tell, self._failed = tell, False
        self._curves: set[str] = set()

    def log(self, curve: str, x: int, metrics: Mapping[str, float], line: int) -> None:
        """Add a point at `x` to each of the curves `curve`/...

        line: the number of the line of metrics.jsonl that holds the point; W&B passes over those that it has.
        """
        if curve not in self._curves:
            self._attempt(lambda: self._run.define_metric(f"{curve}/*", step_metric=f"{curve}/step"))
            self._curves.add(curve)
        points = {f"{curve}/{key}": value for key, value in metrics.items()}
        self._attempt(lambda: self._run.log({**points, f"{curve}/step": x}, step=line))

    def finish(self) -> None:
        """Send what is left, for a minute at most."""
        self._attempt(lambda: self._run.finish())

    def _attempt(self, call: Callable[[], object]) -> None:
        """Nothing may stop a run here; where W&B's process has died, its calls raise OSError and plain Exception."""
        if self._failed:
            return
        try:
            call()
        except Exception as error:
            self._failed = True
            self._tell(f"W&B gets nothing more of this start: {type(error).__name__}: {error}")


def _without_key(project: str, why: str) -> str:
    return (
        f"tracking.wandb_project is {project!r}, but W&B says: {why} Set WANDB_API_KEY, or "
        "WANDB_MODE=offline and run `wandb sync` later, or set tracking.wandb_project=null"
    )
