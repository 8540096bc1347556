"""Where connections go: to the qube that the listener's own file names, or
nowhere.

The model of systemd here works on what files are meant to say, and knows
nothing of how they are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qrexec_activate.errors import BadName
from qrexec_activate.routing.claim import Claim, PassedSocket, Refusal, Route
from qrexec_activate.routing.routes import (
    SocketUnit,
    by_name,
    by_unit,
    claims,
    unit_specifiers,
)
from qrexec_activate.routing.unitfile import SourceFile

USER = {"t": "/run/user/1000", "h": "/home/user", "u": "user", "U": "1000"}
SYSTEM = {"t": "/run", "h": "/root", "u": "root", "U": "0"}
UNIT = "qrexec-connect-tcp@1234.socket"
RELOAD = (
    f"run: systemctl --user daemon-reload && systemctl --user restart {UNIT}"
)


def text(*lines: str) -> str:
    return "\n".join(("[Socket]", *lines, ""))


def drop_in(name: str, *lines: str) -> SourceFile:
    return SourceFile(f"/d/{name}.conf", text(*lines))


def unit(
    *files: SourceFile,
    listen: Sequence[str] = (),
    fd_name: str = UNIT,
    name: str = UNIT,
    problem: str = "",
) -> SocketUnit:
    """A unit with a bare fragment, these drop-ins, and what systemd says of
    it."""
    fragment = SourceFile("/units/template.socket", text("NoDelay=yes"))
    return SocketUnit(
        name,
        (fragment, *files),
        tuple(("Stream", address) for address in listen),
        fd_name,
        problem,
    )


def decide(
    loaded: SocketUnit, service: str = "qubes.ConnectTCP"
) -> list[Claim]:
    return claims(service, loaded, USER)


def target(claim: Claim) -> str:
    return (
        claim.target if isinstance(claim, Route) else f"refused: {claim.reason}"
    )


def reason(claim: Claim) -> str:
    assert isinstance(claim, Refusal)
    assert len(str(claim).splitlines()) == 1
    # Who reads it in the log finds what it is about.
    assert claim.address
    return claim.reason


def place(claim: Claim) -> tuple[str, str]:
    """The unit and the file that a refusal names, for the log's fields."""
    assert isinstance(claim, Refusal)
    return claim.unit, claim.file


GITWEB = drop_in(
    "gitweb", "ListenStream=127.0.0.1:1234", "FileDescriptorName=gitweb"
)
WORK = drop_in("work", "ListenStream=127.0.0.2:1234", "FileDescriptorName=work")
BOTH = ("127.0.0.1:1234", "127.0.0.2:1234")


# ------------------------------------------------------------- as in the README


def test_two_drop_ins_reach_two_qubes_though_systemd_gives_both_sockets_one_name() -> (
    None
):
    sockets = [
        PassedSocket(3 + at, "work", "Stream", address)
        for at, address in enumerate(BOTH)
    ]
    routes = by_unit(
        "qubes.ConnectTCP",
        [unit(GITWEB, WORK, listen=BOTH, fd_name="work")],
        sockets,
        USER,
    )
    assert [str(route) for route in routes] == [
        "127.0.0.1:1234 → gitweb qubes.ConnectTCP+1234 (/d/gitweb.conf)",
        "127.0.0.2:1234 → work qubes.ConnectTCP+1234 (/d/work.conf)",
    ]


def test_an_override_in_a_later_file_reaches_every_address() -> None:
    override = drop_in("z-override", "FileDescriptorName=vault")
    assert [
        target(claim)
        for claim in decide(
            unit(GITWEB, WORK, override, listen=BOTH, fd_name="vault")
        )
    ] == [
        "vault",
        "vault",
    ]


def test_an_override_by_systemctl_edit_sorts_among_the_others() -> None:
    override = drop_in("override", "FileDescriptorName=vault")
    found = decide(unit(GITWEB, override, WORK, listen=BOTH, fd_name="work"))
    assert [target(claim) for claim in found] == ["vault", "work"]


def test_a_template_names_all_addresses_that_name_no_qube() -> None:
    name = SourceFile(
        "/d/qrexec-connect-tcp@.socket.d/all.conf",
        text("FileDescriptorName=home"),
    )
    bare = drop_in("bare", "ListenStream=127.0.0.3:1234")
    assert [
        target(claim)
        for claim in decide(
            unit(name, bare, listen=["127.0.0.3:1234"], fd_name="home")
        )
    ] == ["home"]


def test_a_disposable_is_written_with_an_escaped_colon() -> None:
    file = drop_in("d", "ListenStream=1", r"FileDescriptorName=@dispvm\x3aweb")
    (claim,) = decide(unit(file, listen=["[::]:1"], fd_name=r"@dispvm\x3aweb"))
    assert target(claim) == "@dispvm:web"


def test_specifiers_in_names_and_addresses_are_expanded() -> None:
    file = drop_in("d", "ListenStream=%t/q-%i", "FileDescriptorName=q-%i")
    (claim,) = decide(
        unit(file, listen=["/run/user/1000/q-1234"], fd_name="q-1234")
    )
    assert target(claim) == "q-1234"


def test_a_unit_without_an_instance_calls_without_an_argument() -> None:
    file = drop_in("d", "ListenStream=@x", "FileDescriptorName=work")
    (claim,) = decide(
        unit(file, listen=["@x"], fd_name="work", name="my-rpc.socket"),
        "my.Rpc",
    )
    assert isinstance(claim, Route)
    assert claim.call == "my.Rpc"


def test_an_escaped_instance_is_decoded_and_its_dashes_are_kept() -> None:
    file = drop_in("d", "ListenStream=@x", "FileDescriptorName=work")
    (claim,) = decide(
        unit(
            file, listen=["@x"], fd_name="work", name=r"my-rpc@a\x2bb-c.socket"
        ),
        "my.Rpc",
    )
    assert isinstance(claim, Route)
    assert claim.call == "my.Rpc+a+b-c"


