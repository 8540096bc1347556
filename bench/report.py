"""From figures to tables: what each rival costs, and whether the targets are
reached.

A figure is the median over the rounds. A ratio is the median of the ratios
within each round, so that what the machine did meanwhile is no part of it; it
may thus differ a little from the quotient of two medians.
"""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .measures import AT_ONCE, BUSY, COMMANDS, STREAMS
from .rivals import RIVALS

__all__ = ["Figures", "Target", "markdown", "targets"]

NONE = "-"
#: Less is what a timer or a late look at another connection costs.
NO_CPU = 0.001


class Figures:
    """The results of a run, by measure and rival."""

    def __init__(self, results: Sequence[dict[str, Any]]) -> None:
        self._results = list(results)

    def rivals(self) -> list[str]:
        """Those that were measured, in the order of the tables."""
        seen = {str(one["rival"]) for one in self._results}
        return [name for name in RIVALS if name in seen]

    def has(self, measure: str) -> bool:
        return any(one["measure"] == measure for one in self._results)

    def series(self, measure: str, rival: str, key: str) -> dict[int, float]:
        """What each round gave."""
        return {
            int(one["round"]): float(one[key])
            for one in self._results
            if (one["measure"], one["rival"]) == (measure, rival)
            and one.get(key) is not None
        }

    def median(self, measure: str, rival: str, key: str) -> float | None:
        values = self.series(measure, rival, key).values()
        return statistics.median(values) if values else None

    def spread(self, measure: str, rival: str, key: str) -> float | None:
        """How far the rounds lie apart: from the least to the most, as a part
        of the median."""
        values = self.series(measure, rival, key).values()
        middle = statistics.median(values) if len(values) > 1 else 0
        return (max(values) - min(values)) / middle if middle else None

    def most(self, measure: str, rival: str, key: str) -> float | None:
        return max(self.series(measure, rival, key).values(), default=None)

    def ratio(
        self,
        measure: str,
        rival: str,
        key: str,
        against: str,
        against_measure: str = "",
    ) -> float | None:
        """The median of the ratios of each round."""
        ours = self.series(measure, rival, key)
        theirs = self.series(against_measure or measure, against, key)
        ratios = [
            ours[number] / theirs[number]
            for number in ours
            if theirs.get(number)
        ]
        return statistics.median(ratios) if ratios else None

    def failed(self, measure: str, rival: str) -> int:
        """How many connections got no answer."""
        return sum(
            one.get("failed", 0) + one.get("unfinished", 0) + ("error" in one)
            for one in self._results
            if (one["measure"], one["rival"]) == (measure, rival)
        )

    def errors(self) -> list[str]:
        return [
            f"{one['measure']}, {one['rival']}: {one['error']}"
            for one in self._results
            if "error" in one
        ]

    def memory(self, rival: str, key: str) -> dict[int, float]:
        """KiB by open connections."""
        return self._by("memory", rival, "open", key)

    def listeners(self, key: str) -> dict[int, float]:
        """KiB by listeners."""
        return self._by("listeners", "hand-over", "listeners", key)

    def routes(self) -> list[int]:
        """How many there were for the commands."""
        return sorted(
            int(one["measure"].removeprefix("list-"))
            for one in self._results
            if one["measure"].startswith("list-") and one.get("round") == 0
        )

    def _by(
        self, measure: str, rival: str, by: str, key: str
    ) -> dict[int, float]:
        return {
            int(one[by]): float(one[key])
            for one in self._results
            if (one["measure"], one["rival"]) == (measure, rival) and key in one
        }


def growth(sizes: dict[int, float]) -> float | None:
    """What one more costs, from the fewest to the most."""
    if len(sizes) < 2:
        return None
    least, most = min(sizes), max(sizes)
    return (sizes[most] - sizes[least]) / (most - least)


# ------------------------------------------------------------------ targets


@dataclass(frozen=True)
class Target:
    """What is to be reached. `reached` is None where it was not measured."""

    what: str
    value: float | None
    relation: str
    bound: float
    unit: str = ""

    @property
    def reached(self) -> bool | None:
        if self.value is None:
            return None
        compare: Callable[[float, float], bool] = (
            operator.le if self.relation == "≤" else operator.ge
        )
        return compare(self.value, self.bound)


