"""What the daemon says: in the log of its listeners, its connections, and what
they wait for; and to systemctl status, in one line."""

from __future__ import annotations

import math

import trio

from ..routing.claim import Claim, Refusal, Route
from ..systemd.journal import Log, Priority
from . import xen
from .admission import Admission, Verdict
from .connection import Connection
from .outcome import Outcome

__all__ = ["Reports", "count"]

#: A shortage is over, and the next one worth a line in the log, after so long
#: without another failure. Meanwhile some connections go through, and more
#: wait.
SHORTAGE_OVER = 10.0
#: The log speaks of connections reset at one refused listener not more often
#: than this.
REFUSAL_LOG_INTERVAL = 30.0
#: ... and of connections that --allow-uid keeps out.
KEPT_OUT_LOG_INTERVAL = 1.0
#: ... and of a limit at which connections wait.
LIMIT_LOG_INTERVAL = 60.0


class Reports:
    """Words and counts of one daemon."""

    def __init__(self, service: str, log: Log) -> None:
        self._service = service
        self._log = log
        #: Listeners; and connections, by how they ended.
        self.served = self.refused = 0
        self.well = self.failed = self.reset = 0
        self.changed = trio.Event()
        self._starved_at = -math.inf
        self._spoke_of: dict[object, float] = {}

    def info(self, text: str) -> None:
        self._log(Priority.INFO, text)

    def notice(self, text: str, **fields: object) -> None:
        self._log(Priority.NOTICE, text, **fields)

    # --------------------------------------------------------------- listeners

    def of_listener(
        self, claim: Claim, priority: Priority, text: str, **fields: object
    ) -> None:
        self._log(
            priority,
            text,
            LISTENER=claim.address,
            UNIT=claim.unit or None,
            **fields,
        )

    def listens(self, claim: Claim) -> None:
        """Say of a listener whether it is served."""
        file = claim.file or None
        if isinstance(claim, Refusal):
            self.refused += 1
            self.of_listener(
                claim,
                Priority.ERROR,
                str(claim),
                QREXEC_SERVICE=self._service,
                FILE=file,
            )
        else:
            self.served += 1
            self.of_listener(
                claim,
                Priority.INFO,
                f"serving {claim}",
                QREXEC_TARGET=claim.target,
                QREXEC_SERVICE=claim.call,
                FILE=file,
            )

    def accepts_no_more(self, claim: Claim, error: OSError) -> None:
        self._log(
            Priority.ERROR,
            f"{claim.address} accepts no more: {error.strerror}; restart"
            f" {claim.unit or 'its socket unit'}",
        )

    def lost(self, claim: Claim, error: OSError) -> None:
        self._once(
            claim.address,
            f"{claim.address}: a connection was lost before it was accepted:"
            f" {error.strerror}",
        )

    def turned_away(self, refusal: Refusal) -> None:
        """A connection to a listener that is not served is reset."""
        self.reset += 1
        self.changed.set()
        if self._is_news(refusal, REFUSAL_LOG_INTERVAL):
            self.of_listener(
                refusal, Priority.WARNING, f"reset a connection: {refusal}"
            )

    def kept_out(self, route: Route, peer: str, problem: str) -> None:
        """A connection of somebody who may not connect is reset."""
        self.reset += 1
        self.changed.set()
        # Whoever is kept out decides how often there is something to say.
        if self._is_news(route, KEPT_OUT_LOG_INTERVAL):
            self.of_listener(
                route,
                Priority.WARNING,
                f"reset a connection of {peer} on {route.address}: {problem}",
                PEER=peer,
            )

    # ------------------------------------------------------- what is waited for

    def waits(self, target: str, verdict: Verdict, counts: Admission) -> None:
        """More connections than there is room for wait."""
        if verdict is Verdict.TARGET_FULL:
            self._once(
                target,
                f"{count(counts.open_to(target), 'connection')} open to"
                f" {target}; more wait until there is room",
                QREXEC_TARGET=target,
            )
        elif verdict is Verdict.ALL_FULL:
            others = counts.others
            self._once(
                "",
                count(counts.open, "connection")
                + " open"
                + (f", and {others} of others in this qube" if others else "")
                + "; more wait until there is room",
            )

    def no_room(self, target: str, code: int | None, open_to_it: int) -> None:
        """qrexec has no room for another call."""
        self._once(
            target,
            f"{target} refuses more while {open_to_it} connections are open to"
            " it: taken for full (qrexec opens 128 to a qube, and counts those"
            " of other qubes); more wait"
            if code == 126
            else f"qrexec sets up no more calls to {target}; more"
            f" wait{xen.limit()}",
            QREXEC_TARGET=target,
        )

    def starved(self, error: Exception) -> None:
        before, self._starved_at = self._starved_at, trio.current_time()
        if self._starved_at - before > SHORTAGE_OVER:
            self._log(
                Priority.WARNING,
                "connections wait, as the machine is short of something:"
                f" {error}",
            )

    def _once(self, about: object, text: str, **fields: object) -> None:
        """Say it, unless it was said a moment ago."""
        if self._is_news(about, LIMIT_LOG_INTERVAL):
            self.notice(text, **fields)

    def _is_news(self, about: object, interval: float) -> bool:
        """Whether the log, which is spoken to now, last heard of this so many
        seconds ago."""
        now = trio.current_time()
        if now - self._spoke_of.get(about, -math.inf) < interval:
            return False
        self._spoke_of[about] = now
        return True

    # ------------------------------------------------------------- connections

    def broke(self, connection: Connection, error: Exception) -> None:
        self.failed += 1
        self._log(
            Priority.ERROR,
            f"{connection}: internal error: {type(error).__name__}: {error}",
        )

    def ended(self, connection: Connection, outcome: Outcome) -> None:
        if outcome.failed:
            self.failed += 1
        else:
            self.well += 1
        self.changed.set()
        not_set_up = outcome.failed and not outcome.established
        hint = xen.denial() if not_set_up and outcome.exit_code == 1 else ""
        self._log(
            Priority.WARNING if outcome.failed else Priority.INFO,
            f"{connection}: {outcome.words()}{hint}",
            CONNECTION_ID=connection.id,
            QREXEC_TARGET=connection.route.target,
            QREXEC_SERVICE=connection.route.call,
            PEER=connection.peer,
            LISTENER=connection.route.address,
            UNIT=connection.route.unit or None,
            OUTCOME=outcome.ending.name.lower().replace("_", "-"),
            ESTABLISHED=int(outcome.established),
            EXIT_CODE=outcome.exit_code,
            TRIES=outcome.tries,
            SETUP_USEC=(
                None if outcome.setup is None else round(outcome.setup * 1e6)
            ),
            DURATION_USEC=round(outcome.duration * 1e6),
            BYTES_TO_QUBE=outcome.bytes_to_qube,
            BYTES_FROM_QUBE=outcome.bytes_from_qube,
        )

    def status(self, open_now: int, waiting: int) -> str:
        """One line for systemctl status."""
        parts = [
            f"{count(self.served, 'listener')} served, {self.refused} refused",
            f"{count(open_now, 'connection')} open",
        ]
        if waiting:
            parts.append(f"{waiting} waiting for an answer")
        parts.append(f"{self.well} ended well, {self.failed} failed")
        if self.reset:
            parts.append(f"{self.reset} reset")
        return "; ".join(parts)


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
