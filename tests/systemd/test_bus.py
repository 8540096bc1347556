"""What systemd is asked over D-Bus, what it answers, and what becomes of answers
that make no sense: by the way of serve, and by the quicker one of commands."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

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
from qrexec_activate.systemd import manager as manager_module
from qrexec_activate.systemd import units
from qrexec_activate.systemd.manager import Manager

UNIT = "qrexec-connect-tcp@1234.socket"
DAEMON = "qrexec-connect-tcp.service"

#: Which of the two is tried.
KIND: type[Manager] = Manager


@pytest.fixture(
    params=[Manager, units.Manager],
    ids=["serve", "commands"],
    scope="module",
    autouse=True,
)
def kind(request: pytest.FixtureRequest) -> None:
    global KIND
    KIND = request.param


# ------------------------------------------- a bus that says what it is told to

#: What to say to a call: its answers, of which raw bytes are sent as they are.
Answer = Callable[[Message], "list[Message | bytes]"]
AnyManager = TypeVar("AnyManager", bound=Manager)


@contextlib.contextmanager
def bus(
    answer: Answer, kind: type[AnyManager] | None = None
) -> Iterator[AnyManager]:
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
            yield (kind or KIND)(ours, user=True)
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
    "LoadState": ("s", "loaded"),
    "ActiveState": ("s", "deactivating"),
}
CALLS: list[Callable[[Manager], object]] = [
    lambda manager: manager.hello(),
    lambda manager: manager.trigger_units(DAEMON),
    lambda manager: manager.socket_units([UNIT]),
    lambda manager: manager.stop_timeout(DAEMON),
    lambda manager: manager.is_stopping(DAEMON),
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
    ],
)
def test_a_property_of_another_type_is_an_error_that_names_it(
    name: str, signature: str, content: object
) -> None:
    # systemd is asked more about a file that is newer than what it has read.
    late = {"DropInPaths": ("as", [__file__])}
    said = outcome(
        lambda manager: manager.socket_units([UNIT]),
        by_name({**GOOD, **late, name: (signature, content)}),
    )
    assert "makes no sense" in said
    assert name in said


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
    with (
        bus(answer, units.Manager) as manager,
        pytest.raises(ManagerError, match="makes no sense"),
    ):
        manager.list_units("*")


@pytest.mark.parametrize(
    ("signature", "content"),
    [
        ("as", [UNIT]),
        ("s", UNIT),
        ("a(ss)", [(UNIT, "")]),
        ("a(uuuuu)", [(1, 2, 3, 4, 5)]),
    ],
)
def test_a_list_of_units_of_another_type_is_an_error(
    signature: str, content: object
) -> None:
    answer = by_name({**GOOD, "ListUnitsByNames": (signature, content)})
    with (
        bus(answer, units.Manager) as manager,
        pytest.raises(ManagerError, match="list of units makes no sense"),
    ):
        manager.socket_units([UNIT])


def test_units_are_listed_with_their_states() -> None:
    with bus(by_name(GOOD), units.Manager) as manager:
        assert manager.list_units("*.socket") == [
            units.LoadedUnit(UNIT, "loaded", "active", "listening")
        ]
    with (
        bus(unknown, units.Manager) as manager,
        pytest.raises(ManagerError, match="does not list its units"),
    ):
        manager.list_units("*")


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
    assert "refused" in outcome(lambda manager: manager.hello(), unknown)


def test_a_unit_that_vanishes_between_two_questions_is_left_out() -> None:
    def answer(call: Message) -> list[Message | bytes]:
        listing = call.header.fields[HeaderFields.member] == "ListUnitsByNames"
        return by_name(GOOD)(call) if listing else unknown(call)

    with bus(answer) as manager:
        assert manager.socket_units([UNIT]) == []


def test_a_newer_file_of_a_unit_that_vanishes_meanwhile_is_not_believed() -> (
    None
):
    drop_ins = {"DropInPaths": ("as", [__file__])}

    def problem(gone: str) -> str:
        def answer(call: Message) -> list[Message | bytes]:
            lost = call.body and call.body[-1] == gone
            return (unknown if lost else by_name({**GOOD, **drop_ins}))(call)

        with bus(answer) as manager:
            (unit,) = manager.socket_units([UNIT])
        return unit.files[1].problem

    assert problem("nothing") == ""
    assert problem("NeedDaemonReload") == "was changed after systemd read it"


def test_a_unit_that_systemd_could_not_load_says_so() -> None:
    row = (UNIT, "", "error", "active", "running", "", "/x", 0, "", "/")
    for values in (
        {
            "ListUnitsByNames": ("a(ssssssouso)", [row]),
            "LoadState": ("s", "error"),
        },
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
    answer = by_name(
        {
            **GOOD,
            "ListUnitsByNames": ("a(ssssssouso)", [row]),
            "ActiveState": ("s", state),
        }
    )
    with bus(answer) as manager:
        assert manager.socket_units([UNIT], only_active=True) == []
        assert len(manager.socket_units([UNIT])) == 1


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
        manager = KIND(ours, user=True)
        asked: list[int] = []
        waiting: list[int] = []

        def written(question: object, serial: int) -> bytes:
            asked.append(serial)
            return b""

        def answered() -> tuple[int, tuple[Any, ...]]:
            waiting.append(len(asked) - len(waiting))
            return asked[len(waiting) - 1], (("s", "x"),)

        monkeypatch.setattr(Message, "serialise", written)
        monkeypatch.setattr(units._Get, "serialise", written)
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
        manager = KIND(ours, user=True)
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
            KIND(ours, user=True).hello()


def test_a_reset_of_the_start_limit_is_seen_through() -> None:
    """Nothing becomes of one whose sender has gone when systemd comes to it."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            ours.settimeout(0.05)
            with pytest.raises(ManagerError, match="timed out"):
                KIND(ours, user=True).reset_start_limit(DAEMON)
        with pytest.raises(ManagerError, match="did not answer"):
            KIND(ours, user=True).reset_start_limit(DAEMON)


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
