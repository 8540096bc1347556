"""Names in a Caddy that runs in this qube: routes to unix sockets, put in and
taken out by its admin API.

A route has the name of the service's socket unit as its @id, by which it is
found again. What the API answers is not trusted: any program of the qube can
listen there while Caddy does not run.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

from ..errors import ActivateError, UsageProblem
from ..printable import printable

__all__ = [
    "NotAllowed",
    "add_route",
    "check_domain",
    "known_routes",
    "remove_route",
    "status_problem",
]

#: Where the admin API is, unless CADDY_ADMIN says otherwise, as for Caddy
#: itself.
ADMIN = "localhost:2019"
#: For a question and its answer in all, and how long that may be: a thousand
#: routes are some 300 KiB.
TIMEOUT = 10.0
LONGEST_ANSWER = 8 << 20
#: A connection without a request is closed soon, as it keeps a program from
#: being idle. Caddy's own choice is two minutes.
KEEP_ALIVE = "1s"
#: What a server answers first is one line, by which it is known how it went;
#: from 500 on it is the server, or what is behind it, that has failed.
LONGEST_STATUS = 4096
FIRST_FAILURE = 500
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])\b")
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


class _Received:
    """Bytes that were received, as http.client reads them from a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def _connect(address: str) -> socket.socket:
    if address.startswith("unix/"):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(TIMEOUT)
            sock.connect(address.removeprefix("unix/"))
        except BaseException:
            sock.close()
            raise
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), TIMEOUT)


def _exchange(address: str, request: bytes) -> bytes:
    """Send a request and return all that is answered until the end."""
    deadline = time.monotonic() + TIMEOUT
    answer = bytearray()
    with contextlib.closing(_connect(address)) as sock:
        sock.sendall(request)
        while data := sock.recv(65536):
            answer += data
            if len(answer) > LONGEST_ANSWER:
                raise ValueError("its answer has no end")
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("its answer takes too long")
            sock.settimeout(left)
    return bytes(answer)


