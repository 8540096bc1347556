"""Routes that dom0 gives: they are shown as such, and changed there alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from ..errors import UsageProblem
from ..given.generator import WATCH, Place, decided
from ..given.line import is_of_dom0
from ..given.qubesdb import ask, understand
from .policy import this_qube
from .steps import Context, Level, Step
from .survey import Entry

__all__ = ["from_dom0", "how_to_change", "refuse"]


def how_to_change(path: str) -> str:
    """What is to be done in dom0 to change what is in a file; empty of files
    that are not dom0's."""
    key = is_of_dom0(path)
    return (
        f"dom0 gives it: there, qvm-features --unset {this_qube()}"
        f" vm-config.{key} takes it away"
        if key
        else ""
    )


def refuse(entries: Iterable[Entry]) -> None:
    """Raise UsageProblem where one of these is dom0's."""
    for entry in entries:
        if how := how_to_change(entry.file):
            raise UsageProblem(
                f"{entry.listener} cannot be changed here, as {how}"
            )


def from_dom0(context: Context) -> Iterator[Step]:
    """What dom0 says that is no route, gives way to one of this qube's own, or
    is not there yet; nothing on a machine without QubesDB."""
    answer = ask()
    if answer is None:
        return
    scope = {"SYSTEMD_SCOPE": context.now.manager}
    given, bad = decided(understand(answer), Place({**os.environ, **scope}))
    for wrong in bad:
        yield Step(
            "routes",
            Level.WARNING,
            str(wrong),
            advice=f"mend it in dom0: qvm-features {this_qube()}"
            f" vm-config.{wrong.key}",
        )
    there = {(one.unit, one.target) for one in context.now.entries}
    for one in given:
        if (one.unit, one.target) not in there:
            yield Step(
                "routes",
                Level.WARNING,
                f"{one.address.expanded} → {one.target}, which dom0 gives by"
                f" vm-config.{one.key}, is not there yet",
                context.systemctl.written("restart", WATCH),
            )
    if given and not bad:
        yield Step(
            "routes",
            Level.OK,
            f"all that dom0 says of routes is one: {len(given)}",
        )
