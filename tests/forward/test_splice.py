"""The pump: what it holds back, what it can tell, and what it may take."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing
from pretend import tcp_pair

from qrexec_activate.forward import splice as splice_module
from qrexec_activate.forward.splice import (
    CHUNK,
    DOWN_SIZE,
    PIPE_BUDGET,
    RESET_AT_CLOSE,
    UP_SIZE,
    ClientGone,
    Splice,
    at_close,
    half_close,
    unsent,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Splice]]:
    ours, theirs = socket.socketpair()
    splice = Splice(ours)
    yield theirs, splice
    splice.close()
    ours.close()
    theirs.close()


async def test_the_end_of_the_input_waits_until_the_call_is_established(
    pair: tuple[socket.socket, Splice],
) -> None:
    """Else the end would be taken, and the sign of it with it."""
    client, splice = pair
    child = os.dup(splice.child_ends[0])
    os.set_blocking(child, False)
    client.sendall(b"all there is")
    client.shutdown(socket.SHUT_WR)
    with trio.fail_after(60):
        await splice.pump_up()
    os.read(child, 100)
    with pytest.raises(BlockingIOError):
        os.read(child, 1)
    splice.release_child_ends()
    assert os.read(child, 1) == b""
    assert splice.all_sent
    os.close(child)


async def test_what_comes_by_multipath_tcp_is_moved() -> None:
    """systemd listens for it from 257 on. It has no urgent bytes."""
    kind = socket.SOCK_STREAM, socket.IPPROTO_MPTCP
    try:
        listener = socket.socket(socket.AF_INET, *kind)
    except OSError as error:
        pytest.skip(f"this kernel has no multipath TCP: {error}")
    with listener, socket.socket(socket.AF_INET, *kind) as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        ours, _ = listener.accept()
        ours.setblocking(False)
        splice = Splice(ours)
        client.sendall(b"all there is")
        client.shutdown(socket.SHUT_WR)
        with ours, trio.fail_after(60):
            await splice.pump_up()
            assert os.read(splice.child_ends[0], 100) == b"all there is"
            splice.close()


async def test_what_the_child_has_yet_to_read_is_known_after_the_end(
    pair: tuple[socket.socket, Splice],
) -> None:
    client, splice = pair
    child = os.dup(splice.child_ends[0])
    client.sendall(b"12345")
    client.close()
    with trio.fail_after(60):
        await splice.pump_up()
    assert splice.unread() == 5
    assert not splice.has_moved_data()
    os.read(child, 2)
    assert splice.has_moved_data()
    splice.release_child_ends()
    assert splice.unread() == 3
    os.close(child)


def test_a_data_phase_is_seen_while_it_lasts_and_after_it(
    pair: tuple[socket.socket, Splice],
) -> None:
    _, splice = pair
    assert not splice.in_data_phase()
    # As qrexec-client-vm does as it begins ...
    os.set_blocking(splice.child_ends[0], False)
    os.set_blocking(splice.child_ends[1], False)
    assert splice.in_data_phase()
    # ... and as it closes its descriptors.
    os.set_blocking(splice.child_ends[0], True)
    os.set_blocking(splice.child_ends[1], True)
    assert splice.in_data_phase()


def test_what_came_out_is_seen_before_it_is_moved(
    pair: tuple[socket.socket, Splice],
) -> None:
    _, splice = pair
    assert not splice.has_moved_data()
    os.write(splice.child_ends[1], b"x")
    assert splice.has_moved_data()


def test_all_pipes_together_stay_within_a_budget() -> None:
    """The kernel allows a user 64 MiB, and pipes of 4 KiB beyond."""
    sockets, splices = [], []
    for _ in range(100):
        ours, theirs = socket.socketpair()
        sockets += [ours, theirs]
        splices.append(Splice(ours))
    sizes = [
        fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
        for splice in splices
        for fd in (splice.child_ends[0], splice.child_ends[1])
    ]
    assert sizes[:2] == [UP_SIZE, DOWN_SIZE]
    large = [size for size in sizes if size >= UP_SIZE]
    assert sum(large) == PIPE_BUDGET
    for splice in splices:
        splice.close()
    assert splice_module._enlarged == 0
    for sock in sockets:
        sock.close()


@pytest.mark.parametrize("number", [errno.EHOSTUNREACH, errno.ECONNREFUSED])
async def test_whatever_error_a_socket_reports_its_client_is_gone(
    pair: tuple[socket.socket, Splice],
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    def fail(*args: object, **kwargs: object) -> int:
        raise OSError(number, os.strerror(number))

    _, splice = pair
    monkeypatch.setattr(os, "splice", fail)
    for pump in (splice.pump_up, splice.pump_down):
        with pytest.raises(ClientGone):
            await pump()


def test_a_half_close_of_a_socket_in_trouble_is_no_error() -> None:
    sock = socket.socket()
    assert not half_close(sock)
    sock.close()


def test_a_half_close_takes_back_that_a_close_would_be_a_reset() -> None:
    """A reset destroys what the client has not read yet."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        sock, _ = listener.accept()
        at_close(sock, RESET_AT_CLOSE)
        assert half_close(sock)
        sock.close()
        assert client.recv(1) == b""


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_VSOCK])
def test_sockets_that_cannot_be_reset_at_their_close_are_left_alone(
    family: int,
) -> None:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        pytest.skip(f"this kernel has no such sockets: {error}")
    with sock:
        at_close(sock, RESET_AT_CLOSE)


