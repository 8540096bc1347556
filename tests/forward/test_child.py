"""What can be seen of a qrexec-client-vm that runs, by another process in its
place."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio

from qrexec_activate.forward.child import Child

#: A vchan over sockets is a unix socket that listens.
LISTENS = """
import socket
sock = socket.socket(socket.AF_UNIX)
sock.bind("")
sock.listen()
"""
#: A name that looks like the line of another socket, which listens.
FORGES = """
import socket
sock = socket.socket(socket.AF_UNIX)
sock.bind(b"\\0x\\n0: 00000002 00000000 00010000 0001 01 1\\n")
"""
IS_CONNECTED = """
import socket
pair = socket.socketpair()
"""


@contextlib.contextmanager
def running(program: str) -> Iterator[Child]:
    """A child that has done this, and stays."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"{program}\nprint(flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    with process, contextlib.closing(Child(process.pid)) as child:
        yield child
        process.kill()


@pytest.mark.parametrize(
    ("program", "answered"),
    [(LISTENS, True), (IS_CONNECTED, False), (FORGES, False), ("", False)],
)
def test_a_call_is_answered_once_its_end_of_the_vchan_is_open(
    program: str, answered: bool
) -> None:
    with running(program) as child:
        assert child.is_answered() is answered


@pytest.mark.parametrize("name", ["gntalloc", "gntdev", "evtchn"])
def test_on_xen_its_devices_tell(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with running("") as child:
        monkeypatch.setattr(os, "readlink", lambda path: f"/dev/xen/{name}")
        assert child.is_answered()


def test_a_call_that_may_not_be_looked_at_has_no_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forbidden(path: str) -> str:
        raise PermissionError

    with running(LISTENS) as child:
        monkeypatch.setattr(os, "readlink", forbidden)
        assert not child.is_answered()


async def test_a_child_that_has_ended_is_ending() -> None:
    with running("") as child:
        assert not child.is_ending()
        child.signal(signal.SIGKILL)
        with trio.fail_after(60):
            await child.ended()
        assert child.is_ending()
        assert not child.is_answered()
        child.signal(signal.SIGKILL)


def test_work_is_told_from_idleness() -> None:
    with running("") as idle, running("sum(range(5_000_000))") as busy:
        assert 0 < idle.cpu_time() < busy.cpu_time()
