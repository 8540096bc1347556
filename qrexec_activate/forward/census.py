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
#: A process that is none when it is first seen may yet become one, by exec.
_LOOKS = 2


class Census:
    """Counts the others, and reads no more of /proc than has changed."""

    def __init__(self) -> None:
        self._clients: set[int] = set()
        self._looked: dict[int, int] = {}

    def others(self, ours: Container[int]) -> int:
        """Count the qrexec-client-vm that are none of ours."""
        clients: set[int] = set()
        looked: dict[int, int] = {}
        for name in os.listdir("/proc"):
            if not name.isdigit():
                continue
            pid = int(name)
            looks = self._looked.get(pid, 0)
            if pid in self._clients or (looks < _LOOKS and _is_client(pid)):
                clients.add(pid)
            else:
                looked[pid] = looks + 1
        self._clients, self._looked = clients, looked
        return sum(pid not in ours for pid in clients)


def _is_client(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return file.read() == _COMM
    except OSError:
        return False
