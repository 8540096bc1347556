"""What serve asks of systemd as it starts."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator

import pytest
import trio

from qrexec_activate.errors import ManagerError
from qrexec_activate.forward import serve
from qrexec_activate.forward.settings import CARETAKER
from qrexec_activate.routing.claim import PassedSocket
from qrexec_activate.systemd.manager import Manager


class SystemManager:
    """Answers anybody, and takes orders of root alone."""

    asked = 0
    stopping = False

    def trigger_units(self, service: str) -> list[str]:
        return []

    def socket_units(self, units: list[str], **_: bool) -> list[object]:
        return []

    def specifiers(self) -> dict[str, str]:
        return {}

    def stop_timeout(self, service: str) -> None:
        return None

    def is_stopping(self, service: str) -> bool:
        return self.stopping

    def reset_start_limit(self, service: str) -> None:
        self.asked += 1
        raise ManagerError(
            "systemd did not answer over D-Bus:"
            " org.freedesktop.DBus.Error.AccessDenied: Permission denied"
        )


def test_a_daemon_starts_though_systemd_takes_no_order_of_its_user(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    systemd = SystemManager()

    @contextlib.contextmanager
    def open_manager(*, user: bool) -> Iterator[SystemManager]:
        yield systemd

    monkeypatch.setattr(Manager, "open", open_manager)
    monkeypatch.setattr(
        sys, "argv", ["x", "serve", "qubes.ConnectTCP", "--unit", "x.service"]
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        passed = PassedSocket(listener.fileno(), "x", "tcp", "127.0.0.1:1")
        request, claims = serve._decide([passed], by_manager=True)
    assert systemd.asked == 1
    assert not request.stopping
    # It goes on, and refuses what is not known.
    assert len(claims) == 1


def test_a_caretaker_looks_once_the_daemon_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whose connections are taken for those of a daemon that lives.
    parents = [7, 7, 7, 1]
    monkeypatch.setenv(CARETAKER, "7")
    monkeypatch.setattr(os, "getppid", lambda: parents.pop(0))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *order: None)
    monkeypatch.setattr(
        sys, "argv", ["x", "serve", "qubes.ConnectTCP", "--unit", "x.service"]
    )
    left_as_it_looks = []
    monkeypatch.setattr(
        trio, "run", lambda look: left_as_it_looks.append(list(parents))
    )
    serve._look_after()
    assert left_as_it_looks == [[]]
