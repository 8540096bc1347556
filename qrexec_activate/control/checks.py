"""The walk of `check`: the whole way from qrexec-client-vm to the services of
this qube, each step by itself.

A step looks, says what it saw, and what mends what is wrong. None changes
anything, and none stops the ones after it, except where there is nothing to
look at without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..errors import ActivateError
from ..systemd.journalreader import Record, records
from ..systemd.systemctl import Systemctl
from ..systemd.units import Manager, open_manager
from .check_calls import calls, listeners
from .check_names import strays, targets
from .check_qrexec import DEFAULT_CLIENT, client_steps, clients
from .check_routes import clashes, exposure, overrides, routes
from .check_services import services
from .check_units import daemons, reloads, syntax, units
from .dom0 import from_dom0
from .managers import ask
from .persistence import forgotten
from .publications import is_offering
from .steps import Context, Level, Step
from .survey import Entry, Survey, take_survey

__all__ = ["Level", "Step", "to_reach", "walk"]

#: Where logind keeps the runtime folders of users.
RUNTIME = "/run/user"
#: Where it keeps who lingers.
LINGER = Path("/var/lib/systemd/linger")

#: How far back the journal is searched, in records.
LOOK_BACK = 500


def walk(which: str | None) -> tuple[list[Step], list[Entry]]:
    """Take all steps for the manager that is named or else for both; also
    returns the routes."""
    with ExitStack() as opened:
        return _walk(which, opened)


def _walk(
    which: str | None, opened: ExitStack
) -> tuple[list[Step], list[Entry]]:
    managers: dict[bool, Manager] = {}

    def look(user: bool) -> Survey:
        managers[user] = opened.enter_context(open_manager(user=user))
        return take_survey(managers[user])

    def declares(now: Survey) -> bool:
        context = Context(managers[now.user], now, Systemctl(now.user))
        return bool(now.units) or any(strays(context)) or is_offering()

    steps: list[Step] = []
    try:
        surveys, lost = ask(which, look, declares)
        entries = [entry for now in surveys for entry in now.entries]
        if lost:
            # Root has come to see what the system has.
            level = Level.ERROR if os.geteuid() else Level.WARNING
            steps.append(Step("systemd", level, lost, *to_reach(user=True)))
        for now in surveys:
            others = [one for one in entries if one.manager != now.manager]
            for step in _steps(managers[now.user], now, others):
                # What is of the machine is said once.
                if step.area not in ("qrexec", "services") or (
                    step not in steps
                ):
                    steps.append(replace(step, manager=now.manager))
    except ActivateError as error:
        user = which != "system"
        wrong = Step("systemd", Level.ERROR, str(error), *to_reach(user=user))
        return [*client_steps(DEFAULT_CLIENT, None), wrong], []
    return steps, entries


def _steps(
    manager: Manager, now: Survey, others: list[Entry]
) -> Iterator[Step]:
    version, environment = manager.manager_properties("Version", "Environment")
    found = _records(now) if now.entries else []
    context = Context(
        manager,
        now,
        Systemctl(now.user),
        dict(one.partition("=")[::2] for one in environment or ()),
        [one for one in found if one.connection],
        [one for one in found if not one.connection],
        others,
    )
    yield Step(
        "systemd",
        Level.OK,
        f"the {now.manager} manager answers (systemd {version})",
    )
    for look in _LOOKS:
        yield from look(context)


def _records(now: Survey) -> list[Record]:
    """What the daemons wrote last; nothing where there is no journal."""
    try:
        with records(
            user=now.user,
            control_group=now.control_group,
            daemons=now.daemons,
            latest_first=True,
        ) as found:
            return list(islice(found, LOOK_BACK))
    except ActivateError:
        return []


def to_reach(*, user: bool) -> tuple[str, str]:
    """How the manager is reached: mend and advice."""
    if not user:
        return "", "start dbus, and see whether systemd runs on this machine"
    uid = os.getuid()
    if uid == 0 and (name := os.environ.get("SUDO_USER")):
        return "", (
            f"your routes are those of {name}: run it without sudo, or with"
            f" --system for those of this machine"
        )
    runtime = f"{RUNTIME}/{uid}"
    if (
        Path(runtime, "bus").exists()
        and os.environ.get("XDG_RUNTIME_DIR") != runtime
    ):
        return f"export XDG_RUNTIME_DIR={runtime}", ""
    if uid == 0:
        return "", "root has no routes of its own: add --system"
    if not Path(runtime).exists():
        if lost := forgotten(LINGER):
            return "", f"log in, or loginctl enable-linger; {lost}"
        return "loginctl enable-linger", ""
    return "", (
        "log in as this user, not by su or sudo; where that is so, install"
        " dbus-user-session"
    )


_LOOKS: tuple[Callable[[Context], Iterator[Step]], ...] = (
    clients,
    units,
    daemons,
    reloads,
    syntax,
    routes,
    listeners,
    calls,
    strays,
    clashes,
    overrides,
    exposure,
    from_dom0,
    targets,
    services,
)
