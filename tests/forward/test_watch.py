"""Waiting for a descriptor where the kernel has no memory to watch it."""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from qrexec_activate.forward.watch import readable, writable


def refuse(
    patch: pytest.MonkeyPatch, name: str, *numbers: int
) -> Callable[[], int]:
    """Let epoll_ctl fail with these errors first; how many are left to come."""
    left = list(numbers)
    genuine: Callable[[int], Awaitable[None]] = getattr(trio.lowlevel, name)

    async def wait(fd: int) -> None:
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number))
        await genuine(fd)

    patch.setattr(trio.lowlevel, name, wait)
    return lambda: len(left)


async def test_a_shortage_of_memory_for_watches_is_waited_out(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    reader, writer = os.pipe()
    for name, wait, fd in (
        ("wait_readable", readable, reader),
        ("wait_writable", writable, writer),
    ):
        left = refuse(monkeypatch, name, errno.ENOMEM, errno.ENOSPC)
        os.write(writer, b"x")
        with trio.fail_after(3600):
            await wait(fd)
        assert left() == 0
    os.close(reader)
    os.close(writer)


async def test_any_other_error_is_passed_on(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    refuse(monkeypatch, "wait_readable", errno.EBADF)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        await readable(0)
