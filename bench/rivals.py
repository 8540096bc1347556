"""The ways from a local address to qrexec-client-vm, each started as its own
users start it.

All stand beside each other for the whole run, each on a loopback address of its
own, and none outlives the ``with`` block of `rivals`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from qrexec_activate.loopback.machine import Machine

__all__ = [
    "CHARGEN",
    "DISCARD",
    "ECHO",
    "LISTEN",
    "NOT_INSTALLED",
    "RIVALS",
    "Many",
    "Programs",
    "Rival",
    "build",
    "rivals",
]

#: The well-known ports of the three services: they are the RPC's argument, and
#: tell the stand-in what to do.
ECHO, DISCARD, CHARGEN = 7, 9, 19
#: The listeners' ports, each far enough from its service's own to need no
#: privilege.
LISTEN = {service: 7000 + service for service in (ECHO, DISCARD, CHARGEN)}

#: In the order of the tables.
RIVALS = {
    "limit": "limit: accept, fork, exec in C",
    "hand-over": "qrexec-activate, hand-over",
    "splice": "qrexec-activate, splice",
    "socat": "qvm-connect-tcp (socat)",
    "accept": "Accept=yes units",
    "proxyd": "systemd-socket-proxyd + limit",
    "qrexec-connect": "qrexec-connect (asyncio)",
}

#: One target takes 120 connections at once, so a thousand need several.
TARGETS = 10
PROXYD = "/lib/systemd/systemd-socket-proxyd"
START_TIMEOUT = 60.0
NOT_INSTALLED = "not installed"
#: What qrexec-connect 1.0 calls, wherever another is wanted.
GENUINE_CLIENT = "/usr/bin/qrexec-client-vm"
PREFIX = "qrexec-connect-tcp"

DROP_IN = """\
[Socket]
ListenStream={host}:{port}
FileDescriptorName={target}
"""
RELAY_DROP_IN = """\
[Service]
Environment=QREXEC_ACTIVATE_RELAY={relay}
"""
#: More are held open for the sake of their memory than a qube's agent takes.
LIMITS_DROP_IN = """\
[Service]
Environment=QREXEC_ACTIVATE_MAX_CONNECTIONS=2000
Environment=QREXEC_ACTIVATE_MAX_TOTAL=2000
"""
#: As in the Qubes documentation, "Permanent port binding".
ACCEPT_SOCKET = """\
[Unit]
Description=my-tcp-service

[Socket]
ListenStream={host}:{port}
Accept=true
"""
ACCEPT_SERVICE = """\
[Unit]
Description=my-tcp-service

[Service]
ExecStart={client} '{target}' qubes.ConnectTCP+{service}
StandardInput=socket
StandardOutput=inherit
"""
#: As they are, systemd refuses the 65th connection, and fails the socket for
#: good at 200 connections in 2 s.
ACCEPT_LIMITS = """\
[Socket]
MaxConnections=4096
TriggerLimitIntervalSec=0
"""
#: Undoes what the private manager sets for every service, so that the unit is
#: as its author wrote it.
ACCEPT_LOG = """\
[Service]
StandardOutput=inherit
StandardError=inherit
"""
#: Started and stopped again and again here, which the default limit of 5 starts
#: in 10 s would end.
PROXYD_SOCKET = """\
[Unit]
StartLimitIntervalSec=0

[Socket]
TriggerLimitIntervalSec=0
ListenStream={host}:{port}
"""
PROXYD_SERVICE = """\
[Unit]
StartLimitIntervalSec=0