def targets(figures: Figures) -> list[Target]:
    """All of them, measured or not."""
    limit, ours, splice = "limit", "hand-over", "splice"
    times = " times"
    found = [
        Target(
            "first byte, hand-over / limit",
            figures.ratio("first-byte", ours, "p50", limit),
            "≤",
            1.08,
            times,
        )
    ]
    for at_once in AT_ONCE:
        ratio = figures.ratio(
            f"connections-{at_once}", ours, "per_second", limit
        )
        found.append(
            Target(
                f"connections/s, {at_once} at once, hand-over / limit",
                ratio,
                "≥",
                # One alone waits for nobody.
                0.90 if at_once == 1 else 0.82,
                times,
            )
        )
    beside = "beside a busy core: "
    found.append(
        Target(
            f"{beside}first byte, hand-over / limit",
            figures.ratio(f"first-byte{BUSY}", ours, "p50", limit),
            "≤",
            1.15,
            times,
        )
    )
    found += [
        Target(
            f"{beside}connections/s, {at_once} at once, hand-over / socat",
            figures.ratio(
                f"connections-{at_once}{BUSY}", ours, "per_second", "socat"
            ),
            "≥",
            1.0,
            times,
        )
        for at_once in AT_ONCE
    ]
    for rival, against, bound in (
        (ours, limit, 0.97),
        (splice, "socat", 2.5),
        (splice, limit, 0.6),
    ):
        for name, (title, *_) in STREAMS.items():
            ratio = figures.ratio(
                f"throughput-{name}", rival, "mib_per_second", against
            )
            found.append(
                Target(
                    f"throughput {title}, {rival} / {against}",
                    ratio,
                    "≥",
                    bound,
                    times,
                )
            )
    used = [
        figures.median(f"throughput-{name}", ours, "cpu_per_gib")
        for name in STREAMS
    ]
    known = [one for one in used if one is not None]
    most = max(known) if known else None
    connections, listeners = (
        figures.memory(ours, "uss"),
        figures.listeners("uss"),
    )
    resident = figures.memory(ours, "rss")
    cold = figures.ratio("cold", ours, "p50", "python3", "import-trio")
    help_ = figures.ratio("help", "python3", "p50", "python3", "import-click")
    # What is not named here: 2 s.
    bounds = {("list", 100): 0.3, ("list", 2000): 1.5}
    commands = {
        (name, count): figures.median(f"{name}-{count}", "python3", "p50")
        for name, count in [("list", 100), *((name, 2000) for name in COMMANDS)]
    }
    return [
        *found,
        Target(
            "CPU per GiB in the daemon, hand-over: none",
            most,
            "≤",
            NO_CPU,
            " s",
        ),
        Target(
            "memory per open connection", growth(connections), "≤", 8, " KiB"
        ),
        Target("memory per listener", growth(listeners), "≤", 4, " KiB"),
        Target(
            "memory without a connection",
            resident[0] / 1024 if 0 in resident else None,
            "≤",
            27,
            " MiB",
        ),
        Target("cold first byte / import trio", cold, "≤", 1.15, times),
        Target("`--help` / import click", help_, "≤", 1.3, times),
        *(
            Target(
                f"`{name}` with {count:,} routes",
                None if took is None else took / 1e9,
                "≤",
                bounds.get((name, count), 2),
                " s",
            )
            for (name, count), took in commands.items()
        ),
    ]


# ------------------------------------------------------------------ Markdown


@dataclass(frozen=True)
class _Row:
    """One line of a table: how it is called, where its figures are, and how
    they are written."""

    title: str
    measure: str
    key: str
    write: Callable[[float], str]
    #: Ratios are those to the limit.
    ratio: bool = True


