"""A name as a socket service of qrexec's own: its agent connects the caller to
the socket itself, as root, and nothing runs between.

It is a link and its rpc-config, in folders that every qrexec searches, and that
last as long as the units beside them. While there is no socket at the end of
the link, qrexec passes over it, and takes qubes.ConnectUnix.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..control.check_qrexec import DEFAULT_CLIENT, package_version
from ..control.publications import (
    CONFIG,
    CONFIG_FOLDERS,
    RPC_FOLDERS,
    places,
)
from ..errors import UsageProblem
from .steps import Step, file_step, link_step

__all__ = [
    "check_native",
    "is_too_old",
    "native_files",
    "native_steps",
]

#: The qrexec that knows its config.
SINCE = (4, 2, 19)
#: What a unix socket's address holds; qrexec connects by that of the link.
LONGEST = 107


def native_files(name: str) -> tuple[Path, Path]:
    """The rpc-config, and the link."""
    return (
        places(CONFIG_FOLDERS, name)[-1],
        places(RPC_FOLDERS, name)[-1],
    )


def is_too_old(package: str) -> bool:
    """Whether a package, given with its version, is none that knows it; so is
    one of no version."""
    found = re.search(r"\b([0-9]+)\.([0-9]+)\.([0-9]+)", package)
    return not found or tuple(map(int, found.groups())) < SINCE


def check_native(name: str) -> None:
    """Raise UsageProblem where qrexec would not find the socket, or not take it
    as it is."""
    if is_too_old(package := package_version(DEFAULT_CLIENT)):
        raise UsageProblem(
            f"--native needs qrexec {'.'.join(map(str, SINCE))} or later, as"
            f" the program would read a line of qrexec's first; here is"
            f" {package or 'none that dpkg or rpm knows of'}"
        )
    for path in places((*CONFIG_FOLDERS, *RPC_FOLDERS), name):
        if os.path.lexists(path):
            raise UsageProblem(
                f"--native: {path} is there already, and was not made for"
                f" this: remove it first"
            )
    link = native_files(name)[1]
    if len(os.fsencode(link)) > LONGEST:
        raise UsageProblem(
            f"--native: {name} is too long: {link} has to be of at most"
            f" {LONGEST} bytes"
        )


def native_steps(name: str, address: Path) -> list[Step]:
    """What leads qrexec to the socket; none where the link is another's by
    now."""
    config, link = native_files(name)
    if os.path.lexists(link) and not (
        link.is_symlink() and os.readlink(link) == str(address)
    ):
        return []
    # The link comes last, and goes first: no call is without its config.
    return [file_step(config, CONFIG), link_step(link, str(address))]
