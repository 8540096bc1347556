"""Waiting for a descriptor where the kernel refuses to watch it, or to end
that."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from qrexec_activate.forward.watch import Watch, readable, writable


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


async def test_a_watch_that_cannot_be_ended_harms_no_other() -> None:
    def refused(fd: int) -> None:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    watch = Watch()
    epoll = watch._epoll
    readers, writers = zip(*(os.pipe() for _ in range(3)), strict=True)
    called = [trio.Event() for _ in readers]
    for reader, event in zip(readers, called, strict=True):
        watch.add(reader, select.EPOLLIN | select.EPOLLONESHOT, event.set)

    class Refusing:
        """One that knows of nothing to be ended."""

        unregister = staticmethod(refused)
        fileno, poll, close = epoll.fileno, epoll.poll, epoll.close

    watch._epoll = Refusing()  # type: ignore[assignment]  # as much of an epoll as is used
    watch.forget(readers[0])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        for writer in writers:
            os.write(writer, b"x")
        with trio.fail_after(60):
            for event in called[1:]:
                await event.wait()
        nursery.cancel_scope.cancel()
    assert not called[0].is_set()
    watch.close()
    for fd in *readers, *writers:
        os.close(fd)


async def test_one_with_a_pause_wakes_nobody_in_between(
    autojump_clock: MockClock,
) -> None:
    watch = Watch(pause=1.0)
    reader, writer = os.pipe()
    os.write(writer, b"x")
    fds = [os.dup(reader) for _ in range(3)]
    called: dict[int, float] = {}

    def add(fd: int) -> None:
        def callback() -> None:
            called[fd] = trio.current_time() - began

        watch.add(fd, select.EPOLLIN, callback)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        add(fds[0])
        await trio.sleep(0.25)
        add(fds[1])
        add(fds[2])
        await trio.sleep(0.25)
        watch.forget(fds[2])
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert called == {fds[0]: 0, fds[1]: 1}
    watch.close()
    for fd in reader, writer, *fds:
        os.close(fd)
