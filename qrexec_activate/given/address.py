"""Where a route listens, as it is written: ADDRESS[:PORT], a path, @abstract or
vsock:, and what of these is none."""

from __future__ import annotations

import os
from _collections_abc import Mapping

from ..errors import UsageProblem
from ..routing.address import (
    LONGEST_PATH,
    AddressKey,
    address_key,
    expand_specifiers,
)

__all__ = ["Address", "parse_address"]


class Address:
    """A listener as a unit file has it, and as it is once systemd has filled in
    the specifiers."""

    __slots__ = ("expanded", "key", "written")

    def __init__(self, written: str, expanded: str, key: AddressKey) -> None:
        self.written = written
        self.expanded = expanded
        self.key = key

    @property
    def host(self) -> str:
        return self.key[1]

    @property
    def port(self) -> int:
        return self.key[2]

    @property
    def is_ip(self) -> bool:
        return self.key[0] == "ip"


def parse_address(
    text: str, port: int | None, specifiers: Mapping[str, str]
) -> Address:
    """Understand ADDRESS[:PORT], a path (with specifiers, as %t/name),
    @abstract or vsock:; raises UsageProblem."""
    if not text or not text.isprintable() or text != text.strip():
        raise UsageProblem(
            f"{text!r} is no address: write it like 127.0.0.2, [::1]:8080 or"
            f" %t/name"
        )
    if text.endswith("\\"):
        raise UsageProblem(
            f"{text!r} is no address: systemd would join its line with the next"
        )
    if text.isdigit():
        raise UsageProblem(
            f"a bare port would be open to other machines: write"
            f" 127.0.0.1:{text}, or 127.0.0.2 and the like"
        )
    if text.startswith(("/", "%")):
        return _parse_path(text, specifiers)
    if text.startswith(("@", "vsock:")):
        key = address_key(text)
        if key is None or "%" in text or len(text) > LONGEST_PATH + 1:
            raise UsageProblem(
                f"{text!r} is no address: write it like @name or vsock::1234"
            )
        return Address(text, text, key)
    return _parse_ip(text, port)


def _parse_path(text: str, specifiers: Mapping[str, str]) -> Address:
    expanded = expand_specifiers(text, specifiers)
    key = address_key(expanded) if expanded else None
    if expanded is None or key is None or not expanded.startswith("/"):
        raise UsageProblem(
            f"{text!r} is no path: write it from / on, or from %t or %h on"
        )
    if ".." in expanded.split("/") or expanded.endswith("/"):
        raise UsageProblem(
            f"{text!r} is no path of a socket: systemd takes neither .. nor a"
            f" / at the end"
        )
    if len(os.fsencode(expanded)) > LONGEST_PATH:
        raise UsageProblem(
            f"{expanded} is too long: the path of a unix socket holds"
            f" {LONGEST_PATH} bytes"
        )
    return Address(text, expanded, key)


def _parse_ip(text: str, port: int | None) -> Address:
    host, own_port = text, port
    # An IPv6 address without brackets has more than one colon, and so no port.
    if text.startswith("[") or text.count(":") == 1:
        front, colon, back = text.rpartition(":")
        if colon and not back.endswith("]"):
            host = front
            # int() takes no more than 4,300 digits.
            if not (
                back.isascii()
                and back.isdigit()
                and len(back) <= LONGEST_PATH
                and 1 <= int(back) <= 65535
            ):
                raise UsageProblem(
                    f"{back!r} in {text!r} is no port: write a number from 1"
                    f" to 65535"
                )
            own_port = int(back)
    host = (
        "127.0.0.1"
        if host == "localhost"
        else host.removeprefix("[").removesuffix("]")
    )
    for form in ("{}:{}", "[{}]:{}"):
        key = address_key(form.format(host, own_port or 1))
        if key is not None and "%" not in host:
            break
    else:
        raise UsageProblem(
            f"{host!r} is no address of this machine: write it like 127.0.0.2"
            f" or [::1], or a path like %t/name"
        )
    if own_port is None:
        raise UsageProblem(
            f"{text!r} has no port: write it like 127.0.0.1:8080"
        )
    written = form.format(key[1], own_port)
    return Address(written, written, key)
