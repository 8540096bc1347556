"""Which services are daemons of this program, told by what they run: as systemd
has them loaded or, where it has not, as the files on the disk mean it.

A route is shown also where its daemon is masked, or cannot be loaded, or where
another file makes it run something else.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ..routing.address import expand_specifiers
from ..routing.names import parse_unit_name
from ..routing.routes import unit_specifiers
from ..routing.unitfile import SourceFile, assignments
from ..systemd.unitdirs import UnitFiles

__all__ = ["Daemon", "declared_daemon", "find_daemon", "is_mask", "read_file"]

#: Options of `serve` that stand alone; all others are followed by their value.
_FLAGS = {"--help", "-h", "--debug"}
#: What the shipped units call: all that is known of them where the package is
#: gone, and a person's drop-ins are not.
_SHIPPED = {
    "qrexec-connect-tcp": "qubes.ConnectTCP",
    "qrexec-connect-unix": "qubes.ConnectUnix",
    "qrexec-connect-tcp-bind": "qubes.ConnectTCPBind",
}


@dataclass(frozen=True, slots=True)
class Daemon:
    """A service that runs `qrexec-activate serve RPC`, and how it is now."""

    unit: str
    service: str
    #: The argument of all its calls, where it was given by --argument; None:
    #: each unit's instance is the argument.
    argument: str | None
    active: str = "inactive"
    sub: str = "dead"
    argv: tuple[str, ...] = ()
    load: str = "loaded"
    #: Why it cannot serve, though files say that it should; empty if it can.
    dead: str = ""

    @property
    def is_shipped(self) -> bool:
        return self.unit.removesuffix(".service") in _SHIPPED


def find_daemon(
    unit: str, exec_start: Sequence[Sequence[Any]]
) -> Daemon | None:
    """Read from a service's ExecStart which RPC it serves; None if it runs
    another program.

    `exec_start` is the D-Bus property: (path, argv, …) for each command line.
    """
    for _, argv, *_ in exec_start:
        words = list(argv)
        if "serve" not in words:
            continue
        at = words.index("serve")
        # As a program, as `python3 -m qrexec_activate`, or by a path of one's
        # own.
        if any(
            PurePath(word).name in ("qrexec-activate", "qrexec_activate")
            for word in words[:at]
        ):
            service, argument = _serve_options(words[at + 1 :])
            if service:
                return Daemon(unit, service, argument, argv=tuple(words))
    return None


def _serve_options(words: list[str]) -> tuple[str, str | None]:
    """Find the RPC and --argument among the words after `serve`."""
    service, argument = "", None
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            service = service or word
            continue
        option, equals, value = word.partition("=")
        if not equals and option not in _FLAGS:
            value = next(rest, "")
        if option == "--argument":
            argument = value
    return service, argument


def declared_daemon(unit: str, files: UnitFiles) -> Daemon | None:
    """The daemon that the files mean a socket unit to start, whatever systemd
    makes of them; None where it is none of ours."""
    name = parse_unit_name(unit)
    shipped = _SHIPPED.get(name.prefix)
    service = _service_of(unit, files) or (
        f"{name.prefix if shipped else unit.rpartition('.')[0]}.service"
    )
    for file in _declaring(service, files):
        lines = (
            one.value.lstrip("@-:+!|")
            for one in assignments(file.text or "")
            if (one.section, one.key) == ("Service", "ExecStart")
        )
        if daemon := find_daemon(service, [("", _words(x)) for x in lines]):
            return daemon
    return Daemon(service, shipped, None) if shipped else None


def _service_of(unit: str, files: UnitFiles) -> str:
    """The last Service= of a socket unit's files; empty if there is none."""
    found = ""
    for file in _declaring(unit, files):
        for one in assignments(file.text or ""):
            if (one.section, one.key) == ("Socket", "Service"):
                found = one.value
    return expand_specifiers(found, unit_specifiers(unit, {})) or ""


def _declaring(unit: str, files: UnitFiles) -> Iterator[SourceFile]:
    """Read all files of a unit that are no masks, also those that are
    hidden: the fragment that hides the others first, then drop-ins."""
    name = parse_unit_name(unit)
    template = f"{name.prefix}@.{name.suffix}" if name.instance else unit
    fragments = files.all_fragments.get(unit) or files.all_fragments.get(
        template, []
    )
    if all(map(is_mask, fragments)):
        fragments = files.all_fragments.get(template, [])
    paths: Iterable[str] = (*fragments, *files.drop_ins(unit))
    return (read_file(path) for path in paths if not is_mask(path))


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return line.split()


def is_mask(path: str) -> bool:
    """Whether a unit file is a link to /dev/null, or empty, which systemd takes
    for a unit that must not be."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return found.st_size == 0 and not stat.S_ISDIR(found.st_mode)


def read_file(path: str) -> SourceFile:
    """Read a unit file as it is on the disk now."""
    try:
        with open(
            path,
            encoding="utf-8",
            errors="surrogateescape",
            newline="",
            opener=_at_once,
        ) as file:
            return SourceFile(path, file.read())
    except OSError as error:
        return SourceFile(path, None, f"cannot be read ({error.strerror})")


def _at_once(path: str, flags: int) -> int:
    """Open a file, and wait for nobody who may write to a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)
