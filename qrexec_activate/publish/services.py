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
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ..control.publications import (
    FOLDER,
    NOTES,
    PREFIX,
    RPC,
    folder,
    services_of,
)
from ..control.survey import read_file
from ..errors import ActivateError, UsageProblem
from ..given.escapes import escape_instance
from ..routing.names import check_argument, parse_unit_name
from ..routing.unitfile import assignments
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import Manager, open_manager
from . import caddy
from .accounts import (
    check_database,
    check_ours,
    check_user,
    database_steps,
    home,
    user_steps,
)
from .disk import (
    check_disk,
    disk_steps,
    mount_steps,
    mount_text,
    mount_unit,
    size_of,
    written,
)
from .native import check_native, native_steps
from .room import (
    BY_ITSELF,
    BY_USERS,
    POSTGRESQL,
    confinement,
    ensure_private_network,
    is_hidden,
    private_network,
)
from .steps import Step, file_step

__all__ = [
    "Service",
    "caller",
    "check",
    "creation",
    "domain_step",
    "load_step",
    "pause_problem",
    "quoted",
    "removal",
    "running_of",
    "state_and_memory",
    "units_of",
]

PROGRAM_PREFIX = "qrexec-program-"
AGAIN_PREFIX = "qrexec-again-"
DOMAIN_PREFIX = "qrexec-domain-"
PROXY = (
    "/usr/lib/systemd/systemd-socket-proxyd",
    "/lib/systemd/systemd-socket-proxyd",
)
NSENTER = "/usr/bin/nsenter"
#: What a unix socket's address holds, without the zero at its end.
LONGEST_ADDRESS = 107
#: As whom qrexec runs services in a qube, unless dom0 says otherwise.
DEFAULT_USER = "user"
CADDY_GROUP = "caddy"
CADDY = "caddy.service"
#: How long a program may take until it listens, and how often it is looked
#: whether it does.
START_TIMEOUT = 60
LOOK_INTERVAL = 0.05
UNKNOWN_MEMORY = 2**64 - 1

#: No word of this kind means anything else to systemd or to socat.
_PLAIN = re.compile(r"[A-Za-z0-9_./:=@+,-]+", re.ASCII)
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_.@+=-]+)+", re.ASCII)