def markdown(figures: Figures, machine: dict[str, str]) -> str:
    """The whole report."""
    parts = [
        "# What a connection costs",
        _intro(),
        "## Targets",
        _targets_table(figures),
        "## Time and throughput",
        "In brackets: the ratio to the limit. Behind ±: half of what lies"
        " between the least and the most of all rounds.",
        _main_table(figures),
    ]
    if figures.has("memory"):
        parts += ["## Memory", _memory_note(), _memory_table(figures)]
    if figures.has("listeners"):
        parts += [
            "A listener, its route and its file:",
            _listeners_table(figures),
        ]
    if figures.has("import-click"):
        parts += [
            "## Commands",
            "In brackets: CPU time of the command with all that it starts, and"
            " of systemd meanwhile.",
            _commands_table(figures),
        ]
    parts += [
        "## The machine",
        _table(["", ""], [[key, value] for key, value in machine.items()]),
    ]
    if errors := figures.errors():
        parts += [
            "## What went wrong",
            "\n".join(f"- {error}" for error in errors),
        ]
    return "\n\n".join(parts) + "\n"


def _intro() -> str:
    return (
        "Made by `make bench`. Everything runs on one machine, over the"
        " loopback, with one private systemd user"
        " manager. qrexec-client-vm is a stand-in in C, unless the table of"
        " the machine names another: what is"
        " measured lies between a client and qrexec-client-vm, and is not"
        " what a call between two qubes takes. A"
        " figure is the median of the rounds, a ratio the median of the"
        " ratios within each round.\n\n"
        "- `Accept=yes` units are those of the Qubes documentation, with"
        " systemd's limits lifted: as written they"
        " refuse a 65th connection, and fail at 200 connections in 2 s.\n"
        "- socat has the options of qvm-connect-tcp, and so its backlog of 5:"
        " TCP keeps more at once waiting for a"
        " second and longer.\n"
        "- systemd-socket-proxyd stands in front of the limit, so only what"
        " it costs to move bytes compares."
    )


def _targets_table(figures: Figures) -> str:
    words = {True: "reached", False: "**not reached**", None: "not measured"}
    rows = [
        [
            one.what,
            NONE if one.value is None else f"{_short(one.value)}{one.unit}",
            f"{one.relation} {one.bound:g}{one.unit}",
            words[one.reached],
        ]
        for one in targets(figures)
    ]
    return _table(["", "measured", "target", ""], rows)


def _main_table(figures: Figures) -> str:
    milliseconds, whole = (
        (lambda value: f"{value / 1e6:.2f} ms"),
        (lambda value: f"{value:,.0f}"),
    )
    rows = [
        _Row("first byte, p50", "first-byte", "p50", milliseconds),
        _Row("first byte, p99", "first-byte", "p99", milliseconds),
        *(
            _Row(
                f"connections/s, {n} at once",
                f"connections-{n}",
                "per_second",
                whole,
            )
            for n in AT_ONCE
        ),
        *(
            _Row(
                f"first byte, p99, {n} at once",
                f"connections-{n}",
                "p99",
                milliseconds,
            )
            for n in AT_ONCE[1:]
        ),
        _Row(
            "beside a busy core: first byte, p50",
            f"first-byte{BUSY}",
            "p50",
            milliseconds,
        ),
        *(
            _Row(
                f"beside a busy core: connections/s, {n} at once",
                f"connections-{n}{BUSY}",
                "per_second",
                whole,
            )
            for n in AT_ONCE
        ),
        *(
            _Row(
                f"MiB/s {title}", f"throughput-{name}", "mib_per_second", whole
            )
            for name, (title, *_) in STREAMS.items()
        ),
        *(
            _Row(
                f"CPU s per GiB {title}",
                f"throughput-{name}",
                "cpu_per_gib",
                lambda value: f"{value:.3f}",
                False,
            )
            for name, (title, *_) in STREAMS.items()
        ),
    ]
    names = figures.rivals()
    lines = [
        [row.title, *(_cell(figures, row, name) for name in names)]
        for row in rows
        if figures.has(row.measure)
    ]
    if figures.has("cold"):
        lines += _cold_lines(figures, names)
    return _table(["", *(RIVALS[name] for name in names)], lines)


