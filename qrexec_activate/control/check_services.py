"""The steps of `check` about what this qube offers to others."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator

from .publications import RPC as CONNECT_UNIX
from .publications import Publication, published, where_installed
from .steps import Context, Level, Step, sudo

__all__ = ["services"]


def services(context: Context) -> Iterator[Step]:
    """What this qube offers to others by qubes.ConnectUnix."""
    known = [unit.socket for unit in context.now.units.values()]
    found = published(context.manager, known)
    path = where_installed(CONNECT_UNIX)
    if found or context.now.user:
        yield _script(path, offers=bool(found))
    for one in found:
        yield _name(context, one, path)


def _script(path: str, *, offers: bool) -> Step:
    if not path and not offers:
        return Step(
            "services", Level.OK, f"this qube offers nothing by {CONNECT_UNIX}"
        )
    if not path:
        return Step(
            "services",
            Level.ERROR,
            f"{CONNECT_UNIX} is not installed in this qube, but names are"
            f" published",
            advice="install the package qrexec-activate-services in the"
            " template, and start this qube again",
        )
    if not os.access(path, os.X_OK):
        return Step(
            "services",
            Level.ERROR,
            f"{path} cannot be run",
            sudo(f"chmod a+x {shlex.quote(path)}", path),
        )
    if not shutil.which("socat"):
        return Step(
            "services",
            Level.ERROR,
            f"{path} needs socat",
            advice="install the package socat in the template, and start this"
            " qube again",
        )
    return Step("services", Level.OK, f"{path} is installed")


def _name(context: Context, one: Publication, script: str) -> Step:
    """Whether a name can be called, and which way its calls take."""
    if one.alive and not one.problem:
        by = (
            f"by qrexec alone, as root ({one.way})"
            if one.way
            else f"by the script {script or CONNECT_UNIX}"
        )
        return Step(
            "services",
            Level.OK,
            f"{one.name} leads to {one.socket}, which is alive, {by}",
        )
    text = f"{one.name}: {one.problem}"
    if one.alive:
        # The problem says what to do: it is in files of qrexec's.
        return Step("services", Level.ERROR, text)
    text = f"{one.name} cannot be called: {one.problem}"
    if one.unit:
        mend = context.systemctl.written("restart", one.unit)
        mend = mend if context.now.user else sudo(mend)
    elif context.now.user:
        mend = f"qrexec-activate unpublish {shlex.quote(one.name)}"
    else:
        mend = ""
    return Step("services", Level.ERROR, text, mend)
