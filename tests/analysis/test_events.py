import json
from pathlib import Path

from rloop_mcore.analysis.events import environments, events
from rloop_mcore.analysis.read_run import read_run


def start(previous: dict | None, torch: str = "2.14.1", restarts: int = 0, job: str | None = None) -> dict:  # type: ignore[type-arg]
    environment = {"python": "3.12.1", "device": "CPU", "packages": {"torch": torch}}
    return {
        "event": "started",
        "previous": previous,
        "host": "node7",
        "job": job,
        "restarts": restarts,
        "environment": environment,
    }


def write_journal(path: Path, records: list[dict]) -> None:  # type: ignore[type-arg]
    timed = [record | {"time": 100.0 + number} for number, record in enumerate(records)]
    (path / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in timed))


def test_what_happened_in_the_order_of_time(rloop_run: Path) -> None:
    guard = {"event": "guard", "iteration": 1, "phase": "explore", "step": 3, "policy": "end_phase", "early": True}
    write_journal(
        rloop_run,
        [
            start(None),
            {"event": "policy", "iteration": 0, "path": "base", "reason": "the base model"},
            start({"code": 75, "message": "stopped: SIGTERM came"}),
            {"event": "changed", "keys": {"layout.tp": {"before": 1, "now": 2}}, "forced": ["layout.tp"]},
            start(None, restarts=2, job="41"),
            {"event": "done", "iteration": 0, "phase": "select", "experts": 30, "problems": 15},
            guard | {"reason": "entropy 0.01"},
            {"event": "removed", "paths": ["policies/a", "policies/b"]},
            {"event": "commit", "iteration": 0, "phase": "explore", "step": 1},
        ],
    )
    assert [(event.kind, event.text) for event in events(read_run(rloop_run))] == [
        ("start", "on node7"),
        ("policy", "θ0: the base model"),
        ("stop", "stopped: SIGTERM came; resumed on node7"),
        ("change", "layout.tp: 1 → 2, by force"),
        ("requeue", "Slurm has started the job 2 times again, job 41"),
        ("kill", "the process before ended without a word; resumed on node7, job 41"),
        ("phase", "iteration 1: selection done: 30 trajectories of 15 problems"),
        ("guard", "iteration 2, exploration, step 3: entropy 0.01, which ended the phase"),
        ("removed", "policies/a, policies/b"),
    ]


def test_neighbouring_skips_are_one_event(rloop_run: Path) -> None:
    write_journal(rloop_run, [])
    lines = [json.loads(line) for line in (rloop_run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["phase"] == "explore" and (line["iteration"], line["step"]) in {(0, 2), (0, 3), (1, 1)}:
            line["skipped"] = 2.0
    (rloop_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [event.text for event in events(read_run(rloop_run)) if event.kind == "skip"] == [
        "iteration 1, exploration, steps 2 to 3: 4 updates skipped",
        "iteration 2, exploration, step 1: 2 updates skipped",
    ]


def test_an_environment_is_told_once_until_it_changes(rloop_run: Path) -> None:
    write_journal(rloop_run, [start(None), start(None), start(None, torch="2.15.0")])
    assert environments(read_run(rloop_run)) == [
        {"host": "node7", "python": "3.12.1", "device": "CPU", "torch": "2.14.1"},
        {"host": "node7", "python": "3.12.1", "device": "CPU", "torch": "2.15.0"},
    ]
