"""The steps of `check` about routes: whether each is served, listens, excludes
another or is open to others."""

from __future__ import annotations

import os
import re
import shlex
import socket
import stat
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import UsageProblem
from ..given.address import parse_address
from ..printable import printable
from ..routing.address import AddressKey, address_key
from ..routing.names import parse_unit_name
from ..routing.unitfile import assignments, declared_listeners
from .address import (
    Obstacle,
    Trouble,
    is_open_to_others,
    is_plain,
    obstacle,
)
from .kinds import will_refuse
from .netproc import overlaps
from .steps import Context, Level, Step, joined, sudo
from .survey import Entry, accepts, is_utf_8, masked_name

__all__ = ["clashes", "exposure", "overrides", "routes"]

#: What refusals say where the files are right, and systemd has yet to read
#: them.
_STALE = re.compile(
    r"after systemd read it|has not read|is gone|as systemd has loaded|but"
    r" systemd has loaded|the file of the socket was removed"
)


def routes(context: Context) -> Iterator[Step]:
    """Every route: is it served, does it listen, and will it after the next
    login?"""
    for entry in context.now.entries:
        yield _route(context, entry)
    with_routes = {entry.unit for entry in context.now.entries}
    for unit in context.now.units.values():
        if unit.enabled.startswith("enabled") and unit.name not in with_routes:
            yield Step(
                "routes",
                Level.WARNING,
                f"{unit.name} is enabled, but no file opens an address for it",
                context.systemctl.written("disable", unit.name),
            )
    if not context.now.entries:
        yield Step(
            "routes",
            Level.WARNING,
            "there are no routes",
            advice="make one, as with qrexec-activate add tcp 1234 QUBE",
        )


def _not_open(listener: str) -> str:
    """Why nobody listens at an address that systemd has loaded."""
    if not is_plain(listener):
        return (
            "systemd does not listen there: each daemon-reload closes an"
            " address that it has to write with a backslash; use plain"
            " letters, or restart it each time"
        )
    return "systemd does not listen there yet, only after a restart"


def _route(context: Context, entry: Entry) -> Step:
    written = context.systemctl.written
    route = (
        f"{entry.listener} → {entry.target} {entry.call}"
        if entry.target
        else entry.listener
    )
    if entry.refused:
        return Step(
            "routes",
            Level.ERROR,
            f"{route} is refused: {entry.refused}",
            *_mend_refused(context, entry),
        )
    if entry.active == "inactive" and (unmet := _unmet(context, entry)):
        return Step(
            "routes",
            Level.OK,
            f"{route}: {entry.unit} is off, as a condition of it is not met:"
            f" {unmet}",
        )
    if entry.active in ("failed", "inactive"):
        why = _why_inactive(context, entry)
        mend, advice = _mend_inactive(context, entry)
        how = "has failed" if entry.active == "failed" else "is not started"
        return Step(
            "routes",
            Level.ERROR if entry.active == "failed" else Level.WARNING,
            f"{route}: {entry.unit} {how}{f': {why}' if why else ''}",
            mend,
            advice,
        )
    if entry.state == "not readable":
        files = context.now.units[entry.unit].unreadable
        return Step(
            "routes",
            Level.WARNING,
            f"{route}: only root can read {', '.join(files)}",
            sudo("qrexec-activate check --system"),
        )
    if entry.listens is False:
        return Step(
            "routes",
            Level.ERROR,
            f"{route}: {_not_open(entry.listener)}",
            written("restart", entry.unit),
        )
    if entry.enabled == "disabled":
        return Step(
            "routes",
            Level.WARNING,
            f"{route} listens, but not after the next"
            f" {'login' if context.now.user else 'boot'}",
            written("enable", entry.unit),
        )
    if refuses := will_refuse(entry.service, entry.argument):
        return Step(
            "routes",
            Level.WARNING,
            f"{route}: {refuses}",
            advice=f"use a unit of another name than {entry.unit}",
        )
    return Step("routes", Level.OK, route)


def _mend_refused(context: Context, entry: Entry) -> tuple[str, str]:
    """How a refused route is served again: mend and advice, one of them or,
    where another step says it, none."""
    written = context.systemctl.written
    if context.now.daemons[entry.daemon].dead:
        return "", ""
    unit = context.now.units[entry.unit]
    if entry.load == "masked":
        masked = masked_name(entry.unit, entry.enabled)
        return joined(
            written("unmask", masked), written("enable", "--now", entry.unit)
        ), ""
    if any(file.text is None for file in unit.socket.files) and any(
        file.problem.startswith(("cannot", "is a symbolic"))
        for file in unit.socket.files
    ):
        return "", ""
    if "use a unit of another name" in entry.refused:
        return "", (
            f"put what {entry.file or entry.unit} says into the folder of a"
            f" unit that is named for it, as"
            f" {parse_unit_name(entry.daemon).prefix}@ARGUMENT.socket.d is"
        )
    if not is_utf_8(entry.file):
        return "", ""
    if not entry.file or _STALE.search(entry.refused):
        return context.reload(entry.unit), ""
    for one in declared_listeners(unit.socket.files).listeners:
        if one.path == entry.file and one.name and not one.name.text:
            return context.edit(entry.unit, one.name.path)
    where = accepts(unit, entry.file) if entry.load != "loaded" else ""
    return context.edit(entry.unit, where.rpartition(":")[0] or entry.file)