@given(
    st.from_regex(r"[A-Za-z0-9_.-]{0,40}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9:_.\\@-]{0,40}", fullmatch=True),
)
@example("1234", "work")
@example("1234", "")
@example("", "work")
@example("1234", r"a:b\xzz@c")
@example(r"a\x3ab", "work")
def test_a_label_tells_units_apart_and_is_no_part_of_the_call(
    instance: str, label: str
) -> None:
    file = drop_in("d", "ListenStream=@x", "FileDescriptorName=work")
    both = [
        decide(unit(file, listen=["@x"], fd_name="work", name=name), "my.Rpc")[
            0
        ]
        for name in (
            f"my-rpc@{instance}.socket",
            f"my-rpc@{instance}:{label}.socket",
        )
    ]
    if isinstance(both[0], Refusal):
        assert isinstance(both[1], Refusal)
    else:
        assert both[1] == replace(
            both[0], unit=f"my-rpc@{instance}:{label}.socket"
        )


def test_an_argument_ends_at_the_first_colon_before_it_is_decoded() -> None:
    file = drop_in("d", "ListenStream=@x", "FileDescriptorName=work")
    (claim,) = decide(
        unit(
            file,
            listen=["@x"],
            fd_name="work",
            name=r"my-rpc@a\x3ab:work.socket",
        ),
        "my.Rpc",
    )
    assert "'a:b' holds ':'" in reason(claim)


def test_two_labels_of_one_port_reach_two_qubes() -> None:
    both = [
        unit(
            drop_in(qube, f"ListenStream={at}", f"FileDescriptorName={qube}"),
            listen=[at],
            fd_name=qube,
            name=f"qrexec-connect-tcp@1234:{label}.socket",
        )
        for at, qube, label in (
            ("127.0.0.1:1234", "gitweb", "a"),
            ("127.0.0.2:1234", "work", "b"),
        )
    ]
    passed = [
        PassedSocket(3, "work", "Stream", "127.0.0.2:1234"),
        PassedSocket(4, "gitweb", "Stream", "127.0.0.1:1234"),
    ]
    decided = by_unit("qubes.ConnectTCP", both, passed, USER)
    assert [target(claim) for claim in decided] == ["work", "gitweb"]
    assert {claim.call for claim in decided if isinstance(claim, Route)} == {
        "qubes.ConnectTCP+1234"
    }


def test_a_bare_port_is_found_again_where_the_kernel_has_no_ipv6() -> None:
    file = drop_in("d", "ListenStream=1234", "FileDescriptorName=work")
    assert (
        target(decide(unit(file, listen=["0.0.0.0:1234"], fd_name="work"))[0])
        == "work"
    )
    written = drop_in("d", "ListenStream=[::]:1234", "FileDescriptorName=work")
    assert "no file of" in reason(
        decide(unit(written, listen=["0.0.0.0:1234"], fd_name="work"))[0]
    )


def test_a_bare_port_leaves_ipv4_any_to_the_file_that_asks_for_it() -> None:
    six = drop_in("a", "ListenStream=1234", "FileDescriptorName=six")
    four = drop_in("b", "ListenStream=0.0.0.0:1234", "FileDescriptorName=four")
    found = decide(
        unit(six, four, listen=["[::]:1234", "0.0.0.0:1234"], fd_name="four")
    )
    assert [target(claim) for claim in found] == ["six", "four"]


# ------------------------------------------------------------- refused, and why


def test_a_unit_without_a_target_says_so_by_name() -> None:
    file = drop_in("a", "ListenStream=1")
    assert reason(decide(unit(file, listen=["[::]:1"]))[0]) == (
        f"{UNIT} has no target: /d/a.conf:2 opens it, but no file sets"
        f" FileDescriptorName=;"
        f" add FileDescriptorName=QUBE to /d/a.conf, then {RELOAD}"
    )


def test_a_target_that_was_taken_back_is_told_with_its_place() -> None:
    reset = drop_in("b", "FileDescriptorName=")
    assert (
        "/d/b.conf:2 resets FileDescriptorName=; take FileDescriptorName= out"
        " of /d/b.conf, then"
    ) in reason(decide(unit(GITWEB, reset, listen=BOTH[:1]))[0])
    itself = drop_in("a", f"ListenStream={BOTH[0]}", "FileDescriptorName=")
    assert (
        "/d/a.conf:3 resets FileDescriptorName=; add FileDescriptorName=QUBE to"
        " /d/a.conf, then"
    ) in reason(decide(unit(itself, listen=BOTH[:1]))[0])


def test_an_address_never_borrows_the_name_of_another_drop_in() -> None:
    bare = drop_in("a", "ListenStream=127.0.0.1:1234")
    refused, served = decide(unit(bare, WORK, listen=BOTH, fd_name="work"))
    assert reason(refused) == (
        "/d/a.conf:2 opens it, but that file names no qube, and"
        " FileDescriptorName=work at /d/work.conf:3 is for the"
        f" listeners of its own file; add FileDescriptorName=QUBE to"
        f" /d/a.conf, then {RELOAD}"
    )
    assert target(served) == "work"
    assert isinstance(refused, Refusal)
    assert (refused.unit, refused.file) == (UNIT, "/d/a.conf")


def test_one_file_of_two_addresses_and_two_names_is_refused() -> None:
    file = drop_in(
        "a",
        "ListenStream=127.0.0.1:1234",
        "FileDescriptorName=a",
        "ListenStream=127.0.0.2:1234",
        "FileDescriptorName=b",
    )
    for claim in decide(unit(file, listen=BOTH, fd_name="b")):
        assert reason(claim) == (
            "/d/a.conf names two qubes for it, FileDescriptorName=a in line 3"
            " and FileDescriptorName=b in line 5;"
            f" give each qube a file of its own, then {RELOAD}"
        )