async def test_what_a_child_reads_no_more_is_taken_until_the_client_ends(
    pair: tuple[socket.socket, Splice],
) -> None:
    """Left unread, it would turn the close into a reset."""
    client, splice = pair
    client.setblocking(False)
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
    splice.release_child_ends()
    over = False

    async def pump() -> None:
        nonlocal over
        await splice.pump_up()
        over = True

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump)
            # More than all buffers on the way hold.
            await stream.send_all(bytes(4 * CHUNK))
            await trio.testing.wait_all_tasks_blocked()
            assert not over
            await stream.send_eof()
    assert over


async def test_what_is_sent_out_of_band_is_left_out_and_stops_nothing() -> None:
    """As with qrexec-client-vm alone, which reads: splice(2) stops there for ever."""
    client, sock = tcp_pair()
    splice = Splice(sock)
    child = os.dup(splice.child_ends[0])
    for word in (b"one ", b"two ", b"three"):
        client.sendall(word)
        client.send(b"!", socket.MSG_OOB)
    client.sendall(b" and all")
    client.shutdown(socket.SHUT_WR)
    with trio.fail_after(60):
        await splice.pump_up()
    splice.release_child_ends()
    # Only the last of several that wait is urgent to the kernel.
    assert os.read(child, 100).replace(b"!", b"") == b"one two three and all"
    os.close(child)
    splice.close()
    for end in (client, sock):
        end.close()


def pump_up(splice: Splice) -> Callable[[], Awaitable[None]]:
    return splice.pump_up


def pump_down(splice: Splice) -> Callable[[], Awaitable[None]]:
    return splice.pump_down


@pytest.mark.parametrize("pump", [pump_up, pump_down])
@pytest.mark.parametrize("state", ["nothing to move", "no room"])
async def test_a_pump_that_can_move_nothing_does_not_spin(
    pair: tuple[socket.socket, Splice],
    monkeypatch: pytest.MonkeyPatch,
    pump: Callable[[Splice], Callable[[], Awaitable[None]]],
    state: str,
) -> None:
    client, splice = pair
    sock = splice._sock
    if state == "no room":
        sink, source = splice._ends["up"], client.fileno()
        if pump is pump_down:
            sink, source = sock.fileno(), splice.child_ends[1]
        fill(sink)
        os.write(source, b"x")
    tried, genuine = 0, os.splice

    def count(source: int, sink: int, *args: int, **kwargs: int) -> int:
        nonlocal tried
        tried += 1
        assert tried < 100
        return genuine(source, sink, *args, **kwargs)

    monkeypatch.setattr(os, "splice", count)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pump(splice))
            await trio.testing.wait_all_tasks_blocked()
            assert 0 < tried < 10
            nursery.cancel_scope.cancel()


def fill(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(fd, bytes(4096))


@pytest.mark.parametrize("pump", [pump_up, pump_down])
async def test_however_much_there_is_to_move_others_have_their_turn(
    pair: tuple[socket.socket, Splice],
    monkeypatch: pytest.MonkeyPatch,
    pump: Callable[[Splice], Callable[[], Awaitable[None]]],
) -> None:
    _, splice = pair
    left, turns = 100, 0

    def move(*args: object, **kwargs: object) -> int:
        nonlocal left
        left -= 1
        return left

    async def another() -> None:
        nonlocal turns
        while left > 0:
            turns += 1
            await trio.lowlevel.checkpoint()

    monkeypatch.setattr(os, "splice", move)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pump(splice))
        nursery.start_soon(another)
    assert turns > 50


def test_a_socket_that_does_not_tell_what_is_unsent_is_not_waited_for() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        assert unsent(sock) == 0
