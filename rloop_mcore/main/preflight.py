"""`rloop preflight`: run on every node, before anything is started; names the nodes that are not fit."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rloop_mcore import validate
from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.preflight.check import check
from rloop_mcore.preflight.judge import BAD_NODE, Findings, Problem, Verdict, judge, link_speeds
from rloop_mcore.preflight.meeting import NoMaster
from rloop_mcore.preflight.place import Place, place_of
from rloop_mcore.preflight.reach import Clock, is_newer, sign

_RATES = (("all-reduce", "all_reduce_gb_s"), ("broadcast", "broadcast_gb_s"))


def preflight(options: argparse.Namespace, clock: Clock = time.time) -> int:
    """Check this node with the others; returns the exit code of docs/preflight.md. Raises UserError and Fault."""
    config = _config(options.overrides)
    place = place_of(options.nodes, options.node_rank, options.master, options.names, os.environ)
    begun = time.time()
    try:
        found = check(config, place, clock)
    except NoMaster as error:
        return _without_master(config, place, str(error), time.time() - begun)
    verdict = judge(config, found)
    if place.rank == 0:
        report = _report(found, verdict, time.time() - begun)
        _write(config, report)
        print(json.dumps(report) if options.json else "\n".join(_lines(report)), flush=True)
    return verdict.exit_code


def _config(overrides: Sequence[str]) -> Config:
    """What is asked of the nodes; a model and data may be missing."""
    config = load_config(overrides, absent="?")
    if config.run.dir == "?":
        raise UserError("run.dir has no value: give run.dir=VALUE on the command line.")
    validate.check_values(config)
    return config


def _without_master(config: Config, place: Place, why: str, seconds: float) -> int:
    """Node 0 is the bad one, as far as this node can tell. It writes that where node 0 has written nothing."""
    name = place.name(0)
    message = f"{name}: {why}"
    print(f"{place.name(place.rank)} says: {message}", file=sys.stderr, flush=True)
    run = RunDirectory(Path(config.run.dir))
    if not is_newer(run.preflight, sign(run.path, place.rank)):
        verdict = Verdict([Problem("present", (name,), message)], [])
        names = {rank: place.name(rank) for rank in range(place.nodes)}
        _write(config, _report(Findings(names, {}, {0: "facts"}, {}), verdict, seconds))
    return BAD_NODE


def _report(found: Findings, verdict: Verdict, seconds: float) -> dict[str, Any]:
    """preflight.json."""
    whole = next((r for rs in found.rates.values() for r in rs if r["round"] == "all" and "error" not in r), {})
    devices = [facts.device for facts in found.facts.values()]
    return {
        "ok": verdict.exit_code == 0,
        "exit_code": verdict.exit_code,
        "time": round(time.time(), 3),
        "seconds": round(seconds, 2),
        "device": devices[0] if devices else None,
        "bad_nodes": verdict.bad_nodes,
        "problems": [asdict(problem) for problem in verdict.problems],
        "warnings": [asdict(warning) for warning in verdict.warnings],
        "nodes": [_node(found, rank) for rank in sorted(found.names)],
        "all_reduce_gb_s": _figure(whole.get("all_reduce_gb_s")),
        "broadcast_gb_s": _figure(whole.get("broadcast_gb_s")),
        "links": [
            {"nodes": [found.names[a], found.names[b]], "gb_s": _figure(speed)} for a, b, speed in link_speeds(found)
        ],
    }


def _node(found: Findings, rank: int) -> dict[str, Any]:
    facts = found.facts.get(rank)
    known = asdict(facts) if facts is not None else {}
    first = {"name": found.names[rank], "rank": rank, "present": rank not in found.lost}
    return first | {"address": found.addresses.get(rank)} | known


def _figure(value: float | None) -> float | None:
    return float(f"{value:.3g}") if value else None


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [problem["message"] for problem in report["problems"]]
    lines += [f"warning: {warning['message']}" for warning in report["warnings"]]
    count, bad = len(report["nodes"]), len(report["bad_nodes"])
    if bad:
        fit = f"{bad} of {count} nodes are bad"
    elif report["problems"]:
        fit = "no node is bad"
    else:
        fit = f"{count} nodes are fit" if count > 1 else "the node is fit"
    rates = [f"{what} {report[key]:g} GB/s" for what, key in _RATES if report[key]]
    return [*lines, ", ".join([f"preflight: {fit} ({report['device']})", *rates, f"{report['seconds']:.1f} s"])]


def _write(config: Config, report: dict[str, Any]) -> None:
    """Where that is impossible, what is printed has to do."""
    path = RunDirectory(Path(config.run.dir)).preflight
    try:
        write_atomic(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        print(f"rloop: {path} can't be written ({error.strerror})", file=sys.stderr)
