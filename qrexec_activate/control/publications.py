"""What this qube offers by qubes.ConnectUnix: names in
$XDG_RUNTIME_DIR/qubes.ConnectUnix, and who makes them.

A name is a symbolic link to a socket (or, rarely, the socket itself). One that
a socket unit makes, by Symlinks=, comes again at the next login; one that was
made by hand does not.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ActivateError, BadName, ManagerError
from ..routing.address import address_key, expand_specifiers
from ..routing.names import check_argument
from ..routing.routes import SocketUnit, unit_specifiers
from ..routing.unitfile import assignments
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder, scan
from ..systemd.units import Manager, open_manager
from .netproc import listening
from .survey import read_file

__all__ = [
    "CONFIG",
    "CONFIG_FOLDERS",
    "FOLDER",
    "NOTES",
    "PREFIX",
    "RPC",
    "RPC_FOLDERS",
    "Publication",
    "check_name",
    "folder",
    "is_offering",
    "is_service",
    "managers",
    "places",
    "published",
    "services_of",
    "symlink_lines",
    "way_problem",
    "where_installed",
]

RPC = "qubes.ConnectUnix"
FOLDER = f"%t/{RPC}"
#: Where services of the whole qube are, which the system's systemd holds.
SYSTEM_FOLDER = Path("/run", RPC)
#: The address of a unix socket holds 107 bytes, of which the service needs two.
MAX_NAME = 105
#: Where qrexec looks for services, those that win first; since 4.3.5 in /run.
RPC_FOLDERS = (
    "/run/qubes-rpc",
    "/usr/local/etc/qubes-rpc",
    "/etc/qubes-rpc",
)
#: Where rpc-config is, what wins first; before qrexec 4.3.5 only the last.
CONFIG_FOLDERS = (
    "/run/qubes/rpc-config",
    "/usr/local/etc/qubes/rpc-config",
    "/etc/qubes/rpc-config",
)
#: What a native name has there. Without it the program would read
#: SERVICE+ARGUMENT SOURCE and a zero first.
CONFIG = "skip-service-descriptor=true\n"
#: The same, as a person may write it; qrexec takes no space before a key.
SAYS_SO = re.compile(
    r"^skip-service-descriptor[ \t]*=[ \t]*true[ \t]*(#.*)?$", re.MULTILINE
)
#: How units begin that publish makes for a program, and the section, which
#: systemd ignores, in which they say what else was made for it.
PREFIX = "qrexec-publish-"
NOTES = "X-Publish"


@dataclass(frozen=True, slots=True)
class Publication:
    """A name that other qubes can call, if policy lets them."""

    name: str
    link: str
    #: The socket that it leads to; empty where nothing is there.
    socket: str
    #: The socket unit that makes it, and the file that says so; empty where a
    #: person made it.
    unit: str
    file: str
    alive: bool
    problem: str
    #: Whether it is the system's systemd that makes it.
    for_system: bool = False
    #: What qrexec takes for calls of this name alone, in place of the script:
    #: a file in one of its folders; empty where there is none.
    way: str = ""


def folder(
    *, user: bool = True, environment: Mapping[str, str] = os.environ
) -> Path:
    """The folder in which qubes.ConnectUnix looks for names: first the user's,
    then the system's."""
    if not user:
        return SYSTEM_FOLDER
    return Path(
        environment.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}", RPC
    )


def where_installed(rpc: str) -> str:
    """The path of a qrexec service on this machine; empty where it is not
    installed."""
    return next(
        (
            path
            for path in (f"{place}/{rpc}" for place in RPC_FOLDERS)
            if os.path.exists(path)
        ),
        "",
    )


def check_name(name: str) -> str:
    """Return the name if other qubes can call it; raises BadName."""
    check_argument(RPC, name)
    if len(name) > MAX_NAME:
        raise BadName(
            f"{name!r} is too long: a name has at most {MAX_NAME} characters"
        )
    return name


