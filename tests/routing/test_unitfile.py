"""Which file opens which address, and whose name it gets, for any text; what
systemd says is in test_agreement.py."""

from __future__ import annotations

import re
import socket

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from samples import SHOWN

from qrexec_activate.routing.address import (
    LONGEST_PATH,
    address_key,
    expand_specifiers,
    shown_address,
    written_key,
)
from qrexec_activate.routing.names import c_escape
from qrexec_activate.routing.unitfile import (
    LISTEN_KINDS,
    Declaration,
    SourceFile,
    assignments,
    declared_listeners,
    is_fd_name,
    is_silent,
    only_adds,
)

ANY_TEXT = st.text(st.characters(blacklist_categories=()), max_size=80)
LINES = st.lists(
    st.sampled_from(
        [
            "[Socket]",
            "[Unit]",
            "[x",
            "ListenStream=",
            "ListenStream=1",
            "FileDescriptorName=a",
            "\\",
            "#",
            "\n",
            "\r",
            "\0",
        ]
    )
    | ANY_TEXT,
    max_size=12,
).map("\n".join)


def lines(*text: str) -> str:
    return "\n".join(("[Socket]", *text, ""))


def names(*files: SourceFile) -> dict[str, str | None]:
    """The name that each address gets, as written."""
    return {
        item.address: item.name.text if item.name else None
        for item in declared_listeners(files).listeners
    }


FRAGMENT = SourceFile("/units/x@.socket", lines("NoDelay=yes"))


# --------------------------------------------------------------------- any text


@given(LINES)
@example("\ufeff\ufeff[Socket]")
@example("[Socket]\nListenStream=\\")
@example("\\")
def test_no_text_is_too_odd_to_be_read(text: str) -> None:
    for item in assignments(text):
        assert item.section
        assert item.line >= 1
        assert item.value == item.value.strip(" \t\n\r")
    declared = declared_listeners(
        [
            FRAGMENT,
            SourceFile("/d/a.conf", text),
            SourceFile("/d/b.conf", None, "is gone", ""),
        ]
    )
    assert all(
        item.kind in LISTEN_KINDS.values() and item.address
        for item in declared.listeners
    )
    only_adds(SourceFile("/d/b.conf", None, "was changed", text))


@given(st.binary(max_size=200))
def test_no_bytes_are_too_odd_to_be_read(raw: bytes) -> None:
    list(assignments(raw.decode(errors="surrogateescape")))


@given(ANY_TEXT)
@example("[\0]:1")
@example("[::1]:٣")
@example("127.0.0.1:٣")
@example("@\ud800")
def test_no_address_is_too_odd_to_be_compared(text: str) -> None:
    for key in (address_key(text), written_key(text)):
        if key is not None:
            family, address, port = key
            assert family in ("path", "abstract", "vsock", "ip")
            assert 0 <= port < 2**32
            assert address or family == "vsock"


@given(ANY_TEXT, st.dictionaries(st.sampled_from("inptX"), ANY_TEXT))
def test_specifiers_are_expanded_once_from_left_to_right(
    text: str, values: dict[str, str]
) -> None:
    expanded = expand_specifiers(text, values)
    if "%" not in text:
        assert expanded == text
    assert expand_specifiers(text.replace("%", "%%"), values) == text


@given(ANY_TEXT)
def test_a_file_descriptor_name_is_ascii_without_colon_and_control_characters(
    text: str,
) -> None:
    assert is_fd_name(text) == (
        len(text) <= 255
        and all(32 <= ord(char) < 127 and char != ":" for char in text)
    )


@given(st.binary(max_size=60))
@example(b" ~\x7f\x80")
def test_an_escaped_path_is_printable_and_tells_its_bytes(raw: bytes) -> None:
    escaped = c_escape(raw)
    assert escaped.isascii()
    assert escaped.isprintable() or not escaped
    simple = {
        "a": 7,
        "b": 8,
        "f": 12,
        "n": 10,
        "r": 13,
        "t": 9,
        "v": 11,
        "\\": 92,
        '"': 34,
        "'": 39,
    }
    back = re.sub(
        r"\\([0-7]{3})|\\(.)",
        lambda m: chr(int(m[1], 8) if m[1] else simple[m[2]]),
        escaped,
    )
    assert back.encode("latin-1") == raw


# ----------------------------------------------------- specifiers and addresses


def test_specifiers_stand_for_what_systemd_says() -> None:
    values = {"i": "1234", "t": "/run/user/1000"}
    assert expand_specifiers("%t/x-%i", values) == "/run/user/1000/x-1234"
    assert expand_specifiers("%%i", values) == "%i"
    assert expand_specifiers("100%", values) == "100%"
    assert expand_specifiers("%-x", values) == "%-x"
    assert expand_specifiers("%i %H", values) is None