def test_two_files_that_open_one_address_for_two_qubes_are_refused() -> None:
    a = drop_in("a", "ListenStream=/run/x", "FileDescriptorName=a")
    b = drop_in("b", "ListenStream=/var/run//x", "FileDescriptorName=b")
    for claim in decide(unit(a, b, listen=["/run/x", "/run//x"], fd_name="b")):
        assert reason(claim) == (
            "/d/a.conf:2 and /d/b.conf:2 open it for different qubes (a, b);"
            f" give each qube an address of its own, then {RELOAD}"
        )
        assert place(claim) == (UNIT, "/d/b.conf")


def test_two_files_that_open_one_address_for_one_qube_are_served() -> None:
    a = drop_in("a", "ListenStream=/run/x", "FileDescriptorName=a")
    b = drop_in("b", "ListenStream=/run/x", "FileDescriptorName=a")
    assert [
        target(claim)
        for claim in decide(
            unit(a, b, listen=["/run/x", "/run/x"], fd_name="a")
        )
    ] == ["a", "a"]


def test_two_files_of_which_one_names_no_qube_are_refused() -> None:
    a = drop_in("a", "ListenStream=/run/x", "FileDescriptorName=a")
    b = drop_in("b", "ListenStream=/run/x")
    for claim in decide(unit(a, b, listen=["/run/x", "/run/x"], fd_name="a")):
        assert "/d/b.conf:2 opens it, but that file names no qube" in reason(
            claim
        )


def test_an_address_that_systemd_has_more_often_than_the_files_is_refused() -> (
    None
):
    for claim in decide(
        unit(
            GITWEB,
            listen=["127.0.0.1:1234", "127.0.0.1:1234"],
            fd_name="gitweb",
        )
    ):
        assert "no file of" in reason(claim)


def test_an_address_that_no_file_opens_is_refused() -> None:
    assert reason(decide(unit(WORK, listen=BOTH, fd_name="work"))[0]) == (
        f"no file of {UNIT} opens it, though systemd has it so loaded; {RELOAD}"
    )
    everywhere = unit(WORK, listen=["0.0.0.0:1234", BOTH[1]], fd_name="work")
    stray, served = decide(everywhere)
    assert reason(stray).startswith(f"no file of {UNIT} opens it")
    assert target(served) == "work"


def test_an_address_in_a_strange_form_is_refused_with_the_form_to_write() -> (
    None
):
    file = drop_in("a", "ListenStream=127.0.0.1:0x50", "FileDescriptorName=a")
    assert reason(
        decide(unit(file, listen=["127.0.0.1:80"], fd_name="a"))[0]
    ) == (
        f"no file of {UNIT} opens it in a form that is understood here; if"
        f" /d/a.conf:2 does"
        f" (ListenStream=127.0.0.1:0x50), write 127.0.0.1:80 there, then"
        f" {RELOAD}"
    )


def test_an_address_that_systemd_prints_in_a_strange_form_is_refused() -> None:
    assert "no file of" in reason(
        decide(unit(GITWEB, listen=["new-kind:1"], fd_name="gitweb"))[0]
    )


def test_a_name_that_systemd_has_loaded_otherwise_refuses_the_whole_unit() -> (
    None
):
    for claim, opener in zip(
        decide(unit(GITWEB, WORK, listen=BOTH, fd_name="vault")),
        ("gitweb", "work"),
        strict=True,
    ):
        assert reason(claim) == (
            f"{UNIT} (opened by /d/{opener}.conf:2): its files set"
            f" FileDescriptorName=work, but systemd has vault;"
            f" {RELOAD}"
        )


def test_where_no_file_names_a_qube_systemd_has_the_name_of_the_unit() -> None:
    bare = drop_in("a", "ListenStream=127.0.0.1:1234")
    reset = drop_in("b", "FileDescriptorName=")
    for files in ((bare,), (GITWEB, reset)):
        (claim,) = decide(unit(*files, listen=BOTH[:1], fd_name="vault"))
        assert (
            f"its files set FileDescriptorName={UNIT}, but systemd has vault"
            in reason(claim)
        )


def test_a_name_that_systemd_ignores_is_told_with_how_to_write_it() -> None:
    file = drop_in("a", "ListenStream=1", "FileDescriptorName=@dispvm:web")
    assert reason(decide(unit(file, listen=["[::]:1"]))[0]) == (
        "/d/a.conf:3: FileDescriptorName=@dispvm:web: systemd ignores a name"
        " with ':'; write it as \\x3a; mend it,"
        f" then {RELOAD}"
    )


def test_a_name_with_an_unknown_specifier_never_takes_what_systemd_has_of_another() -> (
    None
):
    """systemd ignores a name that expands to something invalid, and keeps that
    of the file before."""
    file = drop_in("z", "ListenStream=127.0.0.2:1234", "FileDescriptorName=%H")
    served, refused = decide(unit(GITWEB, file, listen=BOTH, fd_name="gitweb"))
    assert target(served) == "gitweb"
    assert (
        "/d/z.conf:3: FileDescriptorName=%H: it holds a specifier that is not"
        " known here" in reason(refused)
    )


def test_a_misspelt_target_is_refused_with_file_and_line() -> None:
    file = drop_in("a", "ListenStream=1", "FileDescriptorName=1work")
    assert reason(
        decide(unit(file, listen=["[::]:1"], fd_name="1work"))[0]
    ).startswith(
        "/d/a.conf:3: FileDescriptorName=1work: '1work' is no target: a"
        " qube's name begins with a letter"
    )


def test_a_port_that_is_none_is_refused_by_unit_and_file() -> None:
    (claim,) = decide(
        unit(
            GITWEB,
            listen=BOTH[:1],
            fd_name="gitweb",
            name="qrexec-connect-tcp@http.socket",
        )
    )
    assert reason(claim) == (
        "qrexec-connect-tcp@http.socket (opened by /d/gitweb.conf:2): 'http'"
        " is no port: write a number from 1 to 65535"
        " without leading zeros; the argument is what stands between @ and"
        " .socket, or @ and the first colon, so use a unit of another name"
    )
    assert place(claim) == (
        "qrexec-connect-tcp@http.socket",
        "/d/gitweb.conf",
    )
    (claim,) = decide(
        unit(GITWEB, listen=BOTH[:1], fd_name="gitweb", name="nonsense")
    )
    assert "no unit name" in reason(claim)


