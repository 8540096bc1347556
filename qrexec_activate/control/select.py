"""From what a person writes to the routes that are meant."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from ..errors import ActivateError, ManagerError, UsageProblem
from ..given.kinds import KINDS, unit_of
from ..routing.address import address_key
from ..routing.claim import Route
from ..routing.names import parse_unit_name
from .survey import Entry, Survey, Unit, survey, written_claims

__all__ = [
    "means",
    "of_other",
    "select",
    "the_routes",
    "whole_units",
    "written",
]


def select(entries: Sequence[Entry], words: Sequence[str]) -> list[Entry]:
    """Return the routes that any of the words means, in order; without words,
    all. Raises UsageProblem for none."""
    if not words:
        return list(entries)
    chosen: dict[Entry, None] = {}
    for word in words:
        found = [entry for entry in entries if means(word, entry)]
        if not found:
            raise UsageProblem(
                f"there is no route {word!r}: name one by its address, unit,"
                f" label, target, call or file,"
                " as qrexec-activate list shows them"
            )
        chosen |= dict.fromkeys(found)
    return [entry for entry in entries if entry in chosen]


def means(word: str, entry: Entry) -> bool:
    """Whether a person who writes this word may mean this route."""
    if entry.matches(word):
        return True
    key = address_key(word)
    # A bare number is a port, thus an instance, and not the address [::]:PORT.
    return (
        key is not None
        and not word.isdigit()
        and key == address_key(entry.listener)
    )


def written(now: Survey, among: Container[str] | None = None) -> list[Entry]:
    """Return the routes as the files have them now, whether or not systemd has
    read them yet, and after these what only systemd still has: it is the
    files that a command changes. `among`: only those of these units."""
    entries: list[Entry] = []
    loaded: dict[str, list[Entry]] = {name: [] for name in now.units}
    for entry in now.entries:
        loaded[entry.unit].append(entry)
    for unit in now.units.values():
        if among is not None and unit.name not in among:
            continue
        known = loaded[unit.name]
        doubtful = unit.in_doubt or unit.socket.stale
        entries += (
            _written(unit, known, now)
            if doubtful or any(entry.refused for entry in known)
            else known
        )
    return entries


def _written(unit: Unit, loaded: list[Entry], now: Survey) -> list[Entry]:
    def key(address: str) -> object:
        return address_key(address) or address

    by_key: dict[object, Entry] = {}
    for entry in loaded:
        by_key.setdefault(key(entry.listener), entry)
    entries = []
    for claim in written_claims(
        unit.daemon, unit.name, now.files, now.specifiers
    ):
        known = by_key.get(key(claim.address))
        if known is None:
            known = Entry(
                claim.address,
                None,
                unit.daemon.service,
                claim.argument
                if isinstance(claim, Route)
                else parse_unit_name(unit.name).argument,
                unit.name,
                unit.daemon.unit,
                claim.file,
                unit.enabled,
                unit.active,
                now.listening.holds(claim.address),
                manager=now.manager,
            )
        entries.append(
            replace(
                known,
                listener=claim.address,
                target=claim.target if isinstance(claim, Route) else None,
                file=claim.file or known.file,
            )
        )
    found = {key(entry.listener) for entry in entries}
    return entries + [
        entry for entry in loaded if key(entry.listener) not in found
    ]


def the_routes(
    now: Survey, words: Sequence[str], all_of_them: bool = False
) -> list[Entry]:
    """Return the routes that a command changes: one for each word, all that it
    may mean with --all, or those of KIND ARGUMENT [TARGET], as add takes it.

    They are of one manager; that the other has what is meant is said, no more.
    """
    entries = written(now)
    groups = [(" ".join(words), _by_kind(words, entries))]
    if not groups[0][1]:
        try:
            groups = [(word, select(entries, [word])) for word in words]
        except UsageProblem:
            _look_elsewhere(words, entries, user=now.user)
            if _is_kind(words):
                route = " ".join(words)
                raise UsageProblem(
                    f"there is no route {route!r}: qrexec-activate list shows"
                    " all"
                ) from None
            raise
    meant: dict[Entry, None] = {}
    for word, found in groups:
        # A unit's own name stands for all that it opens.
        units = {entry.unit for entry in found}
        if len(found) > 1 and not all_of_them and not _names(word, units):
            listeners = ", ".join(entry.listener for entry in found)
            raise UsageProblem(
                f"{word!r} may mean {len(found)} routes: {listeners}; name"
                f" one of these, or add --all"
            )
        meant |= dict.fromkeys(found)
    return list(meant)


def _look_elsewhere(
    words: Sequence[str], entries: Sequence[Entry], *, user: bool
) -> None:
    """Raise UsageProblem where the other manager has a route that is meant,
    and this one has none."""
    with suppress(ManagerError):
        others = survey(user=not user).entries
        by_kind = _by_kind(words, others)
        for word in words:
            if any(means(word, entry) for entry in entries):
                continue
            if by_kind or any(means(word, entry) for entry in others):
                route = " ".join(words) if by_kind else word
                raise UsageProblem(f"the route {route!r} is {of_other(user)}")


def of_other(user: bool) -> str:
    """Of what the other manager has: whose it is, and how to name it."""
    return (
        "the system's: add --system"
        if user
        else "your own, not the system's: leave out --system"
    )


def _names(word: str, units: set[str]) -> bool:
    return len(units) == 1 and word.removesuffix(".socket") == next(
        iter(units)
    ).removesuffix(".socket")


def _is_kind(words: Sequence[str]) -> bool:
    """Whether these are words for one route, as add takes them."""
    return len(words) in (2, 3) and words[0] in KINDS


def _by_kind(words: Sequence[str], entries: Sequence[Entry]) -> list[Entry]:
    if len(words) not in (2, 3):
        return []
    try:
        name = parse_unit_name(unit_of(words[0], words[1]))
    except ActivateError:
        return []
    found = []
    for entry in entries:
        other = parse_unit_name(entry.unit)
        if (other.prefix, other.argument) == (name.prefix, name.argument):
            found.append(entry)
    if len(words) == 2:
        return found
    # Whose file is gone has no target any more; an earlier run has not come to
    # its end.
    return [
        entry
        for entry in found
        if words[2] in (entry.target, entry.label)
        or not (entry.label or os.path.exists(entry.file))
    ]


def whole_units(
    meant: Sequence[Entry], entries: Sequence[Entry]
) -> Mapping[str, list[Entry]]:
    """Return the units of these routes, with all that each opens; raises
    UsageProblem where one opens more than is meant."""
    units: dict[str, list[Entry]] = {entry.unit: [] for entry in meant}
    for entry in entries:
        if entry.unit in units:
            units[entry.unit].append(entry)
    for unit, all_of_it in units.items():
        for entry in all_of_it:
            if entry not in meant:
                raise UsageProblem(
                    f"{unit} is also the route from {entry.listener} to"
                    f" {entry.target or 'nowhere'}, and systemd starts and"
                    f" stops units: name all of its routes, or the unit"
                )
    return units
