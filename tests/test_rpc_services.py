"""qubes.ConnectUnix and qubes.ConnectTCPBind: run as qrexec runs them, and
through the loopback client."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import shutil
import socket
import string
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pretend import (
    PATIENCE,
    Pretend,
    bound_unix_socket,
    digest,
    echo,
    late_reply,
    random_bytes,
    read_all,
    tcp_pair,
    wait_until,
)

from qrexec_activate.publish.counts import parse_calls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

RPC = Path(__file__).resolve().parent.parent / "rpc"
UNIX, BIND = RPC / "qubes.ConnectUnix", RPC / "qubes.ConnectTCPBind"
ATTEMPTS = 2000


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(
    not has_ipv6(), reason="this machine has no IPv6 loopback"
)


@pytest.fixture
def pretend(tmp_path: Path) -> Iterator[Pretend]:
    pretend = Pretend(tmp_path)
    for service in (UNIX, BIND):
        pretend.link(service.name, service)
        shutil.copy(
            RPC / "rpc-config" / service.name, pretend.qube() / "rpc-config"
        )
    with pretend.resources:
        yield pretend


@pytest.fixture
def sockets(pretend: Pretend) -> Path:
    """The folder of the user's sockets in the qube `work`."""
    folder = pretend.qube() / "run" / "qubes.ConnectUnix"
    folder.mkdir(parents=True)
    return folder


