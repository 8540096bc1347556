"""Who may connect: --allow-uid, and the warnings of listeners that others can
reach."""

from __future__ import annotations

import contextlib
import grp
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio
from scenario import SERVICE, Scene, is_reset, says, write_script

from qrexec_activate.forward.connection import reset
from qrexec_activate.forward.peers import Gate, GateProblem, exposure

OTHER_UID = 4321
needs_other_users = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can act as another user"
)

#: A client of another user: connect, do as told, and stay until killed.
CLIENT = """\
import os, socket, sys
uid, family, address, action = int(sys.argv[1]), int(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
os.setuid(uid)
sock = socket.socket(family)
sock.connect(address)
sock.send(b"data")
if action == "half-close":
    sock.shutdown(socket.SHUT_WR)
if action == "close":
    sock.close()
print("done", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def client(
    uid: int, family: int, address: object, action: str = "stay"
) -> Iterator[None]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            CLIENT,
            str(uid),
            str(int(family)),
            repr(address),
            action,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        process.kill()


def listen(family: int, host: str) -> socket.socket:
    listener = socket.socket(family)
    listener.bind((host, 0))
    listener.listen()
    return listener


def decision(gate: Gate, listener: socket.socket) -> str:
    """Empty where the next connection is let in, or why not."""
    sock, _ = listener.accept()
    with sock:
        try:
            gate.check(sock)
        except GateProblem as problem:
            return str(problem)
    return ""


# -- the gate by itself


@needs_other_users
@pytest.mark.parametrize("action", ["stay", "half-close"])
@pytest.mark.parametrize(
    ("family", "host", "dialled"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "0.0.0.0", "127.0.0.3"),
        (socket.AF_INET6, "::1", "::1"),
        (socket.AF_INET6, "::", "::1"),
        (socket.AF_INET6, "::", "127.0.0.1"),
    ],
)
def test_a_local_tcp_connection_is_that_of_its_user(
    family: int, host: str, dialled: str, action: str
) -> None:
    client_family = socket.AF_INET6 if ":" in dialled else socket.AF_INET
    with closing(Gate([OTHER_UID])) as gate, listen(family, host) as listener:
        assert gate.problem(listener) == ""
        address = (dialled, listener.getsockname()[1])
        with client(OTHER_UID, client_family, address, action):
            assert decision(gate, listener) == ""
        with client(OTHER_UID + 1, client_family, address, action):
            assert (
                decision(gate, listener)
                == f"uid {OTHER_UID + 1} is not among those of --allow-uid"
            )


@needs_other_users
def test_a_connection_that_was_closed_at_once_is_not_taken_for_that_of_root() -> (
    None
):
    """The kernel says uid 0 of a TCP socket that nobody has open any more."""
    with (
        closing(Gate([0])) as gate,
        listen(socket.AF_INET, "127.0.0.1") as listener,
    ):
        assert gate.problem(listener) == ""
        with client(OTHER_UID, socket.AF_INET, listener.getsockname(), "close"):
            assert "closed already" in decision(gate, listener)


@needs_other_users
def test_a_connection_that_was_reset_is_not_let_in() -> None:
    with (
        closing(Gate([OTHER_UID])) as gate,
        listen(socket.AF_INET, "127.0.0.1") as listener,
    ):
        assert gate.problem(listener) == ""
        with client(OTHER_UID, socket.AF_INET, listener.getsockname()):
            pass
        assert decision(gate, listener)


@needs_other_users
def test_a_port_in_another_network_is_refused() -> None:
    """The same addresses there may be those of somebody else."""
    libc_unshare = (
        "import os, socket, ctypes; ctypes.CDLL(None).unshare(0x40000000)"
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        script = (
            f"{libc_unshare}; s = socket.socket(); s.listen();"
            f" socket.send_fds(socket.socket(fileno={theirs.fileno()}),"
            f" [b'x'], [s.fileno()])"
        )
        subprocess.run(
            [sys.executable, "-c", script],
            pass_fds=[theirs.fileno()],
            check=True,
        )
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    with socket.socket(fileno=fd) as listener, closing(Gate([0])) as gate:
        assert "another network namespace" in gate.problem(listener)


def test_a_listener_that_tells_no_users_is_refused() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as other:
        assert Gate([0]).problem(other)


def test_before_it_was_asked_for_problems_the_gate_lets_no_tcp_in() -> None:
    with (
        listen(socket.AF_INET, "127.0.0.1") as listener,
        socket.create_connection(listener.getsockname()),
    ):
        assert (
            decision(Gate([os.getuid()]), listener)
            == "who connects cannot be told"
        )


class Kernel:
    """What answers for the kernel: its socket, with something changed on the
    way."""

    def __init__(
        self, gate: Gate, change: Callable[[bytes, int], tuple[bytes, int]]
    ) -> None:
        assert gate._diag is not None
        self._socket = gate._diag._socket
        self._change = change
        gate._diag._socket = self  # type: ignore[assignment]  # as much of a socket as is used

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        answer, (port, groups) = self._socket.recvfrom(size)
        answer, port = self._change(answer, port)
        return answer, (port, groups)

    def __getattr__(self, name: str) -> object:
        return getattr(self._socket, name)


@pytest.fixture
def ours() -> Iterator[tuple[Gate, socket.socket, socket.socket]]:
    """A gate for ourselves, a connection of ours, and its other end."""
    with (
        closing(Gate([os.getuid()])) as gate,
        listen(socket.AF_INET, "127.0.0.1") as listener,
        socket.create_connection(listener.getsockname()) as other,
    ):
        assert gate.problem(listener) == ""
        sock, _ = listener.accept()
        with sock:
            gate.check(sock)
            yield gate, sock, other


def test_an_answer_that_is_not_the_kernels_lets_nobody_in(
    ours: tuple[Gate, socket.socket, socket.socket],
) -> None:
    """Others can send to the socket that the kernel is asked with."""
    gate, sock, _ = ours
    Kernel(gate, lambda answer, port: (answer, 4321))
    with pytest.raises(GateProblem, match="no answer of the kernel"):
        gate.check(sock)


def test_an_answer_to_another_question_lets_nobody_in(
    ours: tuple[Gate, socket.socket, socket.socket],
) -> None:
    gate, sock, _ = ours
    answers = []

    def repeat(answer: bytes, port: int) -> tuple[bytes, int]:
        answers.append(answer)
        return answers[0], port

    Kernel(gate, repeat)
    gate.check(sock)
    with pytest.raises(GateProblem, match="no answer of the kernel"):
        gate.check(sock)


#: What the kernel numbers its TCP states by (net/tcp_states.h).
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, TCP_STATES = 1, 4, 5, 12


@pytest.mark.parametrize("state", range(1, TCP_STATES + 1))
def test_only_the_end_of_a_connection_tells_its_user(
    ours: tuple[Gate, socket.socket, socket.socket], state: int
) -> None:
    """One that is still connecting may be another user's, who takes over the
    ports of a client that has gone."""
    gate, sock, _ = ours

    def restate(answer: bytes, port: int) -> tuple[bytes, int]:
        # After the header of 16 bytes: the family, the state.
        assert answer[16:18] == bytes([socket.AF_INET, ESTABLISHED])
        return answer[:17] + bytes([state]) + answer[18:], port

    Kernel(gate, restate)
    if state in (ESTABLISHED, FIN_WAIT1, FIN_WAIT2):
        gate.check(sock)
    else:
        with pytest.raises(GateProblem, match="closed already"):
            gate.check(sock)


def test_a_client_that_goes_while_its_user_is_asked_for_is_not_let_in(
    ours: tuple[Gate, socket.socket, socket.socket],
) -> None:
    """Its ports may be another user's by then, and the answer about those."""
    gate, sock, other = ours

    def vanish(answer: bytes, port: int) -> tuple[bytes, int]:
        reset(other)
        return answer, port

    Kernel(gate, vanish)
    with pytest.raises(GateProblem, match="the connection is over"):
        gate.check(sock)


