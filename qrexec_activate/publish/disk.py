"""A file system of its own for the files of a service's Linux user, so that it
can write so much and no more: an image beside its home, which has all of its
blocks from the start, and a mount unit.

ext4 and XFS have quotas only where somebody has switched them on as it was
made or mounted, which no qube does; a loop device is everywhere.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..errors import ActivateError, UsageProblem
from ..systemd.programs import ROOTS_PATH
from ..systemd.systemctl import Systemctl
from .accounts import HOMES, home, image
from .steps import Step, command

__all__ = [
    "check_disk",
    "disk_steps",
    "mount_steps",
    "mount_text",
    "mount_unit",
    "parse_disk",
    "size_of",
    "used",
    "written",
]

_SIZE = re.compile(r"([1-9][0-9]*)([MGT])", re.ASCII)
_UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: ext4 takes some for itself.
SMALLEST = 16 << 20
LOOP_CONTROL = Path("/dev/loop-control")
NEEDED = ("fallocate", "mkfs.ext4")


def parse_disk(text: str) -> int:
    """A size in bytes; raises UsageProblem."""
    match = _SIZE.fullmatch(text)
    if match is None or (size := int(match[1]) * _UNITS[match[2]]) < SMALLEST:
        raise UsageProblem(
            f"--disk {text!r}: write it like 500M or 2G, and no less than"
            f" {written(SMALLEST)}"
        )
    return size


def written(size: int) -> str:
    """A size as a person writes it."""
    for unit, factor in reversed(_UNITS.items()):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return str(size)


def mount_unit(user: str) -> str:
    words = str(home(user)).strip("/").replace("-", "\\x2d").split("/")
    return f"{'-'.join(words)}.mount"


def size_of(user: str) -> int:
    """The size of what was made for a user; 0 where there is none."""
    try:
        return image(user).stat().st_size
    except OSError:
        return 0


def used(user: str) -> int | None:
    """How much of it is used, in bytes; None where it is not there to be
    asked."""
    try:
        if home(user).stat().st_dev == HOMES.stat().st_dev:
            return None
        found = os.statvfs(home(user))
    except OSError:
        return None
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def check_disk(size: int) -> None:
    """Raise UsageProblem where one cannot be made."""
    path = f"{os.environ.get('PATH', '')}:{ROOTS_PATH}"
    if not all(shutil.which(name, path=path) for name in NEEDED):
        raise UsageProblem(
            f"--disk needs {' and '.join(NEEDED)}: apt install e2fsprogs"
        )
    if not LOOP_CONTROL.exists():
        raise UsageProblem(
            f"--disk: this system has no loop devices ({LOOP_CONTROL}); mount a"
            f" file system of your own at {HOMES} before you publish"
        )
    place = HOMES if HOMES.exists() else HOMES.parent
    if (free := shutil.disk_usage(place).free) < size:
        raise UsageProblem(
            f"--disk {written(size)}: {place} has only {free >> 20}M to give"
        )


def mount_text(user: str, size: int) -> str:
    return (
        f"[Unit]\nDescription=The files of {user}, of at most"
        f" {written(size)}\n\n"
        f"[Mount]\nWhat={image(user)}\nWhere={home(user)}\nType=ext4\n"
        f"Options=loop,nodev,nosuid\n\n[Install]\nWantedBy=local-fs.target\n"
    )


def disk_steps(user: str, size: int) -> list[Step]:
    """The image, with what is in the home of a user who was just made."""
    path = str(image(user))
    return [
        # Nobody else reads what is in it.
        command(
            *("install", "--mode=600", "/dev/null", path),
            undo=("rm", "--force", path),
        ),
        command("fallocate", "--length", str(size), path),
        # With the blocks that it has, and none for root alone.
        command(
            *("mkfs.ext4", "-q", "-E", "nodiscard", "-m", "0"),
            *("-d", str(home(user)), path),
        ),
    ]


def mount_steps(systemctl: Systemctl, user: str, folder: Path) -> list[Step]:
    unit, place = mount_unit(user), str(home(user))
    enable = ("enable", "--now", unit)

    def unmount() -> None:
        if os.path.lexists(folder / unit):
            systemctl.run("disable", unit)
        systemctl.run("stop", unit, check=False)
        if os.path.ismount(place):
            raise ActivateError(
                f"{place} is in use, and so cannot be unmounted: see fuser"
                f" --mount {place}"
            )

    return [
        Step(
            f"$ {systemctl.written(*enable)}",
            lambda: systemctl.run(*enable),
            unmount,
            f"$ {systemctl.written('disable', '--now', unit)}",
        ),
        command("chown", f"{user}:{user}", place),
        command("chmod", "700", place),
    ]
