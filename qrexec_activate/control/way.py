"""The way of a connection, hop by hop, and what is known of each: for a
terminal, and as SVG.

Pure: a look goes in, text comes out. What is not known is ?, never ✓.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ..errors import BadName
from ..printable import printable
from ..systemd.journalreader import Record
from .connections import Connection
from .rule import policy_line
from .survey import Entry
from .table import BAD, DOUBTFUL, GOOD, shortened
from .terminal import Styled, styled

__all__ = ["Hop", "hops", "picture", "svg"]

WELL, WRONG, UNKNOWN = "✓", "✗", "?"
_STYLES = {WELL: GOOD, WRONG: BAD, UNKNOWN: DOUBTFUL}
#: What qrexec-client-vm ends with where dom0 or the target refuses.
_REFUSED = "126"


@dataclass(frozen=True, slots=True)
class Hop:
    """A station on the way: what it is, and what is known of it."""

    title: str
    text: str
    mark: str
    note: str = ""


def hops(
    entry: Entry,
    connections: Sequence[Connection],
    daemon: str,
    last: Record | None,
    qube: str,
    *,
    seen: bool = True,
) -> list[Hop]:
    """Say of each hop of a route whether it works; `daemon` is the state of its
    unit, `last` the record of the last connection that has ended, and `seen`
    whether this user may see connections of it."""
    is_open = any(one.state == "open" for one in connections)
    return [
        _program(connections, seen),
        _address(entry),
        _unit(entry),
        _daemon(entry, daemon),
        _policy(entry, connections, is_open, last, qube),
        _service(entry, is_open, last),
    ]


def _program(connections: Sequence[Connection], seen: bool) -> Hop:
    names = {str(one.peer_process or one.peer): None for one in connections}
    if not names:
        note = "none is connected" if seen else "only root can see which"
        return Hop("program", "any of this qube", UNKNOWN, note)
    count = len(connections)
    note = f"{count} connection{'s' * (count != 1)}"
    return Hop("program", ", ".join(names), WELL, note)


def _address(entry: Entry) -> Hop:
    mark, note = {
        True: (WELL, "listening"),
        False: (WRONG, "nobody listens"),
        None: (UNKNOWN, "whether somebody listens is not known"),
    }[entry.listens]
    return Hop("address", entry.listener, mark, note)


def _unit(entry: Entry) -> Hop:
    well = entry.state == "listening"
    refused = f": {entry.refused}" if entry.refused else ""
    states = ", ".join(dict.fromkeys((entry.enabled, entry.state)))
    return Hop(
        "unit",
        entry.unit,
        WELL if well else WRONG,
        f"{states}{refused}; {entry.file or 'no file'}",
    )


def _daemon(entry: Entry, state: str) -> Hop:
    if entry.refused:
        return Hop("daemon", entry.daemon, WRONG, "does not serve it")
    mark, note = {
        "active": (WELL, "running"),
        "activating": (WELL, "starting"),
        "failed": (
            WRONG,
            "failed: qrexec-activate logs --everything"
            f"{' --system' if entry.manager == 'system' else ''}",
        ),
    }.get(state, (WELL, "comes with the next connection"))
    return Hop("daemon", entry.daemon, mark, note)


def _policy(
    entry: Entry,
    connections: Sequence[Connection],
    is_open: bool,
    last: Record | None,
    qube: str,
) -> Hop:
    try:
        line = " ".join(
            policy_line(
                entry.service, entry.argument, qube, entry.target or "-"
            )
        )
    except BadName as error:
        return Hop("policy", entry.call, WRONG, str(error))
    if is_open:
        return Hop("policy", line, WELL, "dom0 lets it through")
    if connections:
        return Hop("policy", line, UNKNOWN, "waits, perhaps for dom0's prompt")
    if last is None:
        return Hop("policy", line, UNKNOWN, "only dom0 knows")
    if last.fields.get("ESTABLISHED") == "1":
        return Hop("policy", line, WELL, "dom0 let the last one through")
    if last.fields.get("EXIT_CODE") == _REFUSED:
        return Hop("policy", line, WRONG, "the last one was refused")
    return Hop("policy", line, UNKNOWN, "the last one did not get so far")


def _service(entry: Entry, is_open: bool, last: Record | None) -> Hop:
    text = f"{entry.call} in {entry.target or 'no qube'}"
    if not entry.target:
        return Hop("service", text, WRONG, "no target is set")
    if is_open:
        return Hop("service", text, WELL, "answers")
    if last is None:
        return Hop("service", text, UNKNOWN, "never called, as far as is known")
    if last.fields.get("ESTABLISHED") != "1":
        return Hop("service", text, UNKNOWN, "not reached by the last one")
    if last.is_warning:
        _, _, said = last.message.partition(entry.call)
        return Hop("service", text, WRONG, said.lstrip(": ") or last.message)
    return Hop("service", text, WELL, "the last one ended well")


def picture(way: Sequence[Hop], width: int) -> list[Styled]:
    """Draw the hops of one route below each other."""
    margin = max(len(hop.title) for hop in way) + 4
    room = max(width - margin, 20)
    lines = []
    for number, hop in enumerate(way):
        if number:
            lines.append(Styled("│"))
        lines.append(
            Styled(
                f"{styled(hop.mark, _STYLES[hop.mark])} "
                f"{styled(f'{hop.title:<{margin - 2}}', 'bold')}"
                f"{styled(hop.text, '')}"
            )
        )
        bar = "│" if number < len(way) - 1 else " "
        lines += [
            Styled(f"{bar}{' ' * (margin - 1)}{styled(part, '')}".rstrip())
            for part in textwrap.wrap(printable(hop.note), room)
        ]
    return lines


# -------------------------------------------------------------------------- SVG

_BOX, _HEIGHT, _GAP, _EDGE = 160, 128, 16, 12
_LETTERS, _LINES = 21, 4
_STYLE = """
svg { color-scheme: light dark; --ink: #1f2328; --box: #f6f8fa; --line: #8c959f;
  --well: #1a7f37; --wrong: #cf222e; --unknown: #9a6700; }
@media (prefers-color-scheme: dark) { svg { --ink: #e6edf3; --box: #161b22;
  --line: #7d8590; --well: #3fb950; --wrong: #f85149; --unknown: #d29922; } }
text { fill: var(--ink); font: 11px monospace; }
.title { font: bold 13px sans-serif; }
.note { font: 10px sans-serif; }
rect { fill: var(--box); stroke-width: 1.5; }
path { stroke: var(--line); stroke-width: 1.5; fill: none; }
.well { stroke: var(--well); } text.well { fill: var(--well); stroke: none; }
.wrong { stroke: var(--wrong); }
text.wrong { fill: var(--wrong); stroke: none; }
.unknown { stroke: var(--unknown); stroke-dasharray: 4 3; }
text.unknown { fill: var(--unknown); stroke: none; }
"""
_CLASSES = {WELL: "well", WRONG: "wrong", UNKNOWN: "unknown"}


def svg(ways: Sequence[Sequence[Hop]]) -> str:
    """Draw the ways of all routes, a row for each; in light and in dark."""
    stations = max((len(way) for way in ways), default=0)
    width = 2 * _EDGE + stations * (_BOX + _GAP) - _GAP
    height = 2 * _EDGE + len(ways) * (_HEIGHT + _GAP) - _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width}'
        f' {height}" width="{width}" height="{height}" role="img">',
        "<title>The way of connections to other qubes</title>",
        f"<style>{_STYLE}</style>",
    ]
    for row, way in enumerate(ways):
        y = _EDGE + row * (_HEIGHT + _GAP)
        for column, hop in enumerate(way):
            x = _EDGE + column * (_BOX + _GAP)
            if column:
                middle = y + _HEIGHT // 2
                parts.append(
                    f'<path d="M{x - _GAP} {middle}h{_GAP - 2}m-5 -4l5 4l-5'
                    f' 4"/>'
                )
            parts += _box(hop, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(hop: Hop, x: int, y: int) -> list[str]:
    look = _CLASSES[hop.mark]
    parts = [
        f'<rect class="{look}" x="{x}" y="{y}" width="{_BOX}"'
        f' height="{_HEIGHT}" rx="6"/>',
        f'<text class="title" x="{x + 8}" y="{y + 20}">{hop.title}</text>',
        f'<text class="title {look}" x="{x + _BOX - 20}"'
        f' y="{y + 20}">{hop.mark}</text>',
    ]
    down = y + 38
    for kind, text in (("text", hop.text), ("note", hop.note)):
        letters = _LETTERS if kind == "text" else _LETTERS + 4
        text = shortened(printable(text), letters * _LINES - 12)
        for line in textwrap.wrap(text, letters)[:_LINES]:
            parts.append(
                f'<text class="{kind}" x="{x + 8}"'
                f' y="{down}">{escape(line)}</text>'
            )
            down += 13
    return parts
