"""Tables that a person can read, however wide the terminal is."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from desk import GOLDEN, WRITE_GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from qrexec_activate.control.list import HEADER, row, table
from qrexec_activate.control.status import CONNECTION_HEADER
from qrexec_activate.control.survey import Entry
from qrexec_activate.control.table import cells, lay_out, shortened

WIDTHS = [40, 60, 80, 120, 200]


def entry(
    listener: str, target: str | None, argument: str, file: str, refused: str
) -> Entry:
    return Entry(
        listener,
        target,
        "qubes.ConnectTCP",
        argument,
        f"qrexec-connect-tcp@{argument}.socket",
        "qrexec-connect-tcp.service",
        file,
        "enabled",
        "active",
        not refused,
        refused,
    )


DROP_IN = "/home/user/.config/systemd/user/qrexec-connect-tcp@{}.socket.d/{}"
ENTRIES = [
    entry(
        f"127.0.0.{number}:1234",
        target,
        "1234",
        DROP_IN.format(1234, f"{name}.conf"),
        "" if target else "no target is set",
    )
    for number, (target, name) in enumerate(
        [
            ("gitweb", "gitweb"),
            ("work", "größe"),
            ("@dispvm:whonix-workstation-17", "dispvm"),
            ("vault", "a-very-long-name-that-a-person-once-gave-to-a-file"),
            ("a-qube-with-a-name-of-31-letter", "漢字"),
            (None, "broken"),
        ],
        start=1,
    )
]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    monkeypatch.setenv("HOME", "/home/user")
    return [row(one) for one in ENTRIES]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_are_those_that_were_looked_at(
    rows: list[list[str]], width: int
) -> None:
    text = "".join(f"{line}\n" for line in lay_out(HEADER, rows, width))
    path = GOLDEN / f"list-{width}.txt"
    if WRITE_GOLDEN:
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_of_both_managers_are_those_that_were_looked_at(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    file = "/etc/systemd/system/qrexec-connect-tcp@1234.socket.d/dispvm.conf"
    theirs = replace(ENTRIES[2], manager="system", file=file)
    both = [*ENTRIES[:2], theirs]
    lines = lay_out(*table(both, marked=True), width)
    text = "".join(f"{line}\n" for line in lines)
    path = GOLDEN / f"list-both-{width}.txt"
    if WRITE_GOLDEN:
        path.write_text(text)
    assert text == path.read_text()
    assert re.findall(r"(?:user|system)(?=\s|$)", text) == [
        one.manager for one in both
    ]


CONNECTIONS = [
    [
        f"3dac-{number}",
        age,
        state,
        peer,
        f"127.0.0.{number}:1234",
        target,
        "2.9 MiB",
        "1023.9 KiB",
    ]
    for number, (age, state, peer, target) in enumerate(
        [
            ("1 s", "open", "git-remote-https (pid 4194303)", "gitweb"),
            ("59 min 59 s", "waiting", "curl (pid 7)", "@dispvm:whonix-17"),
            ("23 h 59 min", "setting up", "pid 17 uid 1000", "work"),
        ],
        start=1,
    )
]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_connections_are_those_that_were_looked_at(width: int) -> None:
    lines = lay_out(CONNECTION_HEADER, CONNECTIONS, width)
    text = "".join(f"{line}\n" for line in lines)
    path = GOLDEN / f"connections-{width}.txt"
    if WRITE_GOLDEN:
        path.write_text(text)
    assert text == path.read_text()
    for one in CONNECTIONS:
        assert all(one[at] in text for at in (0, 4, 5))
    if width >= 60:
        assert max(map(cells, lines)) <= width


@pytest.mark.parametrize("width", range(20, 220, 7))
def test_no_target_and_no_address_is_ever_cut(
    rows: list[list[str]], width: int
) -> None:
    lines = lay_out(HEADER, rows, width)
    text = "\n".join(lines)
    for listener, target, *_ in rows:
        assert listener in text
        assert target in text
    if width >= 60:
        assert max(map(cells, lines)) <= width
    # A part of a cell is there only with an ellipsis in it.
    words = {cell for one in rows for cell in one} | {*map(str.upper, HEADER)}
    for word in {word for line in lines for word in re.split("  +", line)}:
        assert word in words or "…" in word or not word


def test_without_a_width_everything_is_shown(rows: list[list[str]]) -> None:
    lines = lay_out(HEADER, rows, None)
    assert len(lines) == len(rows) + 1
    for cells_of_row, line in zip(rows, lines[1:], strict=True):
        assert all(cell in line for cell in cells_of_row)


@given(st.text("ab/漢é\u0301", max_size=30), st.integers(6, 40))
def test_a_shortened_text_fits_and_says_so(text: str, width: int) -> None:
    short = shortened(text, width)
    assert cells(short) <= width
    assert short == text or "…" in short


def test_a_table_has_no_raw_characters() -> None:
    (_, line) = lay_out(("target", "peer"), [["work", "a\x1b[31m"]], 80)
    assert line == "work    a\\x1b[31m"


def test_what_is_too_narrow_for_a_table_is_a_record_for_each_row() -> None:
    """Also where these columns would fit."""
    header, rows = ("listener", "target"), [["127.0.0.1:1234", "work"]]
    assert len(lay_out(header, rows, 60)[0].split()) == 2
    assert [line.split() for line in lay_out(header, rows, 59)] == [
        ["LISTENER", "127.0.0.1:1234"],
        ["TARGET", "work"],
    ]