@given(st.ip_addresses(v=4).map(str), st.integers(1, 65535))
def test_every_ipv4_address_is_known_again(host: str, port: int) -> None:
    assert (
        written_key(f"{host}:{port}")
        == address_key(f"{host}:{port}")
        == ("ip", host, port)
    )


@given(st.ip_addresses(v=6), st.integers(1, 65535))
def test_every_ipv6_address_is_known_again_however_it_is_written(
    host: object, port: int
) -> None:
    text = str(host).partition("%")[0]
    packed = socket.inet_pton(socket.AF_INET6, text)
    long = ":".join(
        f"{packed[at] << 8 | packed[at + 1]:04X}" for at in range(0, 16, 2)
    )
    key = written_key(f"[{long}]:{port}")
    assert key is not None
    assert (
        key
        == address_key(f"[{text}]:{port}")
        == address_key(f"[{key[1]}]:{port}")
    )


def test_an_ipv4_address_and_its_mapped_ipv6_address_are_two() -> None:
    assert address_key("[::ffff:127.0.0.1]:80") != address_key("127.0.0.1:80")


def test_a_link_local_address_belongs_to_its_interface() -> None:
    assert address_key("[fe80::1]:80%vif1.0") == ("ip", "fe80::1%vif1.0", 80)
    assert address_key("[fe80::1]:80%vif2.0") != address_key(
        "[fe80::1]:80%vif1.0"
    )
    assert address_key("[febf::1]:80%vif1.0") == ("ip", "febf::1%vif1.0", 80)
    # The kernel takes no other for link-local, by all of its first ten bits.
    for other in ("fd00::1", "fec0::1", "fe7f::1", "ff80::1"):
        assert address_key(f"[{other}]:80%vif1.0") == ("ip", other, 80)


@pytest.mark.parametrize(
    "text",
    [
        "80%lo",
        "127.0.0.1:80%lo",
        "[fe80::1]:80%1",
        "[::1]:80%",
        "[::1%lo]:80",
        "vsock::4294967296",
        "vsock:",
        "vsock:80",
        "vsock:3:",
        "vsock:3:80:1",
        "vsock::80:",
        "vsock:3:x",
        "vsock:3:080",
        "vsock:x:80",
        "vsock:03:80",
        "vsock:12345678901:80",
    ],
)
def test_an_address_that_is_not_understood_is_known_as_none(text: str) -> None:
    assert address_key(text) is None
    assert written_key(text) is None


def test_a_vsock_address_is_that_of_one_machine_or_of_all() -> None:
    assert address_key("vsock::80") == ("vsock", "", 80)
    assert address_key("vsock:4294967295:80") == ("vsock", "", 80)
    assert address_key("vsock:3:80") == ("vsock", "3", 80)
    assert address_key("vsock:0:4294967295") == ("vsock", "0", 2**32 - 1)
    assert address_key("vsock:1234567890:0") == ("vsock", "1234567890", 0)


def test_an_address_is_told_apart_to_its_last_letter() -> None:
    assert address_key("/run/./a//b/") == ("path", "/run/a/b", 0)
    assert address_key("@a/b") == ("abstract", "@a/b", 0)
    assert written_key("/") is None
    for first in "/@":
        assert written_key(first + "x" * (LONGEST_PATH - 1)) is not None
        assert written_key(first + "x" * LONGEST_PATH) is None
    assert address_key("127.0.0.1:65535") == ("ip", "127.0.0.1", 65535)
    for text in ("127.0.0.1:65536", "[::1:80", "::1]:80"):
        assert address_key(text) is None


def test_an_address_in_a_file_and_on_the_bus_are_one() -> None:
    assert written_key("/run/späce") == address_key(r"/run/sp\303\244ce")
    assert written_key("/var/run/x/") == address_key("/run/x")
    assert written_key("@ä b") == address_key(r"@\303\244 b")
    assert written_key("127.0.0.1:0") is None
    assert written_key("vsock::0") == address_key("vsock:4294967295:0")


# ------------------------------------------------------------------ the syntax


