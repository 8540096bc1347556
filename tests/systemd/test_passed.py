"""What an inherited descriptor is, and what it is called."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrexec_activate.routing.claim import PassedSocket
from qrexec_activate.systemd.passed import (
    describe,
    format_address,
    split_names,
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with a path that is short enough for a socket."""
    name = Path(f"/tmp/passed-{os.getpid()}")
    name.mkdir()
    yield name
    for path in name.iterdir():
        path.unlink()
    name.rmdir()


def listener(
    family: int, address: object, kind: int = socket.SOCK_STREAM
) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.bind(address)  # type: ignore[arg-type]  # of any family
    if kind != socket.SOCK_DGRAM:
        sock.listen()
    return sock


@pytest.mark.parametrize(
    ("family", "name", "text"),
    [
        (socket.AF_INET, ("127.0.0.1", 80), "127.0.0.1:80"),
        (socket.AF_INET6, ("::1", 80, 0, 0), "[::1]:80"),
        (socket.AF_INET6, ("::", 80, 0, 0), "[::]:80"),
        (socket.AF_INET6, ("fe80::1", 80, 0, 1), "[fe80::1]:80%lo"),
        (
            socket.AF_INET6,
            ("fe80::1", 80, 0, 2**31 - 1),
            "[fe80::1]:80%2147483647",
        ),
        (socket.AF_UNIX, "/run/x", "/run/x"),
        (socket.AF_UNIX, "/run/a b\n", "/run/a b\\n"),
        (socket.AF_UNIX, os.fsdecode(b"/run/\xff"), "/run/\\377"),
        (socket.AF_UNIX, b"\0abs", "@abs"),
        (socket.AF_UNIX, b"\0a\0b", "@a\\000b"),
        (socket.AF_UNIX, b"\0", "@"),
        (socket.AF_UNIX, "", "unix socket without a name"),
        (socket.AF_UNIX, b"", "unix socket without a name"),
        (socket.AF_VSOCK, (2, 80), "vsock:2:80"),
        (socket.AF_VSOCK, (0xFFFFFFFF, 80), "vsock::80"),
        (socket.AF_NETLINK, (0, 0), "socket of address family 16"),
        (socket.AF_INET, None, "socket of address family 2"),
    ],
)
def test_an_address_is_written_as_systemd_writes_it(
    family: int, name: object, text: str
) -> None:
    assert format_address(family, name) == text


@given(st.binary(max_size=100))
def test_every_path_is_written_in_one_line(raw: bytes) -> None:
    for name in (os.fsdecode(raw), b"\0" + raw):
        assert len(format_address(socket.AF_UNIX, name).splitlines()) == 1


def test_listeners_are_streams_with_their_addresses(folder: Path) -> None:
    path = f'{folder}/späce "x"'
    with (
        listener(socket.AF_INET, ("127.0.0.1", 0)) as tcp,
        listener(socket.AF_UNIX, path) as unix,
        listener(socket.AF_UNIX, f"\0{path}") as abstract,
    ):
        port = tcp.getsockname()[1]
        shown = f'{folder}/sp\\303\\244ce \\"x\\"'
        assert describe(tcp.fileno(), "work") == PassedSocket(
            tcp.fileno(), "work", "Stream", f"127.0.0.1:{port}"
        )
        assert describe(unix.fileno(), "").address == shown
        assert describe(abstract.fileno(), "").address == f"@{shown}"
        # The descriptor is only looked at.
        assert tcp.getsockname()[1] == port


def test_what_is_no_listener_is_called_by_its_kind(folder: Path) -> None:
    with listener(socket.AF_INET, ("127.0.0.1", 0), socket.SOCK_DGRAM) as udp:
        assert describe(udp.fileno(), "").kind == "Datagram"
    with listener(
        socket.AF_UNIX, f"{folder}/seq", socket.SOCK_SEQPACKET
    ) as seqpacket:
        assert describe(seqpacket.fileno(), "").kind == "SequentialPacket"
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        assert describe(netlink.fileno(), "").kind == "Netlink"
    left, right = socket.socketpair()
    with left, right:
        assert describe(left.fileno(), "") == PassedSocket(
            left.fileno(), "", "Connection", "unix socket without a name"
        )
    os.mkfifo(folder / "fifo")
    fifo = os.open(folder / "fifo", os.O_RDWR)
    device = os.open("/dev/null", os.O_RDWR)
    try:
        assert describe(fifo, "work") == PassedSocket(
            fifo, "work", "FIFO", f"{folder}/fifo"
        )
        assert describe(device, "") == PassedSocket(
            device, "", "Special", "/dev/null"
        )
    finally:
        os.close(fifo)
        os.close(device)


def test_a_closed_descriptor_is_an_error() -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        describe(fd, "")


SHOW = """
import os
from qrexec_activate.systemd.passed import passed_sockets
for _ in range(2):
    for item in passed_sockets():
        print(item.fd, item.name, item.kind, item.address, os.get_inheritable(item.fd))
print(sorted(name for name in os.environ if name.startswith("LISTEN_")))
"""


def test_sockets_are_taken_over_once_in_order_and_closed_to_children() -> None:
    with (
        listener(socket.AF_INET, ("127.0.0.1", 0)) as one,
        listener(socket.AF_INET, ("127.0.0.1", 0)) as two,
    ):
        ports = [sock.getsockname()[1] for sock in (one, two)]
        start = (
            f"import os, sys; os.dup2({one.fileno()}, 200);"
            f" os.dup2({two.fileno()}, 201); os.dup2(200, 3);"
            "os.dup2(201, 4); os.environ.update(LISTEN_PID=str(os.getpid()),"
            " LISTEN_FDS='2',"
            "LISTEN_FDNAMES='gitweb:work'); exec(sys.argv[1])"
        )
        result = subprocess.run(
            [sys.executable, "-c", start, SHOW],
            pass_fds=(one.fileno(), two.fileno()),
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
    assert result.stdout.splitlines() == [
        f"3 gitweb Stream 127.0.0.1:{ports[0]} False",
        f"4 work Stream 127.0.0.1:{ports[1]} False",
        "[]",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["work"],
        ["work", "work", "gitweb"],
        ["@dispvm\\x3adebian-dvm", "work", "@dispvm"],
        [""],
        ["", ""],
        ["qrexec-connect-tcp@1234.socket", "work"],
        ["qrexec-connect-tcp@1234:work.socket", "work"],
        [
            "work",
            "qrexec-connect-tcp@1:a:b.socket",
            "my@2:c.socket",
            "@default",
        ],
    ],
)
def test_names_are_split_as_systemd_joined_them(names: list[str]) -> None:
    assert split_names(":".join(names), len(names)) == names


@pytest.mark.parametrize(
    ("text", "count"), [("a:b", 1), ("a", 2), ("x@1:a:b", 2), ("", 2)]
)
def test_names_that_do_not_fit_are_an_error(text: str, count: int) -> None:
    with pytest.raises(ValueError, match="LISTEN_FDNAMES"):
        split_names(text, count)
