"""qrexec-activate notify: tell the person at the desktop of connections that
were refused, failed, or wait.

A notification says what this qube knows, and what to do; of another qube it
shows nothing but the name. One per route and minute.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import Any

import click

from ..errors import ActivateError
from ..printable import printable
from ..systemd.journalreader import Record, records
from .connections import Connection, Lookout
from .options import system_option
from .survey import Survey, survey
from .terminal import say

__all__ = ["Notice", "Notices", "command"]

#: One notification for each route in so many seconds.
PAUSE = 60.0
#: How often it is looked whether something waits, and how long one waits before
#: it is told, in seconds.
LOOK, PATIENCE = 5.0, 10.0
#: Routes and daemons are asked for anew so often.
RENEW = 60.0
_REPLY_TIMEOUT = 10.0

_MEANINGS = {
    "126": "was refused by dom0's policy, or the qube cannot take it",
    "125": "found no service: nothing listens there, or it is set up wrongly",
    "127": "found no such service in the qube",
    "1": "could not be set up by qrexec",
}


@dataclass(frozen=True, slots=True)
class Notice:
    """A notification: what has happened to a route, and what to do."""

    summary: str
    body: str


@dataclass(slots=True)
class Notices:
    """Decides what is told. No I/O; times in seconds."""

    _told: dict[str, float] = field(default_factory=dict)
    _waiting: set[str] = field(default_factory=set)

    def ended(self, record: Record, now: float) -> Notice | None:
        """Of a record of the journal."""
        fields = record.fields
        if not record.connection or not record.is_warning:
            return None
        listener = fields.get("LISTENER", "")
        target = fields.get("QREXEC_TARGET", "")
        meaning = (
            "had no answer in time"
            if fields.get("OUTCOME") == "timed-out"
            else _MEANINGS.get(fields.get("EXIT_CODE", ""), "failed")
        )
        refused = fields.get("EXIT_CODE") == "126"
        mend = f"qrexec-activate {'policy' if refused else 'status'} {listener}"
        return self._once(
            listener,
            now,
            f"{target}: {'refused' if refused else 'failed'}",
            f"A connection to {listener} {meaning}. See: {mend}",
        )

    def waits(self, one: Connection, now: float) -> Notice | None:
        """Of a connection that is not established; each is told once."""
        if one.state != "waiting" or one.age < PATIENCE:
            return None
        if one.id in self._waiting:
            return None
        notice = self._once(
            one.listener,
            now,
            f"{one.target}: waiting",
            f"A connection to {one.listener} waits: answer dom0's question, if"
            f" there is one; or the qube is starting. See: qrexec-activate"
            f" status {one.listener}",
        )
        if notice is not None:
            self._waiting.add(one.id)
        return notice

    def _once(
        self, route: str, now: float, summary: str, body: str
    ) -> Notice | None:
        if now - self._told.get(route, -PAUSE) < PAUSE:
            return None
        self._told[route] = now
        # A body may hold markup.
        return Notice(printable(summary), escape(printable(body), quote=False))


@click.command(
    "notify",
    epilog="""\b
Examples:
    $ qrexec-activate notify
    $ systemctl --user enable --now qrexec-activate-notify.service
""",
)
@system_option
def command(system: bool) -> None:
    """Show a desktop notification when a connection was refused, failed, or
    waits for longer than ten seconds; until Ctrl-C.

    A unit that does this is installed, and not enabled.
    """
    notices = Notices()
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.closing(_Desktop()) as desktop,
    ):
        for notice in _happenings(notices, user=not system):
            try:
                desktop.show(notice)
            except (OSError, ActivateError) as error:
                say(f"{notice.summary}: not shown: {error}", err=True)


def _happenings(notices: Notices, *, user: bool) -> Iterator[Notice]:
    now = survey(user=user)
    began = time.monotonic()
    lookout = Lookout()
    ended: queue.Queue[Record | Exception] = queue.Queue()
    threading.Thread(
        target=_follow, args=(ended, now, user), daemon=True
    ).start()
    due = began
    while True:
        with contextlib.suppress(queue.Empty):
            one = ended.get(timeout=max(due - time.monotonic(), 0))
            if isinstance(one, Exception):
                raise one
            if notice := notices.ended(one, time.monotonic()):
                yield notice
        if time.monotonic() < due:
            continue
        due = time.monotonic() + LOOK
        if time.monotonic() - began > RENEW:
            now, began = survey(user=user), time.monotonic()
        for connection in lookout.look([now]):
            if notice := notices.waits(connection, time.monotonic()):
                yield notice


def _follow(
    ended: queue.Queue[Record | Exception], now: Survey, user: bool
) -> None:
    try:
        with records(
            user=user,
            control_group=now.control_group,
            daemons=now.daemons,
            follow=True,
        ) as found:
            for record in found:
                ended.put(record)
        raise ActivateError("journalctl has ended")
    except Exception as error:
        ended.put(error)


class _Desktop:
    """The session's notifications (org.freedesktop.Notifications); connects
    when there is something to show, and again when that was lost."""

    def __init__(self) -> None:
        self._connection: Any = None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def show(self, notice: Notice) -> None:
        from jeepney import DBusAddress, MessageType, new_method_call
        from jeepney.io.blocking import open_dbus_connection

        message = new_method_call(
            DBusAddress(
                "/org/freedesktop/Notifications",
                "org.freedesktop.Notifications",
                "org.freedesktop.Notifications",
            ),
            "Notify",
            "susssasa{sv}i",
            (
                "qrexec-activate",
                0,
                "dialog-warning",
                notice.summary,
                notice.body,
                [],
                {},
                -1,
            ),
        )
        try:
            if self._connection is None:
                self._connection = open_dbus_connection("SESSION")
            reply = self._connection.send_and_get_reply(
                message, timeout=_REPLY_TIMEOUT
            )
        except (OSError, TimeoutError, KeyError) as error:
            self.close()
            raise ActivateError(
                f"no notifications over the session's bus: {error}"
            ) from error
        if reply.header.message_type is MessageType.error:
            said = ", ".join(map(str, reply.body))
            raise ActivateError(f"no notifications on this desktop: {said}")
