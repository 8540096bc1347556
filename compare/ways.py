"""The ways from a local address to a port of another qube, each set up as its
own users do it.

A way is asked only for what a person does with it: open an address, close it,
restart or kill what forwards. What it has no means for is `Cannot`.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import psutil

from bench.rivals import (
    ACCEPT_LOG,
    ACCEPT_SERVICE,
    ACCEPT_SOCKET,
    PREFIX,
    PROXYD,
    PROXYD_SERVICE,
    PROXYD_SOCKET,
    RELAY_DROP_IN,
)
from qrexec_activate.loopback.machine import Machine

__all__ = ["WAYS", "Address", "Cannot", "Command", "Seen", "Way", "written"]

#: Host and port, or the path of a unix socket.
Address = tuple[str, int] | str

#: What qvm-connect-tcp runs, quotes and all. It takes a port, and no address.
SOCAT = (
    'socat TCP-LISTEN:{port},reuseaddr,fork "EXEC:{client}'
    r" \'{qube}\' {service}"
    '"'
)
START_TIMEOUT = 20.0
#: systemd waits 90 s for what does not stop.
RESTART_TIMEOUT = 120.0


class Cannot(Exception):
    """The way has no means for this; the text says which is missing."""


class Seen(Exception):
    """What was seen instead of what is right."""


def written(address: Address) -> str:
    """An address as ListenStream= takes it."""
    if isinstance(address, str):
        return address
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Way:
    """One way; all that it opens is gone after clean_up().

    What only raises NotImplementedError is each way's own to say.
    """

    #: Whether its connections become calls, which policy and qrexec decide
    #: about.
    makes_calls = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def open(self, address: Address, qube: str, port: int) -> None:
        """Let connections to a local address reach a port of a qube."""
        raise NotImplementedError

    def close(self, address: Address) -> None:
        """Close a local address again."""
        raise NotImplementedError

    def restart(self) -> None:
        """Stop and start what forwards, as after an upgrade."""
        raise NotImplementedError

    def kill(self) -> None:
        """Kill the process that forwards, as the kernel does when memory is
        short."""
        raise NotImplementedError

    def clean_up(self) -> None:
        raise NotImplementedError


class _Units(Way):
    """A way that is made of units: a socket unit for each address."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self._sockets: dict[Address, str] = {}
        self._opened = 0

    def open(self, address: Address, qube: str, port: int) -> None:
        self._opened += 1
        unit = self._write(f"compare-{self._opened}", address, qube, port)
        self._sockets[address] = unit
        self.machine.systemctl("daemon-reload")
        self.machine.systemctl("start", unit)

    def _write(self, name: str, address: Address, qube: str, port: int) -> str:
        """Write the units; returns the name of the socket unit."""
        raise NotImplementedError

    def close(self, address: Address) -> None:
        self.machine.systemctl("stop", self._sockets.pop(address))

    def _services(self) -> list[str]:
        """The units whose processes forward."""
        return [
            unit.replace(".socket", ".service")
            for unit in self._sockets.values()
        ]

    def restart(self) -> None:
        # What does not stop in its time is killed, and counts as failed.
        self.machine.systemctl(
            "restart",
            *self._services(),
            check=False,
            timeout=RESTART_TIMEOUT,
        )

    def kill(self) -> None:
        for unit in self._services():
            if pid := int(self.machine.property(unit, "MainPID")):
                os.kill(pid, signal.SIGKILL)

    def clean_up(self) -> None:
        machine = self.machine
        # Patterns stand for what is active.
        for kind in ("socket", "service"):
            for pattern in (f"compare-*.{kind}", f"{PREFIX}*.{kind}"):
                machine.systemctl("stop", pattern, check=False)
        for path in machine.unit_dir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        machine.systemctl("daemon-reload")
        machine.systemctl("reset-failed", check=False)
        self._sockets.clear()


class _Ours(_Units):
    relay = "auto"

    def _write(self, name: str, address: Address, qube: str, port: int) -> str:
        unit = f"{PREFIX}@{port}:{name}.socket"
        self.machine.write_drop_in(
            unit,
            name,
            f"[Socket]\nListenStream={written(address)}\n"
            f"FileDescriptorName={qube}\n",
        )
        self.machine.write_drop_in(
            f"{PREFIX}.service", "relay", RELAY_DROP_IN.format(relay=self.relay)
        )
        return unit

    def _services(self) -> list[str]:
        return [f"{PREFIX}.service"]


