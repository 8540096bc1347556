"""Names in a Caddy that runs in this qube: routes to unix sockets, put in and
taken out by its admin API.

A route has the name of the service's socket unit as its @id, by which it is
found again. Caddy keeps what it was told by its API over a restart if it is run
with --resume.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import ActivateError, UsageProblem

__all__ = ["add_route", "check_domain", "has_route", "remove_route"]

#: Where the admin API is, unless CADDY_ADMIN says otherwise, as for Caddy
#: itself.
ADMIN = "localhost:2019"
TIMEOUT = 10.0
_DOMAIN = re.compile(
    r"(?!-)[a-z0-9-]+(?<!-)(\.(?!-)[a-z0-9-]+(?<!-))*", re.ASCII | re.IGNORECASE
)


def check_domain(domain: str) -> None:
    """Raise UsageProblem for what is no host's name."""
    if not _DOMAIN.fullmatch(domain) or len(domain) > 253:
        raise UsageProblem(
            f"--domain {domain!r} is no name of a host; give one like"
            f" wiki.localhost"
        )


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def _ask(method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Ask the admin API; returns the status and what it says. ActivateError if
    it does not answer."""
    address = os.environ.get("CADDY_ADMIN") or ADMIN
    if address.startswith("unix/"):
        connection: http.client.HTTPConnection = _UnixConnection(
            address.removeprefix("unix/")
        )
    else:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT)
    try:
        with contextlib.closing(connection):
            text = None if body is None else json.dumps(body)
            connection.request(
                method, path, text, {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            said = answer.read()
            return answer.status, json.loads(said) if said.strip() else None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ActivateError(
            f"Caddy's admin API at {address} does not answer: {error}; start"
            f" Caddy, or set CADDY_ADMIN to its address"
        ) from None


def add_route(unit: str, domain: str, path: Path) -> None:
    """Let Caddy offer a unix socket by a name of its own; raises
    ActivateError."""
    _, servers = _ask("GET", "/config/apps/http/servers")
    if not servers:
        raise ActivateError(
            "Caddy serves nothing yet: give it a server first, for example"
            " `:80` in its Caddyfile"
        )
    route = {
        "@id": unit,
        "match": [{"host": [domain]}],
        "handle": [
            {
                "handler": "reverse_proxy",
                "upstreams": [{"dial": f"unix/{path}"}],
            }
        ],
        "terminal": True,
    }
    place = f"/config/apps/http/servers/{sorted(servers)[0]}/routes"
    status, routes = _ask("GET", place)
    if status == http.client.OK and routes:
        # Before all others, as one of these may take every host.
        status, said = _ask("PUT", f"{place}/0", route)
    else:
        status, said = _ask("POST", place, [route])
    if status != http.client.OK:
        raise ActivateError(
            f"Caddy does not take the route to {domain}: {said}"
        )


def has_route(unit: str) -> bool:
    """Whether Caddy has the route of a service; raises ActivateError if it does
    not answer."""
    return _ask("GET", f"/id/{quote(unit)}")[0] == http.client.OK


def remove_route(unit: str) -> None:
    """Take a route out; one that is not there is no error. Raises ActivateError
    if Caddy does not answer."""
    _ask("DELETE", f"/id/{quote(unit)}")
