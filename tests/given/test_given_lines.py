"""From dom0's words to routes, and to reasons why not: pure."""

from __future__ import annotations

import pytest

from qrexec_activate.given.line import Bad, Given, decide, is_of_dom0
from qrexec_activate.given.qubesdb import understand
from qrexec_activate.routing.address import address_key
from qrexec_activate.routing.names import parse_unit_name

SPECIFIERS = {"t": "/run/user/1000", "h": "/home/user"}


def routes(
    values: dict[str, str] | str,
    *,
    system: bool = False,
    own: tuple[str, ...] = (),
) -> tuple[list[Given], list[Bad]]:
    if isinstance(values, str):
        values = {"connect-a": values}
    opened = {address_key(one): "/own.conf" for one in own}
    return decide(
        values,
        SPECIFIERS,
        {key: path for key, path in opened.items() if key},
        system=system,
    )


def shown(*args: object, **options: object) -> list[tuple[str, str, str]]:
    given, bad = routes(*args, **options)  # type: ignore[arg-type]  # any of its options
    assert bad == []
    return [(one.unit, one.address.written, one.target) for one in given]


@pytest.mark.parametrize(
    ("line", "unit", "listen", "target"),
    [
        (
            "tcp 1234 gitweb 127.0.0.1:1234",
            "qrexec-connect-tcp@1234:dom0-gitweb.socket",
            "127.0.0.1:1234",
            "gitweb",
        ),
        (
            "  tcp   1234\tgitweb ",
            "qrexec-connect-tcp@1234:dom0-gitweb.socket",
            "127.0.0.1:1234",
            "gitweb",
        ),
        (
            "tcp 1234 gitweb 127.0.0.2",
            r"qrexec-connect-tcp@1234:dom0-gitweb-127.0.0.2\x3a1234.socket",
            "127.0.0.2:1234",
            "gitweb",
        ),
        (
            "unix gpg-agent-ssh @default %t/qrexec/gpg-agent-ssh",
            r"qrexec-connect-unix@gpg-agent-ssh:dom0-\x40default.socket",
            "%t/qrexec/gpg-agent-ssh",
            "@default",
        ),
        (
            "unix notes @dispvm:vault %h/notes",
            r"qrexec-connect-unix@notes:dom0-\x40dispvm\x3avault-\x25h\x2fnotes"
            ".socket",
            "%h/notes",
            "@dispvm:vault",
        ),
        (
            "tcp-bind 2049-127.0.1.1 nfs",
            "qrexec-connect-tcp-bind@2049-127.0.1.1:dom0-nfs.socket",
            "127.0.0.1:2049",
            "nfs",
        ),
    ],
)
def test_a_line_is_a_unit(
    line: str, unit: str, listen: str, target: str
) -> None:
    assert shown(line) == [(unit, listen, target)]
    parse_unit_name(unit)


def test_the_drop_in_says_who_gave_it() -> None:
    ((one,), bad) = routes("unix notes @dispvm:vault")
    assert bad == []
    assert one.text == (
        "# dom0: qvm-features, vm-config.connect-a\n"
        "[Socket]\n"
        "ListenStream=%t/qrexec/notes\n"
        "FileDescriptorName=@dispvm\\x3avault\n"
    )


@pytest.mark.parametrize("end", [";", "\n", " ; ", ";;\n# no route\n;"])
def test_a_value_holds_several_routes(end: str) -> None:
    assert [target for *_, target in shown(f"tcp 1234 a{end}tcp 1235 b")] == [
        "a",
        "b",
    ]


def test_each_address_is_a_route_by_itself() -> None:
    found = shown("tcp 1234 a 127.0.0.1 [::1]:80 /run/x", system=False)
    assert [listen for _, listen, _ in found] == ["127.0.0.1:1234", "/run/x"]
    # Of which the one below 1024 needs a privilege that no user has.
    found = shown("tcp 1234 a 127.0.0.1 [::1]:80 /run/x", system=True)
    assert [listen for _, listen, _ in found] == ["[::1]:80"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("udp 53 dns", "no kind of route"),
        ("tcp", "KIND ARGUMENT TARGET"),
        ("tcp 1234", "KIND ARGUMENT TARGET"),
        ("tcp 0 a", "no port"),
        ("tcp 65536 a", "no port"),
        (f"tcp {'9' * 2000} a", "longer than"),
        ("unix a/b x", "silently turn into"),
        ("unix .a x", "dot"),
        ("unix %t x", "silently turn into"),
        ("tcp 1234 -x", "option"),
        ("tcp 1234 @adminvm", "keywords"),
        ("tcp 1234 \xe4", "begins with a letter"),
        (f"tcp 1234 {'a' * 32}", "at most"),
        ("tcp 1234 a 1234", "bare port"),
        ("tcp 1234 a nowhere:80", "no address"),
        ("tcp 1234 a 127.0.0.1:0", "no port"),
        (f"tcp 1234 a 127.0.0.1:{'9' * 2500}", "99"),
        ("tcp 1234 a fe80::1%eth0", "no address"),
        ("unix x a relative", "no address"),
        ("unix x a 127.0.0.1", "no port"),
        ("unix x a /a/../b", "neither .."),
        ("unix x a %x/b", "no path"),
        ("unix x a /b\\", "join its line"),
        (f"unix x a /{'a' * 107}", "too long"),
        (f"unix {'a' * 250} x /y", "longer than"),
        ("tcp 1234 a\x1b[31m", "begins with a letter"),
    ],
)
def test_what_is_no_route_is_refused_by_itself(line: str, reason: str) -> None:
    given, (bad,) = routes(f"tcp 1 x;{line};tcp 1235 good")
    assert [one.target for one in given] == ["good"]
    assert reason in str(bad)
    assert str(bad).startswith("vm-config.connect-a, from dom0: ")
    assert str(bad).isprintable()
    assert len(str(bad)) < 400
    # The system's says nothing of it: once is enough.
    assert routes(line, system=True)[1] == []


