"""The two sides of each row: what runs in the target, what the client's socket
and its parent's duplicate of it see.

A probe puts its parts into a Place and returns what it saw, by name; rows.py
says what that must be. Waiting is bounded by PATIENCE where something must
come, and lasts QUIET where nothing may.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .place import PREFIX, CannotTry, Place

PATIENCE = 60.0
QUIET = 1.0

Seen = dict[str, object]

ECHO = "#!/bin/sh\nexec cat\n"


def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"never happened: {what}")
        time.sleep(0.01)


def python(text: str) -> str:
    """A script service in Python; `note(word)` tells the probe something."""
    return (
        f"#!{sys.executable} -IS\n"
        "import os, sys, time\n"
        "def note(word):\n"
        "    path = sys.argv[0] + '.note'\n"
        "    open(path + '.new', 'w').write(word)\n"
        "    os.rename(path + '.new', path)\n" + text
    )


class Call:
    """One call and what can be seen of it: `peer` is the client's end, `held`
    the parent's duplicate of what is fd 0 of qrexec-client-vm. By pipes, which
    serve a client without hand-over too, they are the two ends of its input."""

    def __init__(
        self,
        place: Place,
        service: str,
        *,
        way: str = "",
        target: str = "",
        options: tuple[str, ...] = (),
        client: str = "",
    ) -> None:
        words = [*place.options, *options]
        self._writes = -1
        if way == "pipes" or not (way or place.hands_over):
            reads, writes = os.pipe()
            self._answer, answer_writes = os.pipe()
            place.closing(reads, writes, self._answer, answer_writes)
            self.held_fd = reads
            self.process = place.call(
                *words,
                target or place.target,
                service,
                client=client,
                stdin=reads,
                stdout=answer_writes,
            )
            os.close(answer_writes)
            self._writes = writes
            return
        if not place.hands_over:
            raise CannotTry("it has no --use-stdin-socket")
        self.peer, self.held = (
            socket.socketpair()
            if way == "unix"
            else tcp_pair(slow=way == "slow")
        )
        place.closing(self.peer, self.held)
        self.held_fd = self.held.fileno()
        self.process = place.call(
            *words,
            "--use-stdin-socket",
            target or place.target,
            service,
            client=client,
            stdin=self.held,
        )

    def send(self, data: bytes) -> None:
        if self._writes >= 0:
            os.write(self._writes, data)
        else:
            self.peer.sendall(data)

    def half_close(self) -> None:
        if self._writes >= 0:
            os.close(self._writes)
        else:
            self.peer.shutdown(socket.SHUT_WR)

    @property
    def is_non_blocking(self) -> bool:
        return bool(fcntl.fcntl(self.held_fd, fcntl.F_GETFL) & os.O_NONBLOCK)

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def established(self) -> None:
        until(
            "the call is established",
            lambda: self.is_non_blocking or not self.runs,
        )

    def runs_on(self) -> bool:
        time.sleep(QUIET)
        return self.runs

    def code(self) -> int:
        return self.process.wait(PATIENCE)

    def stderr(self) -> str:
        assert self.process.stderr
        return self.process.stderr.read().decode().strip()

    def receive(self, patience: float = QUIET) -> tuple[bytes, str]:
        """All that comes to the client, and how it ends: `FIN`, `reset`, or
        `open`."""
        if self._writes >= 0:
            return read_pipe(self._answer, patience)
        self.peer.settimeout(patience)
        received = b""
        while True:
            try:
                chunk = self.peer.recv(1 << 16)
            except TimeoutError:
                return received, "open"
            except ConnectionResetError:
                return received, "reset"
            if not chunk:
                return received, "FIN"
            received += chunk

    def expect(self, count: int) -> bytes:
        self.peer.settimeout(PATIENCE)
        received = b""
        while len(received) < count and (chunk := self.peer.recv(count)):
            received += chunk
        return received

    def unread(self) -> bytes | str:
        """What the parent's duplicate still has to read; `end` if reading has
        been shut down or has come to its end."""
        if self._writes >= 0:
            data, end = read_pipe(self.held_fd, 0)
            return data or ("end" if end == "FIN" else b"")
        try:
            data = self.held.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except OSError as error:
            return type(error).__name__
        return data or "end"

    def vchans(self) -> int:
        """How many listening unix sockets the client has: on the socket vchan,
        a vchan that it has opened is one."""
        listening = set()
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            words = line.split()
            if int(words[3], 16) & 0x10000:  # __SO_ACCEPTCON
                listening.add(f"socket:[{words[6]}]")
        links = []
        folder = f"/proc/{self.process.pid}/fd"
        for fd in os.listdir(folder):
            with contextlib.suppress(OSError):
                links.append(os.readlink(f"{folder}/{fd}"))
        return sum(link in listening for link in links)


def read_pipe(fd: int, patience: float) -> tuple[bytes, str]:
    """All that comes out of a pipe, and how it ends: `FIN` or `open`."""
    received = b""
    while select.select([fd], [], [], patience)[0]:
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            return received, "FIN"
        received += chunk
    return received, "open"


def tcp_pair(*, slow: bool = False) -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection. With `slow`, what the client has not read
    stays at the sender's side, which a reset empties."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.socket()
        if slow:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(listener.getsockname())
        held, _ = listener.accept()
        if slow:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return peer, held


def noted(path: Path) -> Callable[[], bool]:
    return Path(f"{path}.note").exists


# ------------------------------------------------------------ how a call ends


def ends(
    place: Place,
    *,
    script: str | None = None,
    mode: int = 0o755,
    way: str = "tcp",
    name: str = PREFIX + "Ends",
    called: str = "",
    target: str = "",
    link: str = "",
    config: str = "",
    policy: str = "",
    options: tuple[str, ...] = (),
    sends: bytes = b"",
    fault: str = "",
) -> Seen:
    """One call from beginning to end."""
    if fault:
        place.fault(fault)
    if policy:
        place.policy(policy.format(target=place.target, source=place.source))
    if script is not None:
        place.service(name, script).chmod(mode)
    if link:
        place.link(name, link)
    if config:
        place.config(name, config)
    call = Call(place, called or name, way=way, target=target, options=options)
    if sends:
        with contextlib.suppress(OSError):
            call.send(sends)
    code = call.code()
    unread = call.unread()
    received, end = call.receive()
    return {
        "code": code,
        "stderr": call.stderr(),
        "non-blocking at exit": call.is_non_blocking,
        "parent's duplicate reads": unread,
        "client got": received,
        "client saw": end,
    }


def refused_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def nobody_listens(place: Place, *, way: str = "tcp") -> Seen:
    return ends(
        place,
        link=f"/dev/tcp/127.0.0.1/{refused_port()}",
        sends=b"secret",
        way=way,
    )


def vchan_closed_early(place: Place, *, way: str = "tcp") -> Seen:
    script = "#!/bin/sh\nread line\nkill -9 $PPID\nsleep 1\n"
    if place.makes_faults:
        place.fault("end-early=1")
        script = ECHO
    elif not place.kill_parent:
        raise CannotTry("the target's side cannot be killed (--kill-parent)")
    return ends(place, script=script, sends=b"line\n", way=way)


# ---------------------------------------------------------------- non-blocking


def non_blocking(place: Place, *, way: str) -> Seen:
    """O_NONBLOCK of fd 0, as its parent sees it: in the data phase, and when
    the call has ended."""
    place.service(PREFIX + "Flag", ECHO)
    call = Call(place, PREFIX + "Flag", way=way)
    call.established()
    during = call.is_non_blocking
    call.half_close()
    return {
        "during": during,
        "code": call.code(),
        "at exit": call.is_non_blocking,
    }


# ------------------------------------------------------------------ half-close


def client_half_closes(place: Place, *, way: str) -> Seen:
    """The service answers after the end of its input."""
    place.service(
        PREFIX + "Late", "#!/bin/sh\nall=$(cat)\nsleep 0.3\necho late $all\n"
    )
    call = Call(place, PREFIX + "Late", way=way)
    call.send(b"question")
    call.half_close()
    received, end = call.receive(PATIENCE)
    return {"client got": received, "client saw": end, "code": call.code()}


def service_half_closes(place: Place, *, way: str) -> Seen:
    """The service ends its output first and goes on reading."""
    path = place.service(
        PREFIX + "Deaf",
        python(
            "os.write(1, b'done')\n"
            "null = os.open('/dev/null', os.O_WRONLY)\n"
            "os.dup2(null, 1)\n"
            "note(sys.stdin.read())\n"
        ),
    )
    call = Call(place, PREFIX + "Deaf", way=way)
    received, end = call.receive(PATIENCE)
    runs = call.runs_on()
    call.send(b"afterwards")
    call.half_close()
    code = call.code()
    note = Path(f"{path}.note")
    got = note.read_text() if note.exists() else None
    note.unlink(missing_ok=True)
    return {
        "client got": received,
        "client saw": end,
        "runs on": runs,
        "service got": got,
        "code": code,
    }


# ------------------------------------------------- the end of a service, a client


def service_ends(place: Place, *, way: str) -> Seen:
    """The service answers and leaves; the client has not ended, and sends."""
    place.service(PREFIX + "Brief", "#!/bin/sh\necho answer\n")
    call = Call(place, PREFIX + "Brief", way=way)
    code = call.code()
    unread = call.unread()
    received, end = call.receive(PATIENCE)
    problems = []
    for _ in range(2):
        try:
            call.send(b"more")
        except OSError as error:
            problems.append(type(error).__name__)
        time.sleep(0.2)
    return {
        "code": code,
        "parent's duplicate reads": unread,
        "client got": received,
        "client saw": end,
        "a client that goes on sending": problems[-1]
        if problems
        else "nothing",
    }


def unread_reply(place: Place) -> Seen:
    """The client has sent after the end of the service, and reads only now."""
    place.service(PREFIX + "Brief", "#!/bin/sh\nhead -c 100000 /dev/zero\n")
    call = Call(place, PREFIX + "Brief", way="slow")
    code = call.code()
    with contextlib.suppress(OSError):
        call.send(b"more")
    time.sleep(0.2)
    received, end = call.receive(PATIENCE)
    return {
        "code": code,
        "whole reply": len(received) == 100_000,
        "client saw": end,
    }


def client_goes(place: Place) -> Seen:
    """The client goes while the service sends."""
    path = place.service(
        PREFIX + "Flood",
        python(
            "count = 0\n"
            "while True:\n"
            "    sys.stdout.buffer.write(bytes(1 << 20))\n"
            "    sys.stdout.buffer.flush()\n"
            "    count += 1\n"
            "    note(str(count))\n"
            "    time.sleep(0.01)\n"
        ),
    )
    call = Call(place, PREFIX + "Flood", way="tcp")
    call.expect(1 << 20)
    call.peer.close()
    call.held.close()
    runs = call.runs_on()
    note = Path(f"{path}.note")
    until("the service has sent", note.exists)
    before = int(note.read_text())
    runs = call.runs_on() and runs
    sent = int(note.read_text()) > before
    _stop(path)
    note.unlink(missing_ok=True)
    return {"runs on": runs, "the service goes on sending": sent}


def _stop(path: Path) -> None:
    """End a service that nobody else ends: by its name."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if os.fsencode(path) in words:
                    os.kill(int(folder.name), 9)


