"""systemd asked and told: over D-Bus where answers are needed in bulk, by systemctl where something is to be done.

A person could type every command that is run here, and is shown it when it fails.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import ManagerError
from ..manager import Manager
from ..manager import _unit_path as unit_path

__all__ = ["LoadedUnit", "Systemctl", "UnitList", "manager_properties", "unit_properties"]

#: systemd gives a start 90 s before it gives up; past this, it is systemd itself that does not answer.
TIMEOUT = 150.0


class LoadedUnit(NamedTuple):
    """A unit that systemd has loaded, and its LoadState, ActiveState and SubState."""

    name: str
    load: str
    active: str
    sub: str


@dataclass(frozen=True, slots=True)
class Systemctl:
    """Runs systemctl for one of the two managers; every method raises ManagerError where it fails."""

    user: bool

    @property
    def words(self) -> list[str]:
        return ["systemctl", "--user"] if self.user else ["systemctl"]

    def written(self, *arguments: str) -> str:
        """A command as a person would type it."""
        return shlex.join([*self.words, *arguments])

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a command and return what it prints."""
        words = [*self.words, *arguments]
        try:
            # A session of its own: Ctrl-C is for us, who then finish or undo what was begun.
            result = subprocess.run(
                words,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="backslashreplace",
                timeout=TIMEOUT,
                start_new_session=True,
                check=False,
            )
        except FileNotFoundError:
            raise ManagerError("systemctl is not installed: this needs systemd") from None
        except subprocess.TimeoutExpired:
            raise ManagerError(f"{shlex.join(words)} has not ended in {TIMEOUT:.0f} s; is systemd busy?") from None
        if check and result.returncode:
            said = " ".join((result.stderr or result.stdout).split()) or f"exit code {result.returncode}"
            raise ManagerError(f"{shlex.join(words)}: {said}")
        return result.stdout

    def daemon_reload(self) -> None:
        self.run("daemon-reload")


class UnitList:
    """`systemctl list-units`, begun when it is made and read later: meanwhile other things can be looked at."""

    def __init__(self, *, user: bool) -> None:
        words = [*Systemctl(user).words, "list-units", "--all", "--full", "--type=socket,service", "--output=json"]
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except FileNotFoundError:
            raise ManagerError("systemctl is not installed: this needs systemd") from None

    def close(self) -> None:
        """End it, if nobody has waited for it."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def read(self) -> dict[str, LoadedUnit]:
        """Wait for the list; raises ManagerError."""
        output, said = self._process.communicate()
        try:
            rows = json.loads(output)
            return {row["unit"]: LoadedUnit(row["unit"], row["load"], row["active"], row["sub"]) for row in rows}
        except (ValueError, LookupError, TypeError):
            reason = " ".join(said.decode(errors="backslashreplace").split()) or "its answer makes no sense"
            raise ManagerError(f"systemctl list-units: {reason}") from None


def manager_properties(manager: Manager, *names: str) -> list[Any]:
    """Return properties of the manager itself, such as UnitPath; None in place of one that it does not have."""
    return manager.properties(
        [("/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", name) for name in names]
    )


def unit_properties(manager: Manager, units: Sequence[str], kind: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return properties of each unit, which systemd loads if need be; `kind` is Unit, Service or Socket."""
    interface = f"org.freedesktop.systemd1.{kind}"
    values = iter(manager.properties([(unit_path(unit), interface, name) for unit in units for name in names]))
    return [{name: next(values) for name in names} for _ in units]
