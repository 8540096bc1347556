"""How many calls others in this qube have open: other prefixes, other users,
people.

qrexec's agent has 256 slots for all calls of a qube. Above that it loses a
descriptor with each call, and in the end exits (qrexec 4.4.2). /proc tells of
every qrexec-client-vm, whoever started it, where it is not hidden.
"""

from __future__ import annotations

import os
from collections.abc import Container

__all__ = ["Census"]

#: What the kernel keeps of the name qrexec-client-vm.
_COMM = b"qrexec-client-v\n"
#: A process may yet become one, by exec, or cease to be: what one forks bears
#: its name until it is another program.
_LOOKS = 3


class Census:
    """Counts the others, and reads no more of /proc than has changed."""

    def __init__(self) -> None:
        #: Process → how often it was looked at, and whether it is one.
        self._seen: dict[int, tuple[int, bool]] = {}

    def others(self, ours: Container[int]) -> int:
        """Count the qrexec-client-vm that are none of ours."""
        seen: dict[int, tuple[int, bool]] = {}
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            pid = int(name)
            looks, client = self._seen.get(pid, (0, False))
            if looks < _LOOKS:
                looks, client = looks + 1, _is_client(pid)
            seen[pid] = looks, client
        self._seen = seen
        return sum(
            client and pid not in ours for pid, (_, client) in seen.items()
        )


def _is_client(pid: int) -> bool:
    # Three system calls and not the ten of open(): the first connection waits
    # until all processes of the qube were looked at.
    try:
        fd = os.open(f"/proc/{pid}/comm", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.read(fd, len(_COMM) + 1) == _COMM
    except OSError:
        return False
    finally:
        os.close(fd)