# ---------------------------------------------------------------------- limits


def many(
    place: Place, count: int, targets: list[str], second: str = ""
) -> list[Call]:
    """So many calls that stay open, spread over targets; only some are set up
    at once, as qrexec loses calls when many are."""
    for target in targets:
        place.service(
            PREFIX + "Hold", "#!/bin/sh\nexec cat >/dev/null\n", target
        )
    calls: list[Call] = []
    for number in range(count):
        call = Call(
            place,
            PREFIX + "Hold",
            way="unix" if place.hands_over else "pipes",
            target=targets[number % len(targets)],
            client=second if number % 2 else "",
        )
        calls.append(call)
        if number % 4 == 3:
            for one in calls[-4:]:
                one.established()
    for one in calls:
        one.established()
    return calls


def limit_of_target(place: Place, *, callers: int = 1) -> Seen:
    """128 calls to one target are open; then one more."""
    if callers > 1 and not place.second:
        raise CannotTry("no second calling qube (--second-client)")
    # The last target: both callers' domain ids are lower than its own.
    target = place.targets[-1] if callers > 1 else place.target
    calls = many(place, 128, [target], place.second if callers > 1 else "")
    open_before = sum(call.runs and call.is_non_blocking for call in calls)
    call = Call(place, PREFIX + "Hold", target=target)
    call.established()
    code = None if call.runs else call.code()
    seen: Seen = {
        "open": open_before,
        "the 129th's code": code,
        "the 129th's stderr": "" if call.runs else call.stderr(),
    }
    calls[0].half_close()
    calls[0].code()

    def has_room() -> bool:
        again = Call(place, PREFIX + "Hold", target=target)
        again.established()
        return again.runs

    until("a place is free again", has_room)
    return seen


