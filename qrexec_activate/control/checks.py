"""The steps of `check`: the whole way from qrexec-client-vm to the services of
this qube, each by itself.

A step looks, says what it saw, and names the command that mends what is wrong.
None changes anything, and none stops the ones after it, except where there is
nothing to look at without it.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
import shutil
import stat
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import ActivateError
from ..routing.unitfile import (
    AddressKey,
    address_key,
    assignments,
    declared_listeners,
)
from ..systemd.journalreader import Record, records
from ..systemd.manager import Manager, open_manager
from ..systemd.systemctl import Systemctl
from .address import is_open_to_others
from .kinds import KINDS
from .netproc import overlaps
from .policy import FILE as POLICY_FILE
from .publications import RPC as CONNECT_UNIX
from .publications import published, where_installed
from .settle import why_not_started
from .survey import Daemon, Entry, Survey, read_file, take_survey

__all__ = ["Level", "Step", "walk"]

DEFAULT_CLIENT = "/usr/bin/qrexec-client-vm"
AGENT_SOCKET = Path("/var/run/qubes/qrexec-agent")
#: Things that only a qube has.
QUBES_SIGNS = (
    "/usr/bin/qrexec-client-vm",
    "/usr/bin/qubesdb-read",
    "/etc/qubes",
    "/var/run/qubes",
)
PROGRAM_TIMEOUT = 10.0
#: Names that are so similar, one of them used once, are most likely one name
#: and a slip.
SIMILAR = 0.8
#: How far back the journal is searched, in records.
LOOK_BACK = 500
#: The exit code of qrexec-client-vm where policy refuses the call.
REFUSED = "126"

#: What refusals say where the files are right, and systemd has yet to read
#: them.
_STALE = re.compile(
    r"after systemd read it|has not read|is gone|as systemd has loaded|but"
    r" systemd has loaded"
)
_COMPLAINT = re.compile(r"(/[^:]+):(\d+): (.+)")


class Level(IntEnum):
    """How good a step's news is; check's exit code is that of the worst."""

    OK = 0
    WARNING = 1
    ERROR = 2

    @property
    def word(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Step:
    """What was seen, and the command that mends it, if something is wrong."""

    area: str
    level: Level
    text: str
    mend: str = ""


@dataclass(slots=True)
class Context:
    """What all steps look at."""

    manager: Manager
    now: Survey
    systemctl: Systemctl
    environment: dict[str, str] = field(default_factory=dict)


def walk(*, user: bool) -> tuple[list[Step], Survey | None]:
    """Take all steps; also returns the survey, where systemd could be asked."""
    systemctl = Systemctl(user)
    which = "user" if user else "system"
    try:
        with open_manager(user=user) as manager:
            now = take_survey(manager)
            version, environment = manager.manager_properties(
                "Version", "Environment"
            )
            context = Context(
                manager,
                now,
                systemctl,
                dict(one.partition("=")[::2] for one in environment or ()),
            )
            steps = [
                Step(
                    "systemd",
                    Level.OK,
                    f"the {which} manager answers (systemd {version})",
                )
            ]
            for look in _LOOKS:
                steps += look(context)
            return steps, now
    except ActivateError as error:
        mend = "loginctl enable-linger" if user and os.geteuid() else ""
        return [
            *_client(DEFAULT_CLIENT),
            Step("systemd", Level.ERROR, str(error), mend),
        ], None


# ---------------------------------------------------------------------- qrexec


def _clients(context: Context) -> Iterator[Step]:
    """Every qrexec-client-vm that a daemon would start."""
    clients = {
        _client_of(context, daemon)
        for daemon in context.now.daemons.values()
        if not daemon.dead
    } or {DEFAULT_CLIENT}
    for client in sorted(clients):
        yield from _client(client)


def _client_of(context: Context, daemon: Daemon) -> str:
    for at, word in enumerate(daemon.argv):
        if word == "--client" and at + 1 < len(daemon.argv):
            return daemon.argv[at + 1]
        if word.startswith("--client="):
            return word.partition("=")[2]
    (row,) = context.manager.unit_properties(
        [daemon.unit], "Service", ["Environment"]
    )
    environment = context.environment | dict(
        one.partition("=")[::2] for one in row["Environment"] or ()
    )
    return environment.get("QREXEC_ACTIVATE_CLIENT") or DEFAULT_CLIENT


def _client(path: str) -> Iterator[Step]:
    if not os.path.exists(path):
        if not any(map(os.path.exists, QUBES_SIGNS)):
            yield Step(
                "qrexec",
                Level.ERROR,
                f"{path} is not there: this machine is no qube. Routes can be"
                f" made here, but reach nothing",
                "qrexec-activate demo",
            )
            return
        yield Step(
            "qrexec",
            Level.ERROR,
            f"{path} is not there",
            "apt install qubes-core-qrexec (in the template)",
        )
        return
    if not os.access(path, os.X_OK):
        yield Step(
            "qrexec",
            Level.ERROR,
            f"{path} cannot be run",
            f"sudo chmod a+x {shlex.quote(path)}",
        )
        return
    takes_socket = "use-stdin-socket" in _output([path, "--help"])
    how = (
        "takes sockets (--use-stdin-socket)"
        if takes_socket
        else "takes no sockets, so bytes go through pipes"
    )
    version = _package_version(path)
    yield Step(
        "qrexec", Level.OK, f"{path}{f', {version},' if version else ''} {how}"
    )
    if path == DEFAULT_CLIENT:
        if AGENT_SOCKET.exists():
            yield Step("qrexec", Level.OK, "qrexec-agent runs")
        else:
            yield Step(
                "qrexec",
                Level.ERROR,
                f"qrexec-agent does not run: {AGENT_SOCKET} is not there",
                "sudo systemctl start qubes-qrexec-agent",
            )


def _output(words: list[str], *, must_succeed: bool = False) -> str:
    """What a program prints, on both; empty where it does not run or, if it
    must, does not succeed."""
    try:
        result = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROGRAM_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return (
        ""
        if must_succeed and result.returncode
        else result.stdout + result.stderr
    )


def _package_version(path: str) -> str:
    """The package that a file is of, with its version; empty where no package
    manager knows it."""
    if shutil.which("dpkg-query"):
        package = _output(
            ["dpkg-query", "--search", path], must_succeed=True
        ).partition(":")[0]
        return _output(
            [
                "dpkg-query",
                "--show",
                "--showformat=${Package} ${Version}",
                package,
            ],
            must_succeed=True,
        )
    if shutil.which("rpm"):
        return _output(
            ["rpm", "--query", "--file", path], must_succeed=True
        ).strip()
    return ""


# ---------------------------------------------------------------------- units


def _units(context: Context) -> Iterator[Step]:
    """The units that ship: all there, and not hidden by older ones."""
    fragments = context.now.files.fragments
    missing = []
    for prefix in KINDS.values():
        names = (f"{prefix}@.socket", f"{prefix}.service")
        missing += [name for name in names if name not in fragments]
        hiding = False
        for name in names:
            paths = context.now.files.all_fragments.get(name, [])
            if (
                len(paths) > 1
                and read_file(paths[0]).text != read_file(paths[-1]).text
            ):
                hiding = True
                yield Step(
                    "units",
                    Level.WARNING,
                    f"{paths[0]} hides {paths[-1]} and is not the same: it"
                    f" may be of an older version",
                    f"rm {shlex.quote(paths[0])} &&"
                    f" {context.systemctl.written('daemon-reload')}",
                )
        if not hiding and all(name in fragments for name in names):
            yield Step(
                "units", Level.OK, f"{names[0]} and {names[1]} are installed"
            )
    if missing:
        yield Step(
            "units",
            Level.ERROR,
            f"not installed: {', '.join(missing)}",
            "apt install qrexec-activate (in the template)",
        )


def _daemons(context: Context) -> Iterator[Step]:
    """Every service that runs serve, also a person's own."""
    daemons = sorted(context.now.daemons.values(), key=lambda one: one.unit)
    rows = context.manager.unit_properties(
        [one.unit for one in daemons], "Service", ["KillMode", "Result"]
    )
    for daemon, row in zip(daemons, rows, strict=True):
        if daemon.dead:
            yield _dead_daemon(context, daemon)
            continue
        program = daemon.argv[0]
        if not shutil.which(program):
            yield Step(
                "units",
                Level.ERROR,
                f"{daemon.unit} starts {program}, which is not there",
                _edit_unit(context, daemon.unit),
            )
            continue
        if daemon.active == "failed":
            yield Step(
                "units",
                Level.ERROR,
                f"{daemon.unit} has failed ({row['Result']}): the journal"
                f" says why, journalctl"
                f"{' --user' if context.now.user else ''} -u {daemon.unit}",
                context.systemctl.written("reset-failed", daemon.unit),
            )
            continue
        if row["KillMode"] not in (None, "process", "mixed"):
            yield Step(
                "units",
                Level.WARNING,
                f"{daemon.unit} has KillMode={row['KillMode']}, so open"
                f" connections end with the daemon:"
                " set KillMode=process",
                _edit_unit(context, daemon.unit),
            )
            continue
        yield Step(
            "units",
            Level.OK,
            f"{daemon.unit} calls {daemon.service}, and is {daemon.active}",
        )


