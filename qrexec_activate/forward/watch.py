"""Waits for descriptors, also where the kernel lacks the memory to watch one
more. Calls back once when one has an event, without being woken by data.

That takes an epoll of its own, as trio waits for readable or writable only, and
a hang-up is neither: with an empty event mask epoll reports hang-ups and errors
alone.
"""

from __future__ import annotations

import contextlib
import errno
import select
from collections.abc import Awaitable, Callable

import trio

__all__ = ["Watch", "readable", "writable"]

#: What one turn looks at.
BATCH = 64
#: How long to wait where the kernel has no memory for another watch.
NO_MEMORY_PAUSE = 0.25


async def readable(fd: int) -> None:
    """Wait until it is. Nobody may close the descriptor meanwhile: it is looked
    at again by its number."""
    await _wait(trio.lowlevel.wait_readable, fd)


async def writable(fd: int) -> None:
    """Likewise."""
    await _wait(trio.lowlevel.wait_writable, fd)


async def _wait(wait: Callable[[int], Awaitable[None]], fd: int) -> None:
    while True:
        try:
            return await wait(fd)
        except OSError as error:
            # epoll_ctl(2): no memory, or the user's limit of watches.
            if error.errno not in (errno.ENOMEM, errno.ENOSPC):
                raise
        await trio.sleep(NO_MEMORY_PAUSE)


class Watch:
    """Descriptors, and what to call when one of them has something to say; not
    more often than every `pause` seconds."""

    def __init__(self, pause: float = 0.0) -> None:
        self._pause = pause
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, events: int, callback: Callable[[], None]) -> None:
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def forget(self, fd: int) -> None:
        if self._callbacks.pop(fd, None) is not None:
            self._unregister(fd)

    def _unregister(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)

    async def run(self) -> None:
        while True:
            await readable(self._epoll.fileno())
            events = self._epoll.poll(0, BATCH)
            for fd, _ in events:
                # Once is enough, and a hang-up does not pass: left registered,
                # it would wake us for ever. So would one that nobody watches.
                callback = self._callbacks.pop(fd, None)
                self._unregister(fd)
                if callback is not None:
                    callback()
            if len(events) < BATCH:
                await trio.sleep(self._pause)

    def close(self) -> None:
        self._epoll.close()
