"""The one function that every text from elsewhere goes through before a
terminal or a log shows it."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str, keep: str = "") -> str:
    """One line without control characters, nor others that are not seen, but
    for those to `keep`: names of processes, files and peers are other people's
    text."""
    return (
        text
        if text.isprintable()
        else "".join(
            c if c.isprintable() or c in keep else _written(c) for c in text
        )
    )


def _written(c: str) -> str:
    code = ord(c)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
