"""One rank of a training run, started by torchrun. Rank 0 runs Algorithm 1; the others follow its actor."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from types import ModuleType

import psutil

from rloop_mcore import platform
from rloop_mcore.config import Config
from rloop_mcore.errors import Interrupted, UserError
from rloop_mcore.hf_config import read_hf_config
from rloop_mcore.main.engines import start_servers, with_engines_for_routers
from rloop_mcore.main.job_folder import JobFolder
from rloop_mcore.main.run_directory import SUPERVISOR_VARIABLE, RunDirectory
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.layouts import stages
from rloop_mcore.platform import heartbeat
from rloop_mcore.platform.process import die_with_parent, importing, show_stacks_when_asked
from rloop_mcore.run_config import read_config


def main() -> int:
    """Run this rank to its end; how the run ended stands in the run directory."""
    _die_with_the_run()
    show_stacks_when_asked()
    run, rank = RunDirectory(Path(sys.argv[1])), int(os.environ["RANK"])
    if (job := JobFolder.of_this_job()) is not None:
        _log_to(job.log(f"rank-{rank}"), progress=rank == 0)
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s",
    )
    try:
        config = read_config(run.config)
        config.model.path = str(run.model(config))
        sizes = Architecture.of(read_hf_config(Path(config.model.path)), config.model.path)
        config.layout.stages = stages(config.layout, sizes.layers)
        if rank == 0:
            with run.lock("lock.rank0"):
                heartbeat.start(run.heartbeat)
                config = with_engines_for_routers(config)
                servers = start_servers(config, Path(config.model.path), run.path)  # before seconds of imports
                _rooms(config).conduct(config, run, servers)
        else:
            _rooms(config).follow(config)
    except Interrupted as why:
        run.write_ending(75, f"stopped: {str(why) or run.stop_reason()}; the same command goes on from here")
    except UserError as error:
        run.write_error(error)
        return 1
    except BaseException as error:
        if run.ending() is None:  # the first rank to fall knows why
            run.write_error(error, f"rank {rank}: ")
        raise
    else:
        if rank == 0:
            run.write_ending(0, "")
    return 0


def _rooms(config: Config) -> ModuleType:
    """The rooms. They import Megatron, which needs the set-up."""
    with importing():
        platform.setup(config.cluster.device, config.cluster.threads)
        from rloop_mcore.main import rooms
    return rooms


def _log_to(log: Path, progress: bool) -> None:
    """What this rank says goes to a file of its own; not its progress, which is the job's."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (2,) if progress else (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _die_with_the_run() -> None:
    """End with torchrun, and torchrun ends with the supervisor; end now if one of them is gone already."""
    parent = os.getppid()
    die_with_parent(parent)
    if int(os.environ[SUPERVISOR_VARIABLE]) not in {process.pid for process in psutil.Process().parents()}:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
