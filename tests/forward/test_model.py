"""The routing rule and the life of a connection as a state machine, against the
real daemon under the real systemd.

The model knows what the files say, and when systemd last read them; whether an
address is open at all, it asks systemd.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from scenario import SERVICE, free_port, written

from qrexec_activate.loopback.machine import Machine

PATIENCE = 60.0
QUBES = ("gitweb", "work", "vault")
#: Drop-ins in the order in which systemd applies them, each with an address of
#: its own; the last one is an override.
FILES = ("a", "b", "c")
OVERRIDE = "z"
EXAMPLES = 20
STEPS = 25

#: What a drop-in may name: a qube, nothing, or what is none.
names = st.sampled_from([*QUBES, *QUBES, None, "-x", "no qube"])


class Qube:
    """A pretend qube whose service says its name, echoes, and half-closes when
    told so by `.`."""

    def __init__(self, name: str, host: str, port: int) -> None:
        self.name = name
        self.listener = socket.create_server((host, port), backlog=128)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._serve, args=(sock,), daemon=True
            ).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(PATIENCE)
            sock.sendall(f"{self.name}\n".encode())
            while (data := sock.recv(4096)) and b"." not in data:
                sock.sendall(data)
            sock.sendall(b"bye")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


@dataclass
class Stream:
    """An established connection, and the qube that it reached."""

    sock: socket.socket
    qube: str


class Model(RuleBasedStateMachine):
    """What a person may do to drop-ins, units and the daemon, and what clients
    then see."""

    machine: Machine
    streams = Bundle("streams")

    @initialize()
    def begin(self) -> None:
        self.port = free_port()
        self.unit = f"qrexec-connect-tcp@{self.port}.socket"
        octet = random.randint(1, 250)
        self.addresses = {
            name: (f"127.99.{octet}.{number}", self.port)
            for number, name in enumerate(FILES, 1)
        }
        self.qubes = [
            Qube(name, self.machine.address(name), self.port) for name in QUBES
        ]
        #: What each file on disk names, by file; None: nothing. A file that is
        #: not there is not in here.
        self.on_disk: dict[str, str | None] = {}
        #: Whether files changed since the unit was last started from them.
        self.changed = False
        #: By file: whatever its listener may have been given since then, as a
        #: daemon may have been started any time.
        self.possible: dict[str, set[str | None]] = {
            name: set() for name in FILES
        }
        self.open: list[Stream] = []
        # As in the README, and then on from there.
        self.write("a", "gitweb")
        self.write("b", "work")
        self.start_anew()

    # What the files say

    def target(self, name: str) -> str | None:
        """The qube that a listener reaches by the rule; None: it is refused."""
        named = (
            self.on_disk[OVERRIDE]
            if self.on_disk.get(OVERRIDE) is not None
            else self.on_disk[name]
        )
        return named if named in QUBES else None

    def note(self) -> None:
        self.changed = True
        for name in FILES:
            if name in self.on_disk:
                self.possible[name].add(self.target(name))

    @rule(name=st.sampled_from(FILES), named=names)
    def write(self, name: str, named: str | None) -> None:
        lines = [f"ListenStream={written(self.addresses[name])}"]
        lines += [] if named is None else [f"FileDescriptorName={named}"]
        self.machine.write_drop_in(
            self.unit, name, "[Socket]\n" + "\n".join(lines) + "\n"
        )
        self.on_disk[name] = named
        self.note()

    @rule(named=names)
    def override(self, named: str | None) -> None:
        line = "" if named is None else f"FileDescriptorName={named}\n"
        self.machine.write_drop_in(self.unit, OVERRIDE, f"[Socket]\n{line}")
        self.on_disk[OVERRIDE] = named
        self.note()

    @rule(name=st.sampled_from((*FILES, OVERRIDE)))
    def remove(self, name: str) -> None:
        if self.on_disk.pop(name, "absent") != "absent":
            (self.machine.unit_dir / f"{self.unit}.d" / f"{name}.conf").unlink()
            self.note()

    # What a person does to systemd

    @rule()
    def reload(self) -> None:
        self.machine.systemctl("daemon-reload")

    @precondition(lambda self: any(name in self.on_disk for name in FILES))
    @rule()
    def start_anew(self) -> None:
        """What the README says to do after a change."""
        self.machine.systemctl("daemon-reload")
        self.machine.systemctl("restart", self.unit)
        self.changed = False
        self.possible = {
            name: {self.target(name)} if name in self.on_disk else set()
            for name in FILES
        }

    @rule()
    def stop_unit(self) -> None:
        self.machine.systemctl("stop", self.unit, check=False)
        # Whatever is started next is started from the files as systemd has read
        # them, which may be long ago.
        self.changed = True

    @rule()
    def stop_daemon(self) -> None:
        self.machine.systemctl("stop", SERVICE, check=False)

    @rule()
    def kill_daemon(self) -> None:
        self.machine.systemctl(
            "kill", "--kill-whom=main", "--signal=KILL", SERVICE, check=False
        )

    # What clients see

    def listens(self, name: str) -> bool:
        """Whether systemd says that this address is open."""
        if self.machine.property(self.unit, "ActiveState") != "active":
            return False
        host, port = self.addresses[name]
        return f"{host}:{port} (Stream)" in self.machine.property(
            self.unit, "Listen"
        )

    @rule(target=streams, name=st.sampled_from(FILES))
    def connect(self, name: str) -> Stream | None:
        expected_open = self.listens(name)
        sock = socket.socket()
        sock.settimeout(PATIENCE)
        try:
            sock.connect(self.addresses[name])
        except ConnectionRefusedError:
            sock.close()
            # A file that came or went since systemd opened the listeners may be
            # shown or not.
            assert not expected_open or self.changed, (
                f"{name} is open by systemd's account, but refuses"
            )
            return None
        except ConnectionResetError:
            # A refusal, before this process had its turn.
            reached = None
        else:
            reached = self._greeting(sock)
        allowed = self.possible[name] | ({None} if self.changed else set())
        assert reached in allowed, (
            f"{name} reached {reached}, its file allows {allowed}"
        )
        if reached is None:
            sock.close()
            return None
        stream = Stream(sock, reached)
        self.open.append(stream)
        return stream

    def _greeting(self, sock: socket.socket) -> str | None:
        """The name of the qube that answers; None for a reset."""
        said = b""
        try:
            sock.sendall(b"?")
            while not said.endswith(b"?"):
                chunk = sock.recv(100)
                assert chunk, (
                    f"the stream ended after {said!r}, without an error"
                )
                said += chunk
        except ConnectionError:
            assert said == b""
            return None
        return said.removesuffix(b"\n?").decode()

    @rule(stream=streams)
    def talk(self, stream: Stream | None) -> None:
        """An established connection goes on, whatever has become of the daemon
        and its unit."""
        if stream is not None and stream in self.open:
            stream.sock.sendall(b"ping")
            said = b""
            while len(said) < 4:
                chunk = stream.sock.recv(4 - len(said))
                assert chunk, (
                    f"the stream to {stream.qube} ended after {said!r}"
                )
                said += chunk
            assert said == b"ping"

    @rule(stream=consumes(streams), by_client=st.booleans())
    def end(self, stream: Stream | None, by_client: bool) -> None:
        """Either side ends, and what was sent last still arrives."""
        if stream is not None and stream in self.open:
            self.open.remove(stream)
            with stream.sock as sock:
                if by_client:
                    sock.shutdown(socket.SHUT_WR)
                else:
                    sock.sendall(b".")
                said = b""
                while chunk := sock.recv(100):
                    said += chunk
            assert said == b"bye"

    @invariant()
    def nothing_has_failed(self) -> None:
        """Whatever a person does, no unit ends up where only reset-failed
        helps."""
        if hasattr(self, "unit"):
            assert self.machine.property(SERVICE, "ActiveState") != "failed"

    def teardown(self) -> None:
        if not hasattr(self, "unit"):
            return
        for stream in self.open:
            stream.sock.close()
        for qube in self.qubes:
            qube.close()
        self.machine.systemctl("stop", self.unit, SERVICE, check=False)
        folder = self.machine.unit_dir / f"{self.unit}.d"
        for path in folder.glob("*"):
            path.unlink()
        if folder.exists():
            folder.rmdir()
        self.machine.systemctl("daemon-reload")
        self.machine.systemctl("reset-failed", check=False)


@pytest.fixture
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        for name in QUBES:
            machine.add_qube(name)
        yield machine


@pytest.mark.slow
def test_every_connection_goes_where_its_file_says_whatever_is_done(
    machine: Machine,
) -> None:
    Model.machine = machine
    run_state_machine_as_test(
        Model,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.filter_too_much,
                HealthCheck.data_too_large,
            ],
            # What fails depends on what processes do, and is worth seeing as it
            # was.
            derandomize=False,
            database=None,
            print_blob=False,
        ),
    )
