"""qrexec-activate published: what this qube offers by qubes.ConnectUnix, and
whether it is alive."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..control.options import debug_option, json_option
from ..control.publications import (
    RPC,
    Publication,
    is_service,
    managers,
    published,
    services_of,
    where_installed,
)
from ..control.table import BAD, GOOD, print_json, print_rows, short_path
from ..errors import ActivateError, UsageProblem
from ..systemd.systemctl import Systemctl
from ..systemd.units import Manager, open_manager
from .caddy import NotAllowed, known_routes, status_problem
from .change import end_unused
from .counts import Calls, count_calls, count_failures
from .disk import used, written
from .services import (
    Service,
    caller,
    pause_problem,
    state_and_memory,
    units_of,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["command", "complete_names"]

#: A program may take its time to start; systemd gives up a little before this.
TRY_TIMEOUT = 70.0
#: Within this time a program that cannot run has ended, unless it waits for a
#: processor, as on a busy machine; none waits longer than SETTLED.
SETTLING = 1.0
SETTLED = 10.0
#: So many are tried at once: each may start a program, which is ended again.
TRIED_AT_ONCE = 8
#: How long a program may take to see that a trial is over.
END_TIMEOUT = 10.0
HEADER = ("name", "state", "socket", "made by", "calls")


def complete_names(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the names that are published."""
    from click.shell_completion import CompletionItem

    try:
        with managers() as found:
            names = sorted(
                one.name for manager in found for one in published(manager)
            )
    except Exception:
        return []
    return [
        CompletionItem(name) for name in names if name.startswith(incomplete)
    ]


def style(column: int, text: str) -> str:
    return {"alive": GOOD, "dead": BAD}.get(text, "") if column == 1 else ""


@click.command(
    "published",
    epilog="""\b
Example:
    $ qrexec-activate published
    NAME           STATE  SOCKET                   MADE BY               CALLS
    gpg-agent-ssh  alive  …/gnupg/S.gpg-agent.ssh  gpg-agent-ssh.socket  12
""",
)
@click.option(
    "--check",
    "walk",
    is_flag=True,
    help="Connect to each, which starts its program, ask Caddy for those with"
    " a domain, and say what is wrong.",
)
@json_option
@debug_option
@click.pass_context
def command(ctx: click.Context, walk: bool, as_json: bool) -> None:
    """In a service qube, list the names that other qubes can call by
    qubes.ConnectUnix, and whether they are alive. What --check has started, and
    nobody else uses, it ends again.

    CALLS are those that have ended since the qube was started, as far as the
    journal has them, and how many of these failed; what comes through Caddy is
    none. Of programs that were published with --exec it says whether they run,
    how often they have failed since then, how much memory they use and, where
    that has a limit, DISK. Where any is native, WAY says of each whether qrexec
    itself connects its callers, or qubes.ConnectUnix, the script; only
    of this one calls are counted.
    """
    calls = _calls()
    with managers() as found:
        seen = [
            one for manager in found for one in _look(manager, calls, walk=walk)
        ]
    seen.sort(key=lambda one: one.publication.name)
    if as_json:
        print_json([one.json() for one in seen])
    else:
        _print(seen)
    if walk:
        installed = bool(where_installed(RPC))
        if not installed:
            click.echo(
                f"{RPC} is not installed in this qube: install the package"
                f" qrexec-activate-services",
                err=True,
            )
        if not installed or any(one.problem for one in seen):
            ctx.exit(1)