def _dead_daemon(context: Context, daemon: Daemon) -> Step:
    if daemon.load == "masked":
        mend = context.systemctl.written("unmask", daemon.unit)
    else:
        mend = ""
    return Step("units", Level.ERROR, daemon.dead, mend)


def _edit_unit(context: Context, unit: str) -> str:
    return context.systemctl.written("edit", unit)


def _reloads(context: Context) -> Iterator[Step]:
    """Whether systemd has read everything that is on the disk."""
    units = sorted({*context.now.units, *context.now.daemons})
    rows = context.manager.unit_properties(units, "Unit", ["NeedDaemonReload"])
    stale = {
        unit
        for unit, row in zip(units, rows, strict=True)
        if row["NeedDaemonReload"]
    }
    # systemd reads a unit that it could not load each time that it is asked
    # for, and has nothing to compare with.
    stale -= {
        unit.name
        for unit in context.now.units.values()
        if unit.load != "loaded"
    }
    stale |= {unit.name for unit in context.now.units.values() if unit.unread}
    if not stale:
        yield Step("units", Level.OK, "systemd has read all files as they are")
        return
    active = [
        unit
        for unit in sorted(stale)
        if unit in context.now.units
        and context.now.units[unit].active == "active"
    ]
    mend = context.systemctl.written("daemon-reload")
    if active:
        mend += f" && {context.systemctl.written('restart', *active)}"
    yield Step(
        "units",
        Level.WARNING,
        f"files were changed after systemd read them:"
        f" {', '.join(sorted(stale))}",
        mend,
    )


