"""Services that run only while other qubes use them: unit files out of a name
and a command.

Everything that is known of such a service is in its unit files, also the user,
the database and the name in Caddy that were made for it: they can be read and
changed by hand. Nothing else is kept.

    takes the socket       NAME.socket → program
    … with --idle          NAME.socket → proxy → program's socket → program
    listens by itself      NAME.socket → proxy → the program's port or path

Without the proxy, a connection starts the program; with it, the proxy does,
and stops it when nobody needs it any more.

With a user of its own, the units are the system's: they belong to root, run
from boot on without a login or a manager of that user's, and systemd can shut
the program in as far as it goes.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ..control.publications import FOLDER, RPC, folder
from ..control.survey import read_file
from ..errors import ActivateError, UsageProblem
from ..routing.names import check_argument, escape_instance, parse_unit_name
from ..routing.unitfile import assignments
from ..systemd.manager import Manager, open_manager
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from . import caddy
from .accounts import (
    check_database,
    check_ours,
    check_user,
    database_steps,
    home,
    user_steps,
)
from .steps import Step, file_step

__all__ = [
    "Service",
    "creation",
    "domain_step",
    "is_service",
    "removal",
    "state_and_memory",
    "units_of",
]

PREFIX = "qrexec-publish-"
PROGRAM_PREFIX = "qrexec-program-"
PROXY = (
    "/usr/lib/systemd/systemd-socket-proxyd",
    "/lib/systemd/systemd-socket-proxyd",
)
#: As whom qrexec runs services in a qube, unless dom0 says otherwise.
DEFAULT_USER = "user"
CADDY_GROUP = "caddy"
#: What systemd ignores, in which a socket unit says what else was made for its
#: service.
NOTES = "X-Publish"
#: How long a program may take until it listens, and how often it is looked
#: whether it does.
START_TIMEOUT = 60
LOOK_INTERVAL = 0.05
UNKNOWN_MEMORY = 2**64 - 1

#: No word of this kind means anything else to systemd or to socat.
_PLAIN = re.compile(r"[A-Za-z0-9_./:=@+,-]+", re.ASCII)
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_.@+=-]+)+", re.ASCII)

#: A program may come and go each second; one that only fails is given up.
LIMITS = "StartLimitIntervalSec=10s\nStartLimitBurst=20\n"
#: What any user may take from a program, and what no program needs that serves
#: a socket.
CONFINED = """\
NoNewPrivileges=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
LockPersonality=yes
SystemCallArchitectures=native
"""
#: What only the system's systemd can take. A program writes into its home, and
#: sees no other home and no other process.
SHUT_IN = """\
CapabilityBoundingSet=
PrivateDevices=yes
PrivateTmp=yes
ProcSubset=pid
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
RestrictNamespaces=yes
SystemCallFilter=@system-service
UMask=0077
"""


@dataclass(frozen=True, slots=True)
class Service:
    """What a person asks for. With `port` or `path` the program listens there
    by itself; else it takes the socket."""

    name: str
    command: str = ""
    #: A time span as systemd writes it; empty: the program ends by itself, or
    #: stays.
    idle: str = ""
    port: int | None = None
    path: str = ""
    #: A Linux user of its own.
    user: str = ""
    database: bool = False
    domain: str = ""

    @property
    def for_system(self) -> bool:
        """Whether its units are the system's."""
        return bool(self.user)

    @property
    def folder(self) -> Path:
        """Where its unit files lie."""
        return own_folder(user=not self.for_system)

    @property
    def systemctl(self) -> Systemctl:
        return Systemctl(user=not self.for_system)

    @property
    def socket_unit(self) -> str:
        return f"{PREFIX}{escape_instance(self.name)}.socket"

    @property
    def address(self) -> Path:
        """The path of the socket that others reach."""
        return folder(user=not self.for_system) / self.name

    @classmethod
    def read(cls, name: str, *, for_system: bool) -> Service | None:
        """What is there under this name, as far as removing it needs to know;
        None if nothing is, or ActivateError."""
        where = own_folder(user=not for_system) / cls(name).socket_unit
        text = read_file(str(where)).text
        if text is None:
            return None
        notes = {
            one.key: one.value
            for one in assignments(text)
            if one.section == NOTES
        }
        user = notes.get("User", "") if for_system else ""
        if for_system and not user:
            raise ActivateError(
                f"{where} does not say, by User= in [{NOTES}], which Linux"
                f" user was made for it"
            )
        return cls(
            name,
            user=user,
            database=bool(user and notes.get("Database")),
            domain=notes.get("Domain", ""),
        )

    @property
    def about(self) -> str:
        """All that is made for it, in a line."""
        parts = [f"{self.name}: {self.command}" if self.command else self.name]
        parts += [f"Linux user {self.user}"] if self.user else []
        parts += [f"database {self.user}"] if self.database else []
        parts += [f"{self.domain} in Caddy"] if self.domain else []
        return ", ".join(parts)

    def files(self) -> list[Path]:
        """Its unit files that are there."""
        units = (self.socket_unit, *units_of(self.socket_unit))
        return [
            self.folder / unit
            for unit in units
            if os.path.lexists(self.folder / unit)
        ]

    # The unit files

    def units(self) -> dict[str, str]:
        """Return all its unit files, by name."""
        main, program, inner = units_of(self.socket_unit)
        texts = {self.socket_unit: self._socket()}
        about = f"[Unit]\nDescription={self.name}, started by other qubes\n"
        run = f"[Service]\nType=exec\nExecStart={command_line(self.command)}\n"
        if not self.idle:
            texts[main] = f"{about}{LIMITS}\n{run}{self._confinement()}"
            return texts
        if (
            listens_at := f"127.0.0.1:{self.port}"
            if self.port is not None
            else self.path
        ):
            needs, more = program, ""
            kind = "TCP" if self.port is not None else "UNIX-CONNECT"
            look = f"{kind}:{listens_at}"
            tries = int(START_TIMEOUT / LOOK_INTERVAL)
            times = f"retry={tries},interval={LOOK_INTERVAL}"
            wait = (
                "# The first connection is passed on at once, so the program"
                " has to listen by then.\n"
                f"ExecStartPre={shutil.which('socat')} -u OPEN:/dev/null"
                f" {look},{times}\n"
                f"TimeoutStartSec={START_TIMEOUT}s\n"
            )
        else:
            listens_at, needs = (
                f"%t/{PROGRAM_PREFIX.rstrip('-')}/{self.name}",
                f"{inner} {program}",
            )
            more, wait = f"Requires={inner}\nAfter={inner}\n", ""
            texts[inner] = (
                f"[Unit]\nDescription={self.name}, behind its"
                f" proxy\n\n[Socket]\nListenStream={listens_at}\n"
                "# What is left there by a proxy that has ended is not to"
                " start the program again.\nFlushPending=yes\n"
                f"{self._access(self.user)}"
            )
        texts[program] = (
            f"{about}StopWhenUnneeded=yes\n{more}{LIMITS}\n{run}{self._confinement()}"
        )
        texts[main] = (
            f"[Unit]\nDescription=The way to {self.name}, until it is idle\n"
            f"BindsTo={program}\nAfter={needs}\n{LIMITS}\n"
            f"[Service]\n{wait}ExecStart={_proxy()}"
            f" --exit-idle-time={self.idle} {listens_at}\n{self._confinement()}"
        )
        return texts

    def _socket(self) -> str:
        notes = {
            "User": self.user,
            "Database": self.user if self.database else "",
            "Domain": self.domain,
        }
        noted = "".join(
            f"{key}={value}\n" for key, value in notes.items() if value
        )
        group = _group() if self.for_system and self.domain else ""
        return (
            f"[Unit]\nDescription={self.name} for other qubes, by {RPC}\n\n"
            f"[Socket]\nListenStream={FOLDER}/{self.name}\n"
            f"{self._access(self.user and caller(), group)}\n"
            "[Install]\nWantedBy=sockets.target\n"
            + (f"\n[{NOTES}]\n{noted}" if noted else "")
        )

    def _access(self, user: str, group: str = "") -> str:
        """Who can connect to a socket. Folders of the system are open, as one
        user's own are not."""
        if not user:
            return "SocketMode=0600\nDirectoryMode=0700\nRemoveOnStop=yes\n"
        who = (
            f"SocketUser={user}\nSocketGroup={group}\nSocketMode=0660\n"
            if group
            else f"SocketUser={user}\nSocketMode=0600\n"
        )
        return f"{who}DirectoryMode=0755\nRemoveOnStop=yes\n"

    def _confinement(self) -> str:
        if not self.user:
            return CONFINED
        place = home(self.user)
        return (
            f"User={self.user}\nWorkingDirectory={place}\n"
            f"ReadWritePaths={place}\n{CONFINED}{SHUT_IN}"
        )