def _obstacle(context: Context, entry: Entry) -> Obstacle | None:
    """What keeps systemd from listening where a route should."""
    try:
        address = parse_address(entry.listener, None, context.now.specifiers)
    except UsageProblem:
        return None
    others = [
        one
        for one in context.now.entries
        if one.unit != entry.unit and one.listens
    ]
    others += [one for one in context.others if one.listens]
    return obstacle(address, others, context.now.listening)


def _unmet(context: Context, entry: Entry) -> str:
    """The conditions by which systemd left a unit off; empty where it met all
    of them, or was not tried."""
    (row,) = context.manager.unit_properties(
        [entry.unit], "Unit", ["Conditions"]
    )
    # Its kind, whether one such will do, whether it is to be false, of what,
    # and below zero where it was not met.
    conditions = row["Conditions"] or []
    one_is_met = any(
        trigger and state > 0 for _, trigger, _, _, state in conditions
    )
    unmet = [
        f"{kind}={'!' if negate else ''}{of_what}"
        for kind, trigger, negate, of_what, state in conditions
        if state < 0 and not (trigger and one_is_met)
    ]
    return printable(", ".join(sorted(unmet)))


def _why_inactive(context: Context, entry: Entry) -> str:
    if hindrance := _obstacle(context, entry):
        return hindrance.words
    if path := _binds_to_device(context, entry):
        return f"{path} sets BindToDevice=, and systemd cannot listen so"
    if entry.active != "failed":
        return ""
    (row,) = context.manager.unit_properties([entry.unit], "Socket", ["Result"])
    meaning = {
        "service-start-limit-hit": f"{entry.daemon} could not start, see its"
        f" journal",
        "trigger-limit-hit": "too many connections came while the daemon"
        " could not start",
        "resources": "its address could not be had when it was started",
    }
    return meaning.get(str(row["Result"]), str(row["Result"] or ""))


def _binds_to_device(context: Context, entry: Entry) -> str:
    """The file that ties a unit to a network device, where that has kept it
    from listening: the device is not there, or this systemd may not; empty
    elsewhere."""
    path = device = ""
    for file in context.now.units[entry.unit].socket.files:
        for one in assignments(file.text or ""):
            if (one.section, one.key) == ("Socket", "BindToDevice"):
                path, device = file.path, one.value
    if not device:
        return ""
    (row,) = context.manager.unit_properties([entry.unit], "Socket", ["Result"])
    return path if row["Result"] == "resources" or not _is_there(device) else ""


def _is_there(device: str) -> bool:
    try:
        return socket.if_nametoindex(device) > 0
    except OSError:
        return False


def _mend_inactive(context: Context, entry: Entry) -> tuple[str, str]:
    """How a route is started that is not: mend and advice."""
    written = context.systemctl.written
    start = written("enable", "--now", entry.unit)
    if entry.enabled.startswith("enabled"):
        start = written("start", entry.unit)
    if entry.active == "failed":
        start = joined(written("reset-failed", entry.unit), start)
    hindrance = _obstacle(context, entry)
    if hindrance is None:
        if path := _binds_to_device(context, entry):
            return context.edit(entry.unit, path)
        return start, ""
    if hindrance.trouble is Trouble.TAKEN and not any(
        address_key(one.listener) == address_key(entry.listener)
        or overlaps(*keys)
        for one in (*context.now.entries, *context.others)
        if (one.manager, one.unit) != (entry.manager, entry.unit)
        and one.listens
        and (keys := _keys(one, entry))
    ):
        return "", (
            f"end that program, then {start}; or choose another address:"
            f" {context.edit(entry.unit, entry.file)[0] or 'in its file'}"
        )
    if folder := _own_folder_above(entry.listener):
        return joined(shlex.join(["chmod", "u+rwx", folder]), start), ""
    return context.edit(entry.unit, entry.file)


def _keys(one: Entry, other: Entry) -> tuple[AddressKey, AddressKey] | None:
    first, second = address_key(one.listener), address_key(other.listener)
    return (first, second) if first and second else None