# -- who can reach a listener


@pytest.mark.parametrize(
    ("family", "address", "warned"),
    [
        (socket.AF_INET, ("127.0.0.1", 0), ""),
        (socket.AF_INET, ("127.9.8.7", 0), ""),
        (socket.AF_INET6, ("::1", 0), ""),
        (socket.AF_INET, ("0.0.0.0", 0), "every machine"),
        (socket.AF_INET6, ("::", 0), "every machine"),
        (socket.AF_UNIX, b"\0qrexec-activate-test-exposure", "every user"),
    ],
)
def test_what_others_can_reach_is_told(
    family: int, address: object, warned: str
) -> None:
    with socket.socket(family) as sock:
        sock.bind(address)  # type: ignore[arg-type]  # of any family
        said = exposure(sock)
        assert warned in said
        assert bool(said) == bool(warned)


@pytest.mark.parametrize(
    ("mode", "folder_mode", "warned"),
    [
        (0o600, 0o755, ""),
        (0o666, 0o755, "every user"),
        (0o660, 0o755, "its group"),
        (0o666, 0o700, ""),
        (0o666, 0o750, "its group"),
    ],
)
def test_the_mode_of_a_unix_socket_and_of_its_folders_decide(
    mode: int, folder_mode: int, warned: str
) -> None:
    # Not tmp_path: folders of pytest are closed to others.
    with contextlib.ExitStack() as stack:
        folder = Path(f"/tmp/qa-exposure-{os.getpid()}")
        folder.mkdir()
        stack.callback(folder.rmdir)
        path = folder / "s"
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(str(path))
        stack.callback(path.unlink)
        path.chmod(mode)
        folder.chmod(folder_mode)
        said = exposure(sock)
        assert warned in said
        assert bool(said) == bool(warned)


