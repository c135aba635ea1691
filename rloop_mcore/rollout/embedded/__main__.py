"""`python -m rloop_mcore.rollout.embedded --model-path DIR ...`: serve a model folder until the parent dies."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.platform.process import die_with_parent, importing, show_stacks_when_asked
from rloop_mcore.rollout.embedded import KEY_VARIABLE


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m rloop_mcore.rollout.embedded", description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True, help="Hugging Face model folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port-file", type=Path, required=True, help="gets the port, once the server answers")
    parser.add_argument("--max-running", type=int, default=256, help="responses decoded at once")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--parent", type=int, required=True, help="pid of the process this server must not outlive")
    return parser.parse_args()


async def _serve(arguments: argparse.Namespace, api_key: str) -> None:
    with importing():
        import torch
        from aiohttp import web

        from rloop_mcore.rollout.embedded.model import CausalModel
        from rloop_mcore.rollout.embedded.server import Server

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = CausalModel(arguments.model_path, getattr(torch, arguments.dtype), arguments.device)
    server = Server(model, arguments.max_running, api_key)
    runner = web.AppRunner(server.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, arguments.host, 0)
    await site.start()
    port = runner.addresses[0][1]
    logging.info("serving %s at http://%s:%d", arguments.model_path, arguments.host, port)
    write_atomic(arguments.port_file, f"{port}\n")
    await asyncio.Event().wait()  # until SIGTERM, which ends the process whatever its worker thread waits for


def main() -> None:
    arguments = _arguments()
    show_stacks_when_asked()
    die_with_parent(arguments.parent)
    if not (arguments.model_path / "config.json").is_file():
        sys.exit(f"error: {arguments.model_path} has no config.json: --model-path wants a Hugging Face model folder")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm's warnings reach every process; they are for the trainer
        signal.signal(number, signal.SIG_IGN)
    try:
        asyncio.run(_serve(arguments, os.environ.pop(KEY_VARIABLE)))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