def is_service(unit: str) -> bool:
    """Whether a socket unit is that of a service that was published with a
    command."""
    return unit.startswith(PREFIX) and unit.endswith(".socket")


def is_offering() -> bool:
    """Whether there is something that the system's systemd publishes."""
    return bool(
        _names(SYSTEM_FOLDER)
        or glob.glob(f"{own_folder(user=False)}/{PREFIX}*.socket")
    )


@contextlib.contextmanager
def managers() -> Iterator[list[Manager]]:
    """The systemd managers that may publish something: the user's, and the
    system's where there is something of it."""
    system = is_offering()
    with contextlib.ExitStack() as stack:
        found = []
        try:
            found.append(stack.enter_context(open_manager(user=True)))
        except ManagerError:
            # sudo gives root no manager of its own.
            if os.geteuid() != 0:
                raise
            system = True
        if system:
            found.append(stack.enter_context(open_manager(user=False)))
        yield found


def published(
    manager: Manager, known: Iterable[SocketUnit] = ()
) -> list[Publication]:
    """Return what is there, and what units promise to make, by name; systemd
    is not asked again of units that are known, and make none."""
    place = folder(user=manager.user)
    promised = _promised(manager, place, known)
    now = listening()

    def restart(unit: str) -> str:
        return Systemctl(user=manager.user).written("restart", unit)

    found = []
    for name in sorted({*_names(place), *promised}):
        unit, file = promised.get(name, ("", ""))
        link = place / name
        socket, problem = _destination(link)
        alive = bool(socket) and bool(now.holds(socket))
        if not alive and not problem:
            problem = f"nobody listens on {socket}"
            problem += (
                f": {restart(unit)}"
                if unit
                else "; start the program that should"
            )
        elif problem and unit:
            problem += f": {restart(unit)}"
        way = where_installed(f"{RPC}+{name}")
        if way and os.path.realpath(way) != socket:
            problem = (
                f"{way} is what other qubes reach by this name: remove it, or"
                f" publish under another"
            )
        elif is_service(unit) and not problem:
            problem = way_problem(name, way, read_file(file).text or "")
        try:
            check_name(name)
        except BadName as error:
            problem, way = str(error), ""
        found.append(
            Publication(
                name,
                str(link),
                socket,
                unit,
                file,
                alive,
                problem,
                not manager.user,
                way,
            )
        )
    return found


def places(folders: Iterable[str], name: str) -> list[Path]:
    """The files of a name alone, in folders of qrexec's."""
    return [Path(folder, f"{RPC}+{name}") for folder in folders]


def way_problem(name: str, way: str, unit: str) -> str:
    """Why calls of a program do not go the way that its unit, which says so,
    was made for; empty where they do."""
    if not way:
        if any(
            (one.section, one.key) == (NOTES, "Native")
            for one in assignments(unit)
        ):
            return (
                "calls take the script, as the link for qrexec is gone:"
                " publish it without --native, and then with it"
            )
        return ""
    for path in places(CONFIG_FOLDERS, name):
        if (text := read_file(str(path)).text) is not None:
            break
    if SAYS_SO.search(text or ""):
        return ""
    return (
        f"{path} has no {CONFIG.strip()}, so its program reads a line of"
        f" qrexec's first: write that there"
    )


def services_of(manager: Manager, unit: str) -> list[str]:
    """The services that a socket unit starts, and the programs behind those
    that are only the way there."""
    (row,) = manager.unit_properties([unit], "Unit", ["Triggers"])
    services = _services_among(row["Triggers"])
    rows = manager.unit_properties(services, "Unit", ["BindsTo"])
    behind = [name for row in rows for name in _services_among(row["BindsTo"])]
    return list(dict.fromkeys([*services, *behind]))


def _services_among(units: Iterable[str] | None) -> list[str]:
    return [unit for unit in units or () if unit.endswith(".service")]


