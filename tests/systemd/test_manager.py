"""What systemd is asked, what it answers, and what becomes of answers that make
no sense."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    Properties,
    new_error,
    new_method_return,
    new_signal,
)
from jeepney.low_level import Endianness, Header, Parser

from qrexec_activate.errors import ManagerError
from qrexec_activate.loopback.machine import Machine
from qrexec_activate.routing.claim import Refusal, Route
from qrexec_activate.routing.routes import claims
from qrexec_activate.systemd import manager as manager_module
from qrexec_activate.systemd.manager import (
    LoadedUnit,
    Manager,
    open_manager,
    runs_in_user_manager,
)

UNIT = "qrexec-connect-tcp@1234.socket"
DAEMON = "qrexec-connect-tcp.service"

# ------------------------------------------- a bus that says what it is told to

#: What to say to a call: its answers, of which raw bytes are sent as they are.
Answer = Callable[[Message], "list[Message | bytes]"]


@contextlib.contextmanager
def bus(answer: Answer) -> Iterator[Manager]:
    """A Manager whose bus answers so; the bus hangs up once it has said
    something that is no message."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        parser = Parser()
        serial = 1000
        with theirs, contextlib.suppress(OSError):
            while data := theirs.recv(65536):
                for call in parser.feed(data):
                    for reply in answer(call):
                        if isinstance(reply, bytes):
                            theirs.sendall(reply)
                            return
                        theirs.sendall(reply.serialise(serial=serial))
                        serial += 1

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with ours:
            ours.settimeout(10)
            yield Manager(ours, user=True)
    finally:
        thread.join()


def value(signature: str, content: object) -> Answer:
    return lambda call: [new_method_return(call, "v", ((signature, content),))]


def by_name(values: dict[str, tuple[str, object]]) -> Answer:
    """Answer calls of Get by the property, and all others by the method."""

    def answer(call: Message) -> list[Message | bytes]:
        method = call.header.fields[HeaderFields.member]
        if method == "Get":
            return [new_method_return(call, "v", (values[call.body[1]],))]
        signature, content = values[method]
        return [new_method_return(call, signature, (content,))]

    return answer


ROW = (UNIT, "", "loaded", "active", "listening", "", "/x", 0, "", "/")
GOOD: dict[str, tuple[str, object]] = {
    "ListUnitsByNames": ("a(ssssssouso)", [ROW]),
    "ListUnitsByPatterns": ("a(ssssssouso)", [ROW]),
    "UnitsLoadTimestamp": ("t", 0),
    "UnitsLoadStartTimestamp": ("t", 0),
    "FragmentPath": ("s", "/nowhere/x.socket"),
    "DropInPaths": ("as", []),
    "NeedDaemonReload": ("b", False),
    "InactiveExitTimestamp": ("t", 0),
    "Listen": ("a(ss)", [("Stream", "127.0.0.1:1234")]),
    "FileDescriptorName": ("s", "work"),
    "TriggeredBy": ("as", ["b.socket", "a.timer", "a.socket"]),
    "TimeoutStopUSec": ("t", 5_000_000),
    "ActiveState": ("s", "deactivating"),
}
CALLS: list[Callable[[Manager], object]] = [
    lambda manager: manager.hello(),
    lambda manager: manager.trigger_units(DAEMON),
    lambda manager: manager.socket_units([UNIT]),
    lambda manager: manager.stop_timeout(DAEMON),
    lambda manager: manager.is_stopping(DAEMON),
    lambda manager: manager.list_units("*.socket"),
    lambda manager: manager.properties([("/x", "x.y", "Listen")]),
]


def outcome(call: Callable[[Manager], object], answer: Answer) -> str:
    """The error of a call; empty where it came to a result."""
    with bus(answer) as manager:
        try:
            call(manager)
            said = ""
        except ManagerError as error:
            said = str(error)
    assert len(said.splitlines()) <= 1
    return said


def test_answers_that_make_sense_are_taken() -> None:
    with bus(by_name(GOOD)) as manager:
        assert manager.trigger_units(DAEMON) == ["a.socket", "b.socket"]
        (unit,) = manager.socket_units([UNIT])
        assert (unit.name, unit.listen, unit.fd_name, unit.problem) == (
            UNIT,
            (("Stream", "127.0.0.1:1234"),),
            "work",
            "",
        )
        assert unit.files[0].problem == "is gone"
        assert manager.list_units("*.socket") == [
            LoadedUnit(UNIT, "loaded", "active", "listening")
        ]
        assert manager.stop_timeout(DAEMON) == 5
        assert manager.is_stopping(DAEMON)
    with bus(by_name(GOOD | {"ActiveState": ("s", "activating")})) as manager:
        assert not manager.is_stopping(DAEMON)
    with bus(value("t", 2**64 - 1)) as manager:
        assert manager.stop_timeout(DAEMON) == 86400


