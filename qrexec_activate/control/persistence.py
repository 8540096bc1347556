"""What this qube forgets when it shuts down, as Qubes OS says of it.

An app qube keeps only what lies in /rw, of which /home and /usr/local are
parts; a disposable keeps nothing. Outside Qubes OS nothing is said.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import click

__all__ = ["forgotten", "qubesdb", "warn_of_loss"]

#: What lies in the private volume of an app qube; bind-dirs may add to that.
KEPT = ("/home", "/rw", "/usr/local")
TIMEOUT = 5.0


def qubesdb(key: str) -> str:
    """What QubesDB has by this key; empty where there is none."""
    program = shutil.which("qubesdb-read")
    if program is None:
        return ""
    try:
        return subprocess.run(
            [program, key],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def forgotten(path: Path) -> str:
    """Say that what is written there will be gone, and what to do instead;
    empty where it stays, or nobody knows."""
    match qubesdb("/qubes-vm-persistence"):
        case "none":
            return (
                f"Warning: this qube is a disposable and forgets {path} when it"
                f" shuts down; make it in its template"
            )
        case "rw-only" if not _is_kept(path):
            return (
                f"Warning: this qube forgets {path} when it shuts down: it"
                f" keeps {', '.join(KEPT)} and what bind-dirs names. Make it in"
                f" the template, or name {_folder(path)} in"
                f" /rw/config/qubes-bind-dirs.d/50_user.conf first"
            )
    return ""


def warn_of_loss(*paths: Path) -> None:
    """Say so before something is written there."""
    for path in paths:
        if words := forgotten(path):
            click.echo(words, err=True)


def _is_kept(path: Path) -> bool:
    if any(path.is_relative_to(one) for one in KEPT):
        return True
    try:
        # What bind-dirs names is a mount of the same volume.
        return _folder(path).stat().st_dev == os.stat("/rw").st_dev
    except OSError:
        return False


def _folder(path: Path) -> Path:
    """The nearest folder that is there."""
    return next(one for one in (path, *path.parents) if one.is_dir())
