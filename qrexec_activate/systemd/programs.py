"""Programs that are run on the way, without a shell and without a terminal."""

from __future__ import annotations

import os
import shlex
import subprocess

from ..errors import ActivateError

__all__ = ["ROOTS_PATH", "run"]

#: systemd gives a start 90 s before it gives up; past this, something waits for
#: ever.
TIMEOUT = 150.0
#: Where root's programs lie, which are not in the PATH of everyone.
ROOTS_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(*words: str, check: bool = True) -> str:
    """Run a program and return what it prints; raises ActivateError, also if it
    fails, unless `check` is off."""
    try:
        # A session of its own: Ctrl-C is for us, who then finish or undo what
        # was begun, and no program can ask for a password on our terminal.
        result = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=TIMEOUT,
            # Some are run as other users, who cannot stay in a folder that is
            # closed to them.
            cwd="/",
            env={
                **os.environ,
                "PATH": f"{os.environ.get('PATH', '')}:{ROOTS_PATH}",
            },
            start_new_session=True,
            check=False,
        )
    except FileNotFoundError:
        raise ActivateError(f"{words[0]} is not installed") from None
    except subprocess.TimeoutExpired:
        raise ActivateError(
            f"{shlex.join(words)} has not ended in {TIMEOUT:.0f} s"
        ) from None
    if check and result.returncode:
        said = (
            " ".join((result.stderr or result.stdout).split())
            or f"exit code {result.returncode}"
        )
        raise ActivateError(f"{shlex.join(words)}: {said}")
    return result.stdout
