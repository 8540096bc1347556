"""Starts programs by posix_spawn(3): one alone as Python does, several at once
side by side.

Python's own keeps the interpreter's lock until the child has called execve(2):
on a busy machine that is most of a connection's time, and one program waits for
the other. Here libc is called with the lock free, in a few of trio's threads.
They only do what they were told; whoever orders waits for all.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import trio

__all__ = ["AT_ONCE", "FileAction", "Order", "alone", "beside", "carry_out"]

#: So many are started at once: more than most machines have cores to spare, as
#: children wait for one most of the time.
AT_ONCE = 4

#: As os.posix_spawnp() takes it: POSIX_SPAWN_DUP2 or POSIX_SPAWN_OPEN.
FileAction: TypeAlias = tuple[int, ...] | tuple[int, int, str, int, int]

# Both ways do the same. A group of its own: Ctrl-C at a terminal stops the
# daemon, not the connections. Python ignores these two signals, and an ignored
# signal stays ignored in a child.
_GROUP, _BLOCKED, _DEFAULT = 0, (), (signal.SIGPIPE, signal.SIGXFSZ)


def alone(
    path: str,
    argv: list[str],
    environment: Mapping[str, str],
    actions: Sequence[FileAction],
) -> int:
    """Start a program and return its pid, while nothing else goes on."""
    return os.posix_spawnp(
        path,
        argv,
        environment,
        file_actions=actions,
        setpgroup=_GROUP,
        setsigmask=_BLOCKED,
        setsigdef=_DEFAULT,
    )


#: The first leaves the lock while it is called; the other, for what takes no
#: time, does not.
_FREE, _LOCKED = ctypes.CDLL(None), ctypes.PyDLL(None)
#: More than any libc has in its types for these (glibc 2.36: 336, 80 and 128).
_ROOM = 1024
#: In spawn.h of every libc for Linux.
_SETPGROUP, _SETSIGDEF, _SETSIGMASK = 0x02, 0x04, 0x08


def _call(name: str, *arguments: Any) -> None:
    if number := getattr(_LOCKED, name)(*arguments):
        raise OSError(number, os.strerror(number))


def _signals(numbers: Iterable[int]) -> ctypes.Array[ctypes.c_char]:
    made = ctypes.create_string_buffer(_ROOM)
    _LOCKED.sigemptyset(made)
    for number in numbers:
        _LOCKED.sigaddset(made, number)
    return made


def _attributes() -> ctypes.Array[ctypes.c_char]:
    made = ctypes.create_string_buffer(_ROOM)
    _call("posix_spawnattr_init", made)
    _call("posix_spawnattr_setpgroup", made, _GROUP)
    _call("posix_spawnattr_setsigmask", made, _signals(_BLOCKED))
    _call("posix_spawnattr_setsigdefault", made, _signals(_DEFAULT))
    flags = ctypes.c_short(_SETPGROUP | _SETSIGDEF | _SETSIGMASK)
    _call("posix_spawnattr_setflags", made, flags)
    return made


_ATTRIBUTES = _attributes()


def _strings(words: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    made = [os.fsencode(word) for word in words]
    if any(b"\0" in word for word in made):
        raise ValueError("embedded null byte")
    return (ctypes.c_char_p * (len(made) + 1))(*made)


def beside(
    path: str,
    argv: list[str],
    environment: Mapping[str, str],
    actions: Sequence[FileAction],
) -> int:
    """Likewise, while other threads go on."""
    words = _strings([path, *argv])
    variables = _strings(f"{key}={value}" for key, value in environment.items())
    pid, made = ctypes.c_int(), ctypes.create_string_buffer(_ROOM)
    _call("posix_spawn_file_actions_init", made)
    try:
        for kind, fd, *rest in actions:
            add = "adddup2" if kind == os.POSIX_SPAWN_DUP2 else "addopen"
            given = [os.fsencode(x) if isinstance(x, str) else x for x in rest]
            _call(f"posix_spawn_file_actions_{add}", made, fd, *given)
        number = _FREE.posix_spawnp(
            ctypes.byref(pid),
            words[0],
            made,
            _ATTRIBUTES,
            ctypes.byref(words, ctypes.sizeof(ctypes.c_char_p)),
            variables,
        )
    finally:
        _LOCKED.posix_spawn_file_actions_destroy(made)
    if number:
        raise OSError(number, os.strerror(number), path)
    return pid.value


class Order:
    """A program to start once, as alone() takes it."""

    __slots__ = ("_over", "_pid", "_problem", "_what")

    def __init__(
        self,
        path: str,
        argv: list[str],
        environment: Mapping[str, str],
        actions: Sequence[FileAction],
    ) -> None:
        self._what = path, argv, environment, actions
        self._pid = 0
        self._problem: Exception | None = None
        self._over = threading.Lock()
        self._over.acquire()

    def run(self, spawn: Callable[..., int]) -> None:
        """Carry it out, in any thread."""
        try:
            self._pid = spawn(*self._what)
        except Exception as error:
            self._problem = error
        finally:
            self._over.release()

    def pid(self) -> int:
        """Wait until it is carried out; raises what kept it from that. To be
        called once."""
        self._over.acquire()
        if self._problem is not None:
            raise self._problem
        return self._pid


def carry_out(orders: Sequence[Order]) -> None:
    """See to it that each is carried out; its pid() waits for it."""
    for order in orders:
        try:
            # To hand over a single one would take longer than is gained.
            if len(orders) > 1:
                run = partial(order.run, beside)
                trio.lowlevel.start_thread_soon(run, lambda _: None)
                continue
        except RuntimeError:
            # No memory for a thread, or too many.
            pass
        order.run(alone)
