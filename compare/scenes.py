"""The scenes: what a program does with a connection to another qube, and what
its user may expect.

Each function is one scene, and its docstring is what is right. It returns where
that is what happens; `Seen` says what happened instead. No scene looks at a
clock but to see that nothing came within Stage.patience.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from .stage import Stage, echo, read_all, read_exactly, reason, vanish
from .ways import Address, Seen

__all__ = ["SCENES", "Scene"]

Scene = Callable[[Stage], None]
#: Title → scene, in the order of the table.
SCENES: dict[str, Scene] = {}

OPEN = 100
#: Longer than what qrexec-client-vm may say in place of an answer.
PING = b"ping " * 10
MIB = 1 << 20


def scene(title: str) -> Callable[[Scene], Scene]:
    def kept(function: Scene) -> Scene:
        SCENES[title] = function
        return function

    return kept


# ------------------------------------------------------------------ the bytes


@scene("a late reply")
def late_reply(stage: Stage) -> None:
    """The client sends its request and half-closes; the service needs 2 s. The
    whole reply comes, and then its end."""

    def handler(sock: socket.socket) -> None:
        request = read_all(sock)
        time.sleep(2)
        sock.sendall(b"late: " + request)

    sock = stage.connect(stage.route(handler))
    sock.sendall(b"request")
    sock.shutdown(socket.SHUT_WR)
    stage.same(read_all(sock), b"late: request")


@scene("the service ends first")
def service_ends_first(stage: Stage) -> None:
    """The service says 10,000 bytes and ends while the client still sends. All
    of them come."""
    said = random.randbytes(10_000)

    def handler(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        _drain(sock)

    sock = stage.connect(stage.route(handler))
    with _sending(sock, pause=0.01):
        stage.same(read_exactly(sock, len(said)), said)


@scene("a slow reader that goes on sending")
def slow_reader(stage: Stage) -> None:
    """The service says 4 MiB and ends; the client reads them slowly and sends
    all the while. All of them come."""
    said = random.randbytes(4 * MIB)

    def handler(sock: socket.socket) -> None:
        sock.recv(1)
        threading.Thread(target=_drain, args=(sock,), daemon=True).start()
        sock.sendall(said)
        sock.shutdown(socket.SHUT_RDWR)

    sock = stage.connect(stage.route(handler))
    data = bytearray()
    with _sending(sock, pause=0.005):
        try:
            while chunk := sock.recv(1 << 15):
                data += chunk
                time.sleep(0.005)
        except ConnectionResetError:
            pass
    stage.same(bytes(data), said)


@scene("one byte at a time")
def one_byte_at_a_time(stage: Stage) -> None:
    """Each of 300 bytes comes back before the client sends the next."""
    sock = stage.connect(stage.route(echo))
    for byte in random.randbytes(300):
        sock.sendall(bytes([byte]))
        stage.same(sock.recv(1), bytes([byte]))


@scene("64 MiB both ways at once")
def both_ways_at_once(stage: Stage) -> None:
    """64 MiB go to the service and come back meanwhile, each byte in its
    place."""
    sock = stage.connect(stage.route(echo))
    block = bytearray(random.randbytes(MIB))
    sent, received = hashlib.sha256(), hashlib.sha256()

    def send() -> None:
        for number in range(64):
            block[:8] = number.to_bytes(8, "big")
            sent.update(block)
            sock.sendall(block)

    sender = threading.Thread(target=_quietly, args=(send,), daemon=True)
    sender.start()
    count = 0
    while count < 64 * MIB and (chunk := sock.recv(1 << 18)):
        received.update(chunk)
        count += len(chunk)
    sender.join()
    if count != 64 * MIB:
        raise Seen(f"{count:,} of {64 * MIB:,} bytes")
    if sent.digest() != received.digest():
        raise Seen("other bytes")


@scene("a client that does not read")
def client_that_does_not_read(stage: Stage) -> None:
    """One client asks for a flood and reads nothing of it. Another at the same
    address is answered."""

    def handler(sock: socket.socket) -> None:
        if sock.recv(5) == b"flood":
            _flood(sock)
        sock.sendall(b"answer")

    address = stage.route(handler)
    stage.connect(address).sendall(b"flood")
    stage.gets(address, b"other", b"answer")


@scene("data before the call is set up")
def early_data(stage: Stage) -> None:
    """The client sends 10,000 bytes at once, and waits; the call takes 2 s to
    be set up. The service gets them, and its answer comes."""
    stage.fault("delay=2")
    data = random.randbytes(10_000)
    stage.gets(stage.route(echo), data, data)


@scene("send and go")
def send_and_go(stage: Stage) -> None:
    """The client sends 1,000 bytes and closes at once, as a logger does; the
    call takes 2 s to be set up. The service gets them all."""
    stage.fault("delay=2")
    _send_and_go(stage, stage.address())


@scene("send and go, by a unix socket")
def send_and_go_by_unix(stage: Stage) -> None:
    """The same, by a unix socket."""
    stage.fault("delay=2")
    _send_and_go(stage, stage.path())


def _send_and_go(stage: Stage, address: Address) -> None:
    got: list[bytes] = []
    stage.route(lambda sock: got.append(read_all(sock)), address=address)
    data = random.randbytes(1000)
    with stage.connect(address) as sock:
        sock.sendall(data)
    stage.until(lambda: got, "the service gets nothing")
    stage.same(got[0], data)


# ----------------------------------------------------- calls that come to grief


@scene("a refused call")
def refused_call(stage: Stage) -> None:
    """Policy denies the call. The client sees an error, which no program takes
    for an empty answer."""
    stage.policy("* * * * deny")
    _sees_an_error(stage, stage.route(echo))


@scene("a missing service")
def missing_service(stage: Stage) -> None:
    """The target qube has no such service. The client sees an error."""
    stage.policy("* * * * allow")
    address = stage.route(echo)
    # Every qube of the stand-in has qubes.ConnectTCP. What is not there shows
    # to the caller as what ends at once with this code.
    service = stage.machine.loopback / "qubes/work/rpc/qubes.ConnectTCP"
    service.write_text("#!/bin/sh\nexit 127\n")
    service.chmod(0o755)
    _sees_an_error(stage, address)


@scene("a stopped program's port")
def stopped_program(stage: Stage) -> None:
    """Nothing listens on that port of the target qube. The client sees an
    error."""
    _sees_an_error(stage, stage.route(None))


@scene("a qube that dies amid its answer")
def qube_dies(stage: Stage) -> None:
    """1,000 bytes of an answer have come when the target qube is destroyed. The
    client sees an error, not the end of a shorter answer."""
    stage.fault("end-early=1 end-early-after=1000")
    sock = stage.connect(stage.route(_flood))
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionResetError:
        return
    raise Seen("an end like any other")


@scene("a set-up that fails once")
def failed_set_up(stage: Stage) -> None:
    """Once, qrexec fails to set the call up (exit code 1, nothing was read).
    The client is answered."""
    stage.fault("vchan-failure=1 first=1")
    stage.gets(stage.route(echo), PING, PING)


@scene("a call that qrexec loses")
def lost_call(stage: Stage) -> None:
    """Once, the target never takes the call that dom0 has allowed, and
    qrexec-client-vm waits. The client is answered within a minute."""
    stage.fault("lose-late=1 first=1")
    stage.patience *= 2
    stage.gets(stage.route(echo), PING, PING)


@scene("a silent qube beside a good one")
def silent_beside_good(stage: Stage) -> None:
    """40 clients wait for a qube whose calls are never answered. The one of
    another qube is answered."""
    stage.fault("[silent] lose=1")
    silent, good = stage.route(echo, "silent"), stage.route(echo, "good")
    for _ in range(40):
        stage.connect(silent).sendall(PING)
    stage.gets(good, PING, PING)


# ---------------------------------------------------------- clients that go


@scene("a client that goes amid a flood")
def client_goes_amid_a_flood(stage: Stage) -> None:
    """The service sends without end, and the client goes. The service is told,
    and no process stays."""
    told = threading.Event()

    def handler(sock: socket.socket) -> None:
        try:
            _flood(sock)
        finally:
            told.set()

    with stage.connect(stage.route(handler)) as sock:
        sock.recv(1)
    stage.until(told.is_set, "the service sends for ever")
    stage.until(lambda: not stage.clients(), "qrexec-client-vm runs for ever")


@scene("a client that goes while dom0 asks")
def client_goes_at_a_prompt(stage: Stage) -> None:
    """The client is killed while a person is asked about its call. Its
    qrexec-client-vm ends, so that nothing is done for nobody."""
    stage.policy("* * * * ask")
    sock = stage.connect(stage.route(echo))
    stage.until(lambda: stage.called("prompt"), "nobody is asked")
    vanish(sock)
    stage.until(lambda: not stage.clients(), "qrexec-client-vm runs for ever")


# ----------------------------------------------------------- many at once


@scene("200 at once")
def two_hundred_at_once(stage: Stage) -> None:
    """200 clients connect at once, and each sends a word of its own. Each gets
    its own word back."""
    _at_once(stage, stage.route(echo), 200)


@scene("60 at once, as under Xen")
def as_under_xen(stage: Stage) -> None:
    """The same with 60, where qrexec fails a call that finds 15 others being
    set up, as it does under Xen. Each is answered."""
    stage.fault("max-setups=15 delay=1")
    _at_once(stage, stage.route(echo), 60)


def _at_once(stage: Stage, address: Address, count: int) -> None:
    def is_answered(number: int) -> bool:
        word = b"%d " % number * 100
        with contextlib.suppress(OSError, Seen):
            stage.gets(address, word, word)
            return True
        return False

    with ThreadPoolExecutor(count) as pool:
        answered = sum(pool.map(is_answered, range(count)))
    if answered != count:
        raise Seen(f"{answered} of {count} are answered")


# ------------------------------------------------ changes while connections run


@scene("a restart with 100 open")
def restart(stage: Stage) -> None:
    """100 connections are open, and the forwarder is restarted. All go on."""
    opened = _opened(stage, stage.route(echo), OPEN)
    stage.way.restart()
    _go_on(opened, OPEN)


@scene("connections during restarts")
def connect_during_restart(stage: Stage) -> None:
    """Clients connect one after the other while the forwarder is restarted
    three times. Each is answered."""
    address = stage.route(echo)
    stage.gets(address, PING, PING)
    over = threading.Event()
    failed: list[str] = []

    def ask() -> None:
        while not over.is_set():
            try:
                stage.gets(address, PING, PING)
            except (OSError, Seen) as error:
                failed.append(reason(error, stage.patience))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(3):
            stage.way.restart()
    finally:
        over.set()
        asking.join()
    if failed:
        raise Seen(f"some are not: {failed[0]}")


@scene("a kill with 100 open")
def kill(stage: Stage) -> None:
    """100 connections are open, and the forwarder is killed. All go on."""
    opened = _opened(stage, stage.route(echo), OPEN)
    stage.way.kill()
    _go_on(opened, OPEN)


@scene("a connection after a kill")
def connect_after_kill(stage: Stage) -> None:
    """The forwarder is killed. The next client is answered, and nobody had to
    do anything."""
    address = stage.route(echo)
    stage.gets(address, PING, PING)
    stage.way.kill()
    stage.gets(address, PING, PING)


@scene("a kill while dom0 asks")
def kill_at_a_prompt(stage: Stage) -> None:
    """The forwarder is killed while a person is asked about a call; then the
    person allows it. The client is answered."""
    stage.policy("* * * * ask")
    sock = stage.connect(stage.route(echo))
    sock.sendall(PING)
    stage.until(lambda: stage.called("prompt"), "nobody is asked")
    stage.way.kill()
    stage.answer("allow")
    stage.same(read_exactly(sock, len(PING)), PING)


@scene("a change of one port beside another")
def change_of_one_port(stage: Stage) -> None:
    """One address is closed and another opened, beside one with 20 open
    connections. These go on, new ones are answered at both that are open, and
    the closed one refuses."""
    closed, kept = stage.route(echo, "first"), stage.route(echo, "second")
    opened = _opened(stage, kept, 20)
    stage.gets(closed, PING, PING)
    stage.way.close(closed)
    new = stage.route(echo, "third")
    _go_on(opened, 20)
    for address in (kept, new):
        stage.gets(address, PING, PING)
    try:
        stage.connect(closed)
    except ConnectionRefusedError:
        return
    raise Seen("the closed one still accepts")


# ------------------------------------------------------------------ addresses


@scene("two targets on one port")
def two_targets(stage: Stage) -> None:
    """127.0.0.1 and 127.0.0.2 lead to two qubes, by one and the same port
    number. Each answers with its own name."""
    _, port = stage.address()
    names = {"127.0.0.1": b"first", "127.0.0.2": b"second"}
    for host, name in names.items():
        handler = _says(name)
        stage.route(handler, name.decode(), address=(host, port))
    for host, name in names.items():
        stage.gets((host, port), b"who?", name)


@scene("no other address")
def no_other_address(stage: Stage) -> None:
    """127.0.0.1 is opened. The same port of this qube's other addresses
    refuses."""
    _, port = stage.address()
    stage.route(echo, address=("127.0.0.1", port))
    try:
        stage.connect(("127.0.0.9", port))
    except ConnectionRefusedError:
        return
    raise Seen("it is open on all addresses")


@scene("IPv6")
def ipv6(stage: Stage) -> None:
    """A client of [::1] is answered."""
    _, port = stage.address()
    address = stage.route(echo, address=("::1", port))
    stage.gets(address, PING, PING)


@scene("a unix socket")
def unix_socket(stage: Stage) -> None:
    """A client of a unix socket is answered."""
    address = stage.route(echo, address=stage.path())
    stage.gets(address, PING, PING)


@scene("whose unix socket")
def whose_unix_socket(stage: Stage) -> None:
    """A unix socket lets in only the user who has opened it."""
    path = stage.path()
    stage.route(echo, address=path)
    mode = stat.S_IMODE(os.stat(path).st_mode)
    if mode & 0o077:
        raise Seen(f"mode {mode:04o}: every user")


# ------------------------------------------------------------------ helpers


def _sees_an_error(stage: Stage, address: Address) -> None:
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        sock = stage.connect(address)
        sock.sendall(b"request")
        stage.same(read_all(sock), b"an error")


def _opened(stage: Stage, address: Address, count: int) -> list[socket.socket]:
    """So many connections that have been answered once, or as many of them as
    can be had."""
    opened = []
    for _ in range(count):
        with contextlib.suppress(OSError):
            sock = stage.connect(address)
            sock.sendall(b"x")
            if sock.recv(1) == b"x":
                opened.append(sock)
    return opened


def _go_on(opened: list[socket.socket], wanted: int) -> None:
    """See that each of these is answered once more."""

    def goes_on(sock: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            sock.sendall(b"y")
            return sock.recv(1) == b"y"
        return False

    with ThreadPoolExecutor(wanted) as pool:
        count = sum(pool.map(goes_on, opened))
    if len(opened) < wanted:
        raise Seen(f"{len(opened)} can be open; of these {count} go on")
    if count < wanted:
        raise Seen(f"{count} of {wanted} go on" if count else "none goes on")


def _says(name: bytes) -> Callable[[socket.socket], None]:
    def handler(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(name)

    return handler


def _flood(sock: socket.socket) -> None:
    while True:
        sock.sendall(bytes(1 << 16))


def _drain(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while sock.recv(1 << 16):
            pass


@contextlib.contextmanager
def _sending(sock: socket.socket, pause: float) -> Iterator[None]:
    """While the block runs, a byte is sent again and again."""
    over = threading.Event()

    def send() -> None:
        while not over.is_set():
            sock.sendall(b"x")
            over.wait(pause)

    sender = threading.Thread(target=_quietly, args=(send,), daemon=True)
    sender.start()
    try:
        yield
    finally:
        over.set()
        sender.join()


def _quietly(work: Callable[[], object]) -> None:
    with contextlib.suppress(OSError):
        work()
