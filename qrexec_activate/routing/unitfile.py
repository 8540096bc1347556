"""Unit-file syntax, and the rule that decides which file owns which listener.

systemd gives one FileDescriptorName to all sockets of a unit (the last
assignment wins), so which drop-in opened which address, and which qube that
drop-in names, has to be read from the files themselves. This module reads them
as systemd 252 to 257 does, from text, in the order in which systemd applied
them. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

__all__ = [
    "LISTEN_KINDS",
    "Assignment",
    "Declaration",
    "Declared",
    "FdName",
    "SourceFile",
    "assignments",
    "declared_listeners",
    "is_fd_name",
    "is_silent",
    "only_adds",
]

#: The settings that add a listener, and the kind by which systemd's D-Bus
#: property Listen calls it.
LISTEN_KINDS = {
    "ListenStream": "Stream",
    "ListenDatagram": "Datagram",
    "ListenSequentialPacket": "SequentialPacket",
    "ListenFIFO": "FIFO",
    "ListenNetlink": "Netlink",
    "ListenSpecial": "Special",
    "ListenMessageQueue": "MessageQueue",
    "ListenUSBFunction": "USBFunction",
}

_WHITESPACE = " \t\n\r"
_BOM = "\ufeff"
#: systemd ends a line at LF, CR or NUL, takes two or three different ones in a
#: row as one end, and NUL as the last.
_LINE_END = re.compile("(?:\r\n?|\n\r?)?\0|\r\n|\n\r|[\n\r]")
#: Unicode's noncharacters, the last two of each plane among them.
_NONCHARACTERS = "\ufdd0-\ufdef" + "".join(
    chr(plane << 16 | low) for plane in range(17) for low in (0xFFFE, 0xFFFF)
)
#: What systemd refuses as UTF-8; surrogates stand for undecodable bytes here.
_NO_UTF8 = re.compile(f"[\ud800-\udfff{_NONCHARACTERS}]")
_FD_NAME = re.compile(r"[ -9;-~]{0,255}")
#: What systemd does not allow in the name of a section.
_UNSAFE = re.compile("[\x01-\x1f\"'\\\\\x7f]")
#: A section without a name: systemd 252 and 257 go on to the next one, 262
#: gives up on the file.
_NAMELESS = re.compile(f"(?:^|[\n\r\0])[{_BOM} \t]*\\[\\][ \t]*(?:$|[\n\r\0])")


@dataclass(frozen=True, slots=True)
class Assignment:
    """One `key=value` line; `line` is the number of the (last) line that it
    stands on."""

    section: str
    key: str
    value: str
    line: int


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines after joining: a trailing backslash joins, comment lines
    inside are skipped."""
    joined = ""
    had_bom = False
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.lstrip(_WHITESPACE).startswith(("#", ";")):
            continue
        # The mark counts once, at the start of any line, and a comment behind
        # it is none to systemd.
        if not had_bom and line.startswith(_BOM):
            had_bom = True
            line = line.removeprefix(_BOM)
        joined += line
        backslashes = len(joined) - len(joined.rstrip("\\"))
        if backslashes % 2:
            joined = joined[:-1] + " "
            continue
        yield number, joined
        joined = ""
    if joined:
        yield number, joined


@lru_cache(maxsize=32)
def assignments(text: str) -> Sequence[Assignment]:
    """Read what systemd would read from a unit file or drop-in; never fails.

    systemd stops reading a file at a bad section header (no closing bracket,
    quotes, control characters) and at bytes that are no UTF-8 (here:
    surrogates, as errors="surrogateescape" leaves them), and keeps what came
    before.

    All instances of a template have its text in common, so that most texts are
    read once for each of them.
    """
    return tuple(_assignments(text))


