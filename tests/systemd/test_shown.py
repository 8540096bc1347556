"""Addresses as systemd shows them, for people."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qrexec_activate.routing.names import c_escape
from qrexec_activate.systemd.shown import c_unescape, plain_address


@given(st.text(max_size=60))
@example("/\a\b\f\n\r\t\v\\\"'\x1b")
def test_an_address_is_written_back_as_a_person_wrote_it(text: str) -> None:
    assert c_unescape(c_escape(text.encode())) == text


def test_what_is_no_text_is_left_as_systemd_shows_it() -> None:
    assert c_unescape(r"/run/\377") == r"/run/\377"


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("/run/é.sock", r"/run/\303\251.sock"),
        ("@a b", "@a b"),
        ("@é", r"@\303\251"),
        (r"/run/a\b", r"/run/a\\b"),
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("vsock::80", "vsock::80"),
        # What is no name of a unix socket has no escapes.
        (r"no\\such", r"no\\such"),
    ],
)
def test_an_address_that_systemd_shows_is_read_back(
    written: str, shown: str
) -> None:
    assert plain_address(shown) == written
