"""Addresses as systemd shows them, for people."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from samples import SHOWN

from qrexec_activate.routing.names import c_escape
from qrexec_activate.systemd.shown import c_unescape, plain_address


@given(st.text(max_size=60))
@example("/\a\b\f\n\r\t\v\\\"'\x1b")
def test_an_address_is_written_back_as_a_person_wrote_it(text: str) -> None:
    assert c_unescape(c_escape(text.encode())) == text


def test_what_is_no_text_is_left_as_systemd_shows_it() -> None:
    assert c_unescape(r"/run/\377") == r"/run/\377"


@pytest.mark.parametrize(("written", "shown"), SHOWN)
def test_an_address_that_systemd_shows_is_read_back(
    written: str, shown: str
) -> None:
    assert plain_address(shown) == written