def _syntax(context: Context) -> Iterator[Step]:
    """What systemd itself says of the files, line by line."""
    files = {
        file.path
        for unit in context.now.units.values()
        for file in unit.socket.files
    }
    files |= {
        path for unit in context.now.units.values() for path in unit.unread
    }
    if not files:
        return
    words = [
        "systemd-analyze",
        *(["--user"] if context.now.user else []),
        "verify",
        "--man=no",
        *context.now.units,
    ]
    complaints = []
    for line in _output(words).splitlines():
        match = _COMPLAINT.match(line)
        if match and match[1] in files:
            complaints.append(f"{match[1]}:{match[2]}: {match[3]}")
    for complaint in sorted(set(complaints)):
        path = complaint.partition(":")[0]
        yield Step(
            "units",
            Level.WARNING,
            complaint,
            f"qrexec-activate edit {shlex.quote(path)}",
        )
    if not complaints:
        yield Step(
            "units",
            Level.OK,
            f"systemd understands every line of {len(files)} files",
        )


# ---------------------------------------------------------------------- routes


def _routes(context: Context) -> Iterator[Step]:
    """Every route: is it served, does it listen, and will it after the next
    login?"""
    for entry in context.now.entries:
        yield _route(context, entry)
    for unit in context.now.units.values():
        if unit.enabled.startswith("enabled") and not any(
            entry.unit == unit.name for entry in context.now.entries
        ):
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
            "qrexec-activate add tcp 1234 QUBE",
        )


