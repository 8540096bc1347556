"""A pretend dom0: what `qubes.tests.extra` offers to integration tests, over
the loopback and a real `systemd --user`.

It has what those tests may use and nothing else, so that they cannot come to
lean on more than there is in Qubes OS.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import types
import unittest
from pathlib import Path

from scenario import measured

from qrexec_activate.loopback.machine import Machine

PACKAGE = Path(__file__).resolve().parent.parent / "dom0"
#: What Qubes OS says itself of qubes.ConnectTCP, in 90-default.policy.
DEFAULT_POLICY = "qubes.ConnectTCP * @anyvm @anyvm deny\n"


class Process:
    """A command in a qube, as far as the genuine wrapper is asked for it."""

    def __init__(self, qube: Qube, process: subprocess.Popen[bytes]) -> None:
        self._qube = qube
        self._process = process

    def communicate(self, input: bytes = b"") -> tuple[bytes, bytes | None]:
        return self._process.communicate(self._qube.as_here(input.decode()))

    @property
    def returncode(self) -> int | None:
        return self._process.returncode


class Qube:
    """A qube that runs commands of its user, and only once it has been
    started."""

    def __init__(
        self,
        name: str,
        environment: dict[str, str],
        differences: dict[str, str],
    ) -> None:
        self.name = name
        self._environment = environment
        self._differences = differences
        self._runs = False

    def start(self, start_guid: bool = True) -> None:
        self._runs = True

    def run(
        self,
        command: str,
        wait: bool = False,
        user: str | None = None,
        passio_popen: bool = False,
        passio_stderr: bool = False,
        gui: bool = False,
    ) -> int | Process:
        assert self._runs, f"{self.name} does not run"
        assert user is None, "there is one user here"
        assert wait != passio_popen
        process = subprocess.Popen(
            ["sh", "-c", self.as_here(command)],
            env=self._environment,
            cwd=self._environment["HOME"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if passio_stderr else None,
        )
        if passio_popen:
            return Process(self, process)
        process.communicate()
        return process.returncode

    def as_here(self, script: str) -> bytes:
        """A script with what differs in a pretend qube."""
        for there, here in self._differences.items():
            script = script.replace(there, here)
        return script.encode()


class ExtraTestCase(unittest.TestCase):
    """The first qube that a test makes is the one that calls: it has the user
    manager. The others serve."""

    template: str | None = None

    def setUp(self) -> None:
        # After tearDown, as qubes are removed there, whatever came of setUp.
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self._machine = stack.enter_context(Machine(environment=measured()))
        stack.callback(self._kill_the_rest)
        self._policy: list[str] = []
        self._write_policy()

    def create_vms(self, names: list[str]) -> list[Qube]:
        first, *others = (f"test-inst-{name}" for name in names)
        return [self._caller(first), *map(self._server, others)]

    def qrexec_policy(
        self,
        service: str,
        source: str,
        destination: str,
        allow: bool = True,
        target: str | None = None,
    ) -> None:
        action = "allow" if allow else "deny"
        redirect = f" target={target}" if target else ""
        self._policy.append(
            f"{service} * {source} {destination} {action}{redirect}\n"
        )
        self._write_policy()

    # How it is made

    def _write_policy(self) -> None:
        files = sorted(PACKAGE.glob("*.policy"))
        self._machine.loopback.joinpath("policy").write_text(
            "".join(self._policy)
            + DEFAULT_POLICY
            + "".join(path.read_text() for path in files)
        )

    def _caller(self, name: str) -> Qube:
        machine = self._machine
        (machine.loopback / "name").write_text(f"{name}\n")
        programs = machine.home / "bin"
        programs.mkdir()
        command = shlex.join([sys.executable, "-m", "qrexec_activate"])
        launcher = programs / "qrexec-activate"
        launcher.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        launcher.chmod(0o755)
        path = f"{programs}:{machine.environment['PATH']}"
        return Qube(name, {**machine.environment, "PATH": path}, {})

    def _server(self, name: str) -> Qube:
        machine = self._machine
        folder = machine.add_qube(name)
        for service in ("qubes.ConnectUnix", "qubes.ConnectTCPBind"):
            machine.add_rpc(name, service)
        environment = {
            "PATH": machine.environment["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(folder / "home"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
        }
        return Qube(
            name,
            environment,
            {
                "/etc/qubes-rpc": str(folder / "rpc"),
                "127.0.0.1": machine.address(name),
            },
        )

    def _kill_the_rest(self) -> None:
        """End what still runs in the qubes that serve."""
        mark = f"XDG_RUNTIME_DIR={self._machine.loopback}/qubes/".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)


def modules() -> dict[str, types.ModuleType]:
    """The modules under whose names tests import this one in dom0."""
    named = {
        name: types.ModuleType(name)
        for name in ("qubes", "qubes.tests", "qubes.tests.extra")
    }
    vars(named["qubes"])["tests"] = named["qubes.tests"]
    vars(named["qubes.tests"])["extra"] = named["qubes.tests.extra"]
    vars(named["qubes.tests.extra"])["ExtraTestCase"] = ExtraTestCase
    return named
