"""The steps of `check` about units: those that ship, the daemons, and what
systemd itself says of the files."""

from __future__ import annotations

import os
import re
import shlex
import stat
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from tempfile import TemporaryDirectory

from ..given.kinds import KINDS
from ..routing.unitfile import assignments
from .daemons import Daemon, is_mask, read_file
from .steps import Context, Level, Step, joined, ran, set_aside, sudo
from .survey import Survey, Unit, is_utf_8

__all__ = ["daemons", "reloads", "syntax", "units"]

#: A labelled unit's files have a colon in their path.
_COMPLAINT = re.compile(r"(/.+?):(\d+): (.+)")
#: A line of so many bytes is too long for systemd (LONG_LINE_MAX).
_LONG_LINE = 1 << 20
#: A drop-in of addresses and a name alone. Where systemd has the routes that it
#: means, it has understood each line.
_PLAIN = re.compile(
    r"(?:[#;][^\\\n]*\n|\n)*\[Socket\]\n"
    r"(?:[#;][^\\\n]*\n|\n|ListenStream=[^\s\\]+\n"
    r"|FileDescriptorName=[^\s\\%]+\n)*"
)


def units(context: Context) -> Iterator[Step]:
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
                and not is_mask(paths[0])
            ):
                hiding = True
                yield Step(
                    "units",
                    Level.WARNING,
                    f"{paths[0]} hides {paths[-1]} and is not the same: it"
                    f" may be of an older version",
                    joined(set_aside(paths[0]), context.reload()),
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
            advice="install the package qrexec-activate in the template, and"
            " start this qube again",
        )


def daemons(context: Context) -> Iterator[Step]:
    """Every service that runs serve, also a person's own."""
    found = sorted(context.now.daemons.values(), key=lambda one: one.unit)
    rows = context.manager.unit_properties(
        [one.unit for one in found],
        "Service",
        ["KillMode", "Result", "NRestarts"],
    )
    for daemon, row in zip(found, rows, strict=True):
        sockets = _sockets(context, daemon)
        if daemon.dead:
            yield _dead(context, daemon, sockets)
        elif program := _lacking(daemon):
            yield Step(
                "units",
                Level.ERROR,
                f"{daemon.unit} starts {program}, which is not there",
                *_without_culprit(context, daemon, sockets, "ExecStart"),
            )
        elif daemon.active == "failed":
            yield Step(
                "units",
                Level.ERROR,
                f"{daemon.unit} has failed ({row['Result']}):"
                f" {_journal(context, daemon)}",
                joined(
                    context.systemctl.written("reset-failed", daemon.unit),
                    context.systemctl.written("restart", *sockets),
                )
                if sockets
                else context.systemctl.written("reset-failed", daemon.unit),
            )
        elif daemon.sub.startswith("auto-restart") or (
            daemon.active == "activating" and row["NRestarts"]
        ):
            yield Step(
                "units",
                Level.ERROR,
                f"{daemon.unit} has failed and is started again, and who"
                f" connects waits: {_journal(context, daemon)}",
                advice="mend what it says: systemd tries on for two minutes",
            )
        elif row["KillMode"] not in (None, "process", "mixed"):
            yield Step(
                "units",
                Level.WARNING,
                f"{daemon.unit} has KillMode={row['KillMode']}, so open"
                f" connections end with the daemon:"
                " set KillMode=process",
                *_without_culprit(context, daemon, (), "KillMode"),
            )
        else:
            yield Step(
                "units",
                Level.OK,
                f"{daemon.unit} calls {daemon.service}, and is {daemon.active}",
            )


def _journal(context: Context, daemon: Daemon) -> str:
    user = " --user" if context.now.user else ""
    return f"the journal says why, journalctl{user} -u {daemon.unit}"


def _sockets(context: Context, daemon: Daemon) -> list[str]:
    """The socket units of a daemon that have a route."""
    return sorted(
        {
            entry.unit
            for entry in context.now.entries
            if entry.daemon == daemon.unit and entry.enabled != "masked"
        }
    )


def _lacking(daemon: Daemon) -> str:
    """A program on a daemon's command line that is not there."""
    words = daemon.argv[: daemon.argv.index("serve")]
    for word in words:
        if word.startswith("/") and not os.path.exists(word):
            return word
    return ""


