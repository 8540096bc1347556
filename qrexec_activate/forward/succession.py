"""What a daemon finds of an earlier one: caretakers to relieve, connections to
watch over again, and calls by pipes to see out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial

import trio

from .child import STARVED, Child
from .connection import STARVED_DELAY, end
from .orphans import Orphan, find_caretakers, find_orphans, left_to_read
from .outcome import Ending
from .reports import Reports, count
from .watch import readable

__all__ = ["see_out", "take_over"]

#: A caretaker has so long to end.
CARETAKER_PATIENCE = 4.0


async def take_over(take: Callable[[Orphan], None], reports: Reports) -> None:
    """Find what an earlier daemon has left, and hand it out, each once."""
    known: set[int] = set()
    again = True
    while again:
        found: list[Orphan] = []
        shortage: OSError | None = None
        try:
            for orphan in find_orphans(known):
                known.add(orphan.pid)
                found.append(orphan)
        except OSError as error:
            if error.errno in STARVED:
                shortage = error
            else:
                # Where ptrace is restricted to descendants, a stranger's
                # descriptors cannot be had.
                reports.notice(
                    "connections of an earlier daemon go on, unwatched:"
                    f" {error}"
                )
        # Not before their sockets are held here, too: a qrexec-client-vm that
        # is killed while nobody else holds its socket ends cleanly. And what a
        # caretaker has started itself is an orphan only once that has gone:
        # look again.
        try:
            again = await _relieve_caretakers()
        finally:
            for orphan in found:
                take(orphan)
        if shortage is not None:
            reports.starved(shortage)
            await trio.sleep(STARVED_DELAY)
            again = True
    if known:
        reports.info(
            f"watching over {count(len(known), 'connection')} of an earlier"
            " daemon"
        )


async def _relieve_caretakers() -> bool:
    """End those who look after what an earlier daemon left; whether any has
    gone."""
    any_gone = False
    for pidfd in find_caretakers():
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            with trio.move_on_after(CARETAKER_PATIENCE):
                await readable(pidfd)
                any_gone = True
        except ProcessLookupError:
            any_gone = True
        finally:
            os.close(pidfd)
    return any_gone


async def see_out(orphan: Orphan) -> None:
    """End a qrexec-client-vm whose pipes led to the daemon that is gone, and
    with it went the client; but what it has yet to read is to arrive."""
    child = Child(orphan.pid, orphan.pidfd)
    try:
        left = partial(left_to_read, orphan.pidfd)
        await end(child, Ending.CLIENT_GONE, left)
    finally:
        child.close()