BOM = "\ufeff"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("", []),
        ("A=1\n[S]\nB=2", [("S", "B", "2", 3)]),
        ("[S]\nA=1\n[T]\nB=2\n", [("S", "A", "1", 2), ("T", "B", "2", 4)]),
        # White space is that of systemd, and no other.
        ("[S]\n \tA \t= \t1 \t\n", [("S", "A", "1", 2)]),
        ("[S]\nA=\f1\f\n", [("S", "A", "\f1\f", 2)]),
        ("[S]\n\fA\f=1\n", [("S", "\fA\f", "1", 2)]),
        ("[S]\n\f#A=1\n", [("S", "\f#A", "1", 2)]),
        # What follows the first = is the value, and without one there is none.
        ("[S]\nA=1=2\nB\n", [("S", "A", "1=2", 2)]),
        # Comments.
        ("[S]\n#A=1\n;B=2\n \t# C=3\nD=4 # 5\n", [("S", "D", "4 # 5", 5)]),
        # A backslash at the end joins lines, two do not; a comment in between
        # is none of them.
        ("[S]\nA=1\\\n2\n", [("S", "A", "1 2", 3)]),
        ("[S]\nA=1\\\n2\\\n3\n", [("S", "A", "1 2 3", 4)]),
        ("[S]\nA=1\\\\\nB=2\n", [("S", "A", "1\\\\", 2), ("S", "B", "2", 3)]),
        ("[S]\nA=1\\\\\\\n2\n", [("S", "A", r"1\\ 2", 3)]),
        (
            "[S]\nA=1\\\n#x\\\n2\nB=3\n",
            [("S", "A", "1 2", 4), ("S", "B", "3", 5)],
        ),
        ("[S]\nA=1\\", [("S", "A", "1", 2)]),
        # The ends of lines.
        (
            "[S]\r\nA=1\rB=2\0C=3\n\nD=4",
            [
                ("S", "A", "1", 2),
                ("S", "B", "2", 3),
                ("S", "C", "3", 4),
                ("S", "D", "4", 6),
            ],
        ),
        # A byte order mark counts once, wherever a line begins.
        (f"{BOM}[S]\nA=1\n", [("S", "A", "1", 2)]),
        (
            f"[S]\n{BOM}A=1\n{BOM}B=2\n",
            [("S", "A", "1", 2), ("S", f"{BOM}B", "2", 3)],
        ),
        (
            f"[S]\nA=1{BOM}\n{BOM}B=2{BOM}\n",
            [("S", "A", f"1{BOM}", 2), ("S", "B", f"2{BOM}", 3)],
        ),
        # Where systemd reads no further.
        ("[S]\nA=1\n[T\nB=2\n", [("S", "A", "1", 2)]),
        ('[S]\nA=1\n["T"]\nB=2\n', [("S", "A", "1", 2)]),
        ("[S]\nA=1\nB=\udcff\nC=2\n", [("S", "A", "1", 2)]),
    ],
)
def test_a_file_is_read_as_systemd_reads_it(
    text: str, read: list[tuple[str, str, str, int]]
) -> None:
    assert [
        (item.section, item.key, item.value, item.line)
        for item in assignments(text)
    ] == read


# --------------------------------------------------------------- who names what


def test_each_drop_in_names_its_own_addresses() -> None:
    gitweb = SourceFile(
        "/d/gitweb.conf",
        lines("ListenStream=127.0.0.1:1234", "FileDescriptorName=gitweb"),
    )
    work = SourceFile(
        "/d/work.conf",
        lines(
            "FileDescriptorName=work",
            "ListenStream=127.0.0.2:1234",
            "ListenStream=@w",
        ),
    )
    assert names(FRAGMENT, gitweb, work) == {
        "127.0.0.1:1234": "gitweb",
        "127.0.0.2:1234": "work",
        "@w": "work",
    }


def test_an_override_names_all_that_came_before_it() -> None:
    a = SourceFile("/d/a.conf", lines("ListenStream=1", "FileDescriptorName=a"))
    override = SourceFile("/d/override.conf", lines("FileDescriptorName=vault"))
    z = SourceFile("/d/z.conf", lines("ListenStream=2", "FileDescriptorName=z"))
    assert names(FRAGMENT, a, override, z) == {"1": "vault", "2": "z"}


def test_an_unnamed_address_takes_the_name_of_the_unit_but_never_that_of_another_drop_in() -> (
    None
):
    fragment = SourceFile("/units/x.socket", lines("FileDescriptorName=home"))
    bare = SourceFile("/d/bare.conf", lines("ListenStream=1"))
    work = SourceFile(
        "/d/work.conf", lines("ListenStream=2", "FileDescriptorName=work")
    )
    everything = SourceFile(
        "/d/everything.conf", lines("FileDescriptorName=all")
    )
    (item,) = declared_listeners([fragment, bare]).listeners
    assert item.name is not None
    assert (item.name.text, item.inherited) == ("home", True)
    item, _ = declared_listeners([fragment, bare, work]).listeners
    assert item.name is None
    assert item.borrowed is not None
    assert item.borrowed.where == "/d/work.conf:3"
    assert names(FRAGMENT, everything, bare) == {"1": "all"}


def test_an_empty_listen_of_any_kind_forgets_what_was_open() -> None:
    a = SourceFile("/d/a.conf", lines("ListenStream=1", "FileDescriptorName=a"))
    for key in LISTEN_KINDS:
        b = SourceFile(
            "/d/b.conf",
            lines(
                "ListenStream=2",
                f"{key}=",
                "ListenStream=3",
                "FileDescriptorName=b",
            ),
        )
        assert names(FRAGMENT, a, b) == {"3": "b"}


