"""Names as a unit's name or its files have them: what is escaped, and how.

routing/names.py decodes it. Quick to import, as a login waits for it where dom0
gives routes. No I/O.
"""

from __future__ import annotations

from ..errors import BadName
from ..routing.names import NAME

__all__ = ["escape_instance", "escape_target"]


def _escape(text: str, plain: frozenset[str]) -> str:
    if plain.issuperset(text):
        return text
    try:
        raw = text.encode()
    except UnicodeError:
        raise BadName(f"{text!r} is no UTF-8 text") from None
    return "".join(
        char if (char := chr(byte)) in plain else f"\\x{byte:02x}"
        for byte in raw
    )


def escape_instance(argument: str, label: str = "") -> str:
    r"""Write an RPC argument, and a label after a `:`, as a unit's instance.

    parse_unit_name() and decode_escapes() give both back: a `:` within one of
    them is written `\x3a`. Raises BadName.
    """
    colon = ":" if label else ""
    return f"{_escape(argument, NAME)}{colon}{_escape(label, NAME)}"


def escape_target(target: str) -> str:
    r"""Write a target as a FileDescriptorName, which may hold no `:`
    (`@dispvm\x3aNAME`) and expands `%`.

    decode_escapes() gives it back. Raises BadName.
    """
    return _escape(target, NAME | {"@"})
