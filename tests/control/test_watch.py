"""The screen of status --watch: what is alive first, and no more work than
there is news."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

import pytest
from desk import GOLDEN, WRITE_GOLDEN

from qrexec_activate.control import connections, watch
from qrexec_activate.control.connections import Connection, Lookout
from qrexec_activate.control.netproc import Holder
from qrexec_activate.control.sockdiag import TcpEnd
from qrexec_activate.control.status import DaemonNow, Status
from qrexec_activate.control.survey import Daemon, Entry, Survey
from qrexec_activate.control.table import cells
from qrexec_activate.control.watch import Screen

DAEMON = "qrexec-connect-tcp.service"


def entry(number: int) -> Entry:
    return Entry(
        f"127.0.0.{number}:1234",
        f"work-{number}",
        "qubes.ConnectTCP",
        "1234",
        "qrexec-connect-tcp@1234.socket",
        DAEMON,
        "",
        "enabled",
        "active",
        True,
        "",
    )


def connected(number: int, state: str = "open", age: float = 100) -> Connection:
    return Connection(
        f"3dac-{number}",
        number,
        1,
        0,
        time.clock_gettime(time.CLOCK_BOOTTIME) - age,
        "127.0.0.1:1234",
        "work-1",
        "qubes.ConnectTCP+1234",
        "qrexec-connect-tcp@1234.socket",
        f"127.0.0.1:{number}",
        number.to_bytes(20, "big"),
        state,
        "hand-over",
        Holder(7, "curl"),
        1024,
        2048,
    )


def status(routes: int, alive: Iterable[Connection]) -> Status:
    survey = Survey(
        True, daemons={DAEMON: Daemon(DAEMON, "qubes.ConnectTCP", None)}
    )
    daemons = [DaemonNow(DAEMON, "qubes.ConnectTCP", "active", 42, "well")]
    entries = [entry(number) for number in range(1, routes + 1)]
    return Status([survey], entries, list(alive), daemons)


def test_what_is_alive_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "12:34:56")
    now = status(
        42,
        [
            connected(1),
            connected(2, "waiting", age=20),
            connected(3, "waiting", age=200),
        ],
    )
    screen = Screen()
    screen.count(now.connections, 10.0)
    now.connections[0].bytes_from_qube = 4096
    screen.count(now.connections, 12.0)
    lines = screen.lines(now, 80, 24)
    text = "".join(f"{line.rstrip()}\n" for line in lines)
    path = GOLDEN / "watch-80x24.txt"
    if WRITE_GOLDEN:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("height", [5, 12, 24, 60])
@pytest.mark.parametrize("alive", [0, 1, 30, 1000])
def test_it_fits_the_terminal(height: int, alive: int) -> None:
    now = status(42, map(connected, range(1, alive + 1)))
    lines = Screen().lines(now, 100, height)
    assert len(lines) <= height
    assert max(map(cells, lines)) <= 100


def test_everything_can_be_reached_by_scrolling() -> None:
    now = status(42, map(connected, range(1, 101)))
    screen, seen = Screen(), ""
    for _ in range(20):
        seen += "\n".join(screen.lines(now, 100, 24))
        screen.key(b"\x1b[6~")
    for one in now.connections:
        assert one.id in seen
    for route in now.entries:
        assert route.listener in seen
    screen.key(b"g")
    assert screen.offset == 0


def test_a_filter_leaves_what_it_names() -> None:
    now = status(42, map(connected, range(1, 101)))
    screen = Screen()
    for key in (b"/", b"3", b"d", b"a", b"c", b"-", b"9", b"9", b"\r"):
        assert screen.key(key)
    text = "\n".join(screen.lines(now, 100, 24))
    assert "3dac-99" in text
    assert "3dac-98" not in text
    assert "1 shown" in text
    assert screen.key(b"\x1b")
    assert "3dac-98" in "\n".join(screen.lines(now, 100, 60))
    assert not screen.key(b"q")


def test_a_thousand_connections_are_read_once_and_laid_out_by_the_screenful(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The work of a look, counted: what a tick costs does not grow with what
    is open, but for one dump of the kernel's sockets."""
    done: list[str] = []
    laid_out: list[int] = []
    pids = set(range(1, 1001))
    rows = watch.connection_rows

    def examine(survey: Survey, pid: int) -> Connection | None:
        done.append("examine")
        return None if pid % 2 else connected(pid, state="")

    def ends(
        wanted: Collection[bytes],
    ) -> tuple[dict[bytes, TcpEnd], dict[bytes, TcpEnd]]:
        done.append("dump")
        return {key: TcpEnd(1, 2, 3) for key in wanted}, {}

    def descriptor(one: Connection) -> None:
        done.append("descriptor")
        one.state = "open"

    def holders(inodes: Iterator[int]) -> dict[int, Holder]:
        assert not list(inodes)
        return {}

    def count_rows(some: list[Connection]) -> list[list[str]]:
        laid_out.append(len(some))
        return rows(some)

    monkeypatch.setattr(connections, "_pids", lambda: set(pids))
    monkeypatch.setattr(connections, "_examine", examine)
    monkeypatch.setattr(connections, "tcp_ends", ends)
    monkeypatch.setattr(connections, "_look_at", descriptor)
    monkeypatch.setattr(connections, "holders", holders)
    monkeypatch.setattr(watch, "connection_rows", count_rows)
    now = status(42, [])
    lookout = Lookout()
    assert len(lookout.look(now.surveys)) == 500
    assert (done.count("examine"), done.count("descriptor")) == (1000, 500)
    # A process that was no connection may be about to become one: once more.
    lookout.look(now.surveys)
    assert done.count("examine") == 1500
    done.clear()
    pids.remove(2)
    pids.add(2002)
    now.connections = lookout.look(now.surveys)
    assert sorted(done) == ["descriptor", "dump", "examine"]
    assert {2, 2002} & {one.pid for one in now.connections} == {2002}
    Screen().lines(now, 100, 24)
    assert laid_out
    assert max(laid_out) <= 24
