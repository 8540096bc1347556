"""Addresses of listeners as systemd shows them, and as a person would write
them. No I/O."""

from __future__ import annotations

import re

from ..routing.names import C_ESCAPES

__all__ = ["c_unescape", "plain_address"]

_C_PLAIN = {letter: byte for byte, letter in C_ESCAPES.items()}


def c_unescape(text: str) -> str:
    r"""Undo c_escape(); what would be no UTF-8 text stays as it is."""
    if "\\" not in text:
        return text

    def replace(match: re.Match[str]) -> str:
        found = match[1]
        return chr(_C_PLAIN[found] if found in _C_PLAIN else int(found, 8))

    try:
        return (
            re.sub(r"\\([abfnrtv\\\"']|[0-7]{3})", replace, text)
            .encode("latin-1")
            .decode()
        )
    except UnicodeError:
        return text


def plain_address(shown: str) -> str:
    """Write an address that systemd shows as a person would."""
    return c_unescape(shown) if shown.startswith(("/", "@")) else shown
