"""The SGLang versions that can serve a run, the routes they must have, and what changed from one to the other.

Read off the wheels of 0.5.17 to 0.5.23 (entrypoints/http_server.py, managers/io_struct.py); each has all of `ROUTES`.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

OLDEST, NEWEST = "0.5.17", "0.5.23"
UPDATE_SESSIONS_SINCE = "0.5.21"  # a weight update stands between /begin_weight_update and /end_weight_update
PARTIAL_SINCE = "0.5.21"  # a paused server flushes its cache though calls wait

ROUTES = (
    "/health",
    "/model_info",
    "/server_info",
    "/generate",
    "/abort_request",
    "/pause_generation",
    "/continue_generation",
    "/flush_cache",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_distributed",
    "/update_weights_from_tensor",
    "/update_weight_version",
    "/weights_checker",
)
SESSION_ROUTES = ("/begin_weight_update", "/end_weight_update")


def has_update_sessions(version: str) -> bool:
    """Whether a server of this version wants update sessions. Raises ValueError where it is not a supported one."""
    return _release(version) >= Version(UPDATE_SESSIONS_SINCE).release


def check_partial(version: str) -> None:
    """Raises ValueError where calls cannot go on over a weight sync."""
    if _release(version) < Version(PARTIAL_SINCE).release:
        raise ValueError(
            f"SGLang {version} takes no weights while calls wait: rollout.partial=true needs {PARTIAL_SINCE} or later"
        )


def routes_of(version: str) -> tuple[str, ...]:
    """The routes that a server of this version must have. Raises ValueError where it is not a supported one."""
    return ROUTES + (SESSION_ROUTES if has_update_sessions(version) else ())


def _release(version: str) -> tuple[int, ...]:
    try:
        release = Version(version).release
    except InvalidVersion as error:
        raise ValueError(f"version {version!r} cannot be read") from error
    if not Version(OLDEST).release <= release <= Version(NEWEST).release:
        raise ValueError(f"SGLang {version} is not supported: {OLDEST} to {NEWEST} are")
    return release