def is_service(unit: str) -> bool:
    """Whether a socket unit is that of a service that was published with a
    command."""
    return unit.startswith(PREFIX) and unit.endswith(".socket")


def units_of(socket_unit: str) -> tuple[str, str, str]:
    """What a service's socket unit starts: the unit beside it, the program's
    own, and its socket; not all have all."""
    stem = socket_unit.removeprefix(PREFIX).removesuffix(".socket")
    return (
        f"{PREFIX}{stem}.service",
        f"{PROGRAM_PREFIX}{stem}.service",
        f"{PROGRAM_PREFIX}{stem}.socket",
    )


def caller() -> str:
    """As whom qubes.ConnectUnix runs here: who may connect to services of the
    system. Raises UsageProblem."""
    for name in (DEFAULT_USER, os.environ.get("SUDO_USER", "")):
        if (
            name
            and name != "root"
            and any(entry.pw_name == name for entry in pwd.getpwall())
        ):
            return name
    raise UsageProblem(
        f"there is no user {DEFAULT_USER!r} here, as whom qrexec runs"
        f" services: use sudo as the user that it is"
    )


def _group() -> str:
    """The group by which Caddy gets at a socket of the system's; empty where it
    has none, and is run by a person."""
    return (
        CADDY_GROUP
        if any(entry.gr_name == CADDY_GROUP for entry in grp.getgrall())
        else ""
    )


