"""What serve asks of systemd as it starts."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import trio

from qrexec_activate.__main__ import NOT_NEEDED, Later
from qrexec_activate.errors import ManagerError
from qrexec_activate.forward import serve
from qrexec_activate.forward.background import Background
from qrexec_activate.forward.serve_options import parse
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


def modules_after(program: str) -> set[str]:
    """What a process of its own has imported at its end."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("COVERAGE_", "LISTEN_"))
    }
    said = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint(*sys.modules)"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return set(said.split())


def test_a_daemon_is_without_what_trio_imports_for_others() -> None:
    loaded = modules_after(
        "import sys\n"
        "from qrexec_activate.__main__ import main\n"
        "sys.argv[1:] = ['serve', 'qubes.ConnectTCP', '--argument', '1']\n"
        "try:\n"
        "    main()\n"
        "except SystemExit:\n"
        "    pass\n"
    )
    assert "qrexec_activate.forward.daemon" in loaded
    # What they would bring; of the modules themselves only the names are there.
    assert set(NOT_NEEDED) <= loaded
    assert not {"_ssl", "idna.core"} & loaded


def test_a_daemon_is_without_what_reads_its_command_line() -> None:
    loaded = modules_after(
        "import sys\n"
        "from qrexec_activate.forward import daemon, serve\n"
        "from qrexec_activate.forward.background import Background\n"
        "from qrexec_activate.routing.claim import PassedSocket\n"
        "sys.argv[1:] = ['serve', 'qubes.ConnectTCP', '--argument', '1']\n"
        "sockets = [PassedSocket(3, 'work', 'Stream', '127.0.0.1:80')]\n"
        "request, claims = Background(\n"
        "    lambda: serve._decide(sockets, by_manager=False)\n"
        ").result()\n"
        "assert claims[0].target == 'work'\n"
        "assert request.argument == '1'\n"
    )
    assert "trio" in loaded
    assert not {"click", "jeepney"} & loaded


def test_a_start_waits_for_the_machine_to_have_a_process_to_spare(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A daemon that ended for that, and was started again and again, would soon
    be over its limit of starts, and all its addresses be closed."""
    fork, short = os.fork, [errno.EAGAIN, errno.ENOMEM]

    def starved() -> int:
        if short:
            number = short.pop()
            raise OSError(number, os.strerror(number))
        return fork()

    monkeypatch.setattr(os, "fork", starved)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert Background(lambda: "found").result() == "found"
    assert capfd.readouterr().err.splitlines() == [
        "cannot start yet: Cannot allocate memory",
        "cannot start yet: Resource temporarily unavailable",
    ]


def test_what_is_imported_later_is_all_there_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import colorsys as real

    monkeypatch.setitem(sys.modules, "colorsys", Later("colorsys"))
    import colorsys

    assert isinstance(colorsys, Later)
    assert "rgb_to_hls" not in vars(colorsys)
    assert colorsys.rgb_to_hls(0, 0, 0) == real.rgb_to_hls(0, 0, 0)
    assert "hls_to_rgb" in vars(colorsys)
    assert not isinstance(sys.modules["colorsys"], Later)
    with pytest.raises(AttributeError):
        colorsys.missing  # noqa: B018


def test_what_is_imported_by_its_parts_is_imported_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "colorsys", Later("colorsys"))
    from colorsys import rgb_to_hls

    assert rgb_to_hls(0, 0, 0) == (0, 0, 0)


def test_a_time_of_nothing_is_no_limit() -> None:
    words = "rpc --argument 1 --setup-timeout 0 --exit-idle-time 0s"
    settings = parse(words.split()).settings
    assert settings.setup_timeout == math.inf
    assert settings.exit_idle_time is None