def _cell(figures: Figures, row: _Row, name: str) -> str:
    value = figures.median(row.measure, name, row.key)
    if value is None:
        return "failed" if figures.failed(row.measure, name) else NONE
    text = row.write(value)
    ratio = (
        figures.ratio(row.measure, name, row.key, "limit")
        if row.ratio and name != "limit"
        else None
    )
    if ratio is not None:
        text += f" ({_short(ratio)})"
    if spread := figures.spread(row.measure, name, row.key):
        text += f" ±{spread / 2:.0%}"
    if failed := figures.failed(row.measure, name):
        text += f", {failed} failed"
    return text


def _cold_lines(figures: Figures, names: Sequence[str]) -> list[list[str]]:
    base = figures.median("import-trio", "python3", "p50")

    def line(
        title: str,
        pick: Callable[[str], float | None],
        write: Callable[[float], str],
    ) -> list[str]:
        values = [pick(name) for name in names]
        return [
            title,
            *(NONE if value is None else write(value) for value in values),
        ]

    whole = "" if base is None else f" ({base / 1e6:.0f} ms)"
    return [
        line(
            "first byte, cold, p50",
            lambda name: figures.median("cold", name, "p50"),
            _whole_ms,
        ),
        line(
            "first byte, cold, slowest",
            lambda name: figures.most("cold", name, "p50"),
            _whole_ms,
        ),
        line(
            f"first byte, cold / `python3 -c 'import trio'`{whole}",
            lambda name: figures.ratio(
                "cold", name, "p50", "python3", "import-trio"
            ),
            _short,
        ),
    ]


def _whole_ms(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e6:.0f} ms"


def _memory_note() -> str:
    return (
        "Of the processes between a client and qrexec-client-vm, without"
        " qrexec-client-vm itself; for `Accept=yes`"
        " units that is the user manager; of socat and the limit there are"
        " three, one for each listener. Resident, and"
        " in brackets their own, shared with nobody. Per connection: their"
        " own, from none to the most."
    )


def _memory_table(figures: Figures) -> str:
    names = figures.rivals()
    counts = sorted(
        {count for name in names for count in figures.memory(name, "rss")}
    )

    def cell(name: str, count: int) -> str:
        rss, uss = (
            figures.memory(name, "rss").get(count),
            figures.memory(name, "uss").get(count),
        )
        return (
            NONE
            if rss is None or uss is None
            else f"{_size(rss)} ({_size(uss)})"
        )

    rows = [
        [f"{count:,} connections", *(cell(name, count) for name in names)]
        for count in counts
    ]
    each = [growth(figures.memory(name, "uss")) for name in names]
    rows.append(
        [
            "per connection",
            *(
                NONE if one is None else f"{max(one, 0):.1f} KiB"
                for one in each
            ),
        ]
    )
    return _table(["", *(RIVALS[name] for name in names)], rows)


def _listeners_table(figures: Figures) -> str:
    rss, uss = figures.listeners("rss"), figures.listeners("uss")
    start = figures.listeners("start")
    rows = [
        [
            f"{count:,}",
            _size(rss[count]),
            _size(uss[count]),
            _whole_ms(start[count]) if count in start else NONE,
        ]
        for count in sorted(rss)
    ]
    if (each := growth(uss)) is not None:
        rows.append(["per listener", "", f"{each:.1f} KiB", ""])
    return _table(
        ["listeners", "resident", "its own", "start to first byte"], rows
    )


def _commands_table(figures: Figures) -> str:
    def cell(measure: str) -> str:
        took, own, systemd = (
            figures.median(measure, "python3", key)
            for key in ("p50", "own", "systemd")
        )
        if took is None or own is None or systemd is None:
            return NONE
        text = f"{took / 1e9:.2f} s ({own:.2f}, {systemd:.2f})"
        if spread := figures.spread(measure, "python3", "p50"):
            text += f" ±{spread / 2:.0%}"
        return text

    counts = figures.routes()
    return _table(
        ["routes", *(f"{count:,}" for count in counts)],
        [
            [f"`{name}`", *(cell(f"{name}-{count}") for count in counts)]
            for name in COMMANDS
        ],
    )


def _size(kib: float) -> str:
    return f"{kib / 1024:.1f} MiB"


def _short(value: float) -> str:
    """Three digits that say something."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return (
        f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
        if abs(value) >= 0.1
        else f"{value:.4f}"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