def test_where_nobody_asked_for_a_reload_files_older_than_the_manager_are_believed(
    tmp_path: Path,
) -> None:
    # As a package leaves it that replaces the unit's fragment.
    drop_in = tmp_path / "work.conf"
    drop_in.write_text("[Socket]\nFileDescriptorName=work\n")
    touched = drop_in.stat().st_ctime_ns // 1000

    def problem(**changed: tuple[str, object]) -> str:
        stale = {
            "DropInPaths": ("as", [str(drop_in)]),
            "NeedDaemonReload": ("b", True),
        }
        with bus(by_name({**GOOD, **stale, **changed})) as manager:
            (unit,) = manager.socket_units([UNIT])
        return unit.files[1].problem

    changed = "was changed after systemd read it"
    older, newer = ("t", touched), ("t", touched + 1)
    assert problem(UnitsLoadStartTimestamp=newer) == ""
    assert (
        problem(UnitsLoadTimestamp=newer, UnitsLoadStartTimestamp=older) == ""
    )
    assert problem(UnitsLoadStartTimestamp=older) == changed
    assert problem() == changed


@pytest.mark.parametrize(
    ("name", "signature", "content"),
    [
        ("UnitsLoadStartTimestamp", "s", "now"),
        ("UnitsLoadTimestamp", "s", "now"),
        ("UnitsLoadTimestamp", "d", 1.0),
        ("FragmentPath", "as", []),
        ("FragmentPath", "o", "/x"),
        ("DropInPaths", "s", "/x"),
        ("NeedDaemonReload", "s", "no"),
        ("NeedDaemonReload", "t", 0),
        ("Listen", "as", ["x"]),
        ("Listen", "a(sss)", [("Stream", "x", "y")]),
        ("Listen", "a(su)", [("Stream", 1)]),
        ("FileDescriptorName", "i", 3),
        ("ListUnitsByNames", "as", [UNIT]),
        ("ListUnitsByNames", "s", UNIT),
        ("ListUnitsByNames", "a(ss)", [(UNIT, "")]),
        ("ListUnitsByNames", "a(uuuuu)", [(1, 2, 3, 4, 5)]),
    ],
)
def test_a_property_of_another_type_is_an_error_that_names_it(
    name: str, signature: str, content: object
) -> None:
    said = outcome(
        lambda manager: manager.socket_units([UNIT]),
        by_name({**GOOD, name: (signature, content)}),
    )
    assert "makes no sense" in said
    assert name in said or name == "ListUnitsByNames"


@pytest.mark.parametrize(
    "answer",
    [
        lambda call: [new_method_return(call)],
        lambda call: [new_method_return(call, "s", ("x",))],
        lambda call: [new_method_return(call, "vv", (("s", "x"), ("s", "y")))],
        lambda call: [new_method_return(call, "v", (("v", ("s", "x")),))],
        lambda call: [new_method_return(call, "(ss)", (("s", "x"),))],
    ],
)
def test_an_answer_of_another_shape_is_an_error(answer: Answer) -> None:
    assert "makes no sense" in outcome(
        lambda manager: manager.trigger_units(DAEMON), answer
    )
    assert "makes no sense" in outcome(
        lambda manager: manager.list_units("*"), answer
    )


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"x" * 16,
        b"l\2\0\1" + b"\xff" * 60,
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        bytes(64),
    ],
)
def test_a_bus_that_talks_nonsense_or_hangs_up_is_an_error(
    call: Callable[[Manager], object], raw: bytes
) -> None:
    assert outcome(call, lambda _: [raw]).startswith(
        "systemd did not answer over D-Bus: "
    )


@pytest.mark.parametrize(
    "name", ["ServiceUnknown", "AccessDenied", "LimitsExceeded", "NoReply"]
)
@pytest.mark.parametrize("call", CALLS)
def test_an_error_of_the_bus_is_told(
    call: Callable[[Manager], object], name: str
) -> None:
    full = f"org.freedesktop.DBus.Error.{name}"
    assert outcome(
        call, lambda message: [new_error(message, full, "s", ("not\nhere",))]
    ) == (f"systemd did not answer over D-Bus: {full}: not here")
    assert full in outcome(call, lambda message: [new_error(message, full)])