@pytest.mark.parametrize("key", ["connect-a/b", "connect-\n", "connect- ", ""])
def test_a_key_that_is_no_name_of_a_feature_is_refused(key: str) -> None:
    given, (bad,) = routes({key: "tcp 1234 a", "connect-b": "tcp 1235 b"})
    assert [one.target for one in given] == ["b"]
    assert str(bad).isprintable()


def test_nonsense_fills_no_journal() -> None:
    _, bad = routes(";".join("x" for _ in range(1000)))
    assert len(bad) == 6
    assert str(bad[-1]).endswith("and 995 more of that kind")


def test_of_two_that_claim_one_address_the_first_has_it() -> None:
    given, (bad,) = routes(
        {"connect-b": "tcp 1234 b", "connect-a": "tcp 1235 a 127.0.0.1:1234"}
    )
    assert [one.target for one in given] == ["a"]
    assert "127.0.0.1:1234 is for a already, by vm-config.connect-a" in str(bad)


def test_a_route_given_twice_is_one() -> None:
    given, bad = routes({"connect-b": "tcp 1234 b", "connect-a": "tcp 1234 b"})
    assert [one.key for one in given] == ["connect-a"]
    assert bad == []


def test_what_the_qube_opens_itself_comes_first() -> None:
    given, (bad,) = routes(
        "tcp 1234 a;tcp 1235 b", own=("127.0.0.1:1234", "127.0.0.1:9")
    )
    assert [one.target for one in given] == ["b"]
    assert "127.0.0.1:1234 is opened by /own.conf" in str(bad)


def test_a_route_that_stays_is_the_same_unit_whatever_else_changes() -> None:
    before = {one.unit: one.text for one in routes("tcp 1234 a;tcp 1235 b")[0]}
    after = {
        one.unit: one.text
        for one in routes("tcp 1;unix y x;tcp 1235 b;tcp 1234 a 127.0.0.2")[0]
    }
    assert set(before.items()) & set(after.items()) == {
        (unit, text) for unit, text in before.items() if "@1235" in unit
    }
    assert not any("@1234:dom0-a.socket" in unit for unit in after)


def test_no_two_routes_are_one_unit() -> None:
    lines = [
        f"tcp 1234 {target} {address}"
        for target in ("a", "a-127.0.0.1", "@dispvm:a", "@dispvm:a-127.0.0.2")
        for address in ("127.0.0.1", "127.0.0.2", "127.0.0.1:1235", "/a", "@a")
    ]
    units = [one.unit for line in lines for one in routes(line)[0]]
    assert len(set(units)) == len(lines)


def test_what_qubesdb_read_prints_is_understood() -> None:
    words = understand(
        b"/default-user = me\n"
        b"/vm-config/connect-a = tcp 1 x = y\\x0atcp 2 z\\x09\\xff\\x41\n"
        b"/vm-config/connect-b = \n"
        b"/vm-config/other = tcp 3 x\n"
        b"nonsense\xff\n = \n"
    )
    assert words.user == "me"
    assert words.values == {
        "connect-a": "tcp 1 x = y\ntcp 2 z\t\\xff\\x41",
        "connect-b": "",
    }
    assert understand(b"").user == "user"


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("/run/user/1/systemd/generator/x@1:dom0-a.socket.d/c-b.conf", "c-b"),
        ("/etc/systemd/user/x@1:dom0-a.socket.d/c.conf", ""),
        ("/run/user/1/systemd/generator/x@1:a.socket.d/c.conf", ""),
        ("/run/user/1/systemd/generator/x@1:dom0-a.socket", ""),
        ("c.conf", ""),
        ("", ""),
    ],
)
def test_whose_a_file_is_is_told_by_where_it_lies(path: str, key: str) -> None:
    assert is_of_dom0(path) == key
