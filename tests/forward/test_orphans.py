"""Which processes count as left by an earlier daemon."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrexec_activate.forward import orphans

#: A parent that starts a qrexec-client-vm, says which, and waits for it.
PARENT = """
import os, subprocess, sys
child = subprocess.Popen(
    ["sh", "-c", "read wait", "work", "qubes.ConnectTCP+80"],
    env={**os.environ, "QREXEC_ACTIVATE_CONNECTION": "1-1"},
)
print(child.pid, flush=True)
child.wait()
"""


@contextlib.contextmanager
def parent_and_child(
    program: str,
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [program, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        # In the midst of its exec it shows no environment yet.
        environment = Path(f"/proc/{child}/environ")
        while b"QREXEC_ACTIVATE" not in environment.read_bytes():
            time.sleep(0.01)
        pidfd = os.pidfd_open(child)
        yield process, child
        process.kill()
        # The end of its input ends the child.
    os.close(pidfd)


def found() -> list[orphans.Orphan]:
    result = list(orphans.find_orphans())
    for orphan in result:
        os.close(orphan.pidfd)
    return result


def test_what_another_daemon_in_the_same_group_sees_to_is_no_orphan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two daemons of one terminal, or of one container, share a control
    group."""
    with parent_and_child(sys.executable) as (parent, child):
        members = [os.getpid(), parent.pid, child]
        monkeypatch.setattr(orphans, "_members", lambda: members)
        assert found() == []
        parent.kill()
        parent.wait()
        (orphan,) = found()
        assert orphan.pid == child
        assert orphan.sock is None
        assert orphan.route.target == "work"


def test_what_this_daemon_has_started_is_no_orphan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever its control group says that it is itself."""
    environment = {**os.environ, "QREXEC_ACTIVATE_CONNECTION": "1-1"}
    program = ["sh", "-c", "echo; read wait", "work", "qubes.ConnectTCP+80"]
    with subprocess.Popen(
        program,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        # Only then its words and variables are to be read in /proc.
        assert child.stdout.readline() == b"\n"
        monkeypatch.setattr(orphans, "_members", lambda: [child.pid])
        assert found() == []
        # Without that it would be one.
        monkeypatch.setattr(os, "getpid", lambda: 0)
        (orphan,) = found()
        assert orphan.pid == child.pid
        assert child.stdin is not None
        child.stdin.close()


def test_an_orphan_is_never_older_than_the_time_that_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel counts from boot, suspends included; limits do not."""
    with parent_and_child(sys.executable) as (parent, child):
        monkeypatch.setattr(orphans, "_members", lambda: [child])
        parent.kill()
        parent.wait()
        (orphan,) = found()
        assert 0 <= orphan.age < 600
        # As after a suspend that lasted for all of the machine's life.
        monkeypatch.setattr(time, "monotonic", lambda: 0.0)
        (orphan,) = found()
        assert orphan.age == 0


def test_one_that_is_ending_keeps_no_other_from_being_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of its descriptors Linux before 6.9 says that they are none."""

    class Libc:
        def syscall(self, *_: int) -> int:
            ctypes.set_errno(errno.EBADF)
            return -1

    monkeypatch.setattr(orphans.ctypes, "CDLL", lambda *_, **__: Libc())
    monkeypatch.setattr(orphans, "_has_daemon", lambda *_: False)
    variables = {**os.environ, "QREXEC_ACTIVATE_CONNECTION": "1-1"}
    words = ["sh", "-c", "echo; read wait", "work", "qubes.ConnectTCP+80"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        subprocess.Popen(
            [*words[:-2], "--use-stdin-socket", *words[-2:]],
            env=variables,
            **pipes,
        ) as ending,
        subprocess.Popen(words, env=variables, **pipes) as other,
    ):
        for child in ending, other:
            assert child.stdout is not None
            assert child.stdout.readline() == b"\n"
        members = [ending.pid, other.pid]
        monkeypatch.setattr(orphans, "_members", lambda: members)
        (orphan,) = found()
        assert orphan.pid == other.pid
        for child in ending, other:
            assert child.stdin is not None
            child.stdin.close()