def _dead(context: Context, daemon: Daemon, sockets: list[str]) -> Step:
    mend = ""
    advice = (
        "install the package qrexec-activate in the template"
        if daemon.is_shipped
        else f"write {daemon.unit}, or mend Service= of {', '.join(sockets)}"
    )
    if daemon.load == "masked":
        mend = context.systemctl.written("unmask", daemon.unit)
        if sockets:
            mend = joined(mend, context.systemctl.written("restart", *sockets))
    elif daemon.load != "not-found":
        mend, advice = _without_culprit(context, daemon, sockets, "ExecStart")
    return Step("units", Level.ERROR, daemon.dead, mend, "" if mend else advice)


def _without_culprit(
    context: Context, daemon: Daemon, sockets: Iterable[str], key: str
) -> tuple[str, str]:
    """How the file that spoils a service is taken away: mend and advice."""
    files = context.now.files
    fragments = files.all_fragments.get(daemon.unit, [])
    drop_ins = [
        path
        for path in files.drop_ins(daemon.unit)
        if any(
            (one.section, one.key) == ("Service", key)
            for one in assignments(read_file(path).text or "")
        )
    ]
    if drop_ins:
        culprit = drop_ins[-1]
    elif len(fragments) > 1:
        culprit = fragments[0]
    else:
        if own := files.drop_ins(daemon.unit):
            again = context.reload(*sockets)
            return "", f"mend what is wrong in {', '.join(own)}, then {again}"
        return "", (
            f"install the package again that {daemon.unit} came with"
            f" ({', '.join(fragments) or 'no file'})"
        )
    again = context.start_again(*sockets) if sockets else context.reload()
    return joined(set_aside(culprit), again), ""


def reloads(context: Context) -> Iterator[Step]:
    """Whether systemd has read everything that is on the disk, and can."""
    wrong = False
    for unit in context.now.units.values():
        known = {file.path: file.problem for file in unit.socket.files}
        for path in sorted({*known, *context.now.files.called_conf(unit.name)}):
            if path in unit.unreadable:
                continue
            problem, command = known.get(path) or "", ""
            if os.path.islink(path) and not os.path.exists(path):
                problem = problem or "is a symbolic link to nothing"
                command = sudo(shlex.join(["rm", path]), path)
            elif not is_utf_8(path):
                problem = (
                    "has a name that is no UTF-8, which systemd cannot tell"
                )
                new = re.sub("[\udc80-\udcff]", "_", path)
                command = sudo(
                    f"mv -n {_by_bytes(path)} {shlex.quote(new)}", path
                )
            elif _holds_up(path):
                problem = "is no file: systemd would wait at it for ever"
                command = set_aside(path)
            elif problem.startswith("cannot be read"):
                command = sudo(shlex.join(["chmod", "a+r", path]), path)
            if command:
                wrong = True
                yield Step(
                    "units",
                    Level.ERROR,
                    f"{path} {problem}",
                    joined(command, context.reload(unit.name)),
                )
    # systemd reads a unit that it could not load each time that it is asked
    # for, and has nothing to compare with.
    names = [
        name
        for known in (context.now.daemons, context.now.units)
        for name, one in known.items()
        if one.load == "loaded"
    ]
    rows = context.manager.unit_properties(names, "Unit", ["NeedDaemonReload"])
    stale = {
        name
        for name, row in zip(names, rows, strict=True)
        if row["NeedDaemonReload"]
    }
    stale |= {
        unit.name
        for unit in context.now.units.values()
        if unit.unread and unit.load == "loaded"
    }
    # systemd holds a unit for changed for ever where it reads a file in part.
    partly = {
        name
        for name in stale & context.now.units.keys()
        if any(map(_stops_at, _paths(context.now.units[name])))
    }
    stale -= partly
    if not stale or wrong:
        if not wrong and not partly:
            yield Step(
                "units", Level.OK, "systemd has read all files as they are"
            )
        return
    active = [
        name
        for name in sorted(stale)
        if name in context.now.units
        and context.now.units[name].active == "active"
    ]
    yield Step(
        "units",
        Level.WARNING,
        f"files were changed after systemd read them:"
        f" {', '.join(sorted(stale))}",
        context.reload(*active),
    )


def _by_bytes(path: str) -> str:
    """A path for a shell, of which no byte is printed that is no letter."""
    escaped = "".join(
        chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\0{byte:03o}"
        for byte in os.fsencode(path)
    )
    return f'"$(printf %b {shlex.quote(escaped)})"'


