"""Calls back once when a descriptor has an event, and watches sockets without
being woken by data.

An epoll of its own, as trio waits for readable or writable only, and a hang-up
is neither: with an empty event mask epoll reports hang-ups and errors alone.
"""

from __future__ import annotations

import select
from collections.abc import Callable

import trio

__all__ = ["Watch"]

#: What one turn looks at.
BATCH = 64


class Watch:
    """Descriptors, and what to call when one of them has something to say."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def run(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _ in self._epoll.poll(0, BATCH):
                # An earlier callback of this round may have forgotten it.
                if (callback := self._callbacks.pop(fd, None)) is not None:
                    # Once is enough, and a hang-up does not pass: left
                    # registered, it would wake us for ever.
                    self._epoll.unregister(fd)
                    callback()

    def close(self) -> None:
        self._epoll.close()
