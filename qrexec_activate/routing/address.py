"""Addresses of listeners: as a file has them, as systemd shows them, and as
they can be compared.

Quick to import, as a login waits for it where dom0 gives routes. No I/O.
"""

from __future__ import annotations

# Of collections and socket the part that Python itself starts with, and that
# is written in C, which is all that is needed: the rest takes 3 and 5 ms.
from _collections_abc import Mapping
from _socket import AF_INET, AF_INET6, VMADDR_CID_ANY, inet_ntop, inet_pton

from .names import LETTERS, NAME, c_escape, is_number

__all__ = [
    "LONGEST_PATH",
    "AddressKey",
    "address_key",
    "expand_specifiers",
    "shown_address",
    "written_key",
]


def expand_specifiers(text: str, values: Mapping[str, str]) -> str | None:
    """Expand `%i` and the like from `values` (letter to text); None where one
    is not in there.

    systemd leaves a `%` alone that neither a letter nor another `%` follows.
    """
    parts, at = [], 0
    while (sign := text.find("%", at)) >= 0:
        parts.append(text[at:sign])
        letter = text[sign + 1 : sign + 2]
        at = sign + 2
        if letter == "%":
            parts.append("%")
        elif letter not in LETTERS:
            parts.append("%")
            at = sign + 1
        elif letter in values:
            parts.append(values[letter])
        else:
            return None
    return "".join(parts) + text[at:]


AddressKey = tuple[str, str, int]

#: A unix socket's address holds 108 bytes, of which systemd leaves one for a
#: terminating zero.
LONGEST_PATH = 107


def written_key(text: str) -> AddressKey | None:
    """Return the address_key() of a ListenStream= as it stands in a file,
    specifiers expanded.

    None where systemd takes no such address (it then drops that listener, with
    a warning, and keeps the others), and where it is in a form that is not
    known here, such as a hexadecimal port.
    """
    if text.startswith(("/", "@")):
        length = len(text.encode(errors="surrogatepass"))
        if not 1 < length <= LONGEST_PATH:
            return None
        return address_key(shown_address(text))
    key = address_key(text)
    # systemd takes port 0 for vsock only.
    return None if key is not None and key[0] == "ip" and key[2] == 0 else key


def shown_address(written: str) -> str:
    """Write a ListenStream= as systemd shows it, as far as that differs in
    more than its form: a unix socket's name is escaped."""
    if not written.startswith(("/", "@")):
        return written
    return c_escape(written.encode(errors="surrogatepass"))


def address_key(text: str) -> AddressKey | None:
    """Reduce a listener's address, as systemd prints it, to what can be
    compared.

    Returns (family, address, port), or None for a form that is not known here;
    a bare port is IPv6 any, as systemd shows it. A path below /var/run is one
    below /run, as systemd rewrites it.
    """
    if text.startswith("/"):
        parts = [part for part in text.split("/") if part not in ("", ".")]
        if parts[:2] == ["var", "run"]:
            del parts[0]
        return ("path", "/" + "/".join(parts), 0)
    if text.startswith("@"):
        return ("abstract", text, 0)
    if text.startswith("vsock:"):
        return _vsock_key(text)
    front, percent, scope = text.rpartition("%")
    if percent and scope and NAME.issuperset(scope):
        text = front
    else:
        scope = ""
    host, colon, port = text.rpartition(":")
    if not is_number(port, 5) or int(port) > 65535:
        return None
    if not colon:
        return None if scope else ("ip", "::", int(port))
    bracketed = host.startswith("[") and host.endswith("]")
    family = AF_INET6 if bracketed else AF_INET
    try:
        # The very function by which systemd reads addresses, so that both take
        # the same ones.
        packed = inet_pton(family, host[1:-1] if bracketed else host)
    except (OSError, ValueError):
        return None
    address = inet_ntop(family, packed)
    if scope and (not bracketed or scope.isdigit()):
        return None
    # The kernel forgets the interface of an address that is not link-local.
    link_local = bracketed and packed[0] == 0xFE and packed[1] & 0xC0 == 0x80
    if scope and link_local:
        address += f"%{scope}"
    return ("ip", address, int(port))


def _vsock_key(text: str) -> AddressKey | None:
    _, cid, *port = text.split(":")
    if len(port) != 1 or not is_number(port[0], 10) or int(port[0]) >= 2**32:
        return None
    if cid and not is_number(cid, 10):
        return None
    any_cid = not cid or int(cid) == VMADDR_CID_ANY
    return ("vsock", "" if any_cid else cid, int(port[0]))