def _proxy() -> str:
    for path in PROXY:
        if os.access(path, os.X_OK):
            return path
    raise ActivateError(
        "systemd-socket-proxyd is not installed: it comes with systemd, or as"
        " systemd-container"
    )


def command_line(command: str) -> str:
    """A command as ExecStart= takes it, split into words as a shell does, with
    no word changed; raises UsageProblem."""
    if not command.isprintable():
        raise UsageProblem("--exec must be one line of printable characters")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageProblem(f"--exec {command!r}: {error}") from None
    program = shutil.which(words[0]) if words else None
    if program is None:
        raise UsageProblem(
            f"--exec: there is no program {(words or [''])[0]!r}"
        )
    return " ".join(
        _word(word) for word in [os.path.abspath(program), *words[1:]]
    )


def _word(word: str) -> str:
    if _PLAIN.fullmatch(word):
        return word
    for special, escaped in (
        ("\\", "\\\\"),
        ('"', '\\"'),
        ("%", "%%"),
        ("$", "$$"),
    ):
        word = word.replace(special, escaped)
    return f'"{word}"'


def check(service: Service) -> None:
    """Raise UsageProblem for what systemd would not take, or take for something
    else."""
    check_argument(RPC, service.name)
    for unit in units_of(service.socket_unit):
        parse_unit_name(unit)
    command_line(service.command)
    if service.port is not None and not 0 < service.port < 65536:
        raise UsageProblem(
            f"--port {service.port}: a port is a number from 1 to 65535"
        )
    if service.path and not _PLAIN_PATH.fullmatch(service.path):
        raise UsageProblem(
            f"--unix {service.path!r}: with --exec, a path begins with / and"
            f" is of A-Z a-z 0-9 _ . @ + = -"
        )
    if (service.port is not None or service.path) and not shutil.which("socat"):
        raise UsageProblem(
            "socat is not installed, which waits until the program listens:"
            " apt install socat"
        )
    if service.idle:
        analyze = ["systemd-analyze", "timespan", "--", service.idle]
        if (
            not _PLAIN.fullmatch(service.idle)
            or subprocess.run(
                analyze, capture_output=True, check=False
            ).returncode
        ):
            raise UsageProblem(
                f"--idle {service.idle!r} is no time span; write it like 5min"
                f" or 90s"
            )
    if service.domain:
        caddy.check_domain(service.domain)
    if service.user:
        check_user(service.user)
        caller()
        if service.path and not Path(service.path).is_relative_to(
            home(service.user)
        ):
            raise UsageProblem(
                f"--unix {service.path}: with --user, the program can write"
                f" only into {home(service.user)}"
            )
    if service.database:
        check_database()
    if there := service.files():
        raise UsageProblem(
            f"{service.name} is published already, by {there[0]}:"
            f" qrexec-activate unpublish it first"
        )


# ------------------------------------------------------------- made and removed


def creation(services: Sequence[Service]) -> list[Step]:
    """What publishes services, all by the same manager; raises UsageProblem for
    what cannot be."""
    for service in services:
        check(service)
    return _steps(services, Service.units)