@dataclass(frozen=True, slots=True)
class Seen:
    """A name, and what there is to say of its program if it was published with
    one."""

    publication: Publication
    problem: str
    state: str | None = None
    memory: int | None = None
    service: Service | None = None
    #: Since the qube was started; None where the journal does not tell.
    calls: Calls | None = None
    failures: int | None = None

    def json(self) -> dict[str, Any]:
        one, service = self.publication, self.service
        return {
            "name": one.name,
            "link": one.link,
            "socket": one.socket or None,
            "unit": one.unit or None,
            "file": one.file or None,
            "alive": one.alive,
            "problem": self.problem or None,
            "state": self.state,
            "memory": self.memory,
            "calls": None if self.calls is None else self.calls.ended,
            "calls_failed": None if self.calls is None else self.calls.failed,
            "program_failed": self.failures,
            "user": (service and service.user) or None,
            "database": service.user if service and service.database else None,
            "domain": (service and service.domain) or None,
            "native": bool(one.way),
            "disk": (service and service.disk) or None,
            "disk_used": used(service.user)
            if service and service.disk
            else None,
        }

    def row(self) -> list[str]:
        one = self.publication
        return [
            one.name,
            "alive" if one.alive else "dead",
            short_path(one.socket) or "-",
            one.unit or "by hand",
            "-"
            if self.calls is None
            else f"{self.calls.ended}"
            + f", {self.calls.failed} failed" * bool(self.calls.failed),
        ]

    def program(self) -> list[str]:
        times = self.failures or 0
        return [
            (self.state or "-")
            + f", failed {times} time{'s' * (times > 1)}" * bool(times),
            "-" if self.memory is None else _mebibytes(self.memory),
        ]

    def disk(self) -> str:
        if not self.service or not self.service.disk:
            return "-"
        taken = used(self.service.user)
        of = f"of {written(self.service.disk)}"
        return of if taken is None else f"{_mebibytes(taken)} {of}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _calls() -> dict[str, Calls] | None:
    try:
        return count_calls(caller() if os.geteuid() == 0 else "")
    except UsageProblem:
        return count_calls("")


def _look(
    manager: Manager, calls: dict[str, Calls] | None, *, walk: bool
) -> Iterator[Seen]:
    found = published(manager)
    services = {
        one.unit: Service.read(one.name, for_system=one.for_system)
        for one in found
        if is_service(one.unit)
    }
    pauses = dict(
        zip(services, pause_problem(manager, list(services)), strict=True)
    )
    in_caddy, lost = _domains([one for one in services.values() if one])
    if walk:
        with ThreadPoolExecutor(TRIED_AT_ONCE) as pool:
            problems = list(pool.map(partial(_try, in_caddy=in_caddy), found))
    else:
        problems = [one.problem for one in found]
    states = dict(
        zip(services, state_and_memory(manager, list(services)), strict=True)
    )
    failed = count_failures(user=manager.user) if services else None
    for one, problem in zip(found, problems, strict=True):
        # Only the script writes of calls.
        called = (
            None if calls is None or one.way else calls.get(one.name, Calls())
        )
        if one.unit not in states:
            yield Seen(one, problem, calls=called)
            continue
        yield Seen(
            one,
            pauses[one.unit] or problem or lost.get(one.name, ""),
            *states[one.unit],
            services[one.unit],
            called,
            None
            if failed is None
            else sum(failed[unit] for unit in units_of(one.unit)[:2]),
        )


def _print(seen: list[Seen]) -> None:
    if not seen:
        click.echo(
            "Nothing is published. Publish a socket: qrexec-activate publish"
            " NAME --unit NAME.socket",
            err=True,
        )
        return
    header, rows = list(HEADER), [one.row() for one in seen]
    if any(one.state for one in seen):
        header += ["program", "memory"]
        rows = [
            row + one.program() for row, one in zip(rows, seen, strict=True)
        ]
    if any(one.service and one.service.disk for one in seen):
        header.append("disk")
        for row, one in zip(rows, seen, strict=True):
            row.append(one.disk())
    if any(one.publication.way for one in seen):
        header.append("way")
        for row, one in zip(rows, seen, strict=True):
            row.append("native" if one.publication.way else "script")
    print_rows(header, rows, style)
    for one in seen:
        if one.problem:
            click.echo(f"{one.publication.name}: {one.problem}")


def _try(one: Publication, in_caddy: dict[str, tuple[str, list[str]]]) -> str:
    """Go the way that a call goes, and that of a browser, and leave all as it
    was; returns what is wrong. `in_caddy` has the domain of a unit, and where
    Caddy listens for it."""
    if one.problem:
        return one.problem
    if not is_service(one.unit):
        client, problem = _connect(one)
        if client is not None:
            client.close()
        return problem
    with open_manager(user=not one.for_system) as manager:
        slept = _state(manager, one.unit) == "idle"
        client, problem = _connect(one)
        if client is None:
            return problem
        with client:
            problem = _walk_on(one, manager, client)
        # No sooner: it may serve one connection at a time.
        if not problem and one.unit in in_caddy:
            problem = status_problem(*in_caddy[one.unit], TRY_TIMEOUT)
            problem += f": qrexec-activate logs {one.name}" * bool(problem)
        if slept:
            _end(one)
    return problem