def test_a_unit_that_systemd_could_not_load_is_refused() -> None:
    (claim,) = decide(
        unit(
            GITWEB,
            listen=BOTH[:1],
            fd_name="gitweb",
            problem="systemd could not load it",
        )
    )
    assert (
        reason(claim)
        == f"{UNIT} (opened by /d/gitweb.conf:2): systemd could not load it;"
        f" {RELOAD}"
    )


def test_a_unit_that_cannot_be_trusted_may_have_specifiers_and_no_opener() -> (
    None
):
    (claim,) = decide(
        unit(
            drop_in("a", "ListenStream=%t/x", "FileDescriptorName=work"),
            listen=["/run/user/1000/x"],
            fd_name="work",
            problem="systemd could not load it",
        )
    )
    assert reason(claim) == f"{UNIT}: systemd could not load it; {RELOAD}"
    assert place(claim) == (UNIT, "")


def test_the_system_manager_gets_commands_of_its_own_and_odd_names_are_quoted() -> (
    None
):
    loaded = unit(
        drop_in("a", "ListenStream=@x"),
        listen=["@x"],
        name=r"my-rpc@a\x2bb.socket",
    )
    (claim,) = claims("my.Rpc", loaded, SYSTEM)
    assert reason(claim).endswith(
        r"run: systemctl daemon-reload && systemctl restart"
        r" 'my-rpc@a\x2bb.socket'"
    )


@pytest.mark.parametrize(
    ("setting", "kind", "shown"),
    [
        ("ListenDatagram=127.0.0.1:53", "Datagram", "127.0.0.1:53"),
        ("ListenSequentialPacket=/run/ä", "SequentialPacket", r"/run/\303\244"),
        ("ListenFIFO=/run/ä", "FIFO", "/run/ä"),
    ],
)
def test_what_carries_no_byte_stream_is_refused_by_file_and_line(
    setting: str, kind: str, shown: str
) -> None:
    file = drop_in("a", setting, "FileDescriptorName=a")
    loaded = replace(
        unit(file, GITWEB, fd_name="gitweb"),
        listen=((kind, shown), ("Stream", "127.0.0.1:1234")),
    )
    refused, served = decide(loaded)
    assert (
        reason(refused)
        == f"/d/a.conf:2: a {kind} socket cannot carry a byte stream; use"
        f" ListenStream="
    )
    assert place(refused) == (UNIT, "/d/a.conf")
    assert target(served) == "gitweb"
    (unknown,) = decide(replace(loaded, listen=(("MessageQueue", "/q"),)))
    assert reason(unknown).startswith(f"{UNIT}: a MessageQueue socket")
    assert place(unknown) == (UNIT, "")


def test_a_name_may_hold_dots_and_no_instance() -> None:
    values = unit_specifiers("my.rpc.socket", {})
    assert (values["N"], values["i"], values["I"]) == ("my.rpc", "", "")


# --------------------------------------------- files that changed under systemd


def changed(file: SourceFile, *now: str) -> SourceFile:
    return SourceFile(
        file.path, None, "was changed after systemd read it", text(*now)
    )


def test_a_changed_drop_in_is_refused_and_its_neighbours_are_served() -> None:
    other = changed(
        WORK, "ListenStream=127.0.0.2:1234", "FileDescriptorName=vault"
    )
    served, refused = decide(unit(GITWEB, other, listen=BOTH, fd_name="work"))
    assert target(served) == "gitweb"
    assert reason(refused) == (
        f"which file opens it cannot be told: /d/work.conf was changed after"
        f" systemd read it; {RELOAD}"
    )
    refused, served = decide(
        unit(changed(GITWEB), WORK, listen=BOTH, fd_name="work")
    )
    assert "was changed" in reason(refused)
    assert target(served) == "work"


@pytest.mark.parametrize(
    "now",
    [
        ("FileDescriptorName=vault",),
        ("ListenStream=", "ListenStream=127.0.0.1:1234"),
    ],
)
def test_a_changed_file_that_may_have_been_an_override_refuses_what_came_before_it(
    now: tuple[str, ...],
) -> None:
    for claim in decide(
        unit(GITWEB, changed(WORK, *now), listen=BOTH, fd_name="work")
    ):
        assert "/d/work.conf was changed after systemd read it" in reason(claim)


def test_a_changed_file_that_opened_nothing_was_an_override() -> None:
    other = changed(
        WORK, "ListenStream=127.0.0.2:1234", "FileDescriptorName=vault"
    )
    (claim,) = decide(unit(GITWEB, other, listen=BOTH[:1], fd_name="work"))
    assert reason(claim) == (
        f"/d/work.conf was changed after systemd read it, and may have named"
        f" another qube for it; {RELOAD}"
    )


def test_two_changed_files_refuse_what_came_before_them() -> None:
    other = changed(WORK, "ListenStream=127.0.0.2:1234")
    third = changed(drop_in("z"), "ListenStream=127.0.0.3:1234")
    named, nobody = decide(
        unit(GITWEB, other, third, listen=BOTH, fd_name="work")
    )
    assert "was changed" in reason(named)
    assert reason(nobody) == (
        "which file opens it cannot be told: /d/work.conf was changed after"
        " systemd read it; /d/z.conf was changed after systemd read it;"
        f" {RELOAD}"
    )


