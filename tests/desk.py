"""A person at the command line: a machine with a real user manager, and
qrexec-activate as a process of its own."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from scenario import Scene, free_port
from schema import problems

from qrexec_activate.loopback.machine import Machine

GOLDEN = Path(__file__).parent / "golden"
#: Set it, run the tests, and look at what has changed in the golden files.
WRITE_GOLDEN = "WRITE_GOLDEN" in os.environ
PATIENCE = 120.0


class Desk:
    """One person's machine for one test; cleaned up by the next."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.scene = Scene(machine, cast("Any", None))
        #: A port that is free on every loopback address, as wide as every
        #: other, so that columns stay where they are.
        self.port = free_port()
        self.tcp = f"qrexec-connect-tcp@{self.port}.socket"
        #: The unit that `add tcp` makes for the qube gitweb.
        self.gitweb = self.labelled("gitweb")

    def labelled(self, label: str, port: int | None = None) -> str:
        return f"qrexec-connect-tcp@{port or self.port}:{label}.socket"

    # The command

    def argv(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "qrexec_activate", *words]

    def try_(
        self, *words: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command that may fail; no traceback may come of it."""
        result = subprocess.run(
            self.argv(*words),
            env={**self.machine.environment, **(environment or {})},
            cwd=self.machine.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert "Traceback" not in result.stderr, result.stderr
        return result

    def run(
        self, *words: str, environment: dict[str, str] | None = None
    ) -> str:
        """Run a command that must succeed, and return what it prints."""
        result = self.try_(*words, environment=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def fails(
        self,
        *words: str,
        code: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> str:
        """Run a command that must fail, and return its one line."""
        result = self.try_(*words, environment=environment)
        assert (
            result.returncode == code
            if code is not None
            else result.returncode != 0
        ), result.stdout
        assert result.stderr.startswith("qrexec-activate: ")
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    def json(self, *words: str, code: int = 0) -> Any:
        result = self.try_(*words, "--json")
        assert result.returncode == code, result.stderr
        printed = json.loads(result.stdout)
        assert problems(printed, words[0]) == []
        return printed

    def routes(self) -> dict[str, str | None]:
        """Listener → target, of all routes."""
        return {
            route["listener"]: route["target"] for route in self.json("list")
        }

    # The files and units

    def drop_in(self, unit: str, name: str, *lines: str) -> Path:
        return self.machine.write_drop_in(
            unit, name, "".join(f"{line}\n" for line in lines)
        )

    def start(self, *units: str, check: bool = True) -> None:
        self.machine.systemctl("daemon-reload")
        self.machine.systemctl("enable", "--now", *units, check=check)

    def files(self) -> set[str]:
        """All files and links among this person's units, without folders."""
        top = self.machine.unit_dir
        return {
            str(path.relative_to(top))
            for path in top.rglob("*")
            if path.is_symlink() or path.is_file()
        }

    def folders(self) -> set[str]:
        return {
            path.name
            for path in self.machine.unit_dir.iterdir()
            if path.name.endswith(".d")
        }

    def active(self) -> set[str]:
        """The socket units of this project that listen."""
        lines = self.machine.systemctl(
            "list-units",
            "--type=socket",
            "--state=active",
            "--plain",
            "--no-legend",
        )
        return {line.split()[0] for line in lines.splitlines()} - {
            "dbus.socket"
        }

    def failed(self) -> str:
        return self.machine.systemctl(
            "list-units", "--state=failed", "--plain", "--no-legend"
        )

    # Golden files

    def plain(self, text: str) -> str:
        """Text without what differs from run to run."""
        text = text.replace(
            str(self.machine.directory), "/tmp/qa-machine_"
        ).replace(str(self.port), "12345")
        text = re.sub(r"systemd [0-9][^)]*\)", "systemd 252)", text)
        text = re.sub(r"  +", "  ", text)
        return "".join(f"{line.rstrip()}\n" for line in text.splitlines())

    def is_golden(
        self,
        name: str,
        text: str,
        plain: Callable[[str], str] = lambda text: text,
    ) -> None:
        """Compare with what is kept under this name."""
        path = GOLDEN / name
        text = plain(self.plain(text))
        if WRITE_GOLDEN:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()

    def tidy(self) -> None:
        """Leave the machine as it was, once more within a test."""
        self.scene.clean_up()
        self.leave()

    def leave(self) -> None:
        """Take away what the next one's clean-up does not know of."""
        for name in ("qrexec", "qubes.ConnectUnix"):
            shutil.rmtree(self.machine.runtime / name, ignore_errors=True)


def listens(address: tuple[str, int] | str) -> bool:
    """Whether a connection is taken there; it is given up at once."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as sock:
        sock.settimeout(PATIENCE)
        return sock.connect_ex(address) not in (
            errno.ECONNREFUSED,
            errno.ENOENT,
        )