def _names(place: Path) -> list[str]:
    try:
        return [name for name in os.listdir(place) if not name.startswith(".")]
    except OSError:
        return []


def _destination(link: Path) -> tuple[str, str]:
    """Follow a name to its socket; returns the socket's path, and what is
    wrong."""
    real = os.path.realpath(link)
    try:
        if stat.S_ISSOCK(os.stat(real).st_mode):
            return real, ""
        return real, f"{real} is not a socket"
    except FileNotFoundError:
        if os.path.islink(link):
            return real, f"{real}, to which it leads, is not there"
        return "", f"{link} is not there"
    except OSError as error:
        return real, f"{real}: {error.strerror}"


def _promised(
    manager: Manager, place: Path, known: Iterable[SocketUnit]
) -> dict[str, tuple[str, str]]:
    """Find the socket units that make names there, or will once they start:
    name → unit, and the file with the line, where it is known."""
    (search_path,) = manager.manager_properties("UnitPath")
    units = {unit.name for unit in manager.list_units("*.socket")}
    units |= scan(search_path or (), suffixes=("socket",)).units("socket")
    units -= {unit.name for unit in known if _makes_none(unit, place)}
    names = sorted(units)
    rows = manager.unit_properties(names, "Socket", ["Symlinks", "Listen"])
    promised: dict[str, tuple[str, str]] = {}
    for unit, row in zip(names, rows, strict=True):
        paths = [
            *(row["Symlinks"] or ()),
            *(
                address
                for kind, address in row["Listen"] or ()
                if kind == "Stream"
            ),
        ]
        for path in paths:
            if os.path.dirname(path) == str(place):
                promised[os.path.basename(path)] = (
                    unit,
                    _file_with(manager, unit, path),
                )
    return promised


def _makes_none(unit: SocketUnit, place: Path) -> bool:
    """Whether the files of a unit show that it makes no name there."""
    return (
        bool(unit.files)
        and all(
            "Symlinks" not in (one.text or "Symlinks") for one in unit.files
        )
        and all(os.path.dirname(path) != str(place) for _, path in unit.listen)
    )


def _file_with(manager: Manager, unit: str, link: str) -> str:
    (row,) = manager.unit_properties(
        [unit], "Unit", ["FragmentPath", "DropInPaths"]
    )
    specifiers = manager.specifiers()
    for path in reversed(
        [row["FragmentPath"] or "", *(row["DropInPaths"] or ())]
    ):
        if path and symlink_lines(path, unit, link, specifiers):
            return str(path)
    # It listens there itself.
    return str(row["FragmentPath"] or "")


def symlink_lines(
    path: str, unit: str, link: str, specifiers: Mapping[str, str]
) -> set[int]:
    """The numbers of a file's lines that say Symlinks= for just this link;
    raises ActivateError for one of several."""
    values = unit_specifiers(unit, specifiers)
    numbers = set()
    for one in assignments(read_file(path).text or ""):
        if (one.section, one.key) != ("Socket", "Symlinks"):
            continue
        links = [
            expand_specifiers(word, values) or word
            for word in one.value.split()
        ]
        if link in links:
            if len(links) > 1:
                raise ActivateError(
                    f"{path}:{one.line} names several links: take {link} out"
                    f" of it by hand"
                )
            numbers.add(one.line)
    return numbers


def socket_path(properties: Mapping[str, Any], unit: str) -> str:
    """The one unix socket of a unit, to which Symlinks= can lead; raises
    ActivateError where there is not just one."""
    paths = [
        address
        for kind, address in properties["Listen"] or ()
        if kind == "Stream" and address.startswith("/")
    ]
    if len(paths) != 1 or address_key(paths[0]) is None:
        raise ActivateError(
            f"{unit} listens on {len(paths)} unix sockets that have a path,"
            f" and a name can only lead to one:"
            " give --unix PATH instead"
        )
    return str(paths[0])