def unknown(call: Message) -> list[Message | bytes]:
    return [
        new_error(
            call,
            "org.freedesktop.DBus.Error.UnknownObject",
            "s",
            ("Unknown object",),
        )
    ]


def test_a_unit_or_property_that_is_unknown_is_none() -> None:
    with bus(unknown) as manager:
        assert manager.properties(
            [("/x", "x.y", "Z"), ("/x", "x.y", "Listen")]
        ) == [None, None]
        assert manager.stop_timeout(DAEMON) is None
    assert "does not know" in outcome(
        lambda manager: manager.trigger_units(DAEMON), unknown
    )
    assert "does not list its units" in outcome(
        lambda manager: manager.list_units("*"), unknown
    )
    assert "refused" in outcome(lambda manager: manager.hello(), unknown)


def test_a_unit_that_vanishes_between_two_questions_is_left_out() -> None:
    def answer(call: Message) -> list[Message | bytes]:
        listing = call.header.fields[HeaderFields.member] == "ListUnitsByNames"
        return by_name(GOOD)(call) if listing else unknown(call)

    with bus(answer) as manager:
        assert manager.socket_units([UNIT]) == []


def test_a_unit_that_systemd_could_not_load_says_so() -> None:
    row = (UNIT, "", "error", "active", "running", "", "/x", 0, "", "/")
    for values in (
        {"ListUnitsByNames": ("a(ssssssouso)", [row])},
        {"FragmentPath": ("s", "")},
    ):
        with bus(by_name({**GOOD, **values})) as manager:
            (unit,) = manager.socket_units([UNIT])
        assert "systemd could not load it" in unit.problem


@pytest.mark.parametrize("state", ["inactive", "failed"])
def test_a_unit_that_has_failed_listens_no_more_than_one_that_was_stopped(
    state: str,
) -> None:
    row = (UNIT, "", "loaded", state, "dead", "", "/x", 0, "", "/")
    answer = by_name({**GOOD, "ListUnitsByNames": ("a(ssssssouso)", [row])})
    with bus(answer) as manager:
        assert manager.socket_units([UNIT], only_active=True) == []
        assert len(manager.socket_units([UNIT])) == 1


# ------------------------------------------------------- when a file is trusted


def touch_after(path: Path, other: Path) -> int:
    """Touch a file, or a link, later than another, but for what it says itself
    (its mtime, as `cp -p` sets it); returns when, in µs."""
    while path.lstat().st_ctime_ns <= other.lstat().st_ctime_ns:
        os.utime(path, (1, 1), follow_symlinks=False)
    return path.lstat().st_ctime_ns // 1000


def trusted(path: Path, loaded_at: int, since: float = 0) -> bool:
    file = manager_module._Reader(loaded_at).read(str(path), since)
    assert (file.text is None) is bool(file.problem)
    return not file.problem


@pytest.mark.parametrize("newest", ["link", "file"])
def test_whichever_was_touched_last_of_a_link_and_its_file_counts(
    tmp_path: Path, newest: str
) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("[Socket]\n")
    link.symlink_to(file)
    if newest == "link":
        touched = touch_after(link, file)
    else:
        touched = touch_after(file, link)
    # In the very moment, systemd may have read it before that.
    assert not trusted(link, touched)
    assert trusted(link, touched + 1)
    assert not trusted(link, 0, touched)
    assert trusted(link, 0, touched + 1)


def test_only_a_reply_to_this_very_call_is_taken_for_one() -> None:
    """Some buses let anybody send a signal that claims to be a reply."""

    def answer(call: Message) -> list[Message | bytes]:
        forged = new_signal(
            DBusAddress("/x", interface="x.y"),
            "Z",
            "v",
            (("as", ["evil.socket"]),),
        )
        forged.header.fields[HeaderFields.reply_serial] = call.header.serial
        other = new_method_return(call, "v", (("as", ["evil.socket"]),))
        other.header.fields[HeaderFields.reply_serial] = (
            call.header.serial + 1000
        )
        return [
            forged,
            other,
            new_method_return(call, "v", (("as", ["good.socket"]),)),
        ]

    with bus(answer) as manager:
        assert manager.trigger_units(DAEMON) == ["good.socket"]