#: A program may come and go with each connection; one that does nothing else
#: is left alone for a while: its socket is closed, and a timer opens it again.
MAX_STARTS = 200
STARTS_INTERVAL = 10
PAUSE = 10
#: What systemd says of a socket that it has closed for that.
LIMIT_HIT = ("trigger-limit-hit", "service-start-limit-hit")
LIMITS = (
    f"StartLimitIntervalSec={STARTS_INTERVAL}s\nStartLimitBurst={MAX_STARTS}\n"
)
#: The proxy has six descriptors for each connection.
PROXY_CONNECTIONS = 2048
PROXY_FILES = 16384
#: A program that its proxy has to find, as it is in a namespace that no other
#: unit can join. systemd makes one dollar of two.
TELL_PID = """\
RuntimeDirectory={folder}
ExecStartPost=/bin/sh -c 'echo "PROGRAM=$$MAINPID" >"$$RUNTIME_DIRECTORY/main"'
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
    #: Whether it has the qube's network.
    network: bool = False
    #: Whether qrexec itself connects callers to its socket.
    native: bool = False
    #: How much its files may take, in bytes; 0 where there is no limit.
    disk: int = 0
    #: Further directives of the program: its limits, and what it is given.
    more: tuple[str, ...] = ()

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

    @property
    def group(self) -> str:
        """Which group can connect to it, too; empty where none can."""
        return _group() if self.for_system and self.domain else ""

    @classmethod
    def read(cls, name: str, *, for_system: bool) -> Service | None:
        """What is there under this name, as far as removing it needs to know;
        None if nothing is, or ActivateError.

        Each of its unit files says it, as one may have been deleted by hand.
        """
        where = own_folder(user=not for_system)
        unit = cls(name).socket_unit
        for file in (where / one for one in (unit, *units_of(unit))):
            if (text := read_file(str(file)).text) is not None:
                break
        else:
            return None
        notes = {
            one.key: one.value
            for one in assignments(text)
            if one.section == NOTES
        }
        user = notes.get("User", "") if for_system else ""
        if for_system and not user:
            raise ActivateError(
                f"{file} does not say, by User= in [{NOTES}], which Linux"
                f" user was made for it"
            )
        return cls(
            name,
            user=user,
            database=bool(user and notes.get("Database")),
            domain=notes.get("Domain", ""),
            native=bool(user and notes.get("Native")),
            disk=size_of(user) if user else 0,
        )

    @property
    def about(self) -> str:
        """All that is made for it, in a line."""
        parts = [f"{self.name}: {self.command}" if self.command else self.name]
        parts += [f"Linux user {self.user}"] if self.user else []
        parts += [f"database {self.user}"] if self.database else []
        parts += [f"{self.domain} in Caddy"] if self.domain else []
        parts += ["native"] if self.native else []
        parts += [f"{written(self.disk)} of disk"] if self.disk else []
        return ", ".join(parts)

    def _names(self) -> list[str]:
        names = [self.socket_unit, *units_of(self.socket_unit)]
        return [*names, mount_unit(self.user)] if self.disk else names

    def files(self) -> list[Path]:
        """Its unit files that are there."""
        return [
            self.folder / unit
            for unit in self._names()
            if os.path.lexists(self.folder / unit)
        ]

    def drop_ins(self) -> list[Path]:
        """What a person has added to its units, which would hold for the next
        of that name."""
        return [
            file
            for unit in self._names()
            for file in sorted((self.folder / f"{unit}.d").glob("*.conf"))
        ]

    # The unit files

    def units(self) -> dict[str, str]:
        """Return all its unit files, by name."""
        notes = self._notes()
        return {
            unit: f"{text.rstrip()}\n{notes}"
            for unit, text in self._units().items()
        }

    def _units(self) -> dict[str, str]:
        main, program, inner, again, domain = units_of(self.socket_unit)
        about = f"[Unit]\nDescription={self.name}, started by other qubes\n"
        if self.disk:
            about += f"RequiresMountsFor={home(self.user)}\n"
        # Who restarts the socket restarts what holds it, which systemd would
        # not do by itself: it would close the socket for good.
        bound = f"Requires={self.socket_unit}\nAfter={self.socket_unit}\n"
        texts = {self.socket_unit: self._socket(), again: self._again()}
        if self.domain:
            texts[domain] = self._domain()
        if self.disk:
            texts[mount_unit(self.user)] = mount_text(self.user, self.disk)
        if not self.idle:
            texts[main] = f"{about}{bound}{LIMITS}\n{self._program()}"
            return texts
        own_socket = self.port is None and not self.path
        more = f"Requires={inner}\nAfter={inner}\n" if own_socket else ""
        if own_socket:
            texts[inner] = (
                f"[Unit]\nDescription={self.name}, behind its"
                f" proxy\n\n[Socket]\nListenStream={self._inner}\n"
                "# What is left there by a proxy that has ended is not to"
                " start the program again.\nFlushPending=yes\n"
                f"{self._access(self.user)}"
            )
        joins = self.port is not None and self._network() == BY_ITSELF
        texts[program] = (
            f"{about}StopWhenUnneeded=yes\n{more}{LIMITS}\n{self._program()}"
        )
        texts[main] = (
            f"[Unit]\nDescription=The way to {self.name}, until it is idle\n"
            f"{bound}BindsTo={program}\nAfter={program}\n{more}"
            + (f"JoinsNamespaceOf={program}\n" if joins else "")
            + f"{LIMITS}\n{self._proxy()}"
        )
        return texts

    @property
    def _inner(self) -> str:
        """The socket between a proxy and a program that takes its socket."""
        return f"%t/{PROGRAM_PREFIX.rstrip('-')}/{self.name}"

    def _network(self) -> str:
        return private_network(user=not self.for_system)

    def _own_network(self) -> str:
        """What takes the network away from it."""
        return "" if self.network else self._network()

    def _program(self) -> str:
        shut_in = confinement(
            self.user,
            self._own_network(),
            sees=(POSTGRESQL,) if self.database else (),
        )
        return (
            f"[Service]\nType=exec\nExecStart={command_line(self.command)}\n"
            # By which the journal knows it, also if it ends at once.
            "SyslogIdentifier=%N\n"
            + (
                TELL_PID.format(folder=f"{PROGRAM_PREFIX}{self.name}")
                if self._is_apart
                else ""
            )
            + shut_in
            + "".join(f"{line}\n" for line in self.more)
        )

    @property
    def _is_apart(self) -> bool:
        """Whether the program listens in a network that no unit can join, as
        its manager had to make a user namespace for it."""
        return self.port is not None and self._network() == BY_USERS

    def _proxy(self) -> str:
        enter, network, wait = "", self._own_network(), ""
        if self._is_apart:
            # Whose user namespace it is may enter it, and thus its network; it
            # fails where it is none of its own.
            enter = (
                f"{NSENTER} --preserve-credentials --user --net"
                f" --target=${{PROGRAM}} "
            )
            network, wait = (
                "",
                f"EnvironmentFile=%t/{PROGRAM_PREFIX}{self.name}/main\n",
            )
        if listens_at := (
            f"127.0.0.1:{self.port}" if self.port is not None else self.path
        ):
            kind = "TCP" if self.port is not None else "UNIX-CONNECT"
            tries = int(START_TIMEOUT / LOOK_INTERVAL)
            wait += (
                "# The first connection is passed on at once, so the program"
                " has to listen by then.\n"
                f"ExecStartPre={enter}{shutil.which('socat')} -u OPEN:/dev/null"
                f" {kind}:{listens_at},retry={tries},interval={LOOK_INTERVAL}\n"
                f"TimeoutStartSec={START_TIMEOUT}s\n"
            )
        else:
            listens_at = self._inner
        return (
            f"[Service]\n{wait}ExecStart={enter}{_proxy()}"
            f" --exit-idle-time={self.idle}"
            f" --connections-max={PROXY_CONNECTIONS} {listens_at}\n"
            f"LimitNOFILE={PROXY_FILES}\n"
            + confinement(
                self.user,
                network,
                sees=(self._inner,) if listens_at == self._inner else (),
            )
        )

    def _notes(self) -> str:
        notes = {
            "User": self.user,
            "Database": self.user if self.database else "",
            "Domain": self.domain,
            "Native": "yes" if self.native else "",
        }
        noted = "".join(
            f"{key}={value}\n" for key, value in notes.items() if value
        )
        return f"\n[{NOTES}]\n{noted}" if noted else ""

    def _socket(self) -> str:
        group = self.group
        again = units_of(self.socket_unit)[3]
        return (
            f"[Unit]\nDescription={self.name} for other qubes, by {RPC}\n"
            f"OnFailure={again}\n\n"
            f"[Socket]\nListenStream={FOLDER}/{self.name}\n"
            f"TriggerLimitIntervalSec={STARTS_INTERVAL}s\n"
            f"TriggerLimitBurst={MAX_STARTS}\n"
            f"{self._access(self.user and caller(), group)}\n"
            "[Install]\nWantedBy=sockets.target\n"
        )

    def _again(self) -> str:
        return (
            f"[Unit]\nDescription=Opens {self.name} again, whose program ended"
            f" {MAX_STARTS} times within {STARTS_INTERVAL} s\n\n[Timer]\n"
            f"OnActiveSec={PAUSE}s\nAccuracySec=1s\nRemainAfterElapse=no\n"
            f"Unit={self.socket_unit}\n"
        )

    def _domain(self) -> str:
        """What gives Caddy the name once more after each start and reload."""
        words = shlex.join(["publish", self.name, "--domain", self.domain])
        admin = os.environ.get("CADDY_ADMIN", "")
        return (
            f"[Unit]\nDescription={self.domain} in Caddy, which forgets it when"
            f" it is started or reloaded\nAfter={CADDY} {self.socket_unit}\n"
            f"PartOf={CADDY}\nReloadPropagatedFrom={CADDY}\n\n"
            f"[Service]\nType=oneshot\nRemainAfterExit=yes\n"
            + (
                f"Environment={quoted(f'CADDY_ADMIN={admin}')}\n"
                if admin
                else ""
            )
            + f"ExecStart={_ourselves()} {words}\n"
            f"ExecReload={_ourselves()} {words}\n\n"
            f"[Install]\nWantedBy={CADDY}\n"
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


def units_of(socket_unit: str) -> tuple[str, str, str, str, str]:
    """What belongs to a service's socket unit: the unit beside it, the
    program's own, and its socket; what opens it again, and what keeps its name
    in Caddy. Not all have all."""
    stem = socket_unit.removeprefix(PREFIX).removesuffix(".socket")
    return (
        f"{PREFIX}{stem}.service",
        f"{PROGRAM_PREFIX}{stem}.service",
        f"{PROGRAM_PREFIX}{stem}.socket",
        f"{AGAIN_PREFIX}{stem}.timer",
        f"{DOMAIN_PREFIX}{stem}.service",
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


def _ourselves() -> str:
    """How systemd starts this command."""
    program = os.path.abspath(sys.argv[0])
    words = (
        [program]
        if os.path.basename(program) == "qrexec-activate"
        else [sys.executable, "-m", __package__.partition(".")[0]]
    )
    return " ".join(_word(word) for word in words)


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
    """A word as ExecStart= takes it, which also knows variables."""
    return quoted(word).replace("$", "$$")


def quoted(word: str) -> str:
    """A word as a unit file takes it, whatever is in it."""
    if _PLAIN.fullmatch(word):
        return word
    for special, escaped in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        word = word.replace(special, escaped)
    return f'"{word}"'


def check(service: Service, before: Service | None = None) -> None:
    """Raise UsageProblem for what systemd would not take, or take for something
    else; `before` is what is there under its name."""
    check_argument(RPC, service.name)
    for unit in units_of(service.socket_unit):
        parse_unit_name(unit)
    command_line(service.command)
    _check_lengths(service)
    if service.port is not None and not 0 < service.port < 65536:
        raise UsageProblem(
            f"--port {service.port}: a port is a number from 1 to 65535"
        )
    if service.port is not None and service.network:
        raise UsageProblem(
            "--port with --network: any user of this qube could reach the"
            " port, and take it, and what is sent there, while the program"
            " sleeps; let it take systemd's socket, or listen on --unix PATH"
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
        _check_domain(service)
    if service.user:
        if before is None:
            check_user(service.user)
        caller()
        _check_visible(service.command)
        if service.path and not Path(service.path).is_relative_to(
            home(service.user)
        ):
            raise UsageProblem(
                f"--unix {service.path}: with --user, the program can write"
                f" only into {home(service.user)}"
            )
    if service.native:
        _check_native(service, before)
    if service.database and not (before and before.database):
        check_database()
    if service.disk and not service.user:
        raise UsageProblem(
            "--disk needs --user: what a program of yours writes is among all"
            " else that is yours"
        )
    if service.disk and before is None:
        check_disk(service.disk)
    if before is None and (there := service.drop_ins()):
        raise UsageProblem(
            f"{there[0]} would change what {service.name} does: it is of one"
            f" that was published before; remove it first"
        )


def _check_native(service: Service, before: Service | None) -> None:
    """Raise UsageProblem where callers as root would not do."""
    if not service.user:
        raise UsageProblem(
            "--native needs --user: qrexec connects callers as root, which is"
            " for root to say, and to units of the system"
        )
    if service.database:
        raise UsageProblem(
            "--native with --database: every caller is root then, and"
            " PostgreSQL goes by who connects (peer)"
        )
    if not (before and before.native):
        check_native(service.name)


def _check_lengths(service: Service) -> None:
    """Addresses and names of units end somewhere, and systemd says so only when
    it is too late."""
    if len(os.fsencode(service.address)) > LONGEST_ADDRESS:
        raise UsageProblem(
            f"{service.name} is too long: {service.address} has to be of at"
            f" most {LONGEST_ADDRESS} bytes"
        )
    if len(os.fsencode(service.path)) > LONGEST_ADDRESS:
        raise UsageProblem(
            f"--unix {service.path} is too long: at most {LONGEST_ADDRESS}"
            f" bytes"
        )


def _check_domain(service: Service) -> None:
    """Raise UsageProblem for a name that another service has, whether Caddy
    knows of it or not."""
    for for_system in (False, True):
        for file in own_folder(user=not for_system).glob(f"{PREFIX}*.socket"):
            for one in assignments(read_file(str(file)).text or ""):
                if (one.section, one.key, one.value.lower()) == (
                    NOTES,
                    "Domain",
                    service.domain.lower(),
                ) and file != service.folder / service.socket_unit:
                    raise UsageProblem(
                        f"--domain {service.domain} is another service's:"
                        f" {file}"
                    )


def _check_visible(command: str) -> None:
    """Raise UsageProblem for a program, or a file that it is given, in a folder
    that a program with a user of its own does not see."""
    words = shlex.split(command)
    program = shutil.which(words[0]) or words[0]
    for path in (Path(os.path.abspath(word)) for word in (program, *words[1:])):
        if not path.exists():
            continue
        for one in (path, path.resolve()):
            if is_hidden(one):
                raise UsageProblem(
                    f"--exec: with --user, the program does not see {one}: put"
                    f" it elsewhere, for example into /usr/local"
                )


# ------------------------------------------------------------- made and removed


def creation(services: Sequence[Service]) -> list[Step]:
    """What publishes services, all by the same manager; raises UsageProblem for
    what cannot be."""
    for service in services:
        check(service)
    private = [Step("", ensure_private_network)] * services[0].for_system
    return [*private, *_steps(services, Service.units)]


def removal(services: Sequence[Service]) -> list[Step]:
    """What, undone, takes services away, all of the same manager, with all that
    was made for them.

    Raises ActivateError where a file was edited so that it names what was not
    made for it.
    """
    for service in services:
        if service.user:
            check_ours(service.user, service.folder / service.socket_unit)
    added = [file for service in services for file in service.drop_ins()]
    for service in services:
        wanted = service.folder / "sockets.target.wants" / service.socket_unit
        if not os.path.lexists(service.folder / service.socket_unit):
            # systemd disables nothing whose unit was deleted by hand.
            added += [wanted] if os.path.lexists(wanted) else []
    return [
        *(file_step(file, "") for file in added),
        *_steps(
            services,
            lambda service: {file.name: "" for file in service.files()},
        ),
    ]


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
    domains = [one for one in files if one.startswith(DOMAIN_PREFIX)]
    everything = [
        unit for socket in sockets for unit in (socket, *units_of(socket))
    ]

    def forget() -> None:
        systemctl.daemon_reload()
        systemctl.run("reset-failed", *everything, check=False)

    there = [one for one in sockets if one in files]

    def stop() -> None:
        if there:
            systemctl.run("disable", *there)
        if files:
            systemctl.run("stop", *files, check=False)
        # What a socket started just then, or has no file any more: none of
        # those that are not there, as systemd 262 then stops none.
        if running := running_of(systemctl, everything):
            systemctl.run("stop", *running)

    load = load_step(systemctl, list(files))
    reset = systemctl.written("reset-failed", *everything)
    steps = [Step("", undo=forget, undone=f"{load.text}\n$ {reset}")]
    steps += [file_step(place / unit, text) for unit, text in files.items()]
    for service in services:
        steps += user_steps(service.user) if service.user else []
        steps += database_steps(service.user) if service.database else []
        if service.disk:
            steps += disk_steps(service.user, service.disk)
    steps.append(load)
    for service in services:
        if service.disk:
            steps += mount_steps(systemctl, service.user, place)
    # What was started of them is stopped also if not all could be.
    ends = [("disable", *there)] if there else []
    ends.append(("stop", *files))
    shown = "\n".join(f"$ {systemctl.written(*words)}" for words in ends)
    steps.append(Step("", undo=stop, undone=shown))
    enable = ("enable", "--now", *sockets)
    steps.append(
        Step(f"$ {systemctl.written(*enable)}", lambda: systemctl.run(*enable))
    )
    for service in services:
        if service.native:
            steps += native_steps(service.name, service.address)
    steps += [domain_step(service) for service in services if service.domain]
    if domains:
        # The first that goes, as it would put back what is taken out then.
        put_back = ("enable", "--now", *domains)
        leave_out = ("disable", "--now", *domains)
        steps.append(
            Step(
                f"$ {systemctl.written(*put_back)}",
                lambda: systemctl.run(*put_back),
                lambda: systemctl.run(*leave_out),
                f"$ {systemctl.written(*leave_out)}",
            )
        )
    return steps


def load_step(systemctl: Systemctl, units: Sequence[str]) -> Step:
    """Let systemd read its files; fails where it does not take these."""

    def load() -> None:
        systemctl.daemon_reload()
        with open_manager(user=systemctl.user) as manager:
            rows = manager.unit_properties(units, "Unit", ["LoadState"])
        for unit, row in zip(units, rows, strict=True):
            if row["LoadState"] != "loaded":
                raise ActivateError(
                    f"systemd does not take {unit}: see"
                    f" {systemctl.written('status', unit)}"
                )

    return Step(f"$ {systemctl.written('daemon-reload')}", load)


def running_of(systemctl: Systemctl, units: Sequence[str]) -> list[str]:
    """Those units that are active, or about to be or not to be."""
    with open_manager(user=systemctl.user) as manager:
        rows = manager.unit_properties(units, "Unit", ["ActiveState"])
    return [
        unit
        for unit, row in zip(units, rows, strict=True)
        if row["ActiveState"] not in (None, "inactive", "failed")
    ]


def domain_step(service: Service) -> Step:
    """A name in Caddy that is made, or removed."""
    unit, domain, address = service.socket_unit, service.domain, service.address

    def remove() -> None:
        try:
            caddy.remove_route(unit)
        except ActivateError as error:
            # It has nothing where it does not run, unless it keeps that for the
            # next time; all else can go.
            click.echo(
                f"{error}; if it runs, or is run with --resume, take {domain}"
                f" out of it by hand",
                err=True,
            )

    return Step(
        f"# Caddy: {domain} leads to {address}",
        lambda: caddy.add_route(unit, domain, address),
        remove,
        f"# Caddy: {domain} leads nowhere any more",
    )


# -------------------------------------------------------------------- looked at


def pause_problem(
    manager: Manager, socket_units: Sequence[str]
) -> Iterator[str]:
    """For each service why systemd has closed its socket for a while; empty
    where it has not."""
    rows = manager.unit_properties(socket_units, "Socket", ["Result"])
    for unit, row in zip(socket_units, rows, strict=True):
        if row["Result"] not in LIMIT_HIT:
            yield ""
            continue
        status = Systemctl(user=manager.user).written(
            "status", *services_of(manager, unit)
        )
        yield (
            f"its program ended {MAX_STARTS} times within"
            f" {STARTS_INTERVAL} s, so systemd has closed its socket, and opens"
            f" it again {PAUSE} s later: {status}"
        )


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
