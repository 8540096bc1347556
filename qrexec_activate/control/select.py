"""From what a person writes to the routes that are meant."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageProblem
from ..routing.unitfile import address_key
from .survey import Entry

__all__ = ["means", "select"]


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
                f" target, call or file,"
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