class _OursByPipes(_Ours):
    relay = "splice"


class _Accept(_Units):
    """As in Qubes OS's documentation."""

    def _write(self, name: str, address: Address, qube: str, port: int) -> str:
        machine = self.machine
        machine.write_unit(f"{name}.socket", _listening(ACCEPT_SOCKET, address))
        machine.write_unit(
            f"{name}@.service",
            ACCEPT_SERVICE.format(
                client=machine.client, target=qube, service=port
            ),
        )
        machine.write_drop_in(f"{name}@.service", "log", ACCEPT_LOG)
        return f"{name}.socket"

    def restart(self) -> None:
        self.machine.systemctl("restart", *self._sockets.values())

    def kill(self) -> None:
        raise Cannot("systemd itself accepts")


class _Proxyd(_Units):
    """In front of a service of this machine: no qrexec is in between."""

    makes_calls = False

    def _write(self, name: str, address: Address, qube: str, port: int) -> str:
        self.machine.write_unit(
            f"{name}.socket", _listening(PROXYD_SOCKET, address)
        )
        self.machine.write_unit(
            f"{name}.service",
            PROXYD_SERVICE.format(
                proxyd=PROXYD, to_host=self.machine.address(qube), to_port=port
            ),
        )
        return f"{name}.socket"


def _listening(template: str, address: Address) -> str:
    return template.replace("{host}:{port}", written(address))


class Command(Way):
    """A program that is started for each address.

    In its command line `{listen}` stands for the local address, or `{host}` and
    `{port}` do; `{client}` for qrexec-client-vm, `{qube}` and `{service}` for
    what it is to call; `{to}` for the service's own address, for a program that
    makes no call.
    """

    def __init__(self, machine: Machine, command: str) -> None:
        super().__init__(machine)
        self._words = shlex.split(command)
        self.makes_calls = "{to}" not in command
        #: Address → its program, and the command line that started it.
        self._running: dict[
            Address, tuple[subprocess.Popen[bytes], list[str]]
        ] = {}

    def open(self, address: Address, qube: str, port: int) -> None:
        command = " ".join(self._words)
        if isinstance(address, str) and "{listen}" not in command:
            raise Cannot("opens TCP ports only")
        host, local = ("", 0) if isinstance(address, str) else address
        if (
            ":" in host
            and "{listen}" not in command
            and "{host}" not in command
        ):
            raise Cannot("takes a port, and no address")
        values = {
            "listen": written(address),
            "host": host,
            "port": local,
            "client": self.machine.client,
            "qube": qube,
            "service": f"qubes.ConnectTCP+{port}",
            "to": f"{self.machine.address(qube)}:{port}",
        }
        argv = [word.format(**values) for word in self._words]
        self._start(address, argv)

    def _start(self, address: Address, argv: list[str]) -> None:
        process = subprocess.Popen(
            argv,
            env=self.machine.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._running[address] = process, argv
        deadline = time.monotonic() + START_TIMEOUT
        while not _listens(process.pid, address):
            if process.poll() is not None or time.monotonic() > deadline:
                raise Seen("it cannot be opened")
            time.sleep(0.02)

    def close(self, address: Address) -> None:
        process, _ = self._running.pop(address)
        process.terminate()
        process.wait()

    def restart(self) -> None:
        for address, (_, argv) in list(self._running.items()):
            self.close(address)
            self._start(address, argv)

    def kill(self) -> None:
        for process, _ in self._running.values():
            process.kill()
            process.wait()

    def clean_up(self) -> None:
        for process, _ in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()


def _listens(pid: int, address: Address) -> bool:
    if isinstance(address, str):
        return os.path.exists(address)
    with contextlib.suppress(psutil.Error):
        return any(
            one.laddr and one.laddr.port == address[1]
            for one in psutil.net_connections("tcp")
            if one.pid == pid and one.status == psutil.CONN_LISTEN
        )
    return False


#: The ways of the table, by their titles.
WAYS: dict[str, Callable[[Machine], Way]] = {
    "qrexec-activate": _Ours,
    "qrexec-activate, by pipes": _OursByPipes,
    "qvm-connect-tcp": lambda machine: Command(machine, SOCAT),
    "`Accept=yes` units": _Accept,
    "systemd-socket-proxyd": _Proxyd,
}
