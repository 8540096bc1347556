"""What is told to the person at the desktop: one thing per route and minute,
and nothing from another qube but its name."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qrexec_activate.control.connections import Connection
from qrexec_activate.control.notify import Notices
from qrexec_activate.systemd.journalreader import Record

UNITS = Path(__file__).parents[2] / "units-user"


def ended(code: str, outcome: str = "client-exited", **more: str) -> Record:
    fields = {
        "CONNECTION_ID": "3dac-1",
        "LISTENER": "127.0.0.1:1234",
        "QREXEC_TARGET": "work",
        "EXIT_CODE": code,
        "OUTCOME": outcome,
        **more,
    }
    return Record(0.0, "what a peer <b>says</b>", 4, fields, "")


def waiting(number: int, age: float, state: str = "waiting") -> Connection:
    return Connection(
        f"3dac-{number}",
        number,
        1,
        0,
        time.clock_gettime(time.CLOCK_BOOTTIME) - age,
        "127.0.0.1:1234",
        "work",
        "qubes.ConnectTCP+1234",
        "qrexec-connect-tcp@1234.socket",
        "127.0.0.1:5",
        None,
        state,
    )


@pytest.mark.parametrize(
    ("record", "summary", "words"),
    [
        (ended("126"), "work: refused", "qrexec-activate policy"),
        (ended("127"), "work: failed", "no such service"),
        (ended("-9"), "work: failed", "failed. See: qrexec-activate status"),
        (ended("", "timed-out"), "work: failed", "no answer in time"),
    ],
)
def test_what_failed_is_told_with_what_to_do(
    record: Record, summary: str, words: str
) -> None:
    notice = Notices().ended(record, 0)
    assert notice is not None
    assert notice.summary == summary
    assert words in notice.body
    assert "peer" not in notice.body


def test_one_is_told_per_route_and_minute() -> None:
    notices = Notices()
    assert notices.ended(ended("126"), 100)
    assert not notices.ended(ended("126"), 159)
    assert notices.ended(ended("126", LISTENER="127.0.0.2:1234"), 159)
    assert notices.ended(ended("126"), 160)


def test_what_ended_well_and_what_is_no_connection_is_not_told() -> None:
    notices = Notices()
    well = Record(0.0, "", 6, ended("0").fields, "")
    assert not notices.ended(well, 0)
    assert not notices.ended(ended("126", CONNECTION_ID=""), 0)


def test_a_wait_is_told_once_when_it_is_long() -> None:
    notices = Notices()
    assert not notices.waits(waiting(1, 3), 0)
    assert not notices.waits(waiting(1, 100, "open"), 0)
    told = notices.waits(waiting(1, 20), 0)
    assert told
    assert told.summary == "work: waiting"
    assert not notices.waits(waiting(1, 200), 200)
    assert notices.waits(waiting(2, 20), 200)


def test_no_markup_and_no_control_character_is_passed_on() -> None:
    notice = Notices().ended(
        ended("126", LISTENER="@<b>\x1b", QREXEC_TARGET="a\n"), 0
    )
    assert notice is not None
    assert "&lt;b&gt;\\x1b" in notice.body
    assert notice.summary == "a\\x0a: refused"


def test_the_unit_runs_it_with_the_desktop() -> None:
    text = (UNITS / "qrexec-activate-notify.service").read_text()
    assert "ExecStart=/usr/bin/qrexec-activate notify\n" in text
    assert "WantedBy=graphical-session.target\n" in text