def test_a_changed_file_beside_one_in_a_strange_form_refuses_what_came_before_it() -> (
    None
):
    """The address that nobody else accounts for may be that of the strange
    form, and the changed file an override."""
    strange = drop_in(
        "a", "ListenStream=127.0.0.2:0x4d2", "FileDescriptorName=a"
    )
    other = changed(
        WORK, "ListenStream=127.0.0.3:1234", "FileDescriptorName=work"
    )
    for claim in decide(
        unit(GITWEB, strange, other, listen=BOTH, fd_name="work")
    ):
        assert "was changed" in reason(claim)


def test_a_changed_file_beside_an_address_that_systemd_prints_strangely_refuses_what_came_before_it() -> (
    None
):
    other = changed(
        WORK, "ListenStream=127.0.0.3:1234", "FileDescriptorName=work"
    )
    third = drop_in("a", "ListenStream=127.0.0.2:1234", "FileDescriptorName=a")
    for claim in decide(
        unit(
            GITWEB,
            third,
            other,
            listen=("127.0.0.1:1234", "new-kind:1"),
            fd_name="work",
        )
    ):
        assert "was changed" in reason(claim)


def test_ipv4_any_of_a_changed_file_does_not_pass_for_the_bare_port_of_another() -> (
    None
):
    six = drop_in("a", "ListenStream=1234", "FileDescriptorName=six")
    four = changed(
        drop_in("b"), "ListenStream=0.0.0.0:1234", "FileDescriptorName=four"
    )
    served, refused = decide(
        unit(six, four, listen=["[::]:1234", "0.0.0.0:1234"], fd_name="four")
    )
    assert target(served) == "six"
    assert "/d/b.conf was changed" in reason(refused)


def test_a_name_for_the_whole_unit_counts_beside_a_changed_file_only_if_systemd_has_it() -> (
    None
):
    everybody = drop_in("x", "FileDescriptorName=home")
    bare = drop_in("z", "ListenStream=127.0.0.1:1234")
    other = changed(WORK, "FileDescriptorName=vault")
    (claim,) = decide(
        unit(other, everybody, bare, listen=BOTH[:1], fd_name="vault")
    )
    assert "systemd has vault loaded instead" in reason(claim)
    (claim,) = decide(
        unit(other, everybody, bare, listen=BOTH[:1], fd_name="home")
    )
    assert target(claim) == "home"
    # One that came after it may have set that very name, for addresses of its
    # own.
    (claim,) = decide(
        unit(everybody, other, bare, listen=BOTH[:1], fd_name="home")
    )
    assert "/d/work.conf was changed" in reason(claim)


def test_a_file_less_that_is_known_gives_nothing_to_a_listener_without_a_name() -> (
    None
):
    """Were it known, the name would be that of its own listener."""
    name = drop_in("0", "FileDescriptorName=work")
    other = drop_in(
        "1", "ListenStream=127.0.0.9:1234", "FileDescriptorName=work"
    )
    bare = drop_in("2", "ListenStream=", "ListenStream=127.0.0.1:1234")
    for second in (other, changed(other), changed(other, "NoDelay=yes")):
        (claim,) = decide(
            unit(name, second, bare, listen=BOTH[:1], fd_name="work")
        )
        assert isinstance(claim, Refusal)
    # Nor where it is known to have opened one.
    bare = drop_in("2", "ListenStream=127.0.0.1:1234")
    opened = ("127.0.0.9:1234", *BOTH[:1])
    for second in (other, changed(other, "ListenStream=127.0.0.9:1234")):
        *_, claim = decide(
            unit(name, second, bare, listen=opened, fd_name="work")
        )
        assert isinstance(claim, Refusal)


def test_a_file_that_not_every_systemd_reads_alike_is_in_doubt() -> None:
    """Of a file with a section without a name, systemd 252 reads on, and 262
    nothing."""
    odd = SourceFile(
        "/d/odd.conf",
        "[]\n"
        + text(
            "ListenStream=",
            *("ListenStream=127.0.0.1:1234",),
            "FileDescriptorName=vault",
        ),
    )
    last = drop_in(
        "z", "ListenStream=127.0.0.2:1234", "FileDescriptorName=gitweb"
    )
    for claim in decide(
        unit(GITWEB, odd, last, listen=BOTH[:1], fd_name="gitweb")
    ):
        assert "/d/odd.conf has a section without a name" in reason(claim)


def test_brackets_that_are_no_section_leave_no_doubt() -> None:
    plain = SourceFile("/d/work.conf", f"# [] is no section here\n{WORK.text}")
    found = decide(unit(GITWEB, plain, listen=BOTH, fd_name="work"))
    assert [target(claim) for claim in found] == ["gitweb", "work"]


# --------------------------------------------------------------- passed sockets


def test_sockets_are_told_apart_by_address_in_any_order() -> None:
    sockets = [
        PassedSocket(3, "work", "Stream", BOTH[1]),
        PassedSocket(4, "work", "Stream", BOTH[0]),
    ]
    found = by_unit(
        "qubes.ConnectTCP",
        [unit(GITWEB, WORK, listen=BOTH, fd_name="work")],
        sockets,
        USER,
    )
    assert [target(claim) for claim in found] == ["work", "gitweb"]


def test_a_socket_that_is_not_open_yet_changes_nothing_for_the_others() -> None:
    """A daemon-reload has added an address, and the socket unit was not
    restarted since."""
    sockets = [PassedSocket(3, "work", "Stream", BOTH[1])]
    found = by_unit(
        "qubes.ConnectTCP",
        [unit(GITWEB, WORK, listen=BOTH, fd_name="work")],
        sockets,
        USER,
    )
    assert [target(claim) for claim in found] == ["work"]


NO_UNIT = (
    "no socket unit that starts this service opens it, as systemd has them"
    " loaded now; restart the socket unit that did"
)


