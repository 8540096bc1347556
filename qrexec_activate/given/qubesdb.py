"""What QubesDB has of dom0's routes, asked by its own programs: two of them,
however many routes there are.

Whoever may write to this qube's QubesDB could have written it, so it is no more
than text.
"""

from __future__ import annotations

import os
import select
import time
from _collections_abc import Mapping

__all__ = ["FOLDER", "PREFIX", "Words", "ask", "understand"]

#: Where qvm-features' vm-config.connect-… are.
FOLDER = "/vm-config/"
PREFIX = f"{FOLDER}connect-"
#: Whose user manager gets the routes.
DEFAULT_USER = "/default-user"
#: It answers within milliseconds; a login is not to wait for one that hangs.
PATIENCE = 3.0
#: The module signal takes a millisecond to say so.
SIGKILL = 9
#: qubesdb-read's own code for: all is well, but some are not there.
MISSING = 2

#: What ends a line, or is a blank, does so; the rest is in no route.
_BLANKS = (("\\x0a", "\n"), ("\\x0d", "\r"), ("\\x09", "\t"))


class Words:
    """What was read: the name of the user, and keys, as `connect-…`, with their
    values."""

    __slots__ = ("user", "values")

    def __init__(self, user: str, values: Mapping[str, str]) -> None:
        self.user = user
        self.values = values


def ask() -> bytes | None:
    """What QubesDB answers, for understand(); None where it does not."""
    listed = _output(["qubesdb-list", "-f", PREFIX], (0,))
    if listed is None:
        return None
    paths = [
        path
        for path in listed.decode(errors="replace").split("\n")
        if path.startswith(PREFIX)
    ]
    # All at once; one that was removed since counts for nothing.
    return _output(
        ["qubesdb-read", "-q", "-f", DEFAULT_USER, *paths], (0, MISSING)
    )


def understand(untrusted: bytes) -> Words:
    """From `PATH = VALUE` lines, in which qubesdb-read writes every byte that
    is not printable as `\\xNN`; never fails."""
    user, values = "", {}
    for line in untrusted.decode("ascii", errors="replace").split("\n"):
        path, equals, value = line.partition(" = ")
        if path == DEFAULT_USER:
            user = value
        elif equals and path.startswith(PREFIX):
            for written, char in _BLANKS:
                value = value.replace(written, char)
            values[path.removeprefix(FOLDER)] = value
    return Words(user or "user", values)


def _output(argv: list[str], codes: tuple[int, ...]) -> bytes | None:
    """What a program prints; None where it cannot be run, takes too long or
    ends with another code."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            pid = os.posix_spawnp(
                argv[0],
                argv,
                os.environ,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, null, 0),
                    (os.POSIX_SPAWN_DUP2, writing, 1),
                    (os.POSIX_SPAWN_DUP2, null, 2),
                ],
            )
        finally:
            os.close(null)
            os.close(writing)
    except OSError:
        os.close(reading)
        return None
    chunks = []
    deadline = time.monotonic() + PATIENCE
    try:
        while select.select(
            [reading], [], [], max(deadline - time.monotonic(), 0)
        )[0]:
            chunk = os.read(reading, 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
        else:
            os.kill(pid, SIGKILL)
    finally:
        os.close(reading)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return b"".join(chunks) if status in codes else None