def _holds_up(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except OSError:
        return False


def syntax(context: Context) -> Iterator[Step]:
    """What systemd itself says of the files, line by line."""
    units = [u for u in context.now.units.values() if u.load != "masked"]
    files = {path: unit.name for unit in units for path in _paths(unit)}
    chosen = _to_verify(context.now, units)
    if not chosen:
        return
    stops = {
        path: line
        for unit in chosen
        for path in _paths(unit)
        if (line := _stops_at(path))
    }
    for path, line in sorted(stops.items()):
        yield Step(
            "units",
            Level.WARNING,
            f"systemd stops reading {path} at line {line}: it is too long, no"
            f" UTF-8, or a section's name without its end",
            *context.edit(files[path], path),
        )
    (searched,) = context.manager.manager_properties("UnitPath")
    with TemporaryDirectory() as links:
        result = ran(
            [
                # It takes its own environment for that of the manager.
                "env",
                f"SYSTEMD_UNIT_PATH={':'.join(searched or ())}:",
                "systemd-analyze",
                *(["--user"] if context.now.user else []),
                "verify",
                "--man=no",
                *(_word(unit, links) for unit in chosen),
            ]
        )
    # 127 is env's word for a program that is not there.
    if result is None or result.returncode == 127:
        return
    # systemd copies a fragment that has an alias, and names the copy.
    fragments = {unit.name: _fragment(unit) for unit in chosen}
    complaints, of_others = {}, False
    for match in filter(None, map(_COMPLAINT.match, result.stderr.split("\n"))):
        path = match[1]
        if path not in files:
            path = fragments.get(os.path.basename(path), path)
        if path in files and stops.get(path) != int(match[2]):
            complaints[f"{path}:{match[2]}: {match[3]}"] = path
        # Of a unit that ours need, which makes it fail, too.
        of_others |= path not in files
    for complaint, path in sorted(complaints.items()):
        yield Step(
            "units",
            Level.WARNING,
            complaint,
            *context.edit(files[path], path),
        )
    if complaints or stops:
        return
    if result.returncode and not of_others:
        said = "; ".join(result.stderr.splitlines()) or "nothing"
        yield Step(
            "units",
            Level.WARNING,
            f"whether systemd understands every line is not known:"
            f" systemd-analyze verify ends with {result.returncode}, and says:"
            f" {said}",
            advice="mend what it says",
        )
        return
    yield Step(
        "units",
        Level.OK,
        f"systemd understands every line of {len(files)} files",
    )


def _paths(unit: Unit) -> list[str]:
    return [*(file.path for file in unit.socket.files), *unit.unread]


def _stops_at(path: str) -> int:
    """The line at which systemd stops reading a file; 0 if it reads all."""
    lines = (read_file(path).text or "").split("\n")
    for number, line in enumerate(lines, start=1):
        if len(line.encode(errors="surrogateescape")) >= _LONG_LINE:
            return number

    def stops(end: int) -> bool:
        # The empty line ends what a backslash goes on with.
        read = assignments("\n".join((*lines[:end], "", "[End]", "End=1")))
        return not read or read[-1].section != "End"

    if not stops(len(lines)):
        return 0
    return bisect_left(range(len(lines)), True, key=stops)


def _fragment(unit: Unit) -> str:
    return unit.socket.files[0].path if unit.socket.files else ""


def _word(unit: Unit, links: str) -> str:
    """A unit as systemd-analyze takes it: what has a colon, as a label has, is
    FILE:ALIAS to it, and no colon may be in FILE."""
    if ":" not in unit.name or not (fragment := _fragment(unit)):
        return unit.name
    link = f"{links}/{len(os.listdir(links))}.socket"
    os.symlink(fragment, link)
    return f"{link}:{unit.name}"


def _to_verify(now: Survey, units: Iterable[Unit]) -> list[Unit]:
    """Units that have every file between them of which systemd may have more to
    say: it takes 2 ms for each."""
    served = {entry.unit for entry in now.entries}
    served -= {entry.unit for entry in now.entries if entry.refused}
    chosen: list[Unit] = []
    seen: set[str] = set()
    for unit in units:
        paths = {
            file.path
            for file in unit.socket.files
            if unit.name not in served or not _PLAIN.fullmatch(file.text or "")
        }.union(unit.unread)
        if paths - seen:
            chosen.append(unit)
            seen |= paths
    return chosen
