"""What is escaped is what systemd allows, and comes back."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from samples import REAL_TEXT, TARGETS

from qrexec_activate.errors import BadName
from qrexec_activate.given.escapes import escape_instance, escape_target
from qrexec_activate.routing.names import (
    UnitName,
    check_target,
    decode_escapes,
    parse_unit_name,
)


@given(REAL_TEXT)
@example("2049-fd00++7")
@example("@dispvm:work")
@example("\\x2d")
@example("%i")
@example("a/b\0ä😀\x7f")
def test_what_is_escaped_comes_back(text: str) -> None:
    assert decode_escapes(escape_instance(text)) == text
    assert decode_escapes(escape_target(text)) == text


@given(REAL_TEXT, REAL_TEXT)
@example("1234", "work")
@example("a:b", "c:d")
@example("", "work")
def test_an_argument_and_its_label_come_back_from_an_instance(
    argument: str, label: str
) -> None:
    name = UnitName("my-rpc", escape_instance(argument, label), "socket")
    assert decode_escapes(name.argument) == argument
    assert decode_escapes(name.label) == label


@given(REAL_TEXT)
def test_an_escaped_argument_is_what_systemd_allows_in_a_unit_name(
    text: str,
) -> None:
    instance = escape_instance(text)
    assert re.fullmatch(r"[A-Za-z0-9:_.\\-]*", instance)
    if instance and len(instance) < 200:
        unit = parse_unit_name(f"my-rpc@{instance}.socket")
        assert unit.instance == instance


def test_escapes_are_written_as_systemd_escape_writes_them() -> None:
    assert escape_instance("1234", "work") == "1234:work"
    assert escape_instance("a/b", "c+d") == r"a\x2fb:c\x2bd"
    assert escape_target("@dispvm:web") == r"@dispvm\x3aweb"


@given(REAL_TEXT)
def test_an_escaped_target_is_what_systemd_allows_in_a_file_descriptor_name(
    text: str,
) -> None:
    escaped = escape_target(text)
    assert all(" " <= char <= "~" and char not in ":%" for char in escaped)


@given(TARGETS)
def test_every_target_can_be_written_and_read_back(target: str) -> None:
    assert check_target(decode_escapes(escape_target(target))) == target
    assert len(escape_target(target)) <= 255


def test_what_is_no_text_is_refused() -> None:
    for escape in (escape_instance, escape_target):
        with pytest.raises(BadName, match="no UTF-8"):
            escape("\udcff")