def removal(services: Sequence[Service]) -> list[Step]:
    """What, undone, takes services away, all of the same manager, with all that
    was made for them.

    Raises ActivateError where a file was edited so that it names what was not
    made for it.
    """
    for service in services:
        if service.user:
            check_ours(service.user, service.folder / service.socket_unit)
    return _steps(
        services, lambda service: {file.name: "" for file in service.files()}
    )


def _steps(
    services: Sequence[Service], units: Callable[[Service], Mapping[str, str]]
) -> list[Step]:
    # The files come first, and so go last: as long as anything is left, so is
    # what says that it was made.
    systemctl, place = services[0].systemctl, services[0].folder
    files = {
        name: text
        for service in services
        for name, text in units(service).items()
    }
    sockets = [service.socket_unit for service in services]
    programs = [
        unit for service in services for unit in units_of(service.socket_unit)
    ]

    def forget() -> None:
        systemctl.daemon_reload()
        systemctl.run("reset-failed", *sockets, *programs, check=False)

    def load() -> None:
        systemctl.daemon_reload()
        with open_manager(user=systemctl.user) as manager:
            rows = manager.unit_properties(list(files), "Unit", ["LoadState"])
        for unit, row in zip(files, rows, strict=True):
            if row["LoadState"] != "loaded":
                raise ActivateError(
                    f"systemd does not take {unit}: see"
                    f" {systemctl.written('status', unit)}"
                )

    def stop() -> None:
        systemctl.run("disable", "--now", *sockets)
        systemctl.run("stop", *programs, check=False)

    reload = f"$ {systemctl.written('daemon-reload')}"
    reset = systemctl.written("reset-failed", *sockets, *programs)
    steps = [Step("", undo=forget, undone=f"{reload}\n$ {reset}")]
    steps += [file_step(place / unit, text) for unit, text in files.items()]
    for service in services:
        steps += user_steps(service.user) if service.user else []
        steps += database_steps(service.user) if service.database else []
    steps.append(Step(reload, load))
    # What was started of them is stopped also if not all could be.
    disable = systemctl.written("disable", "--now", *sockets)
    ended = systemctl.written("stop", *programs)
    steps.append(Step("", undo=stop, undone=f"$ {disable}\n$ {ended}"))
    enable = ("enable", "--now", *sockets)
    steps.append(
        Step(f"$ {systemctl.written(*enable)}", lambda: systemctl.run(*enable))
    )
    steps += [domain_step(service) for service in services if service.domain]
    return steps


def domain_step(service: Service) -> Step:
    """A name in Caddy that is made, or removed."""
    unit, domain, address = service.socket_unit, service.domain, service.address

    def remove() -> None:
        try:
            caddy.remove_route(unit)
        except ActivateError:
            # It has nothing where it does not run, unless it keeps that for the
            # next time; all else can go.
            click.echo(
                f"Caddy does not answer: if it is run with --resume, take"
                f" {domain} out of it by hand",
                err=True,
            )

    return Step(
        f"# Caddy: {domain} leads to {address}",
        lambda: caddy.add_route(unit, domain, address),
        remove,
        f"# Caddy: {domain} leads nowhere any more",
    )


# -------------------------------------------------------------------- looked at


def state_and_memory(
    manager: Manager, socket_units: Sequence[str]
) -> Iterator[tuple[str, int | None]]:
    """For each service `idle`, `running`, `starting`, … or `failed`, and how
    many bytes it uses, if that is known."""
    services = [units_of(unit)[:2] for unit in socket_units]
    flat = [unit for pair in services for unit in pair]
    states = [
        row["ActiveState"]
        for row in manager.unit_properties(flat, "Unit", ["ActiveState"])
    ]
    sizes = [
        row["MemoryCurrent"]
        for row in manager.unit_properties(flat, "Service", ["MemoryCurrent"])
    ]
    sockets = [
        row["ActiveState"]
        for row in manager.unit_properties(
            socket_units, "Unit", ["ActiveState"]
        )
    ]
    words = {
        "active": "running",
        "inactive": "idle",
        "activating": "starting",
        "deactivating": "stopping",
    }
    for at in range(0, len(flat), 2):
        pair = states[at : at + 2]
        # Whose socket has failed, nobody reaches.
        state = (
            "failed"
            if "failed" in (*pair, sockets[at // 2])
            else words.get(pair[0], str(pair[0]))
        )
        known = [
            size
            for size in sizes[at : at + 2]
            if size is not None and size != UNKNOWN_MEMORY
        ]
        yield state, sum(known) if known else (0 if state == "idle" else None)
