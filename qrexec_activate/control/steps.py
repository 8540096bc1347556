"""What a look of `check` is given, and what it says: a step each, with what
mends it.

A mend is a command that a person can run just as it is printed. What no command
can mend is advice, in words.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import dataclass, field
from enum import IntEnum

from ..given.line import is_of_dom0
from ..systemd.journalreader import Record
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import Manager
from .survey import Entry, Survey

__all__ = [
    "PROGRAM_TIMEOUT",
    "Context",
    "Level",
    "Step",
    "joined",
    "output",
    "ran",
    "set_aside",
    "sudo",
]

PROGRAM_TIMEOUT = 10.0


class Level(IntEnum):
    """How good a step's news is; check's exit code is that of the worst."""

    OK = 0
    WARNING = 1
    ERROR = 2

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Step:
    """What was seen and, if something is wrong, the command that mends it, or
    what a person has to do."""

    area: str
    level: Level
    text: str
    mend: str = ""
    advice: str = ""
    #: Of whose units: "user" or "system".
    manager: str = "user"


@dataclass(slots=True)
class Context:
    """What all steps look at."""

    manager: Manager
    now: Survey
    systemctl: Systemctl
    environment: dict[str, str] = field(default_factory=dict)
    #: The last calls, the latest first, as far as the journal goes.
    calls: list[Record] = field(default_factory=list)
    #: What the daemons said of listeners that they refuse, the latest first.
    refusals: list[Record] = field(default_factory=list)
    #: The routes of the other manager, as far as they are known.
    others: list[Entry] = field(default_factory=list)

    def command(self, *words: str) -> str:
        """A command of this program, for this manager."""
        system = [] if self.now.user else ["--system"]
        return shlex.join(["qrexec-activate", words[0], *system, *words[1:]])

    def edit(self, unit: str, path: str) -> tuple[str, str]:
        """How a file is changed and a unit listens afterwards, as mend and
        advice, one of which is empty."""
        if key := is_of_dom0(path):
            return "", f"change it in dom0, where it is vm-config.{key}"
        if not path.startswith(f"{own_folder(user=self.now.user)}/"):
            return "", (
                f"{path} is not yours to change: put a file of the same name"
                f" into {own_folder(user=self.now.user)}/{unit}.d"
            )
        edit = self.command("edit", path)
        edit = edit if self.now.user else sudo(edit)
        known = self.now.units.get(unit)
        if known and known.active == "active":
            return edit, ""
        return joined(edit, self.systemctl.written("enable", "--now", unit)), ""

    def reload(self, *units: str) -> str:
        """The commands by which systemd reads the files, and these units listen
        as they now say."""
        commands = [self.systemctl.written("daemon-reload")]
        if units:
            commands.append(self.systemctl.written("restart", *units))
        return joined(*commands)

    def start_again(self, *units: str) -> str:
        """As reload(); these units are also to be there after the next
        login."""
        return joined(
            self.systemctl.written("daemon-reload"),
            self.systemctl.written("enable", *units),
            self.systemctl.written("restart", *units),
        )


def joined(*commands: str) -> str:
    return " && ".join(commands)


def set_aside(path: str) -> str:
    """The command that takes a file away from systemd, and keeps it."""
    return sudo(shlex.join(["mv", path, f"{path}.off"]), path)


def sudo(command: str, path: str = "") -> str:
    """A command as whoever runs check can run it: `path` is what it changes,
    by default something that is root's."""
    folder = os.path.dirname(path)
    if os.geteuid() == 0 or (folder and os.access(folder, os.W_OK)):
        return command
    return f"sudo {command}"


def ran(words: list[str]) -> subprocess.CompletedProcess[str] | None:
    """What a program printed, and how it ended; None where it does not run."""
    try:
        return subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROGRAM_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None


def output(words: list[str], *, must_succeed: bool = False) -> str | None:
    """What a program prints, on both; None where it does not run or, if it
    must, does not succeed."""
    result = ran(words)
    if result is None or (must_succeed and result.returncode):
        return None
    return result.stdout + result.stderr