def _own_folder_above(listener: str) -> str:
    """The folder of this user's that keeps a socket from being made."""
    if not listener.startswith("/"):
        return ""
    folder = os.path.dirname(listener)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    mine = os.path.isdir(folder) and os.stat(folder).st_uid == os.geteuid()
    return "" if not mine or os.access(folder, os.W_OK | os.X_OK) else folder


def clashes(context: Context) -> Iterator[Step]:
    """Two files that claim one address: only one of them can have it."""
    keyed: list[tuple[AddressKey, Entry]] = [
        (key, entry)
        for entry in context.now.entries
        if (key := address_key(entry.listener))
        and key[:1] + key[2:] != ("ip", 0)
    ]
    by_port: dict[tuple[str, Any], list[tuple[AddressKey, Entry]]] = {}
    for key, entry in keyed:
        # Addresses exclude each other only where family and port, or the path,
        # are the same.
        by_port.setdefault(
            (key[0], key[2] if key[0] == "ip" else key[1]), []
        ).append((key, entry))
    # Within a unit, systemd itself tells no two of them apart. Where they name
    # different qubes, the refusal has said so.
    found = any(
        "different qubes" in entry.refused for entry in context.now.entries
    )
    said: dict[str, Step] = {}
    opened = Counter(
        (unit.name, address_key(address))
        for unit in context.now.units.values()
        for _, address in unit.socket.listen
    )
    for key, entry in keyed:
        times = opened[entry.unit, key]
        if times > 1 and key[0] != "path" and not entry.refused:
            text = (
                f"{entry.unit} opens {entry.listener} {times} times, and"
                f" systemd can do so once: {entry.file} is the last"
            )
            mend = context.edit(entry.unit, entry.file)
            said.setdefault(text, Step("routes", Level.ERROR, text, *mend))
    for group in by_port.values():
        for (one_key, one), (other_key, other) in combinations(group, 2):
            if one_key != other_key and not overlaps(one_key, other_key):
                continue
            # A file of a template's is that of each instance.
            text = (
                f"{one.listener} and {other.listener} exclude each other:"
                f" {one.file or one.unit} and {other.file or other.unit}"
            )
            mend = context.edit(other.unit, other.file)
            said.setdefault(text, Step("routes", Level.ERROR, text, *mend))
    yield from said.values()
    found = found or bool(said)
    if context.now.entries and not found:
        yield Step("routes", Level.OK, "no two routes claim one address")


def overrides(context: Context) -> Iterator[Step]:
    """A file that names a qube and opens no address names it for all files
    before it, meant or not."""
    for unit in context.now.units.values():
        files = {file.path: file for file in unit.socket.files}
        for one in declared_listeners(unit.socket.files).listeners:
            if one.name is None or one.name.path == one.path:
                continue
            own = [
                item.value
                for item in assignments(files[one.path].text or "")
                if item.key == "FileDescriptorName"
            ]
            if own and own[-1] != one.name.text:
                yield Step(
                    "routes",
                    Level.WARNING,
                    f"{one.name.path} opens no address, so {one.address}"
                    f" reaches {one.name.text or 'no qube'} and not {own[-1]},"
                    f" which {one.path} names",
                    *context.edit(unit.name, one.name.path),
                )


def exposure(context: Context) -> Iterator[Step]:
    """Who else can reach the listeners: whoever can makes calls as this
    qube."""
    found = False
    for entry in context.now.entries:
        key = address_key(entry.listener)
        reason = ""
        if key is not None and is_open_to_others(key):
            reason = (
                "other machines may reach it: listen on 127.0.0.1 or the like"
            )
        elif key is not None and key[0] == "abstract":
            reason = (
                "every user of this machine can reach an abstract socket: use"
                " a path"
            )
        elif key is not None and key[0] == "path":
            reason = _open_path(key[1])
        if reason:
            found = True
            yield Step(
                "routes",
                Level.WARNING,
                f"{entry.listener}: {reason}",
                *context.edit(entry.unit, entry.file),
            )
    if context.now.entries and not found:
        yield Step(
            "routes",
            Level.OK,
            "no other machine can reach a route, and no other user a unix"
            " socket",
        )


def _open_path(path: str) -> str:
    """Say so where others may write to a socket and get to it through all its
    folders."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISSOCK(mode) or not mode & (stat.S_IWGRP | stat.S_IWOTH):
            return ""
        above = [folder.stat().st_mode for folder in Path(path).parents]
    except OSError:
        return ""
    words = f"its mode is {stat.S_IMODE(mode):04o}"
    if mode & stat.S_IWOTH and all(one & stat.S_IXOTH for one in above):
        return (
            f"{words}, so every user of this machine can reach it: set"
            f" SocketMode=0600"
        )
    if mode & stat.S_IWGRP and all(
        one & (stat.S_IXGRP | stat.S_IXOTH) for one in above
    ):
        return f"{words}, so its group can reach it: set SocketMode=0600"
    return ""