[Service]
Type=notify
LimitNOFILE=16384
ExecStart={proxyd} --connections-max=4096 {to_host}:{to_port}
"""


@dataclass(frozen=True)
class Programs:
    """What was compiled for this run. `client` is the stand-in, or the one the
    person named."""

    client: Path
    limit: Path
    load: Path
    busy: Path
    #: Whether it has --use-stdin-socket.
    hands_over: bool
    #: bcduggan's qrexec-connect, if the person has it.
    connect: Path | None = None


@dataclass
class Rival:
    """One way to reach qrexec-client-vm."""

    name: str
    #: A loopback address per target; all listen on LISTEN.
    hosts: list[str]
    #: The processes between the client and qrexec-client-vm, without
    #: qrexec-client-vm itself.
    pids: Callable[[], list[int]]
    #: The systemd service that a first connection starts, for each of the three
    #: services.
    units: dict[int, str] = field(default_factory=dict)
    #: It only relays to another listener: what it costs to start a call says
    #: nothing about it.
    only_relays: bool = False


def build(
    folder: Path, client: Path | None, connect: Path | None = None
) -> Programs:
    """Compile the C programs into a folder; `client` None: the stand-in too."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("bench: no C compiler: install the package gcc")
    for name in ("client", "limit", "load", "busy"):
        source = Path(__file__).with_name(f"{name}.c")
        flags = [
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            *(["-pthread"] if name == "load" else []),
        ]
        subprocess.run(
            [compiler, *flags, "-o", folder / name, source], check=True
        )
    client = client or folder / "client"
    if connect is not None:
        text = connect.read_text().replace(GENUINE_CLIENT, str(client))
        connect = folder / "qrexec-connect"
        connect.write_text(text)
    return Programs(
        client,
        *(folder / name for name in ("limit", "load", "busy")),
        hands_over(client),
        connect,
    )


def hands_over(client: Path) -> bool:
    """Whether it has --use-stdin-socket: since 4.2.19, and in --help since
    4.3.0."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        said = subprocess.run(
            [client, "--use-stdin-socket"],
            stdin=theirs,
            capture_output=True,
            check=False,
        ).stderr
    return b"--use-stdin-socket'" not in said


@contextlib.contextmanager
def rivals(
    machine: Machine,
    programs: Programs,
    target: str | None,
    names: Sequence[str],
) -> Iterator[tuple[list[Rival], dict[str, str]]]:
    """Start them; yields those that answer, in the order of RIVALS, and why
    others do not."""
    makers: dict[str, Callable[[contextlib.ExitStack], Rival]] = {
        "limit": lambda stack: _limit(stack, programs, target),
        "hand-over": lambda _: _ours(machine, "hand-over", PREFIX, target),
        "splice": lambda _: _ours(
            machine, "splice", f"{PREFIX}-splice", target
        ),
        "socat": lambda stack: _socat(stack, programs, target),
        "accept": lambda _: _accept(machine, programs, target),
        "proxyd": lambda stack: _proxyd(stack, machine, programs, target),
        "qrexec-connect": lambda stack: _connect(stack, programs, target),
    }
    needed = {
        "socat": shutil.which("socat"),
        "proxyd": _proxyd_path(),
        "qrexec-connect": programs.connect,
    }
    found, problems = [], {}
    with contextlib.ExitStack() as stack:
        for name in (name for name in RIVALS if name in names):
            if name in needed and needed[name] is None:
                problems[name] = NOT_INSTALLED
                continue
            rival = makers[name](stack)
            if problem := _no_answer(rival):
                problems[name] = problem
            else:
                found.append(rival)
        yield found, problems


# ------------------------------------------------------------------ ours


def copy_units(machine: Machine, prefix: str) -> None:
    """The units that ship, under a prefix of their own."""
    if prefix == PREFIX:
        return
    for path in (machine.directory / "units").glob(f"{PREFIX}*"):
        kind = path.name.removeprefix(PREFIX)
        # Not those of qrexec-connect-tcp-bind.
        if kind.startswith(("@", ".", "-quiesce")):
            machine.write_unit(
                prefix + kind, path.read_text().replace(PREFIX, prefix)
            )


def _ours(
    machine: Machine, relay: str, prefix: str, target: str | None
) -> Rival:
    copy_units(machine, prefix)
    machine.write_drop_in(f"{prefix}.service", "limits", LIMITS_DROP_IN)
    if prefix != PREFIX:
        machine.write_drop_in(
            f"{prefix}.service", "relay", RELAY_DROP_IN.format(relay=relay)
        )
    targets = (
        [target] if target else [f"qube-{number}" for number in range(TARGETS)]
    )
    hosts = [_host() for _ in targets]
    for service, port in LISTEN.items():
        for host, name in zip(hosts, targets, strict=True):
            text = DROP_IN.format(host=host, port=port, target=name)
            machine.write_drop_in(
                f"{prefix}@{service}.socket", name.replace("@", ""), text
            )
    machine.systemctl("daemon-reload")
    machine.systemctl(
        "start", *(f"{prefix}@{service}.socket" for service in LISTEN)
    )
    unit = f"{prefix}.service"
    return Rival(
        relay,
        hosts,
        lambda: _main_pids(machine, unit),
        dict.fromkeys(LISTEN, unit),
    )


class Many:
    """A service of its own with as many listeners as one likes, a drop-in
    each."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._prefix = f"{PREFIX}-many"
        copy_units(machine, self._prefix)
        self._net = _host().rsplit(".", 2)[0]
        self._started = False

    def listen(self, count: int) -> str:
        """Have so many listeners; returns the first one's address. The daemon
        is not running then."""
        self.close()
        machine, unit = self._machine, f"{self._prefix}@{ECHO}.socket"
        hosts = [
            f"{self._net}.{number // 250}.{number % 250 + 1}"
            for number in range(count)
        ]
        for number, host in enumerate(hosts):
            text = DROP_IN.format(
                host=host, port=LISTEN[ECHO], target=f"qube-{number}"
            )
            machine.write_drop_in(unit, f"qube-{number}", text)
        machine.systemctl("daemon-reload")
        machine.systemctl("start", unit)
        self._started = True
        return hosts[0]

    def pids(self) -> list[int]:
        return _main_pids(self._machine, f"{self._prefix}.service")

    def close(self) -> None:
        """Stop what was started; with contextlib.closing() at the end of a
        block."""
        if self._started:
            self._machine.systemctl(
                "stop",
                f"{self._prefix}@{ECHO}.socket",
                f"{self._prefix}.service",
            )
            shutil.rmtree(
                self._machine.unit_dir / f"{self._prefix}@{ECHO}.socket.d"
            )
            self._machine.systemctl("daemon-reload")
        self._started = False