@pytest.mark.parametrize(
    ("kind", "address", "words"),
    [
        ("Stream", "127.0.0.9:1", NO_UNIT),
        ("Stream", "unix socket without a name", NO_UNIT),
        ("Stream", "new-kind:1", NO_UNIT),
        (
            "Datagram",
            "127.0.0.9:1",
            "a Datagram socket cannot carry a byte stream; use ListenStream=",
        ),
        (
            "Connection",
            "127.0.0.1:1234",
            "it is a connection, not a listener; set Accept=no"
            " (systemd-socket-activate: leave --accept out)",
        ),
    ],
)
def test_a_socket_that_no_unit_opens_is_refused(
    kind: str, address: str, words: str
) -> None:
    loaded = unit(
        GITWEB, listen=["127.0.0.1:1234", "new-kind:1"], fd_name="gitweb"
    )
    (claim,) = by_unit(
        "qubes.ConnectTCP",
        [loaded],
        [PassedSocket(3, "gitweb", kind, address)],
        USER,
    )
    assert reason(claim) == words
    assert claim.address == address


def test_a_socket_passed_under_another_name_is_refused() -> None:
    loaded = unit(GITWEB, listen=BOTH[:1], fd_name="gitweb")
    (claim,) = by_unit(
        "qubes.ConnectTCP",
        [loaded],
        [PassedSocket(3, "work", "Stream", BOTH[0])],
        USER,
    )
    assert reason(claim) == (
        f"systemd passed it as 'work', but now has {UNIT} loaded with"
        f" FileDescriptorName=gitweb; restart {UNIT}"
    )
    assert isinstance(claim, Refusal)
    assert claim.unit == UNIT
    other = replace(loaded, name="qrexec-connect-tcp@5678.socket")
    (claim,) = by_unit(
        "qubes.ConnectTCP",
        [loaded, other],
        [PassedSocket(3, "work", "Stream", BOTH[0])],
        USER,
    )
    assert f"now has {UNIT} and {other.name} loaded with" in reason(claim)


def test_a_claim_is_about_the_address_as_the_socket_shows_it() -> None:
    loaded = unit(
        drop_in("a", "ListenStream=/run//x", "FileDescriptorName=a"),
        listen=["/run//x"],
        fd_name="a",
    )
    (claim,) = by_unit(
        "qubes.ConnectTCP",
        [loaded],
        [PassedSocket(3, "a", "Stream", "/run/x")],
        USER,
    )
    assert target(claim) == "a"
    assert claim.address == "/run/x"


def test_two_units_that_claim_one_address_are_refused() -> None:
    a = unit(
        drop_in("a", "ListenStream=/run/x", "FileDescriptorName=a"),
        listen=["/run/x"],
        fd_name="a",
    )
    b = replace(a, name="qrexec-connect-tcp@5678.socket")
    for units in ([a, b], [b, a]):
        (claim,) = by_unit(
            "qubes.ConnectTCP",
            units,
            [PassedSocket(3, "a", "Stream", "/run/x")],
            USER,
        )
        assert reason(claim) == (
            f"{UNIT} and qrexec-connect-tcp@5678.socket open it for different"
            f" calls; give each an address of its own"
        )


def test_two_units_that_are_both_refused_keep_their_reason() -> None:
    a = unit(
        drop_in("a", "ListenStream=/run/x"), listen=["/run/x"], fd_name=UNIT
    )
    (claim,) = by_unit(
        "qubes.ConnectTCP",
        [a, a],
        [PassedSocket(3, UNIT, "Stream", "/run/x")],
        USER,
    )
    assert "has no target" in reason(claim)


# -------------------------------------------------------------- without systemd


def test_names_from_systemd_socket_activate_are_targets() -> None:
    sockets = [
        PassedSocket(3, "work", "Datagram", "127.0.0.1:5"),
        PassedSocket(4, "work", "Stream", "127.0.0.1:1"),
        PassedSocket(5, r"@dispvm\x3aweb", "Stream", "127.0.0.1:2"),
        PassedSocket(6, "1x", "Stream", "127.0.0.1:4"),
        PassedSocket(7, "unknown", "Stream", "127.0.0.1:3"),
        PassedSocket(8, "LISTEN_FD", "Stream", "127.0.0.1:6"),
        PassedSocket(9, "", "Stream", "127.0.0.1:7"),
    ]
    found = by_name("qubes.ConnectTCP", "8000", sockets)
    assert reason(found[0]).startswith("a Datagram socket cannot carry")
    assert [target(claim) for claim in found[1:3]] == ["work", "@dispvm:web"]
    assert str(found[1]) == "127.0.0.1:1 → work qubes.ConnectTCP+8000"
    assert "is no target" in reason(found[3])
    assert {reason(claim) for claim in found[4:]} == {
        "no target is set; name the socket after the qube, as with"
        " systemd-socket-activate --fdname=work"
    }


def test_without_systemd_a_bad_service_or_argument_serves_nothing() -> None:
    with pytest.raises(BadName):
        by_name("-x", "", [])
    with pytest.raises(BadName):
        by_name("qubes.ConnectTCP", "x", [])


# ------------------------------------------------------------------- specifiers


def test_specifiers_of_a_unit_are_those_of_its_name() -> None:
    values = unit_specifiers("my-own-rpc@a-b\\x2dc.socket", USER)
    assert values == {
        **USER,
        "n": "my-own-rpc@a-b\\x2dc.socket",
        "N": "my-own-rpc@a-b\\x2dc",
        "p": "my-own-rpc",
        "P": "my/own/rpc",
        "j": "rpc",
        "J": "rpc",
        "i": "a-b\\x2dc",
        "I": "a/b-c",
    }
    assert "I" not in unit_specifiers("x@a\\b.socket", USER)


# -------------------------------------------------------- never to another qube

#: How many others are generated (100, but for `make mutants`).
EXAMPLES = settings.default.max_examples
QUBES = ("work", "vault", "gitweb", "home")
ADDRESSES = (
    "127.0.0.1:1234",
    "[::1]:80",
    "/run/user/1000/s",
    "@abs",
    "/run/user/1000/q-1234",
)
#: How each address may be written.
WRITTEN = {
    "127.0.0.1:1234": ["127.0.0.1:1234", "127.0.0.1:%i"],
    "[::1]:80": ["[::1]:80", "[0::1]:80"],
    "/run/user/1000/s": ["/run/user/1000/s", "%t/s", "/var/run/user//1000/s"],
    "@abs": ["@abs"],
    "/run/user/1000/q-1234": ["%t/q-%i", "%t/q-1234"],
}


