"""Records for the journal, in whatever state it is."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrexec_activate.systemd import journal
from qrexec_activate.systemd.journal import Log, Priority


@pytest.fixture
def journald(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "SOCKET", "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("journal")
        sock.settimeout(60)
        yield sock


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    log.to_journal = True
    yield log
    if log._sock is not None:
        log._sock.close()


def test_a_record_is_a_text_with_fields(
    journald: socket.socket, log: Log
) -> None:
    log(
        Priority.NOTICE,
        "one\ntwo",
        PEER="ü\n\udcffPRIORITY=0",
        EXIT_CODE=None,
        TRIES=1,
    )
    assert journald.recv(1000).decode().splitlines() == [
        r"MESSAGE=one\x0atwo",
        "PRIORITY=5",
        "SYSLOG_IDENTIFIER=qrexec-activate",
        r"PEER=ü\x0a\udcffPRIORITY=0",
        "TRIES=1",
    ]


def test_a_journal_that_does_not_read_holds_up_nobody(
    journald: socket.socket, log: Log
) -> None:
    limit = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())

    def write() -> None:
        for number in range(2 * limit + 50):
            log(Priority.INFO, f"record {number}")

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(60)
    assert not writer.is_alive()
    journald.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while journald.recv(1000):
            pass
    log(Priority.INFO, "it reads again")
    assert journald.recv(1000).startswith(b"MESSAGE=it reads again\n")


def test_a_journal_that_is_not_there_is_no_error(
    journald: socket.socket, log: Log
) -> None:
    os.unlink("journal")
    log(Priority.INFO, "nobody hears this")
