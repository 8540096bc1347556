"""status --watch: a screen that people keep open.

What is alive comes first. What a look costs is decided by what is new and by
what fits on the screen, not by how many connections are open.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..forward.outcome import format_bytes
from .connections import Connection, Lookout, is_among
from .status import (
    CONNECTION_HEADER,
    Status,
    connection_rows,
    connection_style,
    daemon_lines,
    look,
    route_table,
    style,
)
from .table import lay_out
from .terminal import Styled, draw, say, styled

__all__ = ["Screen", "watch"]

#: Routes, daemons and the journal are asked for at most so often, in seconds;
#: and whenever a connection has ended.
RENEW = 30.0
RENEW_AFTER_AN_END = 5.0

#: xterm and all that are like it: another screen and back, the cursor's
#: absence, its home, to the end of a line and of the screen.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"k": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"j": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b" ": "page down",
    b"\x1b[H": "home",
    b"g": "home",
    b"\x1b[F": "end",
    b"G": "end",
    b"/": "filter",
    b"\x1b": "all",
    b"q": "quit",
}


@dataclass(slots=True)
class Screen:
    """What a person sees, and has chosen to see. No I/O."""

    offset: int = 0
    words: str = ""
    typing: bool = False
    #: Bytes a second of each connection, to the qube and from it.
    rates: dict[str, tuple[float, float]] = field(default_factory=dict)
    #: How many connections and routes there was room for.
    _shown: int = 1
    _counted: dict[str, tuple[float, int, int]] = field(default_factory=dict)

    def key(self, key: bytes) -> bool:
        """Obey a key; False to quit."""
        if self.typing:
            self._type(key)
            return True
        match _KEYS.get(key):
            case "quit":
                return False
            case "filter":
                self.typing, self.words = True, ""
            case "all":
                self.words = ""
            case "home":
                self.offset = 0
            case "end":
                self.offset = sys.maxsize
            case "up" | "down" | "page up" | "page down" as move:
                by = self._shown if move.startswith("page") else 1
                self.offset += by if move.endswith("down") else -by
        return True

    def _type(self, key: bytes) -> None:
        if key in (b"\r", b"\n"):
            self.typing = False
        elif key == b"\x1b":
            self.typing, self.words = False, ""
        elif key in (b"\x7f", b"\b"):
            self.words = self.words[:-1]
        elif (text := key.decode(errors="ignore")).isprintable():
            self.words += text
        self.offset = 0

    def count(self, connections: Sequence[Connection], now: float) -> None:
        """Take down how much has gone each way since the last look."""
        counted: dict[str, tuple[float, int, int]] = {}
        self.rates = {}
        for one in connections:
            if one.bytes_to_qube is None or one.bytes_from_qube is None:
                continue
            counted[one.id] = (now, one.bytes_to_qube, one.bytes_from_qube)
            before = self._counted.get(one.id)
            if before and now > before[0]:
                took = now - before[0]
                self.rates[one.id] = (
                    (one.bytes_to_qube - before[1]) / took,
                    (one.bytes_from_qube - before[2]) / took,
                )
        self._counted = counted

    def lines(self, status: Status, width: int, height: int) -> list[Styled]:
        """Lay out as many lines as there is room for."""
        alive = sorted(filter(self._is_wanted, status.connections), key=_order)
        shown = status.entries
        if self.words:
            shown = [
                entry
                for entry in shown
                if self.words
                in f"{entry.listener} {entry.target} {entry.call} {entry.unit}"
            ]
        room = max(height - 2, 1)
        self.offset = max(0, min(self.offset, len(alive) + len(shown) - 1))
        lines = [self._title(status, len(alive))]
        few = alive[self.offset :][: max(room - 2, 1)]
        lines += self._alive(few, width)
        self._shown = max(len(few), 1)
        if not alive:
            lines.append(styled("No connection is open.", ""))
        all_seen = self.offset + len(few) >= len(alive)
        if all_seen and (left := room - len(lines)) > 2:
            skipped = max(self.offset - len(alive), 0)
            routes = shown[skipped:][: left - 2]
            self._shown = max(len(few) + len(routes), 1)
            lines.append(Styled(""))
            lines += lay_out(*route_table(status, routes), width, style)
        lines += [
            Styled(""),
            *(styled(line[:width], "") for line in daemon_lines(status)),
        ]
        lines = lines[: height - 1]
        lines.append(self._hint(width))
        return lines

    def _alive(
        self, connections: Sequence[Connection], width: int
    ) -> list[Styled]:
        if not connections:
            return []
        rows = [
            [*row, self._rate(one)]
            for one, row in zip(
                connections, connection_rows(connections), strict=True
            )
        ]
        return lay_out(
            (*CONNECTION_HEADER, "rate"), rows, width, connection_style
        )

    def _rate(self, one: Connection) -> str:
        rate = self.rates.get(one.id)
        return "" if rate is None else f"{format_bytes(round(sum(rate)))}/s"

    def _title(self, status: Status, shown: int) -> Styled:
        waiting = sum(one.state != "open" for one in status.connections)
        total = len(status.connections)
        up = sum(rate for rate, _ in self.rates.values())
        down = sum(rate for _, rate in self.rates.values())
        text = (
            f"{time.strftime('%H:%M:%S')}  {total - waiting} open, {waiting}"
            f" waiting  ↑ {format_bytes(round(up))}/s"
            f" ↓ {format_bytes(round(down))}/s"
        )
        if shown != total:
            text += f"  {shown} shown"
        return styled(text, "bold")

    def _hint(self, width: int) -> Styled:
        text = (
            f"/{self.words}▏"
            if self.typing
            else f"q quit  / filter{f' ({self.words})' if self.words else ''}"
            "  ↑↓ PgUp PgDn scroll"
        )
        return styled(text[:width], "bright_black")

    def _is_wanted(self, one: Connection) -> bool:
        return not self.words or self.words in f"{one} {one.unit} {one.state}"


def _order(one: Connection) -> tuple[bool, float]:
    """What waits first, and longest; then the newest."""
    waits = one.state != "open"
    return (not waits, one.started if waits else -one.started)


def watch(routes: Sequence[str], which: str | None, *, interval: float) -> None:
    """Redraw in place on a terminal, until q; elsewhere print one after the
    other, until Ctrl-C."""
    if not sys.stdout.isatty():
        for status in _statuses(routes, which):
            say(time.strftime("%Y-%m-%d %H:%M:%S"))
            for line in lay_out(*route_table(status), None):
                say(line)
            if status.connections:
                say()
                rows = connection_rows(status.connections)
                for line in lay_out(CONNECTION_HEADER, rows, None):
                    say(line)
            say()
            time.sleep(interval)
    screen = Screen()
    with _whole_screen():
        for status in _statuses(routes, which):
            screen.count(status.connections, time.monotonic())
            if not _show(screen, status, time.monotonic() + interval):
                return


def _show(screen: Screen, status: Status, until: float) -> bool:
    """Show this, and obey keys, until the next look is due; False to quit."""
    while True:
        size = shutil.get_terminal_size()
        lines = screen.lines(status, size.columns, size.lines)
        body = f"{_END_OF_LINE}\r\n".join(lines)
        draw(Styled(f"{_HOME}{body}{_END_OF_LINE}{_END_OF_SCREEN}"))
        left = max(until - time.monotonic(), 0)
        if not sys.stdin.isatty():
            time.sleep(left)
            return True
        if not select.select([0], [], [], left)[0]:
            return True
        data = os.read(0, 64)
        if not data:
            return False
        # Keys that are not one character come in one piece.
        keys = [data] if data[:1] == b"\x1b" else [bytes([b]) for b in data]
        if not all(screen.key(key) for key in keys):
            return False


def _statuses(routes: Sequence[str], which: str | None) -> Iterator[Status]:
    """Look again and again: at connections each time, at all else when it may
    have changed."""
    lookout = Lookout()
    while True:
        status = look(routes, which, lookout)
        began = time.monotonic()
        pids = {one.pid for one in status.connections}
        yield status
        while (age := time.monotonic() - began) < RENEW:
            status.connections = [
                one
                for one in lookout.look(status.surveys)
                if not routes or is_among(one, status.entries)
            ]
            now = {one.pid for one in status.connections}
            if pids - now and age > RENEW_AFTER_AN_END:
                break
            pids |= now
            yield status


@contextlib.contextmanager
def _whole_screen() -> Iterator[None]:
    """A screen of one's own, and keys as they are pressed; all as it was
    afterwards."""
    before = termios.tcgetattr(0) if sys.stdin.isatty() else None
    try:
        if before is not None:
            tty.setcbreak(0)
            now = termios.tcgetattr(0)
            # A stop by Ctrl-Z would leave the terminal like this.
            now[6][termios.VSUSP] = b"\0"
            termios.tcsetattr(0, termios.TCSANOW, now)
        draw(Styled(_ENTER))
        yield
    finally:
        draw(Styled(_LEAVE))
        if before is not None:
            termios.tcsetattr(0, termios.TCSADRAIN, before)