class Routes:
    """As many routes as one likes, each a socket unit of its own, of a service
    that no connection starts."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        # With as many dashes as the shipped ones have: systemd looks for
        # drop-ins of each beginning of a name up to one.
        self._prefix = "qrexec-connect-routes"
        copy_units(machine, self._prefix)
        self._units: list[str] = []

    def have(self, count: int) -> None:
        """Write and start what is missing."""
        new = [
            f"{self._prefix}@{10_000 + number}.socket"
            for number in range(len(self._units), count)
        ]
        for unit in new:
            text = f"[Socket]\nListenStream=%t/routes/{unit}\nFileDescriptorName=work\n"
            self._machine.write_drop_in(unit, "work", text)
        self._units += new
        self._machine.systemctl("daemon-reload")
        self._machine.systemctl("start", *new)

    def close(self) -> None:
        """Stop and remove them; with contextlib.closing() at the end of a
        block."""
        if self._units:
            self._machine.systemctl("stop", *self._units)
        for unit in self._units:
            shutil.rmtree(self._machine.unit_dir / f"{unit}.d")
        self._machine.systemctl("daemon-reload")


# ------------------------------------------------------------------ the others


def _limit(
    stack: contextlib.ExitStack, programs: Programs, target: str | None
) -> Rival:
    host = _host()
    pids = [
        _start(
            stack,
            *(programs.limit, host, str(port), programs.client),
            *(["--use-stdin-socket"] if programs.hands_over else []),
            *(target or "qube", f"qubes.ConnectTCP+{service}"),
        )
        for service, port in LISTEN.items()
    ]
    return Rival("limit", [host], lambda: pids)


def _socat(
    stack: contextlib.ExitStack, programs: Programs, target: str | None
) -> Rival:
    """The command of qvm-connect-tcp, quotes and all; only bind= is added, to
    stay on the loopback."""
    host = _host()
    roots = [
        _start(
            stack,
            "socat",
            f"TCP-LISTEN:{port},reuseaddr,fork,bind={host}",
            f"EXEC:{programs.client} \\'{target or ''}\\'"
            f" qubes.ConnectTCP+{service}",
        )
        for service, port in LISTEN.items()
    ]

    def pids() -> list[int]:
        found = list(roots)
        for root in roots:
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(root).children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if child.exe() != str(programs.client):
                            found.append(child.pid)
        return found

    return Rival("socat", [host], pids)


def _accept(machine: Machine, programs: Programs, target: str | None) -> Rival:
    host = _host()
    for service, port in LISTEN.items():
        name = f"my-tcp-service-{service}"
        machine.write_unit(
            f"{name}.socket", ACCEPT_SOCKET.format(host=host, port=port)
        )
        machine.write_drop_in(f"{name}.socket", "limits", ACCEPT_LIMITS)
        text = ACCEPT_SERVICE.format(
            client=programs.client, target=target or "", service=service
        )
        machine.write_unit(f"{name}@.service", text)
        machine.write_drop_in(f"{name}@.service", "log", ACCEPT_LOG)
    machine.systemctl("daemon-reload")
    machine.systemctl(
        "start", *(f"my-tcp-service-{service}.socket" for service in LISTEN)
    )
    # systemd itself is what accepts, and what remembers each connection as a
    # unit.
    manager = psutil.Process(_main_pids(machine, "dbus.service")[0]).ppid()
    return Rival("accept", [host], lambda: [manager])


def _proxyd(
    stack: contextlib.ExitStack,
    machine: Machine,
    programs: Programs,
    target: str | None,
) -> Rival:
    behind, host = _limit(stack, programs, target), _host()
    units = {service: f"proxyd-{service}.service" for service in LISTEN}
    for service, port in LISTEN.items():
        machine.write_unit(
            f"proxyd-{service}.socket",
            PROXYD_SOCKET.format(host=host, port=port),
        )
        text = PROXYD_SERVICE.format(
            proxyd=_proxyd_path(), to_host=behind.hosts[0], to_port=port
        )
        machine.write_unit(units[service], text)
    machine.systemctl("daemon-reload")
    machine.systemctl(
        "start", *(f"proxyd-{service}.socket" for service in LISTEN)
    )
    return Rival(
        "proxyd",
        [host],
        lambda: _main_pids(machine, *units.values()),
        units,
        only_relays=True,
    )


def _connect(
    stack: contextlib.ExitStack, programs: Programs, target: str | None
) -> Rival:
    """As its README has it tried; one for each service, as the names of
    several cannot hold a space."""
    host = _host()
    pids = [
        _start(
            stack,
            *("systemd-socket-activate", "-l", f"{host}:{port}"),
            f"--fdname={target or 'qube'} qubes.ConnectTCP+{service}",
            *("/usr/bin/python3", str(programs.connect)),
        )
        for service, port in LISTEN.items()
    ]
    return Rival("qrexec-connect", [host], lambda: pids)


def _proxyd_path() -> str | None:
    return next(
        (
            path
            for path in (PROXYD, f"/usr{PROXYD}")
            if os.access(path, os.X_OK)
        ),
        None,
    )


# ------------------------------------------------------------------ helpers


def _host() -> str:
    """An address in 127.0.0.0/8 that nothing else has, most likely."""
    return f"127.{random.randint(16, 63)}.{random.randint(0, 255)}.{random.randint(1, 254)}"


def _main_pids(machine: Machine, *units: str) -> list[int]:
    shown = machine.systemctl(
        "show", "--value", "-p", "MainPID", *units
    ).split()
    return [int(pid) for pid in shown if pid != "0"]


def _start(stack: contextlib.ExitStack, *argv: str | Path) -> int:
    """Start a program with a process group of its own, which is killed as the
    stack unwinds."""
    process = subprocess.Popen(
        [str(word) for word in argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def stop() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    stack.callback(stop)
    return process.pid


def _no_answer(rival: Rival) -> str:
    """Wait until one byte has gone there and back, which also warms it up; if
    it does not, why not."""
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            with socket.create_connection(
                (rival.hosts[0], LISTEN[ECHO]), timeout=START_TIMEOUT
            ) as sock:
                sock.sendall(b"x")
                if sock.recv(1) == b"x":
                    return ""
                raise ConnectionError("the connection ended")
        except OSError as error:
            if time.monotonic() > deadline:
                return f"no answer: {error}"
            time.sleep(0.02)