def slots_of_caller(place: Place) -> Seen:
    """256 calls of one qube are open; then one more."""
    if len(place.targets) < 3:
        raise CannotTry("it takes three targets (--target, three times)")
    calls = many(place, 256, place.targets[:3])
    open_before = sum(call.runs and call.is_non_blocking for call in calls)
    call = Call(place, PREFIX + "Hold", target=place.targets[2])
    call.established()
    return {
        "open": open_before,
        "the 257th's code": None if call.runs else call.code(),
        "the 257th is established": call.is_non_blocking,
    }


# --------------------------------------------------------------- names, policy


WHO = """#!/bin/sh
echo "$0 ${1-none} $QREXEC_SERVICE_FULL_NAME [$QREXEC_SERVICE_ARGUMENT] $QREXEC_REMOTE_DOMAIN $#"
"""


def names(place: Place, *, called: str, file: str) -> Seen:
    """What a service is told of its name, argument and caller."""
    folder = place.service(file, WHO).parent
    call = Call(place, called)
    received, _ = call.receive(PATIENCE)
    said = received.decode().replace(f"{folder}/", "")
    return {
        "service said": said.strip().replace(place.source, "SOURCE"),
        "code": call.code(),
    }


def default_target(place: Place, *, called: str) -> Seen:
    """Policy has one line for @default, and denies the rest."""
    name = PREFIX + "Default"
    place.policy(
        f"{name} * {place.source} @default allow target={place.target} autostart=no",
        f"{name} * @anyvm @anyvm deny",
    )
    place.service(name, "#!/bin/sh\necho here\n")
    call = Call(
        place,
        name,
        target=called.format(target=place.target, source=place.source),
    )
    code = call.code()
    return {"code": code, "client got": call.receive()[0]}


