"""Which SGLang versions are taken, and what is known of each."""

from __future__ import annotations

from pathlib import Path

import pytest

from rloop_mcore.rollout import client
from rloop_mcore.rollout.versions import SESSION_ROUTES, has_update_sessions, routes_of


@pytest.mark.parametrize(
    ("version", "sessions"),
    [
        ("0.5.17", False),
        ("0.5.20", False),
        ("0.5.20.post1", False),
        ("0.5.21", True),
        ("0.5.23", True),
        ("0.5.23.post2", True),
        ("0.5.23+rloop.embedded", True),
    ],
)
def test_update_sessions_came_with_0_5_21(version: str, sessions: bool) -> None:
    assert has_update_sessions(version) is sessions
    assert (set(SESSION_ROUTES) <= set(routes_of(version))) is sessions


def test_no_route_is_asked_for_that_no_run_calls() -> None:
    calls = Path(client.__file__).read_text(encoding="utf-8")
    assert [route for route in routes_of("0.5.23") if f'"{route}"' not in calls] == []


@pytest.mark.parametrize("version", ["0.5.16", "0.4.10.post2", "0.5.24", "0.6.0rc1", "1.0"])
def test_other_versions_are_refused_with_a_sentence(version: str) -> None:
    with pytest.raises(ValueError, match=rf"SGLang {version} is not supported: 0\.5\.17 to 0\.5\.23 are$"):
        routes_of(version)


def test_a_version_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"version 'unknown' cannot be read"):
        routes_of("unknown")
