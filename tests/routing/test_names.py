"""Names: what qrexec and systemd take as they are passes, and everything else
is refused before anyone sees it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from samples import REAL_TEXT, TARGETS

from qrexec_activate.errors import BadName
from qrexec_activate.routing.names import (
    MAX_ARGUMENT,
    UNIT_TYPES,
    UnitName,
    call_name,
    check_argument,
    check_service,
    check_target,
    decode_escapes,
    parse_unit_name,
)

#: Text that may hold lone surrogates, as undecodable bytes of a command line
#: do.
ANY_TEXT = st.text(st.characters(blacklist_categories=()), max_size=60)


def refusal(function: Callable[[], object]) -> str:
    """The words of a refusal; empty if it passes."""
    try:
        function()
    except BadName as error:
        return str(error)
    return ""


def parts(name: str) -> tuple[str, str | None, str]:
    unit = parse_unit_name(name)
    return unit.prefix, unit.instance, unit.suffix


# ---------------------------------------------------------------------- escapes


def test_a_unit_without_an_instance_has_neither_argument_nor_label() -> None:
    name = parse_unit_name("my-rpc.socket")
    assert (name.argument, name.label) == ("", "")


def test_what_follows_the_first_colon_is_the_label() -> None:
    name = parse_unit_name("qrexec-connect-tcp@1234:work:2.socket")
    assert (name.argument, name.label) == ("1234", "work:2")


@given(REAL_TEXT)
def test_text_without_a_backslash_is_left_as_it_is(text: str) -> None:
    text = text.replace("\\", "")
    assert decode_escapes(text) == text


def test_a_dash_in_an_instance_stays_a_dash() -> None:
    assert decode_escapes("2049-127.0.1.1") == "2049-127.0.1.1"
    assert decode_escapes(r"a\x2db-c\x2Fd") == "a-b-c/d"


@pytest.mark.parametrize(
    "text",
    [
        "\\",
        "a\\",
        "\\n",
        "\\x",
        "\\x4",
        "\\xg0",
        "\\\\x41",
        "\\u0041",
        "\\x-1",
        "\\x 1",
    ],
)
def test_a_backslash_that_begins_no_escape_is_refused(text: str) -> None:
    with pytest.raises(BadName, match="begins no"):
        decode_escapes(text)


def test_escapes_that_make_no_text_are_refused() -> None:
    with pytest.raises(BadName, match="no UTF-8"):
        decode_escapes("\\xff")
    with pytest.raises(BadName, match="no UTF-8"):
        decode_escapes("\udcff")


# ---------------------------------------------------------- nothing but BadName


@given(ANY_TEXT, ANY_TEXT)
@example("\ud800", "\udcff")
def test_no_text_does_anything_but_pass_or_be_refused_in_one_line(
    text: str, other: str
) -> None:
    functions: list[Callable[[], object]] = [
        lambda: decode_escapes(text),
        lambda: check_target(text),
        lambda: check_service(text),
        lambda: check_argument(text, other),
        lambda: check_argument("qubes.ConnectTCP", text),
        lambda: check_argument("qubes.ConnectUnix", text),
        lambda: check_argument("qubes.ConnectTCPBind", text),
        lambda: parse_unit_name(text),
    ]
    for function in functions:
        assert len(refusal(function).splitlines()) <= 1


# ---------------------------------------------------------------------- targets


@given(TARGETS)
def test_a_target_that_qrexec_knows_passes_as_it_is(target: str) -> None:
    assert check_target(target) == target


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("", "is empty; set FileDescriptorName="),
        ("-x", "option"),
        ("--help", "option"),
        ("@dispvm:-x", "option"),
        ("@anyvm", "keywords"),
        ("@adminvm", "dom0 is written dom0"),
        ("@tag:work", "keywords"),
        ("$default", "keywords"),
        ("@dispvm:@dispvm:x", "keywords"),
        ("@dispvm:", "begins with a letter"),
        ("@default ", "keywords"),
        ("1work", "begins with a letter"),
        ("my work", "letters, digits"),
        ("work\n", "letters, digits"),
        ("wörk", "letters, digits"),
        ("work+", "letters, digits"),
        ("w" * 32, "at most 31 characters"),
        ("@dispvm:" + "w" * 32, "at most 31"),
        ("qrexec-connect-tcp@1234.socket", "letters, digits"),
    ],
)
def test_a_target_that_qrexec_would_misread_is_refused(
    target: str, words: str
) -> None:
    with pytest.raises(BadName, match=re.escape(words)):
        check_target(target)


@pytest.mark.parametrize(
    "target", ["work", "dom0", "@default", "@dispvm", "@dispvm:web"]
)
def test_a_target_passes(target: str) -> None:
    assert check_target(target) == target


def test_a_target_may_be_as_long_as_a_qubes_name() -> None:
    assert check_target("w" * 31)
    assert check_target("@dispvm:" + "w" * 31)


@given(ANY_TEXT)
def test_whatever_passes_as_a_target_is_one(text: str) -> None:
    try:
        check_target(text)
    except BadName:
        return
    assert re.fullmatch(
        r"@default|@dispvm|(@dispvm:)?[A-Za-z][A-Za-z0-9_.-]{0,30}",
        text,
        re.ASCII,
    )
    assert not text.endswith("\n")


# ------------------------------------------------------- services and arguments


@pytest.mark.parametrize(
    "service",
    ["qubes.ConnectTCP", "my-rpc", "a_b", "0", "x" * MAX_ARGUMENT],
)
def test_an_rpc_name_passes(service: str) -> None:
    assert check_service(service) == service


@pytest.mark.parametrize(
    "service",
    ["", "-x", ".x", "a+b", "a b", "a/b", "ä", "a\n", "x" * (MAX_ARGUMENT + 1)],
)
def test_what_is_no_rpc_name_is_refused(service: str) -> None:
    with pytest.raises(BadName):
        check_service(service)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (
            lambda: check_service(".x"),
            "'.x' is no RPC name: letters, digits, '_', '-' and '.', beginning with neither '-' nor '.'",
        ),
        (
            lambda: check_service("x" * 1025),
            f"the RPC name '{'x' * 32}'… is longer than 1024 characters",
        ),
        (
            lambda: check_argument("my.Rpc", "x" * 1025),
            f"the argument '{'x' * 32}'… is longer than 1024 characters",
        ),
        (
            lambda: parse_unit_name("x" * 250 + ".socket"),
            f"the unit name '{'x' * 32}'… is longer than 255 characters",
        ),
        (
            lambda: check_argument("my.Rpc", "a/b c"),
            "the argument 'a/b c' holds ' ' '/', which qrexec would silently turn into '_': only letters, digits, '_', '-', '.' and '+' reach the service",
        ),
        (
            lambda: check_argument("my.Rpc", "a:b"),
            "the argument 'a:b' holds ':', which qrexec would silently turn into '_': only letters, digits, '_', '-', '.' and '+' reach the service; write an IPv6 address with '+' for ':'",
        ),
    ],
)
def test_a_refusal_says_what_is_wrong_and_what_may_be_written(
    refused: Callable[[], object], words: str
) -> None:
    assert refusal(refused) == words


@given(st.from_regex(r"[A-Za-z0-9_.+-]{0,1024}", fullmatch=True))
def test_an_argument_that_qrexec_leaves_alone_passes(argument: str) -> None:
    assert check_argument("my.Rpc", argument) == argument


@given(ANY_TEXT)
def test_an_argument_that_qrexec_would_alter_never_passes(
    argument: str,
) -> None:
    altered = re.sub(r"[^A-Za-z0-9_.+-]", "_", argument, flags=re.ASCII)
    assert ("'_'" in refusal(lambda: check_argument("my.Rpc", argument))) is (
        altered != argument
    )


def test_an_argument_that_wedges_the_agent_is_refused() -> None:
    assert check_argument("my.Rpc", "x" * MAX_ARGUMENT)
    with pytest.raises(BadName, match="longer than 1024"):
        check_argument("my.Rpc", "x" * (MAX_ARGUMENT + 1))


@pytest.mark.parametrize(
    ("service", "argument"),
    [
        ("qubes.ConnectTCP", "1"),
        ("qubes.ConnectTCP", "65535"),
        ("qubes.ConnectUnix", "agent.ssh"),
        ("qubes.ConnectTCPBind", "2049-127.0.1.1"),
        ("qubes.ConnectTCPBind", "2049-fd00++7"),
        ("qubes.ConnectTCPBind", "2049-++1"),
    ],
)
def test_an_argument_of_a_known_rpc_passes(service: str, argument: str) -> None:
    assert check_argument(service, argument) == argument


@pytest.mark.parametrize(
    ("service", "argument", "words"),
    [
        *(
            ("qubes.ConnectTCP", port, "is no port")
            for port in (
                "",
                "0",
                "65536",
                "080",
                "x",
                "-1",
                "+1",
                "1.0",
                "9" * 9,
            )
        ),
        ("qubes.ConnectUnix", "", "needs the name of a socket"),
        ("qubes.ConnectUnix", ".hidden", "may not begin with a dot"),
        ("qubes.ConnectUnix", "..", "may not begin with a dot"),
        ("qubes.ConnectTCPBind", "", "is no PORT-ADDRESS"),
        ("qubes.ConnectTCPBind", "2049", "is no PORT-ADDRESS"),
        ("qubes.ConnectTCPBind", "0-127.0.0.1", "is no port"),
        ("qubes.ConnectTCPBind", "2049-", "is no address"),
        ("qubes.ConnectTCPBind", "2049-localhost", "is no address"),
        ("qubes.ConnectTCPBind", "2049-127.0.0.1-x", "is no address"),
    ],
)
def test_an_argument_that_a_known_rpc_cannot_use_is_refused(
    service: str, argument: str, words: str
) -> None:
    with pytest.raises(BadName, match=words):
        check_argument(service, argument)


def test_a_call_without_an_argument_has_no_plus() -> None:
    assert call_name("my.Rpc", "x+y") == "my.Rpc+x+y"
    assert call_name("my.Rpc", "") == "my.Rpc"


# ------------------------------------------------------------------- unit names

UNIT_TEXT = st.from_regex(r"[A-Za-z0-9:_.\\-]{1,40}", fullmatch=True)


@given(
    UNIT_TEXT,
    st.none() | UNIT_TEXT | st.just("") | st.just("a@b"),
    st.sampled_from(sorted(UNIT_TYPES)),
)
def test_a_unit_name_comes_back_from_its_parts(
    prefix: str, instance: str | None, suffix: str
) -> None:
    name = UnitName(prefix, instance, suffix)
    assert parts(str(name)) == (prefix, instance, suffix)


def test_a_unit_name_falls_into_prefix_and_instance() -> None:
    assert parts("qrexec-connect-tcp@1234.socket") == (
        "qrexec-connect-tcp",
        "1234",
        "socket",
    )
    assert parts("my-rpc.socket") == ("my-rpc", None, "socket")
    assert parse_unit_name(r"x@a@b\x2f.c.service").instance == r"a@b\x2f.c"
    assert parse_unit_name("x@.socket").instance == ""
    for name in ("my-rpc.socket", "x@1.socket"):
        assert str(parse_unit_name(name)) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "x",
        "x.",
        "x.conf",
        ".socket",
        "@1.socket",
        "x@1.socket\n",
        "a/b.socket",
        "a b.socket",
        "ä.socket",
        "x%.socket",
    ],
)
def test_what_is_no_unit_name_is_refused(name: str) -> None:
    with pytest.raises(BadName, match="no unit name"):
        parse_unit_name(name)


def test_a_unit_name_that_is_too_long_for_systemd_is_refused() -> None:
    assert parse_unit_name("x" * 248 + ".socket")
    with pytest.raises(BadName, match="longer than 255"):
        parse_unit_name("x" * 249 + ".socket")
