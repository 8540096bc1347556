"""The steps of `check` about what this qube offers to others."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator

from .publications import RPC as CONNECT_UNIX
from .publications import published, where_installed
from .steps import Context, Level, Step, sudo

__all__ = ["services"]


def services(context: Context) -> Iterator[Step]:
    """What this qube offers to others by qubes.ConnectUnix."""
    if not context.now.user:
        return
    known = [unit.socket for unit in context.now.units.values()]
    found = published(context.manager, known)
    path = where_installed(CONNECT_UNIX)
    if not path and not found:
        yield Step(
            "services", Level.OK, f"this qube offers nothing by {CONNECT_UNIX}"
        )
        return
    if not path:
        yield Step(
            "services",
            Level.ERROR,
            f"{CONNECT_UNIX} is not installed in this qube, but names are"
            f" published",
            advice="install the package qrexec-activate-services in the"
            " template, and start this qube again",
        )
    elif not os.access(path, os.X_OK):
        yield Step(
            "services",
            Level.ERROR,
            f"{path} cannot be run",
            sudo(f"chmod a+x {shlex.quote(path)}", path),
        )
    elif not shutil.which("socat"):
        yield Step(
            "services",
            Level.ERROR,
            f"{path} needs socat",
            advice="install the package socat in the template, and start this"
            " qube again",
        )
    else:
        yield Step("services", Level.OK, f"{path} is installed")
    for one in found:
        if one.alive and not one.problem:
            yield Step(
                "services",
                Level.OK,
                f"{one.name} leads to {one.socket}, which is alive",
            )
            continue
        mend = (
            f"systemctl --user restart {one.unit}"
            if one.unit and not one.way
            else f"qrexec-activate unpublish {shlex.quote(one.name)}"
        )
        yield Step(
            "services",
            Level.ERROR,
            f"{one.name} cannot be called: {one.problem}",
            mend,
        )