def run(script: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Run a service by hand, without input; its exit code and what it says on
    stderr."""
    done = subprocess.run(
        [str(script), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
        env={"PATH": os.environ["PATH"], **env},
    )
    assert done.stdout == b""
    return done.returncode, done.stderr.decode()


def with_logger(folder: Path) -> str:
    """A PATH on which `logger` adds a line to the file `log` in a folder."""
    programs = folder / "with-logger"
    programs.mkdir()
    logger = programs / "logger"
    logger.write_text(f'#!/bin/sh\necho "$*" >>{folder}/log\n')
    logger.chmod(0o755)
    timeout = shutil.which("timeout")
    assert timeout
    (programs / "timeout").symlink_to(timeout)
    return f"{programs}:{os.environ['PATH']}"


# -- what they do


@pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair])
def test_connect_unix_reaches_a_socket_by_name(
    pretend: Pretend,
    sockets: Path,
    pair: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    pretend.serve_unix(sockets / "ssh-agent.1+x_y", echo)
    call = pretend.call("work", "qubes.ConnectUnix+ssh-agent.1+x_y", pair=pair)
    assert (call.converse(b"hello"), call.wait(), call.stderr()) == (
        b"hello",
        0,
        "",
    )


def test_connect_unix_follows_a_symlink_to_the_agents_own_socket(
    pretend: Pretend, sockets: Path
) -> None:
    pretend.serve_unix(pretend.root / "agent", echo)
    (sockets / "ssh-agent").symlink_to(pretend.root / "agent")
    assert (
        pretend.call("work", "qubes.ConnectUnix+ssh-agent").converse(b"key?")
        == b"key?"
    )


def test_connect_unix_takes_a_name_that_looks_like_an_option(
    pretend: Pretend, sockets: Path
) -> None:
    pretend.serve_unix(sockets / "-V", echo)
    assert pretend.call("work", "qubes.ConnectUnix+-V").converse(b"x") == b"x"


def test_a_service_on_port_sees_the_address_that_the_call_comes_from(
    pretend: Pretend,
) -> None:
    server = pretend.serve_tcp(echo)
    call = pretend.call("work", f"qubes.ConnectTCPBind+{server.port}-127.0.1.1")
    assert (call.converse(b"hello"), call.wait(), call.stderr()) == (
        b"hello",
        0,
        "",
    )
    assert server.peers[0][0] == "127.0.1.1"


@needs_ipv6
def test_ipv6_addresses_are_written_with_plus_for_colon(
    pretend: Pretend,
) -> None:
    server = pretend.serve_tcp(echo, "::1")
    call = pretend.call("work", f"qubes.ConnectTCPBind+{server.port}-++1")
    assert (call.converse(b"hello"), call.wait(), call.stderr()) == (
        b"hello",
        0,
        "",
    )
    assert {peer[0] for peer in server.peers} == {"::1"}


@pytest.mark.parametrize(
    "address",
    [
        # The kernel would make 127.0.0.1 of these.
        "224.0.0.1",
        "239.255.255.250",
        "255.255.255.255",
        "127.255.255.255",
        "127.0.0.0",
        "0.0.0.1",
        # Other spellings of ::1, and of what it is not.
        "0+0+0+0+0+0+0+1",
        "0++1",
        "++0+1",
        "++01",
        "++0001",
        "0000+0000+0000+0000+0000+0000+0000+0001",
        "FD00++7",
        "++ffff+7f00+1",
        "++7f00+1",
        "ff02++1",
    ],
)
def test_a_server_never_sees_another_address_than_policy_has_read(
    pretend: Pretend, address: str
) -> None:
    """A policy that denies one spelling must not be passed by another."""
    ipv4, ipv6 = pretend.serve_tcp(echo), None
    if has_ipv6():
        ipv6 = pretend.serve_tcp(echo, "::1", ipv4.port)
    call = pretend.call("work", f"qubes.ConnectTCPBind+{ipv4.port}-{address}")
    assert call.converse(b"hello") == b""
    assert call.wait() == 2
    assert ipv4.peers == []
    assert ipv6 is None or ipv6.peers == []


@pytest.mark.parametrize(
    ("source", "listens"),
    [
        ("127.0.0.1", False),
        ("127.0.9.1", True),
        pytest.param("++1", False, marks=needs_ipv6),
    ],
)
def test_a_connection_that_meets_itself_is_ended(
    tmp_path: Path, source: str, listens: bool
) -> None:
    """It would keep the service from its port for as long as it lasts. One
    from elsewhere may have the same port, and is none."""
    listener = "socat TCP4-LISTEN:40000,bind=127.0.0.1 SYSTEM:cat"
    script = (
        "ip link set lo up && "
        "echo 40000 40000 >/proc/sys/net/ipv4/ip_local_port_range && "
        + (
            f"{{ {listener} & }} && "
            "until grep -q :9C40.*:0000.0A /proc/net/tcp; do sleep 0.1; done && "
            if listens
            else ""
        )
        + f"exec {BIND} 40000-{source}"
    )
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen(
            ["unshare", "-rn", "sh", "-c", script],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={**os.environ, "PATH": with_logger(tmp_path)},
            text=True,
        )
        theirs.close()
        if listens:
            ours.shutdown(socket.SHUT_WR)
        _, said = process.communicate(timeout=PATIENCE)
    if "unshare" in said or "ip: " in said or "ip_local_port_range" in said:
        pytest.skip(f"no network of one's own here: {said.strip()}")
    assert (process.returncode == 0) == listens, said
    assert process.returncode != 2
    assert ("nobody listens there" in said) != listens
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert ("could not connect to " in line) != listens


def start_service(
    pretend: Pretend, service: str, **env: str
) -> tuple[subprocess.Popen[bytes], socket.socket, socket.socket]:
    """Run SERVICE+ARGUMENT as qrexec-agent does, on two pairs of sockets; and
    the agent's end of its input and of its output."""
    name, _, argument = service.partition("+")
    own_in, its_in = socket.socketpair()
    own_out, its_out = socket.socketpair()
    with its_in, its_out:
        process = subprocess.Popen(
            [RPC / name, argument],
            stdin=its_in,
            stdout=its_out,
            env={
                **os.environ,
                "XDG_RUNTIME_DIR": str(pretend.qube() / "run"),
                "QREXEC_REMOTE_DOMAIN": "work",
                **env,
            },
            start_new_session=True,
        )
    return process, own_in, own_out


@pytest.mark.parametrize("how", ["closes", "reads no more"])
def test_a_service_that_says_nothing_ends_when_its_caller_has_gone(
    pretend: Pretend,
    reach: Callable[[Callable[[socket.socket], object]], str],
    how: str,
) -> None:
    """qrexec-agent lives on until the service has ended: what goes with the
    caller is that it reads."""
    seen, over = threading.Event(), threading.Event()

    def wait(sock: socket.socket) -> bytes:
        seen.set()
        over.wait(10 * PATIENCE)
        return b""

    process, own_in, own_out = start_service(pretend, reach(wait))
    assert seen.wait(PATIENCE)
    if how == "closes":
        own_in.close()
        own_out.close()
    else:
        own_in.shutdown(socket.SHUT_WR)
        own_out.shutdown(socket.SHUT_RD)
    assert process.wait(PATIENCE) != 0
    over.set()
    own_in.close()
    own_out.close()

    def nobody() -> bool:
        listed = subprocess.run(
            ["pgrep", "-s", str(process.pid)], capture_output=True, check=False
        )
        return not listed.stdout

    wait_until("no process is left", nobody)


def test_what_a_caller_sent_before_it_went_arrives_however_late(
    pretend: Pretend,
    tmp_path: Path,
    reach: Callable[[Callable[[socket.socket], object]], str],
) -> None:
    """Nothing tells a service that is slow from one that never reads."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "sleep").write_text("#!/bin/sh\nexec /bin/sleep 0.01\n")
    (programs / "sleep").chmod(0o755)
    late = threading.Event()
    received: list[bytes] = []

    def read_late(sock: socket.socket) -> None:
        late.wait(PATIENCE)
        received.append(read_all(sock))

    process, own_in, own_out = start_service(
        pretend, reach(read_late), PATH=f"{programs}:{os.environ['PATH']}"
    )
    # As much as all buffers hold: more than the service's own.
    own_in.settimeout(1)
    data, sent = random_bytes(16), 0
    with own_in, own_out, contextlib.suppress(TimeoutError):
        while True:
            sent += own_in.send(data[sent : sent + 4096])
    assert 4096 < sent < len(data)
    time.sleep(0.5)  # in which its going could be looked for many times
    late.set()
    process.wait(PATIENCE)
    wait_until("the service has all", lambda: received)
    assert digest(received[0]) == digest(data[:sent])


def test_each_call_is_one_line_of_the_journal(
    pretend: Pretend, tmp_path: Path
) -> None:
    path = with_logger(tmp_path)
    server = pretend.serve_tcp(echo)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    for argument, code in (
        (f"{server.port}-127.0.0.1", 0),
        ("80", 2),
        (f"{closed}-127.0.0.1", 1),
    ):
        ours, theirs = socket.socketpair()
        with ours:
            process = subprocess.Popen(
                [BIND, argument],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                env={
                    "PATH": path,
                    "QREXEC_REMOTE_DOMAIN": "work",
                },
            )
            theirs.close()
            ours.shutdown(socket.SHUT_WR)
            assert process.wait(PATIENCE) == code
    served, refused, failed = (tmp_path / "log").read_text().splitlines()
    assert "-t qubes.ConnectTCPBind" in served
    assert served.endswith(
        f"work: connected to 127.0.0.1:{server.port} from 127.0.0.1,"
        " exit code 0"
    )
    assert "work: refused: the argument holds no" in refused
    assert failed.endswith(
        f"work: could not connect to 127.0.0.1:{closed} from 127.0.0.1,"
        " exit code 1"
    )


@pytest.mark.parametrize("script", [UNIX, BIND])
def test_a_journal_that_does_not_read_holds_no_call(
    tmp_path: Path, script: Path
) -> None:
    path = with_logger(tmp_path)
    os.mkfifo(tmp_path / "log")
    process = subprocess.Popen(
        [script, ".refused"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": path},
    )
    try:
        assert process.wait(PATIENCE) == 2
    finally:
        # Who still waits for a reader of the FIFO has one.
        os.close(os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK))
        process.wait()


def test_a_call_to_a_unix_socket_is_one_line_of_the_journal(
    pretend: Pretend, tmp_path: Path
) -> None:
    path, folder = with_logger(tmp_path), tmp_path / "qubes.ConnectUnix"
    folder.mkdir()
    pretend.serve_unix(folder / "there", echo)
    bound_unix_socket(folder / "dead").close()
    for name, code in (("there", 0), ("dead", 1), ("none", 1)):
        ours, theirs = socket.socketpair()
        with ours:
            process = subprocess.Popen(
                [UNIX, name],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                env={
                    "PATH": path,
                    "QREXEC_REMOTE_DOMAIN": "work",
                    "XDG_RUNTIME_DIR": str(tmp_path),
                },
            )
            theirs.close()
            ours.shutdown(socket.SHUT_WR)
            assert process.wait(PATIENCE) == code
    there, dead, none = (tmp_path / "log").read_text().splitlines()
    assert there.endswith("work: connected to there, exit code 0")
    assert dead.endswith("work: could not connect to dead, exit code 1")
    assert "work: failed: cannot connect to" in none
    # As `published` understands them.
    lines = [line.partition(" -- ")[2] for line in (there, dead, none)]
    assert parse_calls([*lines, lines[0]]) == {
        "there": (2, 0),
        "dead": (1, 1),
        "none": (1, 1),
    }


@pytest.fixture(params=["unix", "tcp"])
def reach(
    request: pytest.FixtureRequest, pretend: Pretend
) -> Callable[[Callable[[socket.socket], object]], str]:
    """Start a server with a handler, and name the call that reaches it."""

    def start(handle: Callable[[socket.socket], object]) -> str:
        if request.param == "tcp":
            return f"qubes.ConnectTCPBind+{pretend.serve_tcp(handle).port}-127.0.0.9"
        folder = pretend.qube() / "run" / "qubes.ConnectUnix"
        folder.mkdir(parents=True)
        pretend.serve_unix(folder / "server", handle)
        return "qubes.ConnectUnix+server"

    return start


def test_a_reply_after_the_clients_half_close_arrives(
    pretend: Pretend, reach: Callable[[Callable[[socket.socket], object]], str]
) -> None:
    call = pretend.call("work", reach(late_reply))
    assert call.converse(b"question") == b"late: question"
    assert call.wait() == 0


def test_what_the_client_sends_after_the_services_half_close_arrives(
    pretend: Pretend, reach: Callable[[Callable[[socket.socket], object]], str]
) -> None:
    received: list[bytes] = []
    half_closed = threading.Event()

    def listen(sock: socket.socket) -> None:
        sock.sendall(b"ready")
        sock.shutdown(socket.SHUT_WR)
        received.append(read_all(sock))
        half_closed.set()

    call = pretend.call("work", reach(listen))
    assert read_all(call.sock) == b"ready"
    assert call.process.poll() is None
    data = random_bytes(1)
    call.sock.sendall(data)
    call.sock.shutdown(socket.SHUT_WR)
    assert half_closed.wait(PATIENCE)
    assert received == [data]
    assert call.wait() == 0


@pytest.mark.parametrize("kind", ["pipes", "sockets"])
def test_the_end_of_the_services_output_shows_on_pipes_and_on_sockets(
    pretend: Pretend, kind: str
) -> None:
    def goodbye(sock: socket.socket) -> bytes:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)

    server = pretend.serve_tcp(goodbye)
    if kind == "pipes":
        (input_end, to_script), (from_script, output_end) = os.pipe(), os.pipe()
    else:
        pairs = (*socket.socketpair(), *socket.socketpair())
        input_end, to_script, from_script, output_end = (
            sock.detach() for sock in pairs
        )
    with open(to_script, "wb") as send, open(from_script, "rb") as receive:
        process = subprocess.Popen(
            [BIND, f"{server.port}-127.0.0.1"],
            stdin=input_end,
            stdout=output_end,
        )
        os.close(input_end)
        os.close(output_end)
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        assert receive.read() == b"bye"
        assert process.poll() is None
        send.write(b"more")
        send.close()
        assert process.wait(PATIENCE) == 0
        watchdog.cancel()
    wait_until("the service has it", lambda: server.results == [b"more"])


def test_64_mebibytes_go_both_ways_at_once(
    pretend: Pretend, reach: Callable[[Callable[[socket.socket], object]], str]
) -> None:
    """socat's writes block: with -b 262144 this stops for ever after a few
    megabytes on a unix socket."""
    data = random_bytes(64)
    call = pretend.call("work", reach(echo))
    assert digest(call.converse(data)) == digest(data)
    assert call.wait() == 0


def test_when_the_service_ends_the_connection_the_call_ends(
    pretend: Pretend, reach: Callable[[Callable[[socket.socket], object]], str]
) -> None:
    call = pretend.call("work", reach(lambda sock: sock.recv(1)))
    call.sock.sendall(b"x")
    assert read_all(call.sock) == b""
    call.sock.shutdown(socket.SHUT_WR)
    assert call.wait() == 0


# -- what they run


@pytest.fixture
def tracer(tmp_path: Path) -> Path:
    """A folder for PATH in which `socat` only writes down its arguments,
    NUL-terminated, and a newline."""
    folder = tmp_path / "tracer"
    folder.mkdir()
    socat = folder / "socat"
    socat.write_text(
        f"#!/bin/sh\nprintf '%s\\0' \"$@\" '\n' >> {folder}/arguments\n"
    )
    socat.chmod(0o755)
    return folder


def traced(tracer: Path) -> list[list[str]]:
    path = tracer / "arguments"
    if not path.exists():
        return []
    calls = path.read_bytes().decode().split("\n\0")
    return [call.split("\0")[:-1] for call in calls if call]


def option(arguments: Sequence[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_the_reply_may_take_hours_and_the_buffer_is_large(
    tracer: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "qubes.ConnectUnix"
    folder.mkdir()
    bound_unix_socket(folder / "name").close()
    assert run(
        UNIX,
        "name",
        PATH=f"{tracer}:/usr/bin:/bin",
        XDG_RUNTIME_DIR=str(tmp_path),
    ) == (0, "")
    assert run(BIND, "2049-127.0.1.1", PATH=str(tracer)) == (0, "")
    assert run(BIND, "2049-fd00++7", PATH=str(tracer)) == (0, "")
    unix, ipv4, ipv6 = traced(tracer)
    for arguments in (unix, ipv4, ipv6):
        # In milliseconds it must fit the int that poll() takes.
        assert 3600 <= int(option(arguments, "-t")) < 2**31 // 1000
        assert 65536 <= int(option(arguments, "-b")) < 262144
        assert arguments[-2] in (
            "STDIN!!STDOUT,shut-close",
            "STDIN!!STDOUT,shut-down",
        )
    assert unix[-1] == "UNIX-CONNECT:./name"
    assert ipv4[-1].startswith("TCP4:127.0.0.1:2049,bind=127.0.1.1,")
    assert ipv6[-1].startswith("TCP6:[::1]:2049,bind=[fd00::7],")


def random_arguments(seeds: Sequence[str]) -> list[str]:
    """Arguments near to good ones, and far from them; no NUL, which no argument
    can hold."""
    chance = random.Random(1234)
    alphabet = (
        "0123456789abcdefABCDEF.+-" * 3
        + "xyz_:,!/\\ '\"`$()[]{};&|<>*?~#\n\t\x7fé"
        + string.ascii_letters
    )
    arguments = []
    for _ in range(ATTEMPTS):
        text = list(chance.choice(seeds))
        for _ in range(chance.randrange(4)):
            place = chance.randrange(len(text) + 1)
            if chance.random() < 0.5:
                text[place : place + chance.randrange(3)] = chance.choice(
                    alphabet
                )
            else:
                text[place : place + chance.randrange(3)] = []
        arguments.append("".join(text))
    return arguments


def run_many(
    script: Path,
    arguments: list[str],
    folder: Path,
    tracer: Path,
    shell: str,
    **env: str,
) -> list[int]:
    """The exit code for each argument. PATH holds nothing but the tracer: no
    other program may be run at all."""
    listed = folder / "arguments-to-try"
    listed.write_bytes(
        b"".join(argument.encode() + b"\0" for argument in arguments)
    )
    driver = (
        'while IFS= read -r -d "" x; do "$0" "$1" "$x" </dev/null'
        " 2>/dev/null; echo $?; done"
    )
    with listed.open("rb") as stdin:
        done = subprocess.run(
            ["/bin/bash", "-c", driver, shell, str(script)],
            stdin=stdin,
            capture_output=True,
            timeout=5 * PATIENCE,
            check=True,
            env={"PATH": str(tracer), **env},
        )
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(arguments)
    return codes


def bind_address(
    argument: str,
) -> tuple[int, ipaddress.IPv4Address | ipaddress.IPv6Address] | None:
    """What PORT-ADDRESS means, by other means than the script's; None if it
    means nothing."""
    port, dash, text = argument.partition("-")
    if not dash or not (
        port.isascii()
        and port.isdigit()
        and port[0] != "0"
        and 0 < int(port) < 65536
    ):
        return None
    try:
        packed, family = socket.inet_pton(socket.AF_INET, text), socket.AF_INET
    except (OSError, ValueError):
        try:
            family = socket.AF_INET6
            packed = socket.inet_pton(family, text.replace("+", ":"))
        except (OSError, ValueError):
            return None
    # Of all spellings of an address there is but one.
    if socket.inet_ntop(family, packed).replace(":", "+") != text:
        return None
    address = ipaddress.ip_address(packed)
    if address.is_unspecified or address.is_multicast:
        return None
    if family == socket.AF_INET:
        first, last = packed[0], packed[-1]
        return (
            None
            if not 0 < first < 224 or last in (0, 255)
            else (int(port), address)
        )
    return None if "." in text else (int(port), address)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_only_a_whole_port_and_address_ever_reach_socat(
    tracer: Path, tmp_path: Path, shell: str
) -> None:
    seeds = [
        "2049-127.0.1.1",
        "1-fd00++7",
        "65535-223.249.199.100",
        "80-1+2+3+4+5+6+7+8",
        "9-++1",
        "9-a+b++",
        "9-fe80++1+0+0+2",
        "9-1+0+0+2++3",
        "",
    ]
    arguments = random_arguments(seeds) + seeds
    codes = run_many(BIND, arguments, tmp_path, tracer, shell)
    meant = [bind_address(argument) for argument in arguments]
    assert codes == [2 if each is None else 0 for each in meant]
    good = [each for each in meant if each]
    assert len(good) > ATTEMPTS / 10
    calls = traced(tracer)
    assert len(calls) == len(good)
    for call, (port, address) in zip(calls, good, strict=True):
        kind, target, bound = (
            call[-1].split(",")[0].partition(":")[0],
            *call[-1].split(",")[:2],
        )
        loopback, text = (
            ("127.0.0.1", bound[5:])
            if address.version == 4
            else ("[::1]", bound[6:-1])
        )
        assert (kind, target) == (
            f"TCP{address.version}",
            f"TCP{address.version}:{loopback}:{port}",
        )
        assert bound.startswith("bind=")
        assert ipaddress.ip_address(text) == address


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_only_one_plain_name_ever_reaches_socat(
    tracer: Path, tmp_path: Path, shell: str
) -> None:
    (tmp_path / "qubes.ConnectUnix").mkdir()
    arguments = random_arguments(
        [
            "agent",
            "a.b",
            "-V",
            "a,b",
            "a/b",
            "..",
            "",
            "S.gpg-agent+x",
            "n" * 104,
        ]
    )
    good = [
        argument
        for argument in arguments
        if argument
        and argument[0] != "."
        and len(argument) <= 105
        and set(argument) <= PLAIN
    ]
    assert len(good) > ATTEMPTS / 10
    for name in set(good):
        bound_unix_socket(tmp_path / "qubes.ConnectUnix" / name).close()
    codes = run_many(
        UNIX, arguments, tmp_path, tracer, shell, XDG_RUNTIME_DIR=str(tmp_path)
    )
    assert {
        argument
        for argument, code in zip(arguments, codes, strict=True)
        if code == 0
    } == set(good)
    assert set(codes) == {0, 2}
    assert [call[-1] for call in traced(tracer)] == [
        f"UNIX-CONNECT:./{name}" for name in good
    ]


PLAIN = set(string.ascii_letters + string.digits + "_-.+")


# -- what they refuse


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("", "is empty"),
        (".hidden", "begins with a dot"),
        ("..", "begins with a dot"),
        ("a/b", "holds a slash"),
        ("a,b", "a character other than"),
        ("a b", "a character other than"),
        ("a\nb", "a character other than"),
        ("é", "a character other than"),
        ("$(id)", "a character other than"),
        ("x" * 106, "longer than 105"),
    ],
)
def test_connect_unix_says_what_is_wrong_with_a_name(
    tracer: Path, argument: str, problem: str
) -> None:
    code, message = run(UNIX, argument, PATH=str(tracer))
    assert code == 2
    assert message.startswith("qubes.ConnectUnix: ")
    assert problem in message
    assert traced(tracer) == []


@pytest.mark.parametrize(
    ("argument", "problem"),
    [
        ("", "is empty"),
        ("2049", 'holds no "-"'),
        ("2049-", "address"),
        ("-127.0.0.1", "port"),
        ("0-127.0.0.1", 'port "0"'),
        ("080-127.0.0.1", 'port "080"'),
        ("65536-127.0.0.1", "1 to 65535"),
        ("99999999999999999999-1.1.1.1", "port"),
        ("http-127.0.0.1", 'port "http"'),
        ("80-127.0.0.256", "no IPv4 address"),
        ("80-127.0.0.01", "no IPv4 address"),
        ("80-127.0.0", "no IPv4 address"),
        ("80-127.0.0.1.1", "no IPv4 address"),
        ("80-localhost", "no IPv4 address"),
        ("80-0.0.0.0", "none of a single host"),
        ("80-++", "none of a single host"),
        ("80-0+0++0", "in its shortest form"),
        ("80-1++2++3", "no IPv6 address"),
        ("80-+++1", "no IPv6 address"),
        ("80-+1", "no IPv6 address"),
        ("80-1+2+3", "no IPv6 address"),
        ("80-1+2+3+4+5+6+7+8+9", "no IPv6 address"),
        ("80-1+2+3+4++5+6+7+8", "no IPv6 address"),
        ("80-12345++", "no IPv6 address"),
        ("80-fe80++1-eth0", "no IPv6 address"),
        ("80-++1.2.3.4", "no IPv6 address"),
        ("80-::1", "a character other than"),
        ("80-127.0.0.1,fork", "a character other than"),
        ("80-127.0.0.1!!x", "a character other than"),
        ("80-127.0.0.1\n", "a character other than"),
        ("1-" + "1" * 60, "too long"),
    ],
)
def test_connect_tcp_bind_says_what_is_wrong_with_an_argument(
    tracer: Path, argument: str, problem: str
) -> None:
    code, message = run(BIND, argument, PATH=str(tracer))
    assert code == 2
    assert message.startswith("qubes.ConnectTCPBind: ")
    assert problem in message
    assert traced(tracer) == []


@pytest.mark.parametrize("script", [UNIX, BIND])
def test_the_argument_may_come_from_qrexecs_variable_and_must_not_contradict_it(
    tracer: Path, script: Path
) -> None:
    good = "2049-127.0.1.1"
    assert run(script, PATH=str(tracer))[0] == 2
    assert run(script, good, "x", PATH=str(tracer))[0] == 2
    code, message = run(
        script, good, PATH=str(tracer), QREXEC_SERVICE_ARGUMENT="other"
    )
    assert (code, "differ" in message) == (2, True)
    if script == BIND:
        assert run(script, PATH=str(tracer), QREXEC_SERVICE_ARGUMENT=good) == (
            0,
            "",
        )
        assert run(
            script, good, PATH=str(tracer), QREXEC_SERVICE_ARGUMENT=good
        ) == (0, "")


def test_a_bad_argument_ends_the_call_with_2_and_its_reason(
    pretend: Pretend,
) -> None:
    done = pretend.run("work", "qubes.ConnectTCPBind+http-127.0.0.1")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b'the port "http" is not a number from 1 to 65535' in done.stderr


# -- what they say when the service is not there


def test_a_missing_socket_is_named(pretend: Pretend, sockets: Path) -> None:
    done = pretend.run("work", "qubes.ConnectUnix+none")
    assert done.returncode == 1
    assert (
        f"cannot connect to {sockets}/none: there is no such socket"
        in done.stderr.decode()
    )
    (sockets / "dangling").symlink_to("/nowhere/at/all")
    assert (
        b"there is no such socket"
        in pretend.run("work", "qubes.ConnectUnix+dangling").stderr
    )
    (sockets / "file").touch()
    assert (
        b"it is not a socket"
        in pretend.run("work", "qubes.ConnectUnix+file").stderr
    )


def test_a_missing_folder_of_sockets_is_named(pretend: Pretend) -> None:
    done = pretend.run("work", "qubes.ConnectUnix+none")
    assert done.returncode == 1
    assert (
        f"there is no folder {pretend.qube()}/run/qubes.ConnectUnix"
        in done.stderr.decode()
    )


def test_a_socket_that_nobody_listens_on_is_named(
    pretend: Pretend, sockets: Path
) -> None:
    bound_unix_socket(sockets / "dead").close()
    done = pretend.run("work", "qubes.ConnectUnix+dead")
    assert done.returncode == 1
    assert "dead" in done.stderr.decode()
    assert b"Connection refused" in done.stderr


@pytest.mark.parametrize(
    "folder",
    ["a,b:c!!d", 'it\'s "here" (now) [x] {y}', "x" * 250 + "/" + "y" * 250],
)
def test_any_runtime_folder_will_do_and_is_named(
    tmp_path: Path, folder: str
) -> None:
    sockets = tmp_path / folder / "qubes.ConnectUnix"
    sockets.mkdir(parents=True)
    name = "n" * 105
    bound_unix_socket(sockets / name).close()
    code, message = run(UNIX, name, XDG_RUNTIME_DIR=str(tmp_path / folder))
    assert code == 1
    assert "Connection refused" in message
    assert name in message


def test_the_runtime_folder_is_that_of_the_user_by_default() -> None:
    code, message = run(UNIX, "no-such-socket-here")
    assert code == 1
    assert f"/run/user/{os.getuid()}/qubes.ConnectUnix" in message
    assert run(UNIX, "name", XDG_RUNTIME_DIR="relative")[0] == 1


def test_a_closed_port_is_named_with_the_address_that_was_tried(
    pretend: Pretend,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = pretend.run("work", f"qubes.ConnectTCPBind+{port}-127.0.1.1")
    assert done.returncode == 1
    assert f"127.0.0.1:{port} from 127.0.1.1" in done.stderr.decode()
    assert b"Connection refused" in done.stderr


@needs_ipv6
def test_an_address_that_is_not_there_to_bind_to_is_named(
    pretend: Pretend,
) -> None:
    done = pretend.run("work", "qubes.ConnectTCPBind+2049-fd00++7")
    assert done.returncode == 1
    assert "[::1]:2049 from [fd00::7]" in done.stderr.decode()


@pytest.mark.parametrize(
    ("script", "argument"), [(UNIX, "name"), (BIND, "2049-127.0.1.1")]
)
def test_a_missing_socat_is_named(
    tmp_path: Path, script: Path, argument: str
) -> None:
    folder = tmp_path / "qubes.ConnectUnix"
    folder.mkdir()
    bound_unix_socket(folder / "name").close()
    programs = with_logger(tmp_path).partition(":")[0]
    code, message = run(
        script, argument, PATH=programs, XDG_RUNTIME_DIR=str(tmp_path)
    )
    assert code == 1
    assert "socat is not installed" in message
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert (
        f"unknown caller: failed: {message.partition(': ')[2]}" in f"{line}\n"
    )


# -- what they ask of qrexec


def test_connect_unix_waits_for_the_session_and_nothing_disables_the_fast_path() -> (
    None
):
    for script, expected in (
        (UNIX, {"wait-for-session=true"}),
        (BIND, {"wait-for-session=false"}),
    ):
        text = (RPC / "rpc-config" / script.name).read_text()
        assert {
            line
            for line in text.splitlines()
            if line and not line.startswith("#")
        } == expected


def test_shellcheck_finds_nothing() -> None:
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", UNIX, BIND],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == ""


def test_a_client_that_vanishes_takes_the_service_with_it(
    pretend: Pretend, sockets: Path
) -> None:
    arrived = threading.Event()

    def read(sock: socket.socket) -> bytes:
        first = sock.recv(1)
        arrived.set()
        return first + read_all(sock)

    server = pretend.serve_unix(sockets / "server", read)
    call = pretend.call("work", "qubes.ConnectUnix+server")
    call.sock.sendall(b"x")
    assert arrived.wait(PATIENCE)
    call.process.kill()
    wait_until("the server sees the end", lambda: server.results == [b"x"])
