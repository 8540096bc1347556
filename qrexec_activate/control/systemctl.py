"""systemd told what to do, by systemctl; what it knows is asked over D-Bus, by manager.py.

A person could type every command that is run here, and is shown it when it fails.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import dataclass

from ..errors import ManagerError

__all__ = ["Systemctl"]

#: systemd gives a start 90 s before it gives up; past this, it is systemd itself that does not answer.
TIMEOUT = 150.0


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