def test_answers_out_of_order_find_their_questions() -> None:
    held: list[Message] = []

    def answer(call: Message) -> list[Message | bytes]:
        held.append(call)
        if len(held) < 7:
            return []
        return [
            new_method_return(late, "v", (("s", late.body[1]),))
            for late in reversed(held)
        ]

    with bus(answer) as manager:
        names = [f"P{number}" for number in range(7)]
        assert (
            manager.properties([("/x", "x.y", name) for name in names]) == names
        )


def test_more_questions_than_the_bus_allows_at_once_are_asked_in_parts() -> (
    None
):
    def answer(call: Message) -> list[Message | bytes]:
        return [new_method_return(call, "v", (("s", call.body[1]),))]

    with bus(answer) as manager:
        names = [
            f"P{number}" for number in range(manager_module.PIPELINE * 3 + 1)
        ]
        assert (
            manager.properties([("/x", "x.y", name) for name in names]) == names
        )
        assert manager.properties([]) == []


def test_systemd_has_questions_to_answer_while_answers_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And never more than the bus lets wait for an answer."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        manager = Manager(ours, user=True)
        asked: list[int] = []
        waiting: list[int] = []

        def written(question: object, serial: int) -> bytes:
            asked.append(serial)
            return b""

        def answered() -> tuple[int, tuple[Any, ...]]:
            waiting.append(len(asked) - len(waiting))
            return asked[len(waiting) - 1], (("s", "x"),)

        monkeypatch.setattr(manager_module._Get, "serialise", written)
        monkeypatch.setattr(manager, "_receive", answered)
        most = manager_module.PIPELINE
        count = most * 3 + 1
        assert manager.properties([("/x", "x.y", "Z")] * count) == ["x"] * count
    assert max(waiting) == most
    assert min(waiting[: most * 2]) > most // 2


def test_questions_are_written_as_jeepney_would_write_them() -> None:
    calls: list[Message] = []

    def answer(call: Message) -> list[Message | bytes]:
        calls.append(call)
        return [new_method_return(call, "v", (("s", ""),))]

    for path, interface, name in [
        ("/a", "x.y", "Z"),
        ("/org/freedesktop/systemd1/unit/a_2d", "a.b.c", "LongerName"),
    ]:
        with bus(answer) as manager:
            manager.properties([(path, interface, name)])
        expected = Properties(
            DBusAddress(path, "org.freedesktop.systemd1", interface)
        ).get(name)
        (call,) = calls
        calls.clear()
        assert call.body == expected.body
        assert call.header.fields == expected.header.fields
        assert call.header.message_type is MessageType.method_call


