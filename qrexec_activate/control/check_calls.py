"""The steps of `check` about what happens on routes that look well: what their
daemons say of the listeners, and what became of the last calls."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..systemd.journalreader import Record
from .policy import FILE as POLICY_FILE
from .steps import Context, Level, Step, joined
from .survey import Entry

__all__ = ["calls", "listeners"]

_COUNT = re.compile(r"(\d+) listeners? served, (\d+) refused")


def listeners(context: Context) -> Iterator[Step]:
    """Listeners that a daemon refuses, though nothing else shows why."""
    active = [
        one for one in context.now.daemons.values() if one.active == "active"
    ]
    rows = context.manager.unit_properties(
        [one.unit for one in active], "Service", ["StatusText"]
    )
    for daemon, row in zip(active, rows, strict=True):
        match = _COUNT.match(row["StatusText"] or "")
        if match is None or not int(match[2]):
            continue
        mine = [e for e in context.now.entries if e.daemon == daemon.unit]
        if int(match[2]) <= sum(bool(entry.refused) for entry in mine):
            continue
        said = {
            record.fields.get("LISTENER", ""): record.message
            for record in reversed(context.refusals)
            if " is refused: " in record.message
        }
        reasons = [
            said[entry.listener]
            for entry in mine
            if not entry.refused and entry.listener in said
        ]
        yield Step(
            "routes",
            Level.ERROR,
            f"{daemon.unit} refuses {match[2]} of its listeners:"
            f" {'; '.join(reasons) or 'its log says why'}",
            joined(
                context.systemctl.written("edit", daemon.unit),
                context.systemctl.written("stop", daemon.unit),
            ),
        )


def calls(context: Context) -> Iterator[Step]:
    """What became of the last call of each route."""
    last: dict[tuple[str, str], Record] = {}
    for record in context.calls:
        fields = record.fields
        last.setdefault(
            (fields.get("UNIT", ""), fields.get("LISTENER", "")), record
        )
    for entry in context.now.entries:
        ended = last.get((entry.unit, entry.listener))
        if entry.refused or ended is None or not ended.is_warning:
            continue
        if ended.fields.get("QREXEC_TARGET") != entry.target:
            continue
        said = ended.message.partition(f"{entry.call}: ")[2] or ended.message
        yield Step(
            "routes",
            Level.ERROR,
            f"the last call of {entry.listener} → {entry.target}"
            f" {entry.call}: {said}",
            advice=_advice(context, entry, ended),
        )


def _advice(context: Context, entry: Entry, record: Record) -> str:
    """What a person has to do elsewhere; the next call that succeeds makes
    check content again."""
    target = entry.target
    established = record.fields.get("ESTABLISHED") == "1"
    match record.fields.get("EXIT_CODE"):
        case "126" if not established:
            return (
                f"see whether {target} is spelt so and runs; in dom0, put what"
                f" {context.command('policy', entry.listener)} prints into"
                f" {POLICY_FILE}; then connect again"
            )
        case "127":
            return (
                f"install {entry.service} in the template of {target}, then"
                f" connect again"
            )
        case "125":
            return (
                f"start in {target} what should listen on"
                f" {entry.argument or 'its socket'}, then connect again"
            )
    return (
        f"see {context.command('logs', entry.listener)}, and the same call's"
        f" log in {target}; then connect again"
    )
