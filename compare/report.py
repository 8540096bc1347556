"""From what was seen to docs/compare.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .scenes import SCENES

__all__ = ["CANNOT", "RIGHT", "WRONG", "Verdict", "markdown"]

RIGHT, WRONG, CANNOT = "✓", "✗", "-"

HEAD = """\
# Side by side

What a program at a local address gets, by this and by what one would use otherwise. `make compare` has played each
scene on each way and written this page. ✓: it was as it should be. ✗: it was not; what was seen instead stands beside
it. -: the way has no means for it. The other qubes and qrexec are the stand-in of the [tests](testing.md), on one machine.

{ways}

"""
WAYS = {
    "qrexec-activate": (
        "this, as its units start it: the socket is handed over to"
        " qrexec-client-vm"
    ),
    "qrexec-activate, by pipes": "the same, as with qrexec before 4.2.19",
    "qvm-connect-tcp": (
        "the command that Qubes OS brings: one socat a port, as it starts it"
    ),
    "`Accept=yes` units": (
        "a qrexec-client-vm as a unit of its own for each connection, as in"
        " Qubes OS's documentation"
    ),
    "systemd-socket-proxyd": (
        "from a socket unit to a service on the same machine: it makes no"
        " calls, and shows what a relay alone does"
    ),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a scene on a way: one of three marks, and what was seen in
    words."""

    mark: str
    words: str = ""

    def __str__(self) -> str:
        return f"{self.mark} {self.words}".rstrip()


def markdown(
    verdicts: Mapping[str, Mapping[str, Verdict]],
    machine: Mapping[str, str],
    commands: Mapping[str, str],
) -> str:
    """The page, from way → scene → verdict; `commands` are the ways that were
    given."""
    ways = list(verdicts)
    scenes = [
        title
        for title in SCENES
        if any(title in seen for seen in verdicts.values())
    ]
    told = WAYS | {name: f"`{line}`" for name, line in commands.items()}
    lines = [
        HEAD.format(
            ways="\n".join(f"- {way}: {told.get(way, way)}" for way in ways)
        )
        + _row("scene", ways),
        _row("---", ["---"] * len(ways)),
    ]
    for title in scenes:
        cells = [str(verdicts[way].get(title, "")) for way in ways]
        lines.append(_row(title, cells))
    right = [
        sum(one.mark == RIGHT for one in seen.values())
        for seen in verdicts.values()
    ]
    lines.append(
        _row("right", [f"{count} of {len(scenes)}" for count in right])
    )
    lines += ["", "## What is right", ""]
    lines += [
        f"- **{title}**: {' '.join((SCENES[title].__doc__ or '').split())}"
        for title in scenes
    ]
    lines += ["", "## Seen on", "", "| | |", "|---|---|"]
    lines += [_row(what, [said]) for what, said in machine.items()]
    return "\n".join(lines) + "\n"


def _row(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"
