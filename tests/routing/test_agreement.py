"""What systemd itself says of generated unit files, beside what is read from
them here.

Every batch is written for a real user manager, which reloads once; the seeds
are fixed, so that a failure comes back.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from qrexec_activate.loopback.machine import Machine
from qrexec_activate.routing.address import (
    AddressKey,
    address_key,
    expand_specifiers,
    written_key,
)
from qrexec_activate.routing.claim import Refusal
from qrexec_activate.routing.routes import SocketUnit, claims, unit_specifiers
from qrexec_activate.routing.unitfile import (
    assignments,
    declared_listeners,
    is_fd_name,
)
from qrexec_activate.systemd.passed import describe
from qrexec_activate.systemd.units import Manager, open_manager

#: The files of one unit: the fragment, then drop-ins.
Files = Sequence[bytes]


class Systemd:
    """A user manager that is given units, and says how it has loaded them."""

    def __init__(self, machine: Machine, manager: Manager) -> None:
        self.machine = machine
        self.manager = manager
        self._batches = 0

    def load(self, batch: Sequence[Files]) -> list[SocketUnit]:
        self._batches += 1
        names = [
            f"agree-batch{self._batches}-u{number}@1234.socket"
            for number in range(len(batch))
        ]
        for name, files in zip(names, batch, strict=True):
            folder = self.machine.unit_dir / f"{name}.d"
            folder.mkdir()
            (self.machine.unit_dir / name).write_bytes(files[0])
            for number, content in enumerate(files[1:]):
                (folder / f"{number:02}.conf").write_bytes(content)
        self.machine.systemctl("daemon-reload")
        units = self.manager.socket_units(names)
        assert [unit.name for unit in units] == names
        assert not [
            file.problem
            for unit in units
            for file in unit.files
            if file.problem
        ]
        return units


@pytest.fixture(scope="module")
def systemd() -> Iterator[Systemd]:
    with Machine() as machine, pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "HOME"):
            patch.setenv(name, machine.environment[name])
        with open_manager(user=True) as manager:
            yield Systemd(machine, manager)


def unit_file(*lines: str) -> bytes:
    return "\n".join(("[Socket]", *lines, "")).encode()


def read_here(
    systemd: Systemd, unit: SocketUnit
) -> list[tuple[str, AddressKey]]:
    """The stream and datagram listeners that are understood here, as (kind,
    address)."""
    specifiers = unit_specifiers(unit.name, systemd.manager.specifiers())
    found = []
    for item in declared_listeners(unit.files).listeners:
        expanded = expand_specifiers(item.address, specifiers)
        key = None if expanded is None else written_key(expanded)
        if item.kind in ("Stream", "Datagram") and key is not None:
            found.append((item.kind, key))
    return found


def said_by_systemd(unit: SocketUnit) -> list[tuple[str, AddressKey | None]]:
    return [
        (kind, address_key(address))
        for kind, address in unit.listen
        if kind in ("Stream", "Datagram")
    ]


def name_here(systemd: Systemd, unit: SocketUnit) -> str:
    """The last FileDescriptorName that systemd takes."""
    specifiers = unit_specifiers(unit.name, systemd.manager.specifiers())
    result = unit.name
    for name in declared_listeners(unit.files).names:
        expanded = expand_specifiers(name.text, specifiers)
        if not name.text:
            result = unit.name
        elif expanded is not None and is_fd_name(expanded):
            result = expanded
    return result


# -------------------------------------------------------- addresses, one by one


TAKEN = {
    "1299": ("ip", "::", 1299),
    "65535": ("ip", "::", 65535),
    "127.0.0.1:80": ("ip", "127.0.0.1", 80),
    "0.0.0.0:80": ("ip", "0.0.0.0", 80),
    "[::1]:80": ("ip", "::1", 80),
    "[0:0::0001]:80": ("ip", "::1", 80),
    "[FD00::AB]:80": ("ip", "fd00::ab", 80),
    "[1:2:3:4:5:6:7::]:1": ("ip", "1:2:3:4:5:6:7:0", 1),
    "[::ffff:127.0.0.1]:80": ("ip", "::ffff:127.0.0.1", 80),
    "[::127.0.0.1]:80": ("ip", "::127.0.0.1", 80),
    # The kernel forgets the interface of an address that is not link-local.
    "[::1]:80%%lo": ("ip", "::1", 80),
    "[fe80::1]:80%%lo": ("ip", "fe80::1%lo", 80),
    "[fe80::1]:80": ("ip", "fe80::1", 80),
    "/run/x": ("path", "/run/x", 0),
    "/var/run/x": ("path", "/run/x", 0),
    "//run///x": ("path", "/run/x", 0),
    "/run/./x": ("path", "/run/x", 0),
    "/run/a b": ("path", "/run/a b", 0),
    "/run/späce": ("path", r"/run/sp\303\244ce", 0),
    "/run/q\"'uo\\te": ("path", r"/run/q\"\'uo\\te", 0),
    "/run/tab\tx": ("path", r"/run/tab\tx", 0),
    "/run/x ; y": ("path", "/run/x ; y", 0),
    "/run/x#y": ("path", "/run/x#y", 0),
    "/run/" + "x" * 102: ("path", "/run/" + "x" * 102, 0),
    "@abs": ("abstract", "@abs", 0),
    "@@x": ("abstract", "@@x", 0),
    "@//x/": ("abstract", "@//x/", 0),
    "@a\\x20b": ("abstract", r"@a\\x20b", 0),
    "@ä": ("abstract", r"@\303\244", 0),
    "@" + "x" * 106: ("abstract", "@" + "x" * 106, 0),
    "@%i-%I-%n-%N-%p-%j": (
        "abstract",
        "@1234-1234-{name}-{stem}-{prefix}-{last}",
        0,
    ),
    "@%P": ("abstract", "@{slashes}", 0),
    "@%u-%U": ("abstract", "@{u}-{U}", 0),
    "%t/x": ("path", "{t}/x", 0),
    "%h/x": ("path", "{h}/x", 0),
    "%i": ("ip", "::", 1234),
    "127.0.0.1:%i": ("ip", "127.0.0.1", 1234),
    "@%%x": ("abstract", "@%x", 0),
    "@100%": ("abstract", "@100%", 0),
    "@%-x": ("abstract", "@%-x", 0),
    "vsock:2:80": ("vsock", "2", 80),
    "vsock::80": ("vsock", "", 80),
    "vsock:4294967295:1": ("vsock", "", 1),
    "vsock::0": ("vsock", "", 0),
}
DROPPED = [
    *(
        "0",
        "127.0.0.1:0",
        "[::1]:0",
        "65536",
        "99999",
        "127.0.0.1:65536",
        "127.0.0.1",
        "127.0.0.1:",
        ":80",
        "*:80",
    ),
    *(
        "localhost:80",
        "::1:80",
        "[127.0.0.1]:80",
        "127.1:80",
        "127.0.0.01:80",
        "[1:2:3:4::5:6:7:8]:1",
        "[::1%%lo]:80",
    ),
    *(
        "127.0.0.1:80#x",
        "[::1]:80%%",
        "[::1]80",
        "[::1]",
        "01299",
        "1 2",
        "\u0661\u0662",
        "127.0.0.\u0661:80",
    ),
    *(
        "/",
        "@",
        "relative",
        "./x",
        '"/run/x"',
        "/run/" + "x" * 103,
        "@" + "x" * 107,
        "/run/" + "ä" * 52,
    ),
    *(
        "vsock::",
        "vsock:80",
        "vsock:2:",
        "vsock::4294967296",
        "vsock:x:1",
    ),
]
#: systemd takes them, but how is not known here: they are never served, and
#: must do the others no harm.
STRANGE = [
    "0x513",
    "0513",
    "+80",
    "127.0.0.1:0x50",
    "127.0.0.1:010",
    "vsock::0x50",
    "vsock: 2:80",
    "[fe80::1]:80%%1",
]
UNKNOWN_SPECIFIERS = ["@%H", "@%m", "@%b"]


def test_an_address_is_taken_as_systemd_takes_it(systemd: Systemd) -> None:
    units = systemd.load(
        [[unit_file(f"ListenStream={text}")] for text in TAKEN]
    )
    specifiers = systemd.manager.specifiers()
    for unit, (text, (family, address, port)) in zip(
        units, TAKEN.items(), strict=True
    ):
        stem = unit.name.removesuffix(".socket")
        prefix = stem.partition("@")[0]
        expected = address.format(
            **specifiers,
            name=unit.name,
            stem=stem,
            prefix=prefix,
            last=prefix.rpartition("-")[2],
            slashes=prefix.replace("-", "/"),
        )
        assert said_by_systemd(unit) == [
            ("Stream", (family, expected, port))
        ], text
        assert read_here(systemd, unit) == said_by_systemd(unit), text


def test_an_address_that_systemd_drops_is_dropped_and_its_neighbours_keep_theirs(
    systemd: Systemd,
) -> None:
    files = [
        [
            unit_file("ListenStream=@before", "FileDescriptorName=fragment"),
            unit_file(f"ListenStream={text}", "FileDescriptorName=bad"),
            unit_file("ListenStream=@after", "FileDescriptorName=after"),
        ]
        for text in DROPPED
    ]
    for unit, text in zip(systemd.load(files), DROPPED, strict=True):
        assert unit.listen == (("Stream", "@before"), ("Stream", "@after")), (
            text
        )
        assert [key for _, key in read_here(systemd, unit)] == [
            address_key("@before"),
            address_key("@after"),
        ], text
        targets = [
            getattr(claim, "target", claim)
            for claim in claims("my.Rpc", unit, systemd.manager.specifiers())
        ]
        assert targets == ["fragment", "after"], text


def test_an_address_that_only_a_newer_systemd_takes_is_not_served(
    systemd: Systemd,
) -> None:
    """262 takes it as vsock::1."""
    (unit,) = systemd.load(
        [
            [
                unit_file("ListenStream=@a", "FileDescriptorName=a"),
                unit_file("ListenStream=vsock:-1:1", "FileDescriptorName=b"),
            ]
        ]
    )
    first, *others = claims("my.Rpc", unit, systemd.manager.specifiers())
    # That systemd drops the name with the address, or does not, is no matter.
    assert getattr(first, "target", "a") == "a"
    assert all(isinstance(claim, Refusal) for claim in others)


@pytest.mark.parametrize("text", STRANGE + UNKNOWN_SPECIFIERS)
def test_an_address_in_a_strange_form_is_refused_alone_and_its_file_named(
    systemd: Systemd, text: str
) -> None:
    (unit,) = systemd.load(
        [
            [
                unit_file(
                    "ListenStream=@before", "FileDescriptorName=fragment"
                ),
                unit_file(f"ListenStream={text}", "FileDescriptorName=strange"),
                unit_file("ListenStream=@after", "FileDescriptorName=after"),
            ]
        ]
    )
    before, strange, after = claims(
        "my.Rpc", unit, systemd.manager.specifiers()
    )
    assert isinstance(strange, Refusal)
    assert "00.conf:2" in strange.reason
    assert f"write {strange.address} there" in strange.reason
    assert [getattr(claim, "target", claim) for claim in (before, after)] == [
        "fragment",
        "after",
    ]


def test_a_bare_port_is_ipv6_any(systemd: Systemd) -> None:
    (unit,) = systemd.load([[unit_file("ListenStream=1299")]])
    assert unit.listen == (("Stream", "[::]:1299"),)


# ------------------------------------------------------------ names, one by one


def test_a_name_that_systemd_ignores_is_known_to_be_ignored(
    systemd: Systemd,
) -> None:
    texts = [
        *(
            "a",
            "a:b",
            "\\x3a",
            "a" * 255,
            "a" * 256,
            "ä",
            "a\x01",
            "a b",
            "a\x7f",
            "",
            "%i",
            "%%",
            "%I",
            "%n",
            "%p-%j",
        ),
        *(
            '"x"',
            "@dispvm\\x3ax",
            "a%",
            "a\tb",
            "%t",
            "%n%n%n%n%n%n%n%n%n",
            ":",
            "%%i",
            "~",
            "'",
        ),
    ]
    files = [
        [
            unit_file(
                "ListenStream=@x",
                "FileDescriptorName=before",
                f"FileDescriptorName={text}",
            )
        ]
        for text in texts
    ]
    for unit, text in zip(systemd.load(files), texts, strict=True):
        assert unit.fd_name == name_here(systemd, unit), text
        (claim,) = claims("my.Rpc", unit, systemd.manager.specifiers())
        assert "but systemd has" not in str(claim), text


# ----------------------------------------------------------- syntax, one by one


SYNTAX = {
    "a joined line": b"ListenStream=@a\\\n  b\n",
    "a comment inside of a joined line": b"ListenStream=\\\n# no\n  ; nor"
    b" this\\\n@a\n",
    "a joined line at the end": b"ListenStream=@a\\",
    "an even number of backslashes": b"ListenStream=@a\\\\\nListenStream=@b\n",
    "a comment that seems to go on": b"# x \\\nListenStream=@a\n",
    "a joined empty line": b"ListenStream=@a\\\n\nListenStream=@b\n",
    "a joined key": b"Listen\\\nStream=@a\n",
    "blanks around": b" \tListenStream\t = @a \t\n",
    "other blanks": b"\x0bListenStream=@a\nListenStream=@b\x0b\x0c\n",
    "no-break space": "ListenStream=@a\u00a0\n\u00a0ListenStream=@b\n".encode(),
    "a byte order mark": b"\xef\xbb\xbf[Socket]\nListenStream=@a\n",
    "a byte order mark late": b"\xef\xbb\xbfListenStream=@a\n\xef\xbb\xbfListenStream=@b\n",
    "a byte order mark before a comment": b"\xef\xbb\xbf# x"
    b" \\\nListenStream=@a\nListenStream=@b\n",
    "a byte order mark in a joined line": b"ListenStream=@a\\\n\xef\xbb\xbfb\n",
    "a byte order mark after a blank": b" \xef\xbb\xbfListenStream=@a\n",
    "bad bytes": b"X=\xff\nListenStream=@a\n",
    "bad bytes in a comment": b"#\xff\nListenStream=@a\n",
    "a noncharacter": "X=\uffff\nListenStream=@a\n".encode(),
    "a noncharacter of another plane": "X=\U0001fffe\nListenStream=@a\n".encode(),
    "the other noncharacters": "X=\ufdd0\nListenStream=@a\n".encode(),
    "the replacement character": "X=\ufffd\nListenStream=@a\n".encode(),
    "an encoded surrogate": b"X=\xed\xa0\x80\nListenStream=@a\n",
    "an overlong zero": b"X=\xc0\x80\nListenStream=@a\n",
    "a quote in a section": b'[X"]\n[Socket]\nListenStream=@a\n',
    "a backslash in a section": b"[X\\x]\n[Socket]\nListenStream=@a\n",
    "a tab in a section": b"[X\tx]\n[Socket]\nListenStream=@a\n",
    "a section beyond ASCII": "[Sä]\nListenStream=@b\n[Socket]\nListenStream=@a\n".encode(),
    "an open section": b"[Foo\nListenStream=@a\n[Socket]\nListenStream=@b\n",
    "an open bracket": b"[\nListenStream=@a\n",
    "blanks in a section": b"[ Socket ]\nListenStream=@a\n",
    "a comment after a section": b"[Socket] # x\nListenStream=@a\n",
    "blanks around a section": b" [Socket] \nListenStream=@a\n",
    "a section in small letters": b"[socket]\nListenStream=@a\n",
    "another section": b"[Unit]\nListenStream=@a\n[Socket]\nListenStream=@b\n",
    "a joined section": b"[Sock\\\net]\nListenStream=@a\n",
    "a key in small letters": b"listenstream=@a\n",
    "no value": b"ListenStream\nListenStream=@a\n",
    "no key": b"=@a\n",
    "two equals signs": b"ListenStream==@a\nListenStream=@a=b\n",
    "a reset": b"ListenStream=@a\nListenStream=\nListenStream=@b\n",
    "a reset by another key": b"ListenStream=@a\nListenFIFO=\nListenStream=@b\n",
    "a reset by a joined blank": b"ListenStream=@a\nListenStream=\\\n "
    b" \nListenStream=@b\n",
    "carriage returns": b"ListenStream=@a\rListenStream=@b\r\nListenStream=@c\n\rListenStream=@d",
    "NUL": b"ListenStream=@a\0ListenStream=@b\0\nListenStream=@c\r\n\0\nListenStream=@d",
    "NUL after a joined line": b"ListenStream=@a\\\n\0x\nListenStream=@b\\\0\ny\n",
    "line ends after a joined line": b"ListenStream=@a\\\n\rx\nListenStream=@b\\\r\ry\nListenStream=@c\\\r\n\rz\n",
}


@pytest.mark.parametrize("where", ["fragment", "drop-in"])
def test_syntax_is_read_as_systemd_reads_it(
    systemd: Systemd, where: str
) -> None:
    first = unit_file("ListenStream=@first")
    batch: list[Files] = []
    for text in SYNTAX.values():
        content = (
            text if text.startswith(b"\xef\xbb\xbf[") else b"[Socket]\n" + text
        )
        batch.append(
            [first + content]
            if where == "fragment"
            else [first, content, unit_file("ListenStream=@last")]
        )
    for unit, (title, text) in zip(
        systemd.load(batch), SYNTAX.items(), strict=True
    ):
        assert read_here(systemd, unit) == said_by_systemd(unit), (title, text)
        # Where systemd gives up on the fragment, it applies no drop-in.
        if where == "drop-in":
            assert not unit.problem, title


# -------------------------------------------------------------- many, at random


def pick_address(rng: random.Random) -> str:
    forms: list[Callable[[], str]] = [
        lambda: str(rng.randint(1, 65535)),
        lambda: (
            f"127.0.{rng.randint(0, 2)}.{rng.randint(0, 2)}:{rng.choice((0, 80, 80, 65535, 65536))}"
        ),
        lambda: (
            f"[{rng.choice(('::1', 'fd00::7', '::', '::ffff:1.2.3.4', 'fe80::1', 'g::'))}]:{rng.randint(1, 9)}"
        ),
        lambda: (
            "@"
            + rng.choice(
                (
                    "a",
                    "b",
                    "a b",
                    "ä",
                    "x%%y",
                    "%i",
                    "%p",
                    "%N",
                    "100%",
                    'q"',
                    "\\x3a",
                    "a,b",
                )
            )
        ),
        lambda: rng.choice(
            (
                "/run/x",
                "/var/run/x",
                "/run//x/",
                "%t/s",
                "%h/s",
                "/run/ü",
                "/run/a b",
                "/",
                "x",
                "",
            )
        ),
        lambda: f"vsock:{rng.choice(('', '2', '3', 'x'))}:{rng.randint(0, 3)}",
    ]
    return rng.choice(forms)()


def pick_name(rng: random.Random) -> str:
    return rng.choice(
        (
            "a",
            "b",
            "work",
            "@dispvm\\x3ax",
            "a:b",
            "",
            "q-%i",
            "%p",
            "é",
            "x" * 256,
            "a b",
            "%%",
            "50%",
        )
    )


def pick_file(rng: random.Random, *, whole: bool) -> bytes:
    """A unit file with all that syntax allows, and, unless it has to be read as
    a whole, some that it does not."""
    breaks = [b"\n"] * 6 + [b"\r\n", b"\r", b"\n\r", b"\0", b"\n\n", b" \t\n"]

    def end() -> bytes:
        return rng.choice(breaks)

    def blank() -> bytes:
        return rng.choice((b"", b"", b" ", b"\t "))

    def joint() -> bytes:
        inside = rng.choice((b"", b"", b"# no\n", b" ;no \\\n", b"#\xff\n"))
        return rng.choice(
            (b"", b"", b"", b"\\\n" + inside, b" \\\r\n" + inside)
        )

    content = rng.choice(
        (b"", b"", b"", b"\xef\xbb\xbf", b"ListenStream=@outside\n")
    )
    content += blank() + b"[Socket]" + blank() + end()
    for _ in range(rng.randint(0, 6)):
        line = rng.random()
        if line < 0.45:
            key = rng.choice(
                (
                    "ListenStream",
                    "ListenStream",
                    "ListenStream",
                    "ListenDatagram",
                )
            )
            content += (
                blank()
                + key.encode()
                + blank()
                + b"="
                + joint()
                + blank()
                + pick_address(rng).encode()
            )
        elif line < 0.7:
            content += (
                blank()
                + b"FileDescriptorName"
                + joint()
                + b"="
                + joint()
                + pick_name(rng).encode()
                + blank()
            )
        elif line < 0.76:
            content += rng.choice(
                (
                    b"ListenStream=",
                    b"ListenDatagram= ",
                    b"ListenFIFO=",
                    b"ListenSpecial=\\\n ",
                )
            )
        elif line < 0.82:
            content += (
                b"["
                + rng.choice(
                    (
                        b"Socket",
                        b"Unit",
                        b"Socket",
                        b"Foo",
                        b" Socket",
                        "Ü".encode(),
                    )
                )
                + b"]"
            )
        elif line < 0.9:
            content += (
                blank()
                + rng.choice((b"# ", b";", b"#"))
                + b"ListenStream=@comment"
                + rng.choice((b"", b"\\"))
            )
        elif line < 0.97 or whole:
            content += rng.choice(
                (
                    b"NoDelay=yes",
                    b"Foo=bar",
                    b"nonsense",
                    b"=",
                    b"ListenFIFO=/run/f",
                    b"\\",
                    b"\\\\",
                )
            )
        else:
            content += rng.choice(
                (
                    b"X=\xff",
                    b"[Socket",
                    "X=\uffff".encode(),
                    b"[a'b]",
                    b"[\x07]",
                    b"\xc3",
                )
            )
        content += end()
    return content


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_files_at_random_are_read_as_systemd_reads_them(
    systemd: Systemd, seed: int
) -> None:
    rng = random.Random(seed)
    batch = [
        [
            pick_file(rng, whole=True),
            *(pick_file(rng, whole=False) for _ in range(rng.randint(0, 3))),
        ]
        for _ in range(200)
    ]
    specifiers = systemd.manager.specifiers()
    served = 0
    for unit, files in zip(systemd.load(batch), batch, strict=True):
        assert len(unit.files) == len(files)
        assert read_here(systemd, unit) == said_by_systemd(unit), files
        assert unit.fd_name == name_here(systemd, unit), files
        for claim in claims("my.Rpc", unit, specifiers):
            assert "but systemd has" not in str(claim), files
            assert "no file of" not in str(claim), files
            served += not isinstance(claim, Refusal)
    assert served > 50


# ------------------------------------------------------- sockets that are bound


def bind(family: int, address: object) -> socket.socket | None:
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)  # type: ignore[arg-type]  # of any family
        listener.listen()
    except OSError:
        return None
    return listener


def test_a_bound_socket_is_called_what_systemd_calls_it(
    systemd: Systemd, tmp_path: Path
) -> None:
    folder = systemd.machine.directory
    names = [
        "plain",
        "a b",
        "späce",
        "q\"'uo\\te",
        "tab\tx",
        "bell\x07",
        "%",
        "back\\x20slash",
        "emoji😀",
    ]
    wanted: list[tuple[str, int, object]] = [
        *(
            (f"{folder}/{name}", socket.AF_UNIX, f"{folder}/{name}")
            for name in names
        ),
        *(
            (f"@{folder}/{name}", socket.AF_UNIX, f"\0{folder}/{name}")
            for name in names
        ),
        ("127.0.0.1:64321", socket.AF_INET, ("127.0.0.1", 64321)),
        ("[::1]:64322", socket.AF_INET6, ("::1", 64322)),
        (
            "[::ffff:127.0.0.1]:64323",
            socket.AF_INET6,
            ("::ffff:127.0.0.1", 64323),
        ),
        ("64324", socket.AF_INET6, ("::", 64324)),
        ("vsock::64325", socket.AF_VSOCK, (socket.VMADDR_CID_ANY, 64325)),
    ]
    (unit,) = systemd.load(
        [
            [
                unit_file(
                    *(
                        f"ListenStream={text.replace('%', '%%')}"
                        for text, _, _ in wanted
                    )
                )
            ]
        ]
    )
    compared = 0
    for (kind, shown), (text, family, address) in zip(
        unit.listen, wanted, strict=True
    ):
        if listener := bind(family, address):
            with listener:
                passed = describe(listener.fileno(), "work")
            assert (passed.kind, passed.address) == (kind, shown), text
            compared += 1
    assert compared > 2 * len(names)


# ---------------------------------------------------------------------- lines


def test_a_key_is_told_with_the_line_that_it_ends_on() -> None:
    text = "[Socket]\n\nA=1\nB=\\\n# no\n2\n"
    assert [
        (item.key, item.value, item.line) for item in assignments(text)
    ] == [("A", "1", 3), ("B", "2", 6)]