def test_settings_of_other_sections_are_none() -> None:
    text = "ListenStream=1\n[Unit]\nListenStream=2\nFileDescriptorName=x\n[Socket]\nFoo=bar\nListenStream=3\n"
    assert names(FRAGMENT, SourceFile("/d/a.conf", text)) == {"3": None}


def rival(*text: str) -> str | None:
    (item, *_) = declared_listeners(
        [FRAGMENT, SourceFile("/d/a.conf", lines(*text))]
    ).listeners
    return item.rival.text if item.rival else None


def test_two_names_in_one_file_of_two_addresses_are_rivals() -> None:
    assert (
        rival(
            "ListenStream=1",
            "FileDescriptorName=a",
            "ListenStream=2",
            "FileDescriptorName=b",
        )
        == "a"
    )
    assert (
        rival(
            "ListenStream=1",
            "FileDescriptorName=a",
            "ListenStream=2",
            "FileDescriptorName=a",
        )
        is None
    )
    # An empty one takes the first back, and with one address there is no doubt
    # what the last one is for.
    assert (
        rival(
            "ListenStream=1",
            "FileDescriptorName=a",
            "FileDescriptorName=",
            "FileDescriptorName=b",
            "ListenFIFO=/x",
        )
        is None
    )
    assert (
        rival("FileDescriptorName=a", "ListenStream=1", "FileDescriptorName=b")
        is None
    )


def test_a_file_that_cannot_be_trusted_casts_doubt_on_what_came_before_it() -> (
    None
):
    a = SourceFile("/d/a.conf", lines("ListenStream=1", "FileDescriptorName=a"))
    gone = SourceFile("/d/b.conf", None, "is gone", "")
    c = SourceFile("/d/c.conf", lines("ListenStream=2", "FileDescriptorName=c"))
    override = SourceFile("/d/d.conf", lines("FileDescriptorName=d"))

    def doubts(*files: SourceFile) -> list[tuple[str, int]]:
        return [
            (item.address, len(item.doubts))
            for item in declared_listeners(files).listeners
        ]

    assert doubts(FRAGMENT, a, gone, c) == [("1", 1), ("2", 0)]
    # What comes later and is for all leaves none.
    assert doubts(FRAGMENT, a, gone, c, override) == [("1", 0), ("2", 0)]
    assert declared_listeners([FRAGMENT, a, gone]).untrusted == (gone,)


@pytest.mark.parametrize(
    ("now", "adds"),
    [
        (None, False),
        ("", True),
        (lines("ListenStream=1"), True),
        (lines("ListenStream=1", "FileDescriptorName=a"), True),
        (lines("FileDescriptorName=a"), False),
        (lines("ListenStream=", "ListenStream=1"), False),
    ],
)
def test_a_changed_file_only_adds_if_it_leaves_the_addresses_of_others_alone(
    now: str | None, adds: bool
) -> None:
    assert only_adds(SourceFile("/d/a.conf", None, "was changed", now)) is adds


def test_what_a_file_holds_that_systemd_may_read_otherwise_is_kept() -> None:
    """Whether it can do harm is decided on that."""
    text = "[]\n" + lines("ListenStream=1", "FileDescriptorName=a")
    (doubted,) = declared_listeners([SourceFile("/d/a.conf", text)]).untrusted
    assert (doubted.path, doubted.text, doubted.now) == (
        "/d/a.conf",
        None,
        text,
    )
    assert only_adds(doubted)


def test_places_are_told_by_file_and_line() -> None:
    declared = declared_listeners(
        [
            SourceFile(
                "/d/a.conf", lines("FileDescriptorName=a", "ListenStream=1")
            )
        ]
    )
    assert [item.where for item in declared.listeners] == ["/d/a.conf:3"]
    assert declared.last_name is not None
    assert declared.last_name.where == "/d/a.conf:2"
    assert declared_listeners([]).last_name is None
    assert Declaration("Stream", "1", "/d/a.conf", 7).where == "/d/a.conf:7"


@pytest.mark.parametrize(("written", "shown"), SHOWN)
def test_an_address_is_shown_as_systemd_shows_it(
    written: str, shown: str
) -> None:
    assert shown_address(written) == shown


@pytest.mark.parametrize(
    ("text", "silent"),
    [
        ("", True),
        ("[Socket]\nSocketMode=0600\n", True),
        ("[Socket]\nCPUWeight=50\n", True),
        ("[Socket]\nListenStream=\n", False),
        ("[Socket]\nListenStream=1\n", False),
        ("[Socket]\nFileDescriptorName=work\n", False),
    ],
)
def test_a_file_that_says_nothing_of_listeners_is_silent(
    text: str, silent: bool
) -> None:
    assert is_silent(text) is silent
