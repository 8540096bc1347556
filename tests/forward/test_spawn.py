"""Programs that are started side by side: what each gets, and what becomes of
one that cannot be started."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from qrexec_activate.forward.spawn import (
    AT_ONCE,
    FileAction,
    Order,
    alone,
    beside,
    carry_out,
)

Spawn = Callable[..., int]

#: What is seen by the program itself.
LOOK = """
echo "$A:$#:$1"
ls /proc/self/fd
ps -o pgid= -p $$
"""


both = pytest.mark.parametrize("spawn", [alone, beside])


def order(program: str, *actions: FileAction) -> Order:
    return Order(program, [program], {}, actions)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@both
def test_a_program_gets_what_was_ordered_and_nothing_else(
    spawn: Spawn, tmp_path: Path
) -> None:
    output = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT)
    ours = fcntl.fcntl(output, fcntl.F_DUPFD_CLOEXEC, 300)
    pid = spawn(
        "sh",
        ["sh", "-c", LOOK, "sh", "a b"],
        {**os.environ, "A": "ä"},
        [(os.POSIX_SPAWN_DUP2, output, 1)],
    )
    assert exit_code(pid) == 0
    os.close(ours)
    with open(output) as file:
        file.seek(0)
        said, *fds, group = file.read().splitlines()
    assert said == "ä:1:a b"
    assert {"0", "1", "2"} <= set(fds)
    assert str(ours) not in fds
    assert int(group) == pid


@both
def test_a_program_has_no_signal_blocked_or_ignored(
    spawn: Spawn, tmp_path: Path
) -> None:
    output = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT)
    # As all are in the threads. (Not asked of a shell, which unblocks them.)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = spawn(
        "grep",
        ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"],
        os.environ,
        [(os.POSIX_SPAWN_DUP2, output, 1)],
    )
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert exit_code(pid) == 0
    with open(output) as file:
        file.seek(0)
        blocked, ignored = (int(line.split()[1], 16) for line in file)
    assert blocked == 0
    # Python ignores these.
    assert not ignored & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1)


@both
def test_output_may_go_nowhere(spawn: Spawn) -> None:
    pid = spawn(
        "sh",
        ["sh", "-c", '[ "$(readlink /proc/$$/fd/1)" = /dev/null ]'],
        os.environ,
        [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    assert exit_code(pid) == 0


@both
@pytest.mark.parametrize(
    ("argv", "variables"),
    [(["true", "a\0b"], {}), (["true"], {"A": "a\0b"})],
)
def test_a_zero_byte_cuts_nothing_off(
    spawn: Spawn, argv: list[str], variables: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="null byte"):
        spawn("/bin/true", argv, variables, [])
    with pytest.raises(ValueError, match="null"):
        spawn("/bin/true\0", ["true"], {}, [])


@both
def test_what_cannot_be_started_is_named(spawn: Spawn) -> None:
    with pytest.raises(FileNotFoundError) as error:
        spawn("/nonexistent/program", ["program"], {}, [])
    assert error.value.errno == errno.ENOENT
    assert error.value.filename == "/nonexistent/program"


@both
def test_a_descriptor_that_is_none_is_an_error(spawn: Spawn) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        spawn("/bin/true", ["true"], {}, [(os.POSIX_SPAWN_DUP2, 1 << 16, 0)])
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        spawn("/bin/true", ["true"], {}, [(os.POSIX_SPAWN_DUP2, -1, 0)])


def test_one_that_cannot_be_started_keeps_no_other_from_it() -> None:
    programs = ("/bin/true", "/nonexistent/program", "/bin/false")
    good, missing, another = orders = [order(name) for name in programs]
    carry_out(orders)
    assert exit_code(good.pid()) == 0
    with pytest.raises(FileNotFoundError, match="/nonexistent/program"):
        missing.pid()
    assert exit_code(another.pid()) == 1


class Meeting(Order):
    """Is carried out only beside others."""

    where = threading.Barrier(AT_ONCE)

    def run(self, spawn: Spawn) -> None:
        self.where.wait(60)
        super().run(spawn)


def test_orders_are_carried_out_side_by_side() -> None:
    orders = [Meeting("/bin/true", ["true"], {}, []) for _ in range(AT_ONCE)]
    carry_out(orders)
    assert [exit_code(one.pid()) for one in orders] == [0] * len(orders)


def test_a_lone_one_is_started_by_who_orders_it() -> None:
    seen = []

    class Seen(Order):
        def run(self, spawn: Spawn) -> None:
            seen.append((spawn, threading.current_thread()))
            super().run(spawn)

    lone = Seen("/bin/true", ["true"], {}, [])
    carry_out([lone])
    assert exit_code(lone.pid()) == 0
    assert seen == [(alone, threading.main_thread())]


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[Order, Callable[..., None]]:
    """A program whose child waits in open(2), before execve(2), and what lets
    it go on."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def let_go(*_: object) -> None:
        os.close(os.open(pipe, os.O_WRONLY))

    action = (os.POSIX_SPAWN_OPEN, 5, str(pipe), os.O_RDONLY, 0)
    return order("/bin/true", action), let_go


def test_python_goes_on_while_a_child_is_yet_to_run_its_program(
    waiting: tuple[Order, Callable[..., None]],
) -> None:
    one, let_go = waiting
    other = order("/bin/true")
    carry_out([one, other])
    assert exit_code(other.pid()) == 0
    let_go()
    assert exit_code(one.pid()) == 0


def test_a_signal_ends_no_wait_for_a_child(
    waiting: tuple[Order, Callable[..., None]],
) -> None:
    one, let_go = waiting
    other = order("/bin/true")
    before = signal.signal(signal.SIGUSR1, let_go)
    try:
        carry_out([one, other])
        thread = threading.Thread(
            target=os.kill, args=(os.getpid(), signal.SIGUSR1)
        )
        thread.start()
        assert exit_code(one.pid()) == 0
        assert exit_code(other.pid()) == 0
        thread.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("threads", [0, 1])
def test_with_too_few_threads_it_takes_longer(
    monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    start = trio.lowlevel.start_thread_soon
    left = iter(range(threads))

    def start_some(*what: Any) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(*what)

    monkeypatch.setattr(trio.lowlevel, "start_thread_soon", start_some)
    orders = [order("/bin/true") for _ in range(3)]
    carry_out(orders)
    assert [exit_code(one.pid()) for one in orders] == [0, 0, 0]