def _assignments(text: str) -> Iterator[Assignment]:
    section = ""
    for number, joined in _logical_lines(text):
        line = joined.strip(_WHITESPACE)
        if _NO_UTF8.search(line):
            return
        if line.startswith("["):
            if not line.endswith("]") or _UNSAFE.search(line):
                return
            section = line[1:-1]
        elif section:
            key, equals, value = line.partition("=")
            if equals:
                yield Assignment(
                    section,
                    key.strip(_WHITESPACE),
                    value.strip(_WHITESPACE),
                    number,
                )


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A fragment or drop-in of a unit, as systemd has read it.

    Where that cannot be known, `text` is None and `problem` says why; `now` is
    then what the file holds now, empty if it is gone and None if nobody knows.
    """

    path: str
    text: str | None
    problem: str = ""
    now: str | None = None


@dataclass(frozen=True, slots=True)
class FdName:
    """A FileDescriptorName= as written, specifiers and escapes unexpanded;
    empty where it resets the name."""

    text: str
    path: str
    line: int

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(slots=True)
class Declaration:
    """A listener that a file adds, and the name that the files give it.

    `inherited` says that `name` stands in no file of this listener, but is the
    unit's. `rival` is another name in the same file of several listeners, so
    that each may have been meant for some of them. `borrowed` is the name that
    systemd would report for a listener that no file names, where this name
    belongs to the listeners of another file. `doubts` are files that came
    later, are not known as systemd read them, and may say otherwise.
    """

    kind: str
    address: str
    path: str
    line: int
    name: FdName | None = None
    inherited: bool = False
    rival: FdName | None = None
    borrowed: FdName | None = None
    doubts: list[SourceFile] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Declared:
    """What a unit's files declare, all told: listeners in systemd's order, and
    every name in the order assigned."""

    listeners: tuple[Declaration, ...]
    names: tuple[FdName, ...]
    untrusted: tuple[SourceFile, ...]

    @property
    def last_name(self) -> FdName | None:
        return self.names[-1] if self.names else None


@dataclass(slots=True)
class _Contents:
    """What one file says about listeners and names."""

    resets: bool = False
    added: list[Declaration] = field(default_factory=list)
    names: list[FdName] = field(default_factory=list)
    rival: FdName | None = None


def _read(path: str, text: str) -> _Contents:
    contents = _Contents()
    for item in assignments(text):
        if item.section != "Socket":
            continue
        if item.key == "FileDescriptorName":
            name = FdName(item.value, path, item.line)
            before = contents.names[-1] if contents.names else name
            # An empty assignment says that what came before is not meant.
            if not name.text:
                contents.rival = None
            elif before.text not in ("", name.text):
                contents.rival = before
            contents.names.append(name)
        elif kind := LISTEN_KINDS.get(item.key):
            if item.value:
                contents.added.append(
                    Declaration(kind, item.value, path, item.line)
                )
            else:
                # An empty value of any of these settings resets the whole list.
                contents.added.clear()
                contents.resets = True
    return contents


def is_silent(text: str) -> bool:
    """Whether a file says nothing of listeners, nor of names."""
    contents = _read("", text)
    return not (contents.resets or contents.added or contents.names)


def _as_known(file: SourceFile) -> SourceFile:
    """Doubt a file that not every systemd reads alike."""
    if file.text is None or not _NAMELESS.search(file.text):
        return file
    problem = "has a section without a name, [] (remove that line)"
    return SourceFile(file.path, None, problem, file.text)


def only_adds(file: SourceFile) -> bool:
    """Whether a file that is not known as systemd read it does not, as it is
    now, touch the listeners of others."""
    if file.now is None:
        return False
    contents = _read(file.path, file.now)
    return not contents.resets and bool(contents.added or not contents.names)


def declared_listeners(files: Sequence[SourceFile]) -> Declared:
    """Read a unit's fragment and drop-ins, in the order applied, and tell which
    file names which listener.

    - A file's FileDescriptorName is the name of every listener that this file
      adds.
    - A file that sets FileDescriptorName and adds no listener (an override)
      sets it for all that were added before.
    - A listener that no file names has the name that systemd reports, unless
      that one belongs to the listeners of another drop-in: its own file did not
      name that qube, so it gets none. A file that is not known as systemd read
      it may have been that other one.
    """
    listeners: list[Declaration] = []
    names: list[FdName] = []
    unit_wide: FdName | None = None
    untrusted = []
    rivals: list[SourceFile] = []
    for position, file in enumerate(map(_as_known, files)):
        if file.text is None:
            untrusted.append(file)
            rivals.append(file)
            for listener in listeners:
                listener.doubts.append(file)
            continue
        contents = _read(file.path, file.text)
        if contents.resets:
            listeners.clear()
        if contents.names:
            name = contents.names[-1]
            if contents.added:
                for listener in contents.added:
                    listener.name = name
                    listener.rival = (
                        contents.rival if len(contents.added) > 1 else None
                    )
            else:
                # Whatever the files before may have said, this now holds for
                # all of their listeners.
                for listener in listeners:
                    listener.name, listener.rival = name, None
                    listener.doubts.clear()
            if position == 0 or not contents.added:
                unit_wide = name
                rivals.clear()
        listeners += contents.added
        names += contents.names
    declared = Declared(tuple(listeners), tuple(names), tuple(untrusted))
    for listener in listeners:
        if listener.name is None and declared.last_name is not None:
            if declared.last_name is unit_wide:
                listener.name = unit_wide
                listener.inherited = True
                listener.doubts = list(rivals)
            else:
                listener.borrowed = declared.last_name
    return declared


def is_fd_name(expanded: str) -> bool:
    """Whether systemd takes this as a FileDescriptorName; if not, it warns, and
    keeps the name that it had before."""
    return _FD_NAME.fullmatch(expanded) is not None
