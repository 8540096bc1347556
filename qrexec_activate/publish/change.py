"""A program that is published already, changed in place: what differs, and
nothing else.

Its socket stays open throughout, and its Linux user, home and database are
kept. The new program takes over at a moment when nobody is connected to the old
one: both would have one socket, and what the old one has is its own to finish.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from ..control.dropins import create_file, remove_file, replace_file
from ..control.sockdiag import connected_unix
from ..control.survey import read_file
from ..errors import ActivateError, UsageProblem
from ..systemd.systemctl import Systemctl
from ..systemd.units import open_manager
from .accounts import database_steps
from .disk import written
from .native import native_steps
from .services import (
    Service,
    check,
    domain_step,
    load_step,
    units_of,
)
from .steps import Step, command

__all__ = ["alteration", "check_change", "end_unused", "touched"]

#: For how long the new program waits until nobody is connected to the old one.
TAKE_OVER_TIMEOUT = 10.0
LOOK_INTERVAL = 0.05
#: What does not end by SIGTERM is left to systemd, which knows SIGKILL.
END_TIMEOUT = 30.0
#: A signal stops a thread as soon as it has a processor.
STOP_TIMEOUT = 5.0
PROC = Path("/proc")


def check_change(before: Service, after: Service) -> None:
    """Raise UsageProblem where one cannot be made of the other."""
    if before.user != after.user:
        has = f"the Linux user {before.user}" if before.user else "none"
        raise UsageProblem(
            f"{after.name} is published already, and a service keeps its user,"
            f" which here is {has}: qrexec-activate unpublish {after.name}"
            f" first"
        )
    if before.disk != after.disk:
        has = f"--disk {written(before.disk)}" if before.disk else "no --disk"
        raise UsageProblem(
            f"{after.name} was published with {has}, and its files stay where"
            f" they are: say the same, or qrexec-activate unpublish"
            f" {after.name} first"
        )
    check(after, before)


def touched(before: Service, after: Service) -> dict[Path, tuple[str, str]]:
    """Which unit files differ: what they say, and what they are to say; empty
    where there is none."""
    old = {file: read_file(str(file)).text or "" for file in before.files()}
    new = {after.folder / unit: text for unit, text in after.units().items()}
    return {
        path: (old.get(path, ""), new.get(path, ""))
        for path in (*new, *(path for path in old if path not in new))
        if old.get(path, "") != new.get(path, "")
    }


def alteration(pairs: Sequence[tuple[Service, Service]]) -> list[Step]:
    """What makes of each of these services, all of the same manager, the other;
    empty where nothing differs."""
    pairs = [pair for pair in pairs if touched(*pair)]
    if not pairs:
        return []
    systemctl = pairs[0][1].systemctl
    files = {
        path: texts for pair in pairs for path, texts in touched(*pair).items()
    }
    steps = [Step("", undo=systemctl.daemon_reload)]
    for before, after in pairs:
        if before.domain and not after.domain:
            steps.append(_enabling(systemctl, _domain_unit(before), off=True))
        if before.native and not after.native:
            steps += [
                Step(step.undone, step.undo, step.do)
                for step in reversed(native_steps(after.name, after.address))
            ]
    steps += [
        _change_step(path, old, new) for path, (old, new) in files.items()
    ]
    for before, after in pairs:
        if after.database and not before.database:
            steps += database_steps(after.user)
    wanted = [path.name for path, (_, new) in files.items() if new]
    steps.append(load_step(systemctl, wanted))
    for before, after in pairs:
        steps += _access_steps(before, after)
        steps += _domain_steps(before, after)
        if (
            after.socket_unit in wanted
            and not read_file(str(after.folder / after.socket_unit)).text
        ):
            steps.append(_enabling(systemctl, after.socket_unit))
        if after.domain and not before.domain:
            steps.append(_enabling(systemctl, _domain_unit(after)))
        if after.native and not before.native:
            steps += native_steps(after.name, after.address)
    steps += [
        _take_over_step(after, {path.name: new for path, (_, new) in one})
        for after, one in (
            (after, touched(before, after).items()) for before, after in pairs
        )
    ]
    # What nobody can bring back comes last.
    for before, after in pairs:
        if before.database and not after.database:
            steps += [
                Step(step.undone, step.undo)
                for step in reversed(database_steps(before.user))
                if step.undone
            ]
    return steps


def _change_step(path: Path, old: str, new: str) -> Step:
    """A unit file that is made, removed or says something else."""

    def make(before: str, after: str) -> None:
        if (read_file(str(path)).text or "") != before:
            raise ActivateError(
                f"{path} was changed by somebody else just now: try again"
            )
        if not before:
            create_file(path, after)
        elif after:
            replace_file(path, after)
        else:
            remove_file(path)

    return Step(
        "".join(_difference(path, old, new)).rstrip("\n"),
        lambda: make(old, new),
        lambda: make(new, old),
    )


def _difference(path: Path, old: str, new: str) -> Iterator[str]:
    nothing = "/dev/null"
    return difflib.unified_diff(
        old.splitlines(keepends=True),
        new.splitlines(keepends=True),
        str(path) if old else nothing,
        str(path) if new else nothing,
    )


def _enabling(systemctl: Systemctl, unit: str, *, off: bool = False) -> Step:
    words = [(verb, "--now", unit) for verb in ("enable", "disable")]
    do, undo = reversed(words) if off else words
    return Step(
        f"$ {systemctl.written(*do)}",
        lambda: systemctl.run(*do),
        lambda: systemctl.run(*undo),
    )


def _domain_unit(service: Service) -> str:
    return units_of(service.socket_unit)[4]


def _domain_steps(before: Service, after: Service) -> Iterator[Step]:
    if before.domain == after.domain:
        return
    if before.domain:
        gone = domain_step(before)
        yield Step(gone.undone, gone.undo, gone.do)
    if after.domain:
        yield domain_step(after)


def _access_steps(before: Service, after: Service) -> Iterator[Step]:
    """Who can connect, without a new socket."""
    path = str(after.address)
    if before.group == after.group or not os.path.exists(path):
        return
    modes = {True: "0660", False: "0600"}
    yield command(
        *("chgrp", after.group or "root", path),
        undo=("chgrp", before.group or "root", path),
    )
    yield command(
        *("chmod", modes[bool(after.group)], path),
        undo=("chmod", modes[bool(before.group)], path),
    )


# ---------------------------------------------------- one program and the next


def _take_over_step(service: Service, files: dict[str, str]) -> Step:
    """End what runs as it was, once nobody is connected to it."""
    main, program, inner, *_ = units_of(service.socket_unit)
    gone = [unit for unit in (program, inner) if files.get(unit) == ""]
    ours = list(dict.fromkeys([main, program, *gone]))
    if not {main, program, inner} & set(files):
        return Step("")
    restart = service.systemctl.written("restart", service.socket_unit)

    def take_over() -> None:
        deadline = time.monotonic() + TAKE_OVER_TIMEOUT
        while not end_unused(service, ours):
            if time.monotonic() < deadline:
                time.sleep(LOOK_INTERVAL)
            elif gone:
                raise ActivateError(
                    f"{service.name} is in use, and what keeps its connections"
                    f" would go: try again later, or end them by {restart}"
                )
            else:
                click.echo(
                    f"{service.name} is in use, and runs on as it was until"
                    f" it ends; this ends it now, with its connections:"
                    f" {restart}",
                    err=True,
                )
                return

    return Step(
        f"# {service.name}: what runs ends as soon as nobody is connected",
        take_over,
    )


def end_unused(service: Service, units: Sequence[str]) -> bool:
    """End these units of a service if nobody is connected to it; returns
    whether they have ended.

    They are stopped for the moment of that look, so that none of them takes a
    connection after it. Who waits, waits in systemd's socket.
    """
    if _is_used(service):
        return False
    systemctl = service.systemctl
    runs = _runs(systemctl, units)
    if any(run.state != "active" for run in runs.values()):
        # Somebody waits for it, or it ends by itself.
        return False
    if not (running := list(runs)):
        return True
    systemctl.run("kill", "--signal=SIGSTOP", *running, check=False)
    ended = False
    try:
        if _stand_still(systemctl, running) and not _is_used(service):
            _end(service, runs)
            ended = True
    except ActivateError:
        # A connection that waits has it started, and not stopped: systemd
        # cancels a job for a later one.
        pass
    finally:
        if not ended:
            systemctl.run("kill", "--signal=SIGCONT", *running, check=False)
    return ended


class _Run(NamedTuple):
    """What runs of a unit; started again, it has another id."""

    state: str
    id: bytes


def _runs(systemctl: Systemctl, units: Sequence[str]) -> dict[str, _Run]:
    """Those units that are active, or about to be or not to be."""
    with open_manager(user=systemctl.user) as manager:
        rows = manager.unit_properties(
            units, "Unit", ["ActiveState", "InvocationID"]
        )
    return {
        unit: _Run(row["ActiveState"], bytes(row["InvocationID"] or ()))
        for unit, row in zip(units, rows, strict=True)
        if row["ActiveState"] not in (None, "inactive", "failed")
    }


def _end(service: Service, runs: Mapping[str, _Run]) -> None:
    """End these, which stand still; systemd has them go on after its SIGTERM.

    A program behind a proxy, and bound to it, is ended by a signal, and its
    proxy by systemd after it. To stop them would stop the proxy first, and
    whoever waits in its socket would start it again, for the program that has
    not ended yet: with that it would go, or wait for what only the next one
    does.
    """
    systemctl = service.systemctl
    main, program = units_of(service.socket_unit)[:2]
    ends = list(runs)
    if program in runs and (service.folder / program).exists():
        ends = [one for one in ends if one not in (main, program)]
        _end_by_signal(systemctl, program, runs[program].id)
    for unit in ends:
        # What ends with another, and has no file any more, it does not know by
        # then.
        systemctl.run("stop", unit, check=unit == main)


def _end_by_signal(systemctl: Systemctl, unit: str, run: bytes) -> None:
    for signal in ("SIGTERM", "SIGCONT"):
        systemctl.run("kill", f"--signal={signal}", unit, check=False)
    deadline = time.monotonic() + END_TIMEOUT
    while (now := _runs(systemctl, [unit]).get(unit)) and now.id == run:
        if time.monotonic() > deadline:
            systemctl.run("stop", unit)
            return
        time.sleep(LOOK_INTERVAL)


def _stand_still(systemctl: Systemctl, units: Sequence[str]) -> bool:
    """Wait until a signal has stopped every thread of these units: one that
    does not know of it yet may still take a connection."""
    with open_manager(user=systemctl.user) as manager:
        rows = manager.unit_properties(units, "Service", ["ControlGroup"])
    groups = [row["ControlGroup"] for row in rows if row["ControlGroup"]]
    deadline = time.monotonic() + STOP_TIMEOUT
    while any(_moves(process, groups) for process in PROC.glob("[0-9]*")):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _moves(process: Path, groups: Sequence[str]) -> bool:
    """Whether it is of one of these control groups, and has a thread that is
    not stopped."""
    try:
        of = [
            line.split(":", 2)[2]
            for line in (process / "cgroup").read_text().splitlines()
        ]
        return any(
            f"{path}/".startswith(f"{group}/")
            for path in of
            for group in groups
        ) and any(
            stat.read_text().rpartition(")")[2].split()[0] not in "TtZX"
            for stat in process.glob("task/*/stat")
        )
    except OSError:
        # It has ended.
        return False


def _is_used(service: Service) -> bool:
    """Whether a program has taken a connection; what waits to be taken is no
    file of anybody yet, and has no inode."""
    connected = connected_unix()
    path = os.fsencode(service.address)
    return connected is None or any(
        inode and name.partition(b"\0")[0] == path for name, inode in connected
    )
