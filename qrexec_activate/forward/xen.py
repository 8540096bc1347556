"""What Xen lets this qube share with others: the data of each call is in
memory that it shares, and a qube has a limit for that, and a device."""

from __future__ import annotations

import os

__all__ = ["denial", "grants_are_scarce", "limit"]

#: How much memory a qube may share, in pages. Qubes' GUI agent, where there is
#: one, writes 1073741824 there; the kernel's own limit is 1,024.
_LIMIT = "/sys/module/xen_gntalloc/parameters/limit"
_DEVICE = "/dev/xen/gntalloc"
#: What a call takes: two rings of 64 KiB, and the page that describes them.
_PER_CALL = 33


def _limit() -> int | None:
    try:
        with open(_LIMIT, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def grants_are_scarce(calls: int) -> bool:
    """Whether so many calls may be too many; also where nothing is known."""
    known = _limit()
    return known is None or known < calls * _PER_CALL


def limit() -> str:
    """Name the limit, where there is one."""
    known = _limit()
    if known is None:
        return ""
    return (
        f". Each open call takes some {_PER_CALL} grants, and {_LIMIT} allows"
        f" {known}: Qubes' GUI agent writes 1073741824 there"
    )


def denial() -> str:
    """Say if this user cannot open what a call needs of Xen."""
    if not os.path.exists(_DEVICE) or os.access(_DEVICE, os.R_OK | os.W_OK):
        return ""
    return (
        f"; {_DEVICE} cannot be opened by this user: put the user into the"
        " group qubes, and start the service again"
    )
