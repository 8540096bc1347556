"""The loopback's parsers and its policy, which do no I/O: examples, and no
crash on any text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrexec_activate.loopback import client_vm, faults, policy, rpc_config

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
QUBES = {"work", "gitweb", "client", "default-dvm"}
WORDS = st.sampled_from(
    [
        "*",
        "+",
        "+x",
        "@anyvm",
        "@default",
        "@dispvm",
        "@dispvm:work",
        "@adminvm",
        "dom0",
        "work",
        "client",
        "allow",
        "ask",
        "deny",
        "target=work",
        "target=@dispvm",
        "default_target=gitweb",
        "user=root",
        "#",
        "!include",
        "s.A",
    ]
)
POLICY_TEXT = st.lists(
    st.lists(WORDS, max_size=8).map(" ".join), max_size=6
).map("\n".join)


def problem_of(
    parse: Callable[[str], object], error: type[Exception], text: str
) -> str:
    """What the parser says of a text that it does not take; any other exception
    is a failure."""
    try:
        parse(text)
    except error as problem:
        return str(problem)
    return "line 0: none"


def is_known(name: str) -> bool:
    return name in QUBES


def decide(
    text: str, target: str, service: str = "s.A", argument: str = ""
) -> tuple[str, str]:
    decision = policy.decide(
        policy.parse(text), service, argument, "client", target, is_known
    )
    return decision.action, decision.resolved


# -- policy


@given(st.text() | POLICY_TEXT)
def test_any_text_is_a_policy_or_a_policy_error(text: str) -> None:
    assert problem_of(policy.parse, policy.PolicyError, text).startswith(
        "line "
    )


@given(POLICY_TEXT, st.text() | WORDS, st.text())
def test_only_known_qubes_other_than_the_caller_are_ever_reached(
    text: str, asked: str, argument: str
) -> None:
    target = policy.effective_target(asked, is_known)
    try:
        rules: list[policy.Rule] | None = policy.parse(text)
    except policy.PolicyError:
        rules = None
    decision = policy.decide(
        rules, "s.A", policy.sanitise(argument), "client", target, is_known
    )
    assert decision.reason
    assert decision.action == "refuse" or decision.resolved in QUBES - {
        "client"
    }


@given(st.text())
def test_sanitising_leaves_only_what_qrexec_keeps_and_changes_nothing_twice(
    name: str,
) -> None:
    once = policy.sanitise(name)
    assert set(once) <= policy.CALL_CHARACTERS
    assert policy.sanitise(once) == once
    assert len(once) == len(name.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("line", "target", "expected"),
    [
        ("s.A * client work allow", "work", ("allow", "work")),
        ("* * * * allow", "work", ("allow", "work")),
        (
            "s.A * client @anyvm allow target=gitweb",
            "work",
            ("allow", "gitweb"),
        ),
        ("s.A * client @default allow", "@default", ("refuse", "")),
        (
            "s.A * client @default allow target=@dispvm:work",
            "@default",
            ("allow", "work"),
        ),
        (
            "s.A * client @default ask default_target=work",
            "@default",
            ("ask", "work"),
        ),
        ("s.A * client @default ask", "@default", ("refuse", "")),
        ("s.A * client @dispvm allow", "@dispvm", ("allow", "default-dvm")),
        ("s.A * client @anyvm allow", "@adminvm", ("refuse", "")),
        ("s.A * client @adminvm allow", "@adminvm", ("refuse", "dom0")),
        ("s.A * client work allow target=client", "work", ("refuse", "client")),
        ("s.A * client work allow target=gone", "work", ("refuse", "gone")),
        ("s.A +x client work allow", "work", ("refuse", "")),
        ("s.A + client work allow", "work", ("allow", "work")),
        ("s.A * other work allow", "work", ("refuse", "")),
        ("s.B * client work allow", "work", ("refuse", "")),
    ],
)
def test_one_policy_line(
    line: str, target: str, expected: tuple[str, str]
) -> None:
    assert decide(line, target) == expected


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("s.A * client work", "five fields"),
        ("s.A x client work allow", "neither"),
        ("s.A +a/b client work allow", "neither"),
        ("s+A * client work allow", "no service"),
        ("* +x client work allow", "needs the argument"),
        ("s.A * @tag:a work allow", "no source"),
        ("s.A * client @tag:a allow", "no target"),
        ("s.A * client work permit", "none of"),
        ("s.A * client work allow target", "no parameter=value"),
        ("s.A * client work allow target=*", "names no qube"),
        ("s.A * client work deny target=work", "does not belong"),
        ("s.A * client work allow default_target=work", "does not belong"),
        ("!include x", "directive"),
    ],
)
def test_a_policy_line_that_cannot_be_read_is_named(
    line: str, problem: str
) -> None:
    with pytest.raises(policy.PolicyError, match=problem) as caught:
        policy.parse("# first\n\n" + line)
    assert str(caught.value).startswith("line 3: ")


@pytest.mark.parametrize(
    ("asked", "target"),
    [
        ("work", "work"),
        ("$dispvm:work", "@dispvm:work"),
        ("dom0", "@adminvm"),
        ("gone", "@default"),
        ("*", "@default"),
        ("@dispvm:gone", ""),
        ("@dispvm:", ""),
        ("@anyvm", ""),
        ("@", ""),
    ],
)
def test_the_target_that_policy_sees(asked: str, target: str) -> None:
    assert policy.effective_target(asked, is_known) == target


# -- rpc-config


@given(
    st.text()
    | st.sampled_from(rpc_config.BOOLEANS).flatmap(
        lambda key: st.text().map(lambda text: f"{key}={text}")
    )
)
def test_any_text_is_an_rpc_config_or_an_error(text: str) -> None:
    assert problem_of(
        rpc_config.parse, rpc_config.ConfigError, text
    ).startswith("line ")


def test_every_rpc_config_that_is_shipped_is_one_that_qrexec_takes() -> None:
    files = [
        *ROOT.glob("rpc/rpc-config/*"),
        *ROOT.glob("examples/**/etc/qubes/rpc-config/*"),
    ]
    assert len(files) > 3
    for path in files:
        rpc_config.parse(path.read_text())


def test_an_rpc_config_sets_what_it_names() -> None:
    config = rpc_config.parse(
        "# comment\n\nskip-service-descriptor=true\nexit-on-service-eof ="
        "\ttrue  # both\nexit-on-client-eof=false\r\nwait-for-session=1"
    )
    assert config.skip_service_descriptor is True
    assert config.wait_for_session is True
    assert config.exit_on_service_eof is True
    assert config.exit_on_client_eof is False
    assert config.force_user is None


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("force-user='work'", "work"),
        ("force-user=''#", ""),
        ("a=7\nB.c-d_0 = 'x'\nforce-user = 'a b' ", "a b"),
        ("a=0\nb=18446744073709551615\nc=true", None),
    ],
)
def test_an_rpc_config_may_have_strings_numbers_and_keys_of_others(
    text: str, user: str | None
) -> None:
    assert rpc_config.parse(text).force_user == user


@pytest.mark.parametrize(
    "line",
    [
        "wait-for-session=2",
        "wait-for-session=True",
        "wait-for-session='true'",
        "skip-service-descriptor=1",
        "wait-for-session=true x",
        "wait-for-session=truer",
        " wait-for-session=true",
        " ",
        "\0",
        "a=true\0",
        "[a]",
        "1=true",
        "a",
        "a b=true",
        "a=",
        "a=b",
        "a=00",
        "a=18446744073709551616",
        "a='b",
        "a='''b'''",
        "force-user=work",
        'force-user="work"',
        "force-user=true",
        "force-user=",
        "wait-for-session=true\nwait-for-session=true",
        "force-user='work'\nskip-service-descriptor=true",
        "exit-on-client-eof=true\nforce-user='work'",
        "force-user='work'\nexit-on-service-eof=true",
    ],
)
def test_an_rpc_config_line_that_qrexec_refuses_is_named(line: str) -> None:
    """As 4.4.2 does, in its own code."""
    number = 2 + line.count("\n")
    with pytest.raises(rpc_config.ConfigError, match=f"line {number}: "):
        rpc_config.parse("\n" + line)


# -- faults


@given(
    st.text()
    | st.lists(
        st.sampled_from(
            ["[work]", "lose=1", "delay=nan", "first=1", "exit=inf"]
        )
    ).map(" ".join)
)
def test_any_text_is_a_faults_file_or_an_error(text: str) -> None:
    assert problem_of(faults.parse, faults.FaultsError, text).startswith(
        "line "
    )


def test_faults_select_a_qube_and_later_lines_override() -> None:
    lines = faults.parse(
        "delay=1 lose=0.5 # both\n[work] delay=2\n[*] exit=3\n"
    )
    assert faults.chosen(lines, "gitweb", lambda line: 1) == {
        "delay": 1,
        "lose": 0.5,
        "exit": 3,
    }
    assert faults.chosen(lines, "work", lambda line: 1) == {
        "delay": 2,
        "lose": 0.5,
        "exit": 3,
    }


def test_faults_with_first_end_after_so_many_calls() -> None:
    lines = faults.parse("lose=1 first=2")
    numbers = iter((1, 2, 3))
    assert [
        bool(faults.chosen(lines, "work", lambda line: next(numbers)))
        for _ in range(3)
    ] == [True, True, False]


@pytest.mark.parametrize(
    "line",
    [
        "lose",
        "lose=2",
        "lose=-1",
        "delay=x",
        "delay=nan",
        "exit=256",
        "none=1",
        "[] a=1",
        "[a",
    ],
)
def test_a_fault_that_cannot_be_is_named(line: str) -> None:
    with pytest.raises(faults.FaultsError, match="line 1: "):
        faults.parse(line)


# -- small things of the client


@given(st.text(alphabet=st.characters()))
def test_every_text_survives_the_log(text: str) -> None:
    import json

    assert json.loads(client_vm.json_value(text)) == text


@pytest.mark.parametrize(
    ("text", "version"),
    [("4.2.18\n", (4, 2, 18)), ("4.3", (4, 3)), ("", ()), ("new", ())],
)
def test_versions_are_compared_by_number(
    text: str, version: tuple[int, ...]
) -> None:
    assert client_vm.parse_version(text) == version