@dataclass(frozen=True)
class Meant:
    """What one file says: whether it first forgets all addresses, which it
    opens, and the names that it sets."""

    resets: bool
    opens: tuple[str, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """A file as systemd has read it, as it is now, and what is known of the
    difference."""

    was: Meant
    now: Meant
    state: str


meanings = st.builds(
    Meant,
    st.sampled_from([False, False, False, True]),
    st.lists(st.sampled_from(ADDRESSES), max_size=2).map(tuple),
    st.lists(
        st.sampled_from([*QUBES, *QUBES, "q-%i", "", "a:b", "1x"]), max_size=2
    ).map(tuple),
)
same_files = meanings.map(lambda meant: Loaded(meant, meant, "same"))
files = st.one_of(
    same_files,
    same_files,
    st.builds(Loaded, meanings, meanings, st.just("changed")),
    st.builds(Loaded, meanings, st.just(Meant(False, (), ())), st.just("gone")),
    st.builds(Loaded, meanings, meanings, st.just("unreadable")),
)


def meaning_of(name: str) -> str | None:
    """The qube that a name stands for; None where it stands for none."""
    name = name.replace("%i", "1234")
    return name if re.fullmatch(r"[a-z][a-z0-9-]*", name) else None


def truth(meant: Sequence[Meant]) -> list[tuple[str, str | None]]:
    """Which qube each open address belongs to, in systemd's order; None: to
    none."""
    entries: list[tuple[str, str | None, bool]] = []
    for file in meant:
        if file.resets:
            entries = []
        if file.opens:
            own = file.names[-1] if file.names else None
            entries += [
                (address, own, bool(file.names)) for address in file.opens
            ]
        elif file.names:
            entries = [
                (address, file.names[-1], True) for address, _, _ in entries
            ]
    naming = [number for number, file in enumerate(meant) if file.names]
    everyones = None
    if naming and (naming[-1] == 0 or not meant[naming[-1]].opens):
        everyones = meant[naming[-1]].names[-1]
    return [
        (address, meaning_of((name if named else everyones) or ""))
        for address, name, named in entries
    ]


def last_name(meant: Sequence[Meant], unit_name: str) -> str:
    """The name that systemd has in the end."""
    instance = unit_name.partition("@")[2].removesuffix(".socket")
    result = unit_name
    for name in (name for file in meant for name in file.names):
        result = (
            result
            if ":" in name
            else (name.replace("%i", instance) or unit_name)
        )
    return result


def render(meant: Meant, unit_name: str, draw: st.DrawFn) -> str:
    forms = {
        address: [
            form
            for form in WRITTEN[address]
            if unit_name == UNIT or "%i" not in form
        ]
        for address in ADDRESSES
    }
    opens = [
        f"ListenStream={draw(st.sampled_from(forms[address]))}"
        for address in meant.opens
    ]
    names = [f"FileDescriptorName={name}" for name in meant.names]
    # Names and addresses may stand in any order, each kind in its own.
    order = draw(st.permutations([0] * len(opens) + [1] * len(names)))
    body = [(names if kind else opens).pop(0) for kind in order]
    noise = draw(
        st.sampled_from(
            [
                "",
                "# FileDescriptorName=evil",
                "[Unit]\nFileDescriptorName=evil\n[Socket]",
            ]
        )
    )
    return text(*(["ListenStream="] if meant.resets else []), noise, *body)


@st.composite
def units(
    draw: st.DrawFn, name: str = UNIT, all_same: bool = False
) -> tuple[SocketUnit, list[Loaded]]:
    loaded = draw(
        st.lists(same_files if all_same else files, min_size=1, max_size=4)
    )
    sources = []
    for number, file in enumerate(loaded):
        path = f"/d/{number}.conf"
        now = render(file.now, name, draw)
        sources.append(
            {
                "same": SourceFile(path, now),
                "changed": SourceFile(
                    path, None, "was changed after systemd read it", now
                ),
                "gone": SourceFile(path, None, "is gone", ""),
                "unreadable": SourceFile(path, None, "cannot be read"),
            }[file.state]
        )
    was = [file.was for file in loaded]
    listen = tuple(("Stream", address) for address, _ in truth(was))
    return SocketUnit(
        name, tuple(sources), listen, last_name(was, name)
    ), loaded


@given(units())
@settings(max_examples=5 * EXAMPLES // 2)
def test_no_connection_ever_goes_to_a_qube_that_its_own_file_does_not_name(
    generated: tuple[SocketUnit, list[Loaded]],
) -> None:
    socket_unit, loaded = generated
    was = truth([file.was for file in loaded])
    now = truth([file.now for file in loaded])
    for claim, (address, belongs) in zip(decide(socket_unit), was, strict=True):
        assert claim.address == address
        if isinstance(claim, Route):
            # As systemd has read the files; or, where one was changed since, as
            # they all are now.
            allowed = {
                belongs,
                *(qube for other, qube in now if other == address),
            } - {None}
            assert claim.target in allowed
            if all(file.state == "same" for file in loaded):
                assert {qube for other, qube in was if other == address} == {
                    claim.target
                }
        else:
            assert len(str(claim).splitlines()) == 1


def known(socket_unit: SocketUnit, meant: Sequence[Meant]) -> dict[str, Claim]:
    """What would be decided, by address, if the files were known to be so."""
    sources = tuple(
        SourceFile(
            file.path,
            text(
                *(["ListenStream="] if one.resets else []),
                *(
                    f"ListenStream={WRITTEN[address][0]}"
                    for address in one.opens
                ),
                *(f"FileDescriptorName={name}" for name in one.names),
            ),
        )
        for file, one in zip(socket_unit.files, meant, strict=True)
    )
    listen = tuple(("Stream", address) for address, _ in truth(meant))
    fd_name = last_name(meant, socket_unit.name)
    loaded = SocketUnit(socket_unit.name, sources, listen, fd_name)
    return {claim.address: claim for claim in decide(loaded)}


@given(units())
@settings(max_examples=5 * EXAMPLES // 2)
@example(
    (
        unit(
            drop_in("0", "FileDescriptorName=work"),
            changed(
                drop_in("1"), "ListenStream=@abs", "FileDescriptorName=work"
            ),
            drop_in("2", "ListenStream=", "ListenStream=127.0.0.1:1234"),
            listen=["127.0.0.1:1234"],
            fd_name="work",
        ),
        [
            Loaded(meant, meant, "same")
            for meant in (
                Meant(False, (), ()),
                Meant(False, (), ("work",)),
                Meant(False, ("@abs",), ("work",)),
                Meant(True, ("127.0.0.1:1234",), ()),
            )
        ],
    )
)
@example(
    (
        unit(
            drop_in("0", "ListenStream=[::1]:80", "FileDescriptorName=vault"),
            changed(
                drop_in("1"), "ListenStream=[::1]:80", "FileDescriptorName=work"
            ),
            listen=["127.0.0.1:1234", "[::1]:80"],
            fd_name="work",
        ),
        [
            Loaded(Meant(False, (), ()), Meant(False, (), ()), "same"),
            Loaded(
                Meant(False, ("[::1]:80",), ("vault",)),
                Meant(False, ("[::1]:80",), ("vault",)),
                "same",
            ),
            Loaded(
                Meant(True, ("127.0.0.1:1234", "[::1]:80"), ("work",)),
                Meant(False, ("[::1]:80",), ("work",)),
                "changed",
            ),
        ],
    )
)
def test_knowing_less_never_gives_more(
    generated: tuple[SocketUnit, list[Loaded]],
) -> None:
    """What is refused with all files known as systemd has read them, and as
    they are now, is refused without."""
    socket_unit, loaded = generated
    was = known(socket_unit, [file.was for file in loaded])
    now = known(socket_unit, [file.now for file in loaded])
    for claim in decide(socket_unit):
        if isinstance(claim, Route):
            both = (was.get(claim.address), now.get(claim.address))
            assert claim.target in {
                one.target for one in both if isinstance(one, Route)
            }


@given(units(all_same=True))
@settings(max_examples=3 * EXAMPLES // 2)
def test_every_listener_that_its_own_file_names_is_served(
    generated: tuple[SocketUnit, list[Loaded]],
) -> None:
    socket_unit, loaded = generated
    # Two names in one file of two addresses are refused, as each may have been
    # meant for one of them.
    if any(
        len(file.was.opens) > 1 and len(set(file.was.names)) > 1
        for file in loaded
    ):
        return
    was = truth([file.was for file in loaded])
    for claim, (address, belongs) in zip(decide(socket_unit), was, strict=True):
        if (
            {qube for other, qube in was if other == address}
            == {belongs}
            != {None}
        ):
            assert target(claim) == belongs


@given(units(), units(name="qrexec-connect-tcp@5678.socket"), st.randoms())
def test_no_passed_socket_ever_goes_to_the_qube_of_another_unit(
    one: tuple[SocketUnit, list[Loaded]],
    two: tuple[SocketUnit, list[Loaded]],
    rng: object,
) -> None:
    both = {one[0].name: one, two[0].name: two}
    passed = [
        (name, number, PassedSocket(0, found.fd_name, "Stream", address))
        for name, (found, _) in both.items()
        for number, (_, address) in enumerate(found.listen)
    ]
    getattr(rng, "shuffle")(passed)  # noqa: B009
    decided = by_unit(
        "qubes.ConnectTCP",
        [one[0], two[0]],
        [socket for _, _, socket in passed],
        USER,
    )
    for (name, number, socket), claim in zip(passed, decided, strict=True):
        if isinstance(claim, Route):
            loaded = both[name][1]
            was = truth([file.was for file in loaded])
            now = truth([file.now for file in loaded])
            assert claim.argument == ("1234" if name == UNIT else "5678")
            allowed = {
                was[number][1],
                *(qube for other, qube in now if other == socket.address),
            }
            assert claim.target.replace("5678", "1234") in allowed


@given(
    st.lists(
        st.tuples(
            st.text(max_size=80),
            st.text(max_size=80) | st.none(),
            st.booleans(),
        ),
        max_size=4,
    ),
    st.lists(
        st.tuples(
            st.sampled_from(["Stream", "Datagram", "x"]), st.text(max_size=20)
        ),
        max_size=4,
    ),
    st.text(max_size=20),
    st.text(max_size=20) | st.just(UNIT),
    st.text(max_size=10) | st.just("qubes.ConnectTCP"),
)
@example(
    [("[Socket]\nListenStream=@x", None, True)],
    [("Stream", "@x")],
    "",
    UNIT,
    "my.Rpc",
)
def test_no_unit_is_too_odd_to_be_decided_about(
    contents: list[tuple[str, str | None, bool]],
    listen: list[tuple[str, str]],
    fd_name: str,
    name: str,
    service: str,
) -> None:
    sources = tuple(
        SourceFile(f"/d/{number}", f"[Socket]\n{body}", "")
        if known
        else SourceFile(f"/d/{number}", None, "odd", now)
        for number, (body, now, known) in enumerate(contents)
    )
    odd = SocketUnit(name, sources, tuple(listen), fd_name)
    assert len(claims(service, odd, USER)) == len(listen)
    sockets = [
        PassedSocket(3, fd_name, kind, address) for kind, address in listen
    ]
    assert len(by_unit(service, [odd, odd], sockets, {})) == len(sockets)