# ------------------------------------------------------------------- prompts


def prompt(place: Place) -> None:
    """Let calls of contract.Ask ask, with nobody there to answer."""
    place.unanswered()
    place.policy(
        f"{PREFIX}Ask * {place.source} {place.target} ask"
        f" default_target={place.target} autostart=no"
    )


def prompt_answered(place: Place, *, answer: str, goes: bool = False) -> Seen:
    """A call at a prompt, whose client stays or goes, then the answer."""
    prompt(place)
    place.service(PREFIX + "Ask", "#!/bin/sh\necho here\n")
    call = Call(place, PREFIX + "Ask")
    waits = call.runs_on() and not call.is_non_blocking
    if goes and place.hands_over:
        call.peer.close()
    elif goes:
        call.half_close()
    if goes:
        waits = call.runs_on() and waits
    vchans = call.vchans()
    place.answer(answer)
    code = call.code()
    return {
        "waits": waits,
        "vchans at the prompt": vchans,
        "code": code,
        "stderr": call.stderr(),
        "client got": None if goes else call.receive()[0],
    }


def vchan_of_open_call(place: Place) -> Seen:
    place.service(PREFIX + "Hold", "#!/bin/sh\nexec cat >/dev/null\n")
    call = Call(place, PREFIX + "Hold")
    call.established()
    return {"vchans": call.vchans()}


def lost(place: Place) -> Seen:
    """A call that qrexec has lost after policy's answer."""
    place.lose()
    place.service(PREFIX + "Hold", "#!/bin/sh\nexec cat >/dev/null\n")
    call = Call(place, PREFIX + "Hold")
    call.send(b"secret")
    until("its vchan is open", lambda: call.vchans() or not call.runs)
    runs = call.runs_on()
    call.half_close()
    return {
        "runs on": call.runs_on() and runs,
        "established": call.is_non_blocking,
        "vchans": call.vchans() if call.runs else None,
        "parent's duplicate reads": call.unread(),
    }


# -------------------------------------------------------------- socket services


@contextlib.contextmanager
def served(
    place: Place, argument: str, config: str
) -> Iterator[tuple[Call, socket.socket]]:
    """A call to a service that is a unix socket, and the service's end."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = f"/tmp/{PREFIX}{os.getpid()}.{time.monotonic_ns()}"
        listener.bind(path)
        try:
            listener.listen()
            listener.settimeout(PATIENCE)
            place.link(PREFIX + "Socket", path)
            if config:
                place.config(PREFIX + "Socket", config)
            call = Call(place, PREFIX + "Socket" + argument)
            call.send(b"hello")
            serving, _ = listener.accept()
            with serving:
                serving.settimeout(PATIENCE)
                yield call, serving
        finally:
            os.unlink(path)


def socket_service(
    place: Place, *, config: str, argument: str = "+arg"
) -> Seen:
    """A service that is a unix socket: what comes before the client's bytes."""
    with served(place, argument, config) as (call, serving):
        call.half_close()
        got = b""
        while chunk := serving.recv(1 << 16):
            got += chunk
        serving.close()
        return {
            "service got": got.replace(place.source.encode(), b"SOURCE"),
            "code": call.code(),
        }


def socket_service_leaves(place: Place, *, config: str = "") -> Seen:
    """A service that is a unix socket closes it while its client goes on."""
    with served(place, "", config) as (call, serving):
        serving.recv(1 << 16)
        serving.sendall(b"bye")
        serving.close()
        code = call.code()
        unread = call.unread()
        received, end = call.receive()
        return {
            "code": code,
            "parent's duplicate reads": unread,
            "client got": received,
            "client saw": end,
        }
