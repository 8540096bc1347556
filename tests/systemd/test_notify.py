"""Telling systemd, whatever state it is in."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from qrexec_activate.systemd.notify import Notifier, watchdog_interval


def listen(path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(path))
    sock.settimeout(60)
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    return sock


def test_what_is_told_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen(tmp_path / "notify", monkeypatch) as manager:
        notifier = Notifier()
        assert notifier.wanted
        assert notifier.tell("READY=1")
        assert manager.recv(100) == b"READY=1"
        notifier.close()


def test_a_manager_that_does_not_read_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listen(tmp_path / "notify", monkeypatch) as manager:
        notifier = Notifier()
        # This would never return if it waited.
        while notifier.tell("STATUS=" + "x" * 1000):
            pass
        assert manager.recv(2000).startswith(b"STATUS=x")
        assert notifier.tell("READY=1")
        notifier.close()


def test_where_nobody_wants_to_know_nothing_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notifier = Notifier()
    assert not notifier.wanted
    assert notifier.tell("READY=1")
    notifier.close()


def test_a_manager_that_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notifier = Notifier()
    assert not notifier.tell("READY=1")
    notifier.close()


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        (
            {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid() + 1)},
            None,
        ),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_asks_for(
    environment: dict[str, str],
    interval: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert watchdog_interval() == interval
