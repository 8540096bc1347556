"""Write a launcher for the loopback `qrexec-client-vm`, bound to one loopback
root.

It is never written where it could be taken for the real program.
"""

from __future__ import annotations

import shlex
from pathlib import Path

SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc", "/opt")
SHEBANG_MAX = 120
"""Linux reads 127 bytes of a `#!` line before 5.1; a longer one runs something
else, or nothing."""

PROGRAM = """\
import os
import sys

sys.path.insert(0, {parent!r})
os.environ.setdefault("QREXEC_LOOPBACK", {root!r})
from qrexec_activate.loopback.client_vm import main

main()
"""


class InstallError(ValueError):
    """The launcher must not, or cannot, be written there."""


def write_client(path: str, root: str, python: str) -> None:
    """Write an executable `path` that runs the loopback client with `python`
    for the loopback root `root`.

    All three are absolute. QREXEC_LOOPBACK in the environment still overrides
    `root`. InstallError for a place where the real one belongs.
    """
    for what, value in (
        ("launcher", path),
        ("loopback root", root),
        ("python", python),
    ):
        if not value.startswith("/"):
            raise InstallError(f"{what} {value!r}: an absolute path is needed")
    refuse_system_place(Path(path))
    package_parent = str(Path(__file__).resolve().parent.parent.parent)
    program = PROGRAM.format(parent=package_parent, root=root)
    target = Path(path)
    target.write_text(
        _header(python) + program, encoding="utf-8", errors="surrogateescape"
    )
    target.chmod(0o755)


def refuse_system_place(path: Path) -> None:
    """InstallError if `path`, as written or with its symlinks followed, lies in
    a folder of the system."""
    for place in (path, path.parent.resolve() / path.name, path.resolve()):
        for folder in SYSTEM_FOLDERS:
            if place.is_relative_to(folder):
                raise InstallError(
                    f"{path}: the loopback qrexec-client-vm is for demo and"
                    f" tests, and is not "
                    f"installed in {folder}; choose a folder of your own"
                )


def _header(python: str) -> str:
    """What starts Python. -I and -S keep the user's environment, site-packages
    and their start time out."""
    if len(python) <= SHEBANG_MAX and not any(
        char.isspace() for char in python
    ):
        return f"#!{python} -IS\n"
    quoted = shlex.quote(python)
    if "'''" in quoted or "\\" in quoted or "\n" in quoted:
        raise InstallError(
            f"python {python!r}: the path holds characters that a launcher"
            f" cannot hold"
        )
    # To sh the second line is an exec; to Python it begins a string, which the
    # third line ends.
    return f"#!/bin/sh\n'''exec' {quoted} -IS \"$0\" \"$@\"\n' '''\n"