# -- the daemon


async def test_a_listener_that_other_machines_can_reach_is_warned_of(
    scene: Scene,
) -> None:
    await scene.qube("work")
    scene.drop_in("work", ("0.0.0.0", scene.port + 1))
    await scene.start()
    scene.nursery.start_soon(is_reset, ("127.0.0.1", scene.port + 1))
    await scene.logged("0.0.0.0", "every machine", "BindToDevice=lo")


async def test_with_allow_uid_others_are_reset_and_reported(
    scene: Scene,
) -> None:
    path = str(scene.machine.runtime / "s")
    scene.options(ALLOW_UID=str(os.getuid() + 1))
    await scene.qube("work", says("work"))
    scene.drop_in("path", path, "work")
    await scene.start()
    assert await is_reset(path)
    await scene.logged(
        "reset a connection of pid", f"uid {os.getuid()} is not among"
    )
    assert scene.calls() == []


async def test_tcp_needs_netlink_in_the_sandbox_and_says_so(
    scene: Scene,
) -> None:
    address = scene.address()
    scene.options(ALLOW_UID=str(os.getuid()))
    await scene.qube("work", says("work"))
    scene.drop_in("work", address)
    await scene.start()
    assert await is_reset(address)
    await scene.logged(
        "is refused: --allow-uid is set",
        "add RestrictAddressFamilies=AF_NETLINK",
    )


@needs_other_users
async def test_with_allow_uid_a_local_port_is_one_users(scene: Scene) -> None:
    address = scene.address()
    scene.options(ALLOW_UID=str(OTHER_UID))
    scene.write(
        "netlink",
        "[Service]",
        "RestrictAddressFamilies=AF_NETLINK",
        unit=SERVICE,
    )
    await scene.qube("work", says("work"))
    scene.drop_in("work", address)
    await scene.start()
    assert await is_reset(address)
    await scene.logged("reset a connection of 127.", "uid 0 is not among")
    with client(OTHER_UID, socket.AF_INET, address, "half-close"):
        await scene.logged("work", "ended, ")
    assert len(scene.calls()) == 1


@pytest.mark.parametrize("uid", ["65534", "-1", "root", "4294967295", ""])
def test_what_is_no_user_is_refused(uid: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qrexec_activate",
            "serve",
            "qubes.ConnectTCP",
            "--allow-uid",
            uid,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--allow-uid" in done.stderr


def test_an_empty_list_of_users_does_not_let_everybody_in() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qrexec_activate", "serve", "qubes.ConnectTCP"],
        env={**os.environ, "QREXEC_ACTIVATE_ALLOW_UID": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "QREXEC_ACTIVATE_ALLOW_UID is empty" in done.stderr


AS_MEMBER = """\
import os, socket, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(4321)
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[2])
sock.send(b"who?")
sock.shutdown(socket.SHUT_WR)
print(sock.recv(100).decode())
"""


@needs_other_users
async def test_the_socket_of_the_documents_is_for_a_group(
    scene: Scene,
) -> None:
    text = Path(__file__).parents[2].joinpath("docs", "access.md").read_text()
    header, block = re.findall(
        r"^    # /etc/systemd/system/(\S+)\n((?:    .+\n)+)", text, re.MULTILINE
    )[0]
    folder, name = header.split("/")
    path = Path("/run", scene.machine.directory.name, "vault")
    group = grp.getgrgid(100)
    lines = (
        block.replace("    ", "")
        .replace("/run/ssh-agents/vault", str(path))
        .replace("ssh-users", group.gr_name)
        .splitlines()
    )
    rpc = scene.machine.add_qube("vault") / "rpc" / "qubes.ConnectUnix"
    write_script(rpc, "#!/bin/sh\nexec cat\n")
    unit = folder.removesuffix(".d")
    scene.write(name.removesuffix(".conf"), *lines, unit=unit)
    await scene.start(unit)

    async def ask_as(gid: int) -> tuple[int, str]:
        done = await trio.run_process(
            [sys.executable, "-c", AS_MEMBER, str(gid), str(path)],
            # Not to be measured: another user cannot write what was.
            env={},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
        return done.returncode, (done.stdout + done.stderr).decode()

    try:
        assert await ask_as(group.gr_gid) == (0, "who?\n")
        code, said = await ask_as(4321)
        assert code == 1
        assert "PermissionError" in said
    finally:
        await scene.systemctl("stop", unit)
        shutil.rmtree(path.parent)