def _route(context: Context, entry: Entry) -> Step:
    def step(level: Level, text: str, mend: str = "") -> Step:
        return Step("routes", level, text, mend)

    written = context.systemctl.written
    if entry.refused:
        mend = f"qrexec-activate edit {shlex.quote(entry.listener)}"
        if not entry.file or _STALE.search(entry.refused):
            mend = (
                f"{written('daemon-reload')} &&"
                f" {written('restart', entry.unit)}"
            )
        return step(
            Level.ERROR, f"{entry.listener} is refused: {entry.refused}", mend
        )
    route = f"{entry.listener} → {entry.target} {entry.call}"
    if entry.enabled == "masked":
        return step(
            Level.ERROR,
            f"{route}: {entry.unit} is masked",
            written("unmask", entry.unit),
        )
    if entry.active == "failed":
        reason = _why_failed(context, entry)
        mend = (
            f"{written('reset-failed', entry.unit)} &&"
            f" {written('start', entry.unit)}"
        )
        return step(
            Level.ERROR,
            f"{route}: {entry.unit} has failed"
            f"{f': {reason}' if reason else ''}",
            mend,
        )
    if entry.active != "active":
        enabled = entry.enabled.startswith("enabled")
        mend = (
            written("start", entry.unit)
            if enabled
            else written("enable", "--now", entry.unit)
        )
        reason = why_not_started([entry.listener])
        reason = f", and {reason}" if reason else ""
        return step(
            Level.WARNING, f"{route}: {entry.unit} is not started{reason}", mend
        )
    if entry.listens is False:
        return step(
            Level.ERROR,
            f"{route}: systemd does not listen there yet, only after a restart",
            written("restart", entry.unit),
        )
    if entry.enabled == "disabled":
        return step(
            Level.WARNING,
            f"{route} listens, but not after the next login",
            written("enable", entry.unit),
        )
    return step(Level.OK, route)


def _why_failed(context: Context, entry: Entry) -> str:
    if reason := why_not_started([entry.listener]):
        return reason
    (row,) = context.manager.unit_properties([entry.unit], "Socket", ["Result"])
    meaning = {
        "service-start-limit-hit": f"{entry.daemon} could not start, see its"
        f" journal",
        "trigger-limit-hit": "too many connections came while the daemon"
        " could not start",
        "resources": "its address could not be had when it was started",
    }
    return meaning.get(str(row["Result"]), str(row["Result"] or ""))


def _clashes(context: Context) -> Iterator[Step]:
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
    # Within a unit, systemd itself tells no two of them apart, and the refusal
    # has said so.
    found = any(
        "different qubes" in entry.refused for entry in context.now.entries
    )
    for group in by_port.values():
        for (one_key, one), (other_key, other) in combinations(group, 2):
            if one_key != other_key and not overlaps(one_key, other_key):
                continue
            found = True
            yield Step(
                "routes",
                Level.ERROR,
                f"{one.listener} and {other.listener} exclude each other:"
                f" {one.file or one.unit} and {other.file or other.unit}",
                f"qrexec-activate edit"
                f" {shlex.quote(other.file or other.listener)}",
            )
    if context.now.entries and not found:
        yield Step("routes", Level.OK, "no two routes claim one address")


def _overrides(context: Context) -> Iterator[Step]:
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
                    f" reaches {one.name.text} and not {own[-1]},"
                    f" which {one.path} names",
                    f"qrexec-activate edit {shlex.quote(one.path)}",
                )


