"""SGLang's router among the endpoints: its workers are the engines.

The router (sglang-router 0.3.2) passes on requests but none of the routes that pause a server or change its weights, so
it is asked once who its workers are, and everything goes to these directly.
"""

from __future__ import annotations

import http.client
import json
import logging
import urllib.request
from collections.abc import Sequence
from typing import Any

from rloop_mcore.errors import UserError

log = logging.getLogger(__name__)

_ANSWER_S = 10.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy of the site must not see the key


def engines_of(endpoints: Sequence[str], api_key: str | None) -> list[str]:
    """URLs of the servers at `endpoints`, with its workers, sorted by URL, in the place of a router.

    Raises UserError for a router whose workers cannot be engines.
    """
    found: list[str] = []
    for endpoint in endpoints:
        answer = _workers(endpoint.rstrip("/"), api_key)
        if answer is None:
            found.append(endpoint)
            continue
        urls = sorted(_url(endpoint, worker) for worker in answer)
        if not urls:
            raise UserError(f"rollout.endpoints: SGLang's router at {endpoint} has no workers yet: wait until it has.")
        log.info("%s is SGLang's router: the engines are its workers %s", endpoint, ", ".join(urls))
        found += urls
    servers = {url.rstrip("/").lower().replace("//localhost", "//127.0.0.1") for url in found}
    if len(servers) < len(found):
        raise UserError(f"rollout.endpoints leads to a server twice: {', '.join(sorted(found))}.")
    return found


def _workers(url: str, api_key: str | None) -> list[dict[str, Any]] | None:
    """None where no router answers: a server, or one that is still starting, which its client waits for."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    request = urllib.request.Request(f"{url}/workers", headers=headers)
    try:
        with _DIRECT.open(request, timeout=_ANSWER_S) as response:
            answer = json.load(response)
    except (http.client.HTTPException, OSError, ValueError):  # URLError and TimeoutError are OSErrors
        return None
    workers = answer.get("workers") if isinstance(answer, dict) else None
    return workers if isinstance(workers, list) else None


def _url(router: str, worker: dict[str, Any]) -> str:
    """Of a worker that is a whole server of its own. Raises UserError for another one."""
    url, kind, protocol = str(worker.get("url")), worker.get("worker_type"), worker.get("connection_mode")
    if kind != "regular" or protocol != "HTTP" or "@" in url:  # HOST:PORT@RANK is a replica inside a server
        raise UserError(
            f"rollout.endpoints: worker {url} of SGLang's router at {router} ({kind}, {protocol}) can be no engine: "
            "one is a whole server, reached by HTTP."
        )
    return url