@given(
    st.sampled_from(list(Endianness)),
    st.dictionaries(
        st.sampled_from(
            [
                HeaderFields.interface,
                HeaderFields.member,
                HeaderFields.destination,
                HeaderFields.sender,
                HeaderFields.unix_fds,
            ]
        ),
        st.text("ab.:", max_size=9),
    ),
    st.sampled_from(["", "s", "as", "v", "a(ss)", "t", "asb"]),
    st.integers(1, 7),
)
@settings(deadline=None)
def test_answers_are_read_as_jeepney_would_read_them(
    endianness: Endianness,
    texts: dict[HeaderFields, str],
    signature: str,
    pieces: int,
) -> None:
    contents = {**CONTENTS, "": None, "asb": (["x", "yy"], True)}
    content = contents[signature]
    body = content if signature == "asb" else (content,) if signature else ()

    def answer(call: Message) -> list[Message | bytes]:
        fields: dict[HeaderFields, Any] = dict(texts)
        if HeaderFields.unix_fds in fields:
            fields[HeaderFields.unix_fds] = 0
        fields[HeaderFields.reply_serial] = call.header.serial
        if signature:
            fields[HeaderFields.signature] = signature
        header = Header(
            endianness, MessageType.method_return, 0, 1, 0, 0, fields
        )
        raw = Message(header, body).serialise(serial=9)
        assert Parser().feed(raw)[0].body == body
        sent.append(raw)
        return []

    # In pieces, with another message behind, as they may come.
    sent: list[bytes] = []
    ours, theirs = socket.socketpair()
    with ours, theirs:
        manager = Manager(ours, user=True)
        answer(
            Message(
                Header(endianness, MessageType.method_call, 0, 1, 0, 77, {}), ()
            )
        )
        raw = sent[0] * 2
        for start in range(0, len(raw), -(-len(raw) // pieces)):
            theirs.sendall(raw[start : start + -(-len(raw) // pieces)])
        assert manager._receive() == (77, body)
        assert manager._receive() == (77, body)


def test_a_bus_that_never_answers_is_given_up() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        with pytest.raises(ManagerError, match="timed out"):
            Manager(ours, user=True).hello()


def test_a_reset_of_the_start_limit_is_seen_through() -> None:
    """Nothing becomes of one whose sender has gone when systemd comes to it."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            ours.settimeout(0.05)
            with pytest.raises(ManagerError, match="timed out"):
                Manager(ours, user=True).reset_start_limit(DAEMON)
        with pytest.raises(ManagerError, match="did not answer"):
            Manager(ours, user=True).reset_start_limit(DAEMON)


CONTENTS: dict[str, Any] = {
    "s": "x",
    "as": ["x"],
    "a(ss)": [("x", "y")],
    "b": True,
    "t": 7,
    "v": ("s", "x"),
    "a(ssssssouso)": [ROW],
    "(s)": ("x",),
    "aas": [["x"], []],
    "a{sv}": {"x": ("s", "y")},
    "d": 1.0,
    "o": "/x",
}


@given(
    st.lists(
        st.tuples(st.none() | st.sampled_from(sorted(CONTENTS)), st.booleans()),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from(CALLS),
)
@settings(max_examples=150, deadline=None)
def test_no_answer_is_too_odd_for_a_result_or_one_line(
    replies: list[tuple[str | None, bool]], call: Callable[[Manager], object]
) -> None:
    turns = itertools.cycle(replies)

    def answer(message: Message) -> list[Message | bytes]:
        signature, wrapped = next(turns)
        if signature is None:
            return [new_method_return(message)]
        content = CONTENTS[signature]
        return [
            new_method_return(
                message,
                *(
                    ("v", ((signature, content),))
                    if wrapped
                    else (signature, (content,))
                ),
            )
        ]

    outcome(call, answer)


@given(st.binary(max_size=80), st.sampled_from(CALLS))
@settings(max_examples=150, deadline=None)
@example(b"l\2\0\1\0\0\0\0\1\0\0\0\x08\0\0\0\5\1u\0\1\0\0\0", CALLS[0])
@example(b"l\2\0\1\0\0\0\0\1\0\0\0\x08\0\0\0\5\1s\0\1\0\0\0", CALLS[0])
def test_no_bytes_are_too_odd_for_a_result_or_one_line(
    raw: bytes, call: Callable[[Manager], object]
) -> None:
    outcome(call, lambda _: [raw])


# -------------------------------------------------------------- finding the bus


def test_a_user_bus_that_is_nowhere_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with (
        pytest.raises(ManagerError, match="log in as this user"),
        open_manager(user=True),
    ):
        pass
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with (
        pytest.raises(
            ManagerError, match="DBUS_SESSION_BUS_ADDRESS is not set"
        ),
        open_manager(user=True),
    ):
        pass


@pytest.mark.parametrize(
    "address",
    [
        "unix:path=/nonexistent/bus",
        "nonsense",
        "tcp:host=x,port=1",
        "unix:",
        ";",
        "unix:path",
    ],
)
def test_a_bus_address_that_leads_nowhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    for user, word in ((True, "user"), (False, "system")):
        with pytest.raises(ManagerError) as caught, open_manager(user=user):
            pass
        assert str(caught.value).startswith(
            f"cannot reach systemd over the {word} bus, {address}: "
        )
        assert len(str(caught.value).splitlines()) == 1


def test_a_bus_that_lets_in_and_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """systemd's own private socket is such a one."""
    monkeypatch.setattr(manager_module, "REPLY_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0test-manager-{os.getpid()}")
        server.listen()

        def admit() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
                while connection.recv(100):
                    pass

        thread = threading.Thread(target=admit)
        thread.start()
        monkeypatch.setenv(
            "DBUS_SYSTEM_BUS_ADDRESS",
            f"unix:abstract=test-manager-{os.getpid()}",
        )
        with (
            pytest.raises(ManagerError, match="did not answer"),
            open_manager(user=False),
        ):
            pass
        thread.join()


def test_the_bus_beside_the_users_manager_comes_before_another_session_bus(
    monkeypatch: pytest.MonkeyPatch,
    systemd: Manager,
    machine: Machine,
    tmp_path: Path,
) -> None:
    odd = tmp_path / "a,b;c=d%e"
    odd.symlink_to(machine.runtime)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(odd))
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    with open_manager(user=True) as manager:
        assert manager.manager_properties("Version")[0]


def test_only_a_user_manager_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANAGERPID", "1")
    assert runs_in_user_manager()
    monkeypatch.delenv("MANAGERPID")
    assert not runs_in_user_manager()


def test_specifiers_are_those_of_the_manager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Manager(ours, user=False).specifiers() == {
            "t": "/run",
            "h": "/root",
            "u": "root",
            "U": "0",
        }
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
        monkeypatch.setenv("HOME", "/home/x")
        monkeypatch.setattr(os, "getuid", lambda: 0)
        assert Manager(ours, user=True).specifiers() == {
            "t": "/run/user/7",
            "h": "/home/x",
            "u": "root",
            "U": "0",
        }
        monkeypatch.setattr(os, "getuid", lambda: 987654321)
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        monkeypatch.delenv("HOME")
        assert Manager(ours, user=True).specifiers() == {
            "u": "987654321",
            "U": "987654321",
        }


# ----------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.fixture
def systemd(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "HOME"):
        monkeypatch.setenv(name, machine.environment[name])
    with open_manager(user=True) as manager:
        yield manager


@pytest.fixture
def instance(machine: Machine) -> Iterator[str]:
    """A unit with two drop-ins, gone afterwards."""
    name = "qrexec-connect-tcp@4321.socket"
    machine.write_drop_in(
        name,
        "gitweb",
        f"[Socket]\nListenStream=@{machine.directory}/g\nFileDescriptorName=gitweb\n",
    )
    machine.write_drop_in(
        name,
        "work",
        f"[Socket]\nListenStream=@{machine.directory}/w\nFileDescriptorName=work\n",
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("start", name)
    yield name
    machine.systemctl("stop", name)
    for path in (machine.unit_dir / f"{name}.d").iterdir():
        path.unlink()
    (machine.unit_dir / f"{name}.d").rmdir()
    machine.systemctl("daemon-reload")


def problems(manager: Manager, name: str) -> dict[str, str]:
    """What is wrong with each file, by the last part of its path."""
    (unit,) = manager.socket_units([name])
    for file in unit.files:
        assert (file.text is None) is bool(file.problem)
    return {os.path.basename(file.path): file.problem for file in unit.files}


def targets(manager: Manager, name: str) -> list[str]:
    (unit,) = manager.socket_units([name])
    found = claims("qubes.ConnectTCP", unit, manager.specifiers())
    return [
        claim.target if isinstance(claim, Route) else "refused"
        for claim in found
    ]


def later(path: Path) -> None:
    """Make sure that a file counts as newer: the kernel dates files by a clock
    that ticks some 100 times a second."""
    time.sleep(0.03)
    path.touch()


def test_a_unit_comes_with_its_listeners_and_its_files_in_the_order_applied(
    systemd: Manager, instance: str
) -> None:
    assert instance in systemd.trigger_units(DAEMON)
    (unit,) = systemd.socket_units([instance], only_active=True)
    assert [address[-2:] for _, address in unit.listen] == ["/g", "/w"]
    assert [os.path.basename(file.path) for file in unit.files] == [
        "qrexec-connect-tcp@.socket",
        "gitweb.conf",
        "work.conf",
    ]
    assert unit.fd_name == "work"
    assert not unit.problem
    assert "FileDescriptorName=gitweb" in (unit.files[1].text or "")
    assert targets(systemd, instance) == ["gitweb", "work"]
    assert systemd.list_units(instance, "nothing*") == [
        LoadedUnit(instance, "loaded", "active", "listening")
    ]


def test_units_that_do_not_listen_are_left_out_where_only_active_ones_are_wanted(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    machine.systemctl("stop", instance)
    assert systemd.socket_units([instance], only_active=True) == []
    assert [unit.name for unit in systemd.socket_units([instance])] == [
        instance
    ]


def test_a_daemon_that_systemd_does_not_know_has_no_units(
    systemd: Manager,
) -> None:
    assert systemd.trigger_units("nothing-here.service") == []
    with pytest.raises(ManagerError, match="does not know"):
        systemd.trigger_units("no unit name")
    assert systemd.stop_timeout(DAEMON) == 5
    assert not systemd.is_stopping(DAEMON)
    systemd.reset_start_limit(DAEMON)
    systemd.reset_start_limit("nothing-here.service")


def test_a_changed_file_is_not_trusted_and_the_others_are(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    path = machine.write_drop_in(
        instance,
        "work",
        "[Socket]\nListenStream=@x\nFileDescriptorName=vault\n",
    )
    later(path)
    assert problems(systemd, instance) == {
        "qrexec-connect-tcp@.socket": "",
        "gitweb.conf": "",
        "work.conf": "was changed after systemd read it",
    }
    (unit,) = systemd.socket_units([instance])
    assert "FileDescriptorName=vault" in (unit.files[2].now or "")
    assert targets(systemd, instance) == ["gitweb", "refused"]
    machine.systemctl("daemon-reload")
    assert not any(problems(systemd, instance).values())


def test_what_systemctl_set_property_wrote_is_no_change_of_listeners(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    """From then on systemd 252 asks for a daemon-reload, and has that file last
    until then; 257 does not, and has it where its name belongs."""
    machine.systemctl("set-property", instance, "CPUWeight=50")
    (row,) = systemd.unit_properties([instance], "Unit", ["DropInPaths"])
    (written,) = [path for path in row["DropInPaths"] if ".control/" in path]
    try:
        assert not any(problems(systemd, instance).values())
        assert targets(systemd, instance) == ["gitweb", "work"]
        # By hand, anything can be in there.
        with open(written, "a") as file:
            file.write("[Socket]\nFileDescriptorName=work\n")
        later(Path(written))
        assert (
            problems(systemd, instance)[os.path.basename(written)]
            == "was changed after systemd read it"
        )
    finally:
        os.unlink(written)


def test_a_deleted_file_is_not_trusted_and_the_others_are(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    (machine.unit_dir / f"{instance}.d" / "gitweb.conf").unlink()
    assert problems(systemd, instance)["gitweb.conf"] == "is gone"
    assert targets(systemd, instance) == ["refused", "work"]


def test_a_file_replaced_by_an_older_one_beside_a_changed_one_is_not_trusted(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    folder = machine.unit_dir / f"{instance}.d"
    old = machine.home / "old.conf"
    old.write_text("[Socket]\nListenStream=@x\nFileDescriptorName=vault\n")
    os.utime(old, (1, 1))
    time.sleep(0.03)
    old.rename(folder / "gitweb.conf")
    later(folder / "work.conf")
    assert (
        problems(systemd, instance)["gitweb.conf"]
        == "was changed after systemd read it"
    )


def test_a_file_replaced_by_an_older_one_is_not_trusted_though_systemd_sees_no_change(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    old = machine.home / "old.conf"
    path = machine.unit_dir / f"{instance}.d" / "gitweb.conf"
    old.write_text(path.read_text().replace("gitweb", "vault"))
    os.utime(old, (1, 1))
    time.sleep(0.03)
    old.rename(path)
    assert machine.property(instance, "NeedDaemonReload") == "no"
    assert targets(systemd, instance) == ["refused", "work"]
    machine.systemctl("daemon-reload")
    assert targets(systemd, instance) == ["vault", "work"]


def test_a_new_drop_in_does_not_count_before_a_daemon_reload(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    path = machine.write_drop_in(
        instance, "aaa", "[Socket]\nListenStream=@x\nFileDescriptorName=vault\n"
    )
    later(path)
    assert machine.property(instance, "NeedDaemonReload") == "yes"
    assert "aaa.conf" not in problems(systemd, instance)
    assert targets(systemd, instance) == ["gitweb", "work"]


def test_a_unit_that_was_loaded_on_demand_is_trusted_without_a_daemon_reload(
    systemd: Manager, machine: Machine
) -> None:
    name = "on-demand@1.socket"
    path = machine.write_unit(
        "on-demand@.socket",
        "[Socket]\nListenStream=@x\nFileDescriptorName=work\n",
    )
    later(path)
    assert problems(systemd, name) == {"on-demand@.socket": ""}
    path.unlink()


def test_links_to_nothing_folders_masks_and_fifos_do_not_stop_the_daemon(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    folder = machine.unit_dir / f"{instance}.d"
    (folder / "a-folder.conf").mkdir()
    (folder / "a-mask.conf").symlink_to("/dev/null")
    (folder / "a-nothing.conf").symlink_to("nothing")
    (folder / "a-fifo.conf").write_text("")
    machine.systemctl("daemon-reload")
    (folder / "a-fifo.conf").unlink()
    os.mkfifo(folder / "a-fifo.conf")
    try:
        found = problems(systemd, instance)
        assert (
            found["a-nothing.conf"]
            == "is a symbolic link to nothing (remove it)"
        )
        assert found["a-folder.conf"] == found["a-mask.conf"] == ""
        assert found["a-fifo.conf"] == "was changed after systemd read it"
        assert targets(systemd, instance) == ["gitweb", "work"]
    finally:
        (folder / "a-folder.conf").rmdir()
        # systemd itself would wait for somebody to write there.
        (folder / "a-fifo.conf").unlink()


def test_a_file_that_cannot_be_read_is_not_trusted(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    path = machine.unit_dir / f"{instance}.d" / "gitweb.conf"
    path.unlink()
    path.symlink_to(path)
    assert problems(systemd, instance)["gitweb.conf"].startswith(
        "cannot be read (Too many levels"
    )
    path.unlink()
    path.write_text("")


def test_a_unit_with_a_broken_fragment_serves_nothing(
    systemd: Manager, machine: Machine
) -> None:
    name = "broken@1.socket"
    path = machine.write_unit(
        "broken@.socket",
        "[Socket]\nListenStream=@x\nFileDescriptorName=work\n[Socket\n",
    )
    machine.write_drop_in(
        name, "override", "[Socket]\nFileDescriptorName=vault\n"
    )
    machine.systemctl("daemon-reload")
    (unit,) = systemd.socket_units([name])
    (claim,) = claims("my.Rpc", unit, systemd.specifiers())
    assert isinstance(claim, Refusal)
    assert "systemd could not load it (LoadState=error)" in claim.reason
    path.unlink()


def test_drop_ins_of_the_template_and_of_all_sockets_come_in_the_order_of_their_names(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    made = [
        machine.write_drop_in(
            "qrexec-connect-tcp@.socket", "hhh", "[Socket]\nListenFIFO=/x\n"
        ),
        machine.write_drop_in("socket", "a", "[Socket]\nMark=0\n"),
        machine.write_drop_in(
            "qrexec-connect-.socket",
            "zzz",
            "[Socket]\nFileDescriptorName=vault\n",
        ),
    ]
    machine.systemctl("daemon-reload")
    try:
        assert list(problems(systemd, instance)) == [
            *(
                "qrexec-connect-tcp@.socket",
                "a.conf",
                "gitweb.conf",
                "hhh.conf",
                "work.conf",
                "zzz.conf",
            )
        ]
        assert targets(systemd, instance) == ["vault", "refused", "vault"]
    finally:
        for path in made:
            path.unlink()


def test_a_transient_unit_has_a_fragment_like_any_other(
    systemd: Manager, machine: Machine
) -> None:
    machine.run(
        [
            *(
                "systemd-run",
                "--user",
                "--unit=passing",
                "--socket-property=ListenStream=@passing-by",
            ),
            *("--socket-property=FileDescriptorName=work", "true"),
        ]
    )
    try:
        (unit,) = systemd.socket_units(["passing.socket"])
        assert not unit.problem
        (claim,) = claims("my.Rpc", unit, systemd.specifiers())
        assert isinstance(claim, Route)
        assert claim.target == "work"
    finally:
        machine.systemctl("stop", "passing.socket")


def test_properties_of_several_units_come_in_order(
    systemd: Manager, instance: str
) -> None:
    found = systemd.unit_properties(
        [DAEMON, instance], "Unit", ["Id", "ActiveState", "NoSuchProperty"]
    )
    assert found == [
        {"Id": DAEMON, "ActiveState": "inactive", "NoSuchProperty": None},
        {"Id": instance, "ActiveState": "active", "NoSuchProperty": None},
    ]


def test_systemd_says_when_it_last_loaded_units(
    systemd: Manager, machine: Machine
) -> None:
    (first,) = systemd.manager_properties("UnitsLoadTimestamp")
    machine.systemctl("daemon-reload")
    (second,) = systemd.manager_properties("UnitsLoadTimestamp")
    assert 0 < first < second <= time.time_ns() // 1000


def test_three_hundred_instances_are_told_at_once(
    systemd: Manager, machine: Machine
) -> None:
    made = [
        machine.write_drop_in(
            f"many@{number}.socket",
            "a",
            f"[Socket]\nListenStream=@m{number}\nFileDescriptorName=q{number}\n",
        )
        for number in range(300)
    ]
    template = machine.write_unit("many@.socket", "[Socket]\nNoDelay=yes\n")
    machine.systemctl("daemon-reload")
    names = [f"many@{number}.socket" for number in range(300)]
    units = systemd.socket_units(names)
    assert [unit.name for unit in units] == names
    for number, unit in enumerate(units):
        (claim,) = claims("my.Rpc", unit, systemd.specifiers())
        assert isinstance(claim, Route)
        assert (claim.address, claim.target) == (f"@m{number}", f"q{number}")
    for path in made:
        path.unlink()
        path.parent.rmdir()
    template.unlink()
    machine.systemctl("daemon-reload")