def _ask(method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Ask the admin API; returns the status and what it says. ActivateError if
    it does not answer."""
    address = os.environ.get("CADDY_ADMIN") or ADMIN
    text = b"" if body is None else json.dumps(body).encode()
    # By a unix socket it wants no name: 2.6 refuses all but an empty one.
    host = "" if address.startswith("unix/") else address
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    ).encode() + text
    try:
        received = _Received(_exchange(address, request))
        answer = http.client.HTTPResponse(
            cast("socket.socket", received), method=method
        )
        answer.begin()
        said = answer.read()
        return answer.status, json.loads(said) if said.strip() else None
    except PermissionError as error:
        raise NotAllowed(_silent(address, error)) from None
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
        RecursionError,
    ) as error:
        raise ActivateError(_silent(address, error)) from None


class NotAllowed(ActivateError):
    """Whoever asks may not ask Caddy anything."""


def _silent(address: str, error: Exception) -> str:
    return (
        f"Caddy's admin API at {address} does not answer:"
        f" {printable(str(error))}; start Caddy, or set CADDY_ADMIN to its"
        f" address"
    )


def _servers() -> dict[str, tuple[list[str], list[dict[str, Any]]]]:
    """Where each of Caddy's servers listens, and its routes."""
    status, said = _ask("GET", "/config/apps/http/servers")
    match said:
        case None:
            return {}
        case dict() if status == http.client.OK and all(
            isinstance(server, dict) for server in said.values()
        ):
            return {
                name: (
                    [str(one) for one in _list(server.get("listen"))],
                    [
                        route
                        for route in _list(server.get("routes"))
                        if isinstance(route, dict)
                    ],
                )
                for name, server in said.items()
            }
    raise ActivateError(
        f"Caddy's admin API makes no sense: {printable(str(said)[:200])}"
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _hosts(route: dict[str, Any]) -> Iterator[str]:
    for matcher in _list(route.get("match")):
        if isinstance(matcher, dict):
            for host in _list(matcher.get("host")):
                yield str(host).lower()


def add_route(unit: str, domain: str, path: Path) -> None:
    """Let Caddy offer a unix socket by a name of its own, if it does not yet;
    raises ActivateError, also where the name is another's."""
    servers = _servers()
    if not servers:
        raise ActivateError(
            "Caddy serves nothing yet: give it a server first, for example"
            " `:80` in its Caddyfile"
        )
    for route in (one for _, routes in servers.values() for one in routes):
        if route.get("@id") == unit:
            return
        if domain.lower() in _hosts(route):
            raise ActivateError(
                f"Caddy offers something else as {domain} already: choose"
                f" another name"
            )
    new = {
        "@id": unit,
        "match": [{"host": [domain]}],
        "handle": [
            {
                "handler": "reverse_proxy",
                "upstreams": [{"dial": f"unix/{path}"}],
                "transport": {
                    "protocol": "http",
                    "keep_alive": {"idle_timeout": KEEP_ALIVE},
                },
            }
        ],
        "terminal": True,
    }
    first = sorted(servers)[0]
    place = f"/config/apps/http/servers/{quote(first, safe='')}/routes"
    if servers[first][1]:
        # Before all others, as one of these may take every host.
        status, said = _ask("PUT", f"{place}/0", new)
    else:
        status, said = _ask("POST", place, [new])
    if status != http.client.OK:
        raise ActivateError(
            f"Caddy does not take the route to {domain}:"
            f" {printable(str(said)[:200])}"
        )


def known_routes() -> dict[str, list[str]]:
    """The units of the services that Caddy has routes to, and other ids, and
    where it listens for each; raises ActivateError if it does not answer,
    NotAllowed if it must not be asked."""
    return {
        str(route.get("@id")): listens
        for listens, routes in _servers().values()
        for route in routes
    }


def status_problem(domain: str, listens: list[str], timeout: float) -> str:
    """Ask Caddy for a domain's first page, as a browser does, and return what
    is wrong with the answer, of which only the status counts."""
    for address in listens[:1]:
        try:
            status = _status(address, domain, timeout)
            if status == http.client.BAD_REQUEST:
                # So Caddy says that it wants TLS; the page itself may, too.
                with contextlib.suppress(OSError):
                    status = _status(address, domain, timeout, tls=True)
        except (OSError, ValueError, OverflowError) as error:
            return (
                f"Caddy at {printable(address)} does not answer for {domain}:"
                f" {printable(str(error))}"
            )
        if status >= FIRST_FAILURE:
            return f"{domain} answers {status} through Caddy"
    return ""


def _status(
    address: str, domain: str, timeout: float, *, tls: bool = False
) -> int:
    deadline = time.monotonic() + timeout
    answer = b""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(_connect(_reached(address)))
        sock.settimeout(timeout)
        if tls:
            sock = stack.enter_context(_unchecked(sock, domain))
        sock.sendall(
            f"GET / HTTP/1.1\r\nHost: {domain}\r\nUser-Agent: qrexec-activate"
            f"\r\nConnection: close\r\n\r\n".encode()
        )
        while b"\n" not in answer and len(answer) < LONGEST_STATUS:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            if not (data := sock.recv(LONGEST_STATUS)):
                break
            answer += data
    if not (match := _STATUS.match(answer)):
        raise ValueError("what it says is no HTTP")
    return int(match[1])


def _unchecked(sock: socket.socket, domain: str) -> socket.socket:
    """TLS to this qube's own Caddy, whose certificates nobody else may know; no
    secret goes there."""
    import ssl

    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(sock, server_hostname=domain)


def _reached(listens: str) -> str:
    """Where one connects to what Caddy listens on: `tcp/:80`, `[::]:80-90`,
    `unix//path|0600`."""
    if listens.startswith("unix/"):
        return listens.partition("|")[0]
    host, _, ports = listens.rpartition("/")[2].rpartition(":")
    if host.strip("[]") in ("", "0.0.0.0", "::"):
        host = "localhost"
    return f"{host}:{ports.partition('-')[0]}"


def remove_route(unit: str) -> None:
    """Take a route out; one that is not there is no error. Raises ActivateError
    if Caddy does not answer, or does not do it."""
    status, said = _ask("DELETE", f"/id/{quote(unit, safe='')}")
    if status != http.client.OK and "unknown object ID" not in str(said):
        raise ActivateError(
            f"Caddy does not take out the route of {unit}:"
            f" {printable(str(said)[:200])}"
        )
