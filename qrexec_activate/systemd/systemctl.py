"""systemd told what to do, by systemctl; what it knows is asked over D-Bus, by
manager.py.

A person could type every command that is run here, and is shown it when it
fails.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from ..errors import ActivateError, ManagerError
from .programs import run

__all__ = ["Systemctl"]


@dataclass(frozen=True, slots=True)
class Systemctl:
    """Runs systemctl for one of the two managers; every method raises
    ManagerError where it fails."""

    user: bool
    #: Whether it makes and removes links by itself. systemd 255 and later,
    #: which make them when they are asked, hold all units for changed
    #: (NeedDaemonReload) from then to the next daemon-reload.
    offline: bool = False

    @property
    def words(self) -> list[str]:
        return [
            *(("env", "SYSTEMD_OFFLINE=1") if self.offline else ()),
            "systemctl",
            *(("--user",) if self.user else ()),
        ]

    def written(self, *arguments: str) -> str:
        """A command as a person would type it."""
        return shlex.join([*self.words, *arguments])

    def run(self, *arguments: str, check: bool = True) -> str:
        """Run a command and return what it prints."""
        try:
            return run(*self.words, *arguments, check=check)
        except ActivateError as error:
            raise ManagerError(str(error)) from None

    def daemon_reload(self) -> None:
        self.run("daemon-reload")