def _exposure(context: Context) -> Iterator[Step]:
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
            mend = f"qrexec-activate edit {shlex.quote(entry.listener)}"
            yield Step(
                "routes", Level.WARNING, f"{entry.listener}: {reason}", mend
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
        above = [folder.stat().st_mode for folder in Path(path).parents]
    except OSError:
        return ""
    if not stat.S_ISSOCK(mode):
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


def _targets(context: Context) -> Iterator[Step]:
    """Qubes that are misspelt: qrexec takes a name that it does not know for
    @default, without a word."""
    used = Counter(
        entry.target
        for entry in context.now.entries
        if entry.target and not entry.target.startswith("@")
    )
    if not used:
        return
    suspects = False
    known = _known_qubes()
    for target in sorted(used):
        entry = next(e for e in context.now.entries if e.target == target)
        mend = f"qrexec-activate edit {entry.listener}"
        if known and target not in known and target != "dom0":
            suspects = True
            close = difflib.get_close_matches(target, known, 1)
            hint = f"; there is {close[0]}" if close else ""
            yield Step(
                "routes",
                Level.ERROR,
                f"there is no qube {target}{hint}: qrexec would take it for"
                f" @default",
                mend,
            )
        elif not known and (likely := _likely(target, used)):
            suspects = True
            yield Step(
                "routes",
                Level.WARNING,
                f"{target} looks like {likely}: if there is no such qube,"
                f" qrexec takes it for @default",
                mend,
            )
    refused = _refused_lately(context)
    for target in sorted(used):
        if target in refused:
            suspects = True
            yield Step(
                "routes",
                Level.WARNING,
                f"the last call to {target} was refused: is it misspelt,"
                f" halted, or not allowed by"
                f" {POLICY_FILE} of dom0?",
                f"qrexec-activate policy {target}",
            )
    if not suspects:
        whom = (
            "dom0 knows all targets"
            if known
            else "no target looks misspelt (only dom0 knows all names)"
        )
        yield Step("routes", Level.OK, f"{whom}: {', '.join(sorted(used))}")


def _likely(target: str, used: Counter[str]) -> str:
    """A name that is used more often, and so similar that this one may be a
    slip; empty if there is none."""
    for other, count in used.most_common():
        if other == target or count <= used[target]:
            continue
        # work-1 and work-2 are two qubes; gitweb and gitwb are one.
        if re.sub(r"\d", "0", other) == re.sub(r"\d", "0", target):
            continue
        if (
            difflib.SequenceMatcher(None, other.lower(), target.lower()).ratio()
            >= SIMILAR
        ):
            return other
    return ""


def _known_qubes() -> set[str]:
    """All qubes, where this one may ask for them, as a management qube may;
    else none."""
    if not shutil.which("qvm-ls"):
        return set()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["qvm-ls", "--raw-list"],
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT,
            check=True,
        )
        return set(result.stdout.split())
    return set()


def _refused_lately(context: Context) -> set[str]:
    """Targets whose last call was refused, as far as the journal goes."""
    last: dict[str, Record] = {}
    routes = {(entry.unit, entry.listener) for entry in context.now.entries}
    with (
        contextlib.suppress(ActivateError),
        records(
            user=context.now.user,
            control_group=context.now.control_group,
            latest_first=True,
        ) as found,
    ):
        for count, record in enumerate(found):
            if count >= LOOK_BACK:
                break
            fields = record.fields
            if (
                record.connection
                and (fields.get("UNIT"), fields.get("LISTENER")) in routes
            ):
                last.setdefault(fields.get("QREXEC_TARGET", ""), record)
    return {
        target
        for target, record in last.items()
        if record.fields.get("EXIT_CODE") == REFUSED
        and record.fields.get("ESTABLISHED") == "0"
    }


# ------------------------------------------------------------- the service side


def _services(context: Context) -> Iterator[Step]:
    """What this qube offers to others by qubes.ConnectUnix."""
    if not context.now.user:
        return
    found = published(context.manager)
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
            "apt install qrexec-activate-services (in the template)",
        )
    elif not os.access(path, os.X_OK):
        yield Step(
            "services",
            Level.ERROR,
            f"{path} cannot be run",
            f"sudo chmod a+x {path}",
        )
    elif not shutil.which("socat"):
        yield Step(
            "services",
            Level.ERROR,
            f"{path} needs socat",
            "apt install socat (in the template)",
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
            if one.unit
            else f"qrexec-activate unpublish {shlex.quote(one.name)}"
        )
        yield Step(
            "services",
            Level.ERROR,
            f"{one.name} leads nowhere: {one.problem}",
            mend,
        )


_LOOKS: tuple[Callable[[Context], Iterator[Step]], ...] = (
    _clients,
    _units,
    _daemons,
    _reloads,
    _syntax,
    _routes,
    _clashes,
    _overrides,
    _exposure,
    _targets,
    _services,
)
