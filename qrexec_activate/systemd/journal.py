"""Structured records: to the journal with fields where it is listening, else
readable lines on stderr.

The journal is listening if stderr is its stream (JOURNAL_STREAM). A record's
text alone says what happened; the fields repeat it for programs. Nothing here
ever fails the caller, or keeps it waiting.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import struct
import sys

from ..printable import printable

__all__ = ["Log", "Priority"]

IDENTIFIER = "qrexec-activate"
#: Where the journal takes records, and how many seconds and microseconds one
#: waits for a journal that is busy. The next one is lost at once, until the
#: journal takes them again: connections go on.
SOCKET = "/run/systemd/journal/socket"
PATIENCE = struct.pack("ll", 0, 100_000)


class Priority(enum.IntEnum):
    """syslog's levels, as far as they are used here."""

    ERROR = 3
    WARNING = 4
    NOTICE = 5
    INFO = 6
    DEBUG = 7


def _stderr_is_journal() -> bool:
    """Whether stderr is the stream that systemd connected to the journal, told
    by its device and inode."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return (device, inode) == (str(status.st_dev), str(status.st_ino))


class Log:
    """Writes records; knows once and for all where they go."""

    def __init__(self) -> None:
        self.to_journal = _stderr_is_journal()
        self._sock: socket.socket | None = None
        self._flags = 0

    def __call__(
        self, priority: Priority, message: str, **fields: object
    ) -> None:
        """Write one record. Fields are upper-case journal names; those that are
        None are left out."""
        message = printable(message)
        if self.to_journal:
            self._send(priority, message, fields)
        elif priority < Priority.DEBUG:
            with contextlib.suppress(OSError, ValueError):
                # One write, so that lines of several processes do not mix.
                sys.stderr.write(f"{message}\n")
                sys.stderr.flush()

    def _send(
        self, priority: Priority, message: str, fields: dict[str, object]
    ) -> None:
        record = [
            f"MESSAGE={message}",
            f"PRIORITY={priority:d}",
            f"SYSLOG_IDENTIFIER={IDENTIFIER}",
        ]
        record += [
            f"{key}={printable(str(value))}"
            for key, value in fields.items()
            if value is not None
        ]
        # Its native protocol; no value here holds a line feed.
        data = "".join(f"{field}\n" for field in record).encode()
        try:
            if self._sock is None:
                self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_SNDTIMEO, PATIENCE
                )
            self._sock.sendto(data, self._flags, SOCKET)
            self._flags = 0
        except OSError:
            self._flags = socket.MSG_DONTWAIT