def _connect(one: Publication) -> tuple[socket.socket | None, str]:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(TRY_TIMEOUT)
    try:
        client.connect(one.socket)
    except OSError as error:
        client.close()
        return (
            None,
            f"cannot connect to {one.socket}: {error.strerror or error}",
        )
    return client, ""


def _state(manager: Manager, unit: str) -> str:
    return next(state_and_memory(manager, [unit]))[0]


def _end(one: Publication) -> None:
    """End a program that slept before, unless somebody uses it by now."""
    if one.for_system and os.geteuid() != 0:
        return
    service = Service.read(one.name, for_system=one.for_system)
    deadline = time.monotonic() + END_TIMEOUT
    while service and not end_unused(service, units_of(one.unit)[:1]):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


class Sight(NamedTuple):
    """What runs of a service at one moment."""

    state: str
    #: systemd's ids of what runs: others mean that it was started once more.
    runs: tuple[str, ...] = ()
    #: Whether it waits for something other than a processor.
    waits: bool = False


def stays(sights: Iterable[tuple[float, Sight]]) -> str | None:
    """Whether a program stays, as seen at these times, in seconds: None where
    it does, else what it was last.

    systemd starts one that ends at once again and again, so that it may be seen
    to run each time: only what has run throughout counts.
    """
    first: tuple[float, Sight] | None = None
    state = "unknown"
    for now, sight in sights:
        state = sight.state
        if first is None:
            if state in ("idle", "starting", "stopping"):
                continue
            first = now, sight
        since, then = first
        if state != "running":
            return state
        if sight.runs != then.runs:
            return "started again"
        if now - since >= (SETTLING if sight.waits else SETTLED):
            return None
    return state


def _sights(manager: Manager, unit: str) -> Iterator[tuple[float, Sight]]:
    pair = units_of(unit)[:2]
    deadline = time.monotonic() + TRY_TIMEOUT
    while (now := time.monotonic()) < deadline:
        # First of all its state: what has just begun to run has an id.
        state = _state(manager, unit)
        rows = manager.unit_properties(
            pair, "Unit", ["ActiveState", "InvocationID"]
        )
        pids = manager.unit_properties(pair, "Service", ["MainPID"])
        active = [
            (bytes(row["InvocationID"] or ()).hex(), pid["MainPID"])
            for row, pid in zip(rows, pids, strict=True)
            if row["ActiveState"] == "active"
        ]
        runs = tuple(run for run, _ in active)
        yield now, Sight(state, runs, all(_waits(pid) for _, pid in active))
        time.sleep(0.05)


def _waits(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "S"


def _walk_on(one: Publication, manager: Manager, client: socket.socket) -> str:
    """systemd has taken the connection; whether there is a program for it, and
    stays, shows in a moment."""
    state = stays(_sights(manager, one.unit))
    if state is None or _has_answered(client):
        return ""
    units = services_of(manager, one.unit)
    return (
        f"its program does not stay ({state}):"
        f" {Systemctl(user=manager.user).written('status', *units)}"
    )


def _has_answered(client: socket.socket) -> bool:
    """Whether a program that has ended had something to say before."""
    client.setblocking(False)
    try:
        return bool(client.recv(1))
    except OSError:
        return False


def _domains(
    services: list[Service],
) -> tuple[dict[str, tuple[str, list[str]]], dict[str, str]]:
    """The domains of these services that Caddy has, by unit, with where it
    listens for them; and what is wrong with others, by service."""
    if not (named := [one for one in services if one.domain]):
        return {}, {}
    try:
        known = known_routes()
    except NotAllowed:
        # Not everyone who lists names may also change them.
        return {}, {}
    except ActivateError as error:
        return {}, {one.name: str(error) for one in named}
    return {
        one.socket_unit: (one.domain, known[one.socket_unit])
        for one in named
        if one.socket_unit in known
    }, {
        one.name: f"Caddy has lost {one.domain}: qrexec-activate publish"
        f" {one.name} --domain {one.domain}"
        for one in named
        if one.socket_unit not in known
    }
