"""The life of one call: what is known of it, and what comes next. No I/O.

Set up, established, ended; or tried again, given up, reset. What happened to
qrexec-client-vm, to the client, to the clock comes in; the next step goes out.
A service runs at most once for one connection: nothing is tried again of which
anything says that the service may have run.
"""

from __future__ import annotations

import math
import random
import signal
from dataclasses import dataclass, field

from .outcome import Ending, Outcome

__all__ = [
    "Call",
    "LastBytes",
    "Pace",
    "has_run",
    "is_heard",
    "output_grace",
    "signals",
]

#: A call that qrexec could not set up (exit code 1) is tried so often again. On
#: Xen, setting up more than 10 to 25 calls at once fails in this way
#: (QubesOS/qubes-issues 11059), and trying again after a random delay is the
#: cure.
RETRIES = 5
#: The first delay in seconds; it doubles each time, and is randomized by half
#: of itself either way.
RETRY_DELAY = 0.1
#: An answer that took longer may have been that of a person.
PROMPT_AGE = 2.0
#: Of a call that may have been put to a person, so many tries are made in all.
PROMPTS = 2
#: A call whose policy was answered, but not its target, is lost after so long,
#: and at each further try after twice as long. A running target answers in
#: 60 ms (Qubes 4.3); but where a service waits for the user's session, it does
#: so before (qubes.ConnectUnix, in a qube that has just started).
VCHAN_PATIENCE = 10.0
#: A call without any sign of an answer is lost if it is so old, and if so many
#: of its route that began later were answered so quickly that nobody can have
#: been asked. Up to 1.1 % of calls hang for ever when 32 are set up at once (a
#: race in qrexec-daemon 4.4.2).
OVERTAKEN_AGE = 10.0
OVERTAKERS = 2
QUICK = 0.5

#: A client that hung up leaves qrexec-client-vm so long to end by itself before
#: SIGTERM, and then before SIGKILL.
HANG_UP_GRACE = 2.0
#: As long as bytes that the client had sent are waiting, and for so long after
#: the last of them moved; then still, unless it uses more than BUSY of a CPU,
#: which is what it does where the service sends on and on.
STALL_GRACE = 10.0
BUSY = 0.05
#: Once it has read them all, no more than half of this is still behind it, in
#: the vchan and the buffers at its other end, and is lost with it.
BEHIND, PAGE = 1 << 19, 1 << 12
#: At a stop of the daemon, a spliced one has so long between the two.
STOP_GRACE = 0.2
#: A spliced connection is half-closed so long after the output of
#: qrexec-client-vm, unless that has ended by then; the longer time is for one
#: that has said nothing: it may have ended because there is no such service.
KILLED_GRACE, EMPTY_GRACE = 0.02, 0.5
#: How long what was sent may take to reach a client that went on sending after
#: the service had ended.
FAREWELL = 30.0

#: Exit codes by which qrexec-client-vm (4.2.18 to 4.4.2) says that no service
#: was run; a service may exit with any of them, too. 125 and 127 are not among
#: them: they come after the target has taken the call.
_NOT_RUN = {1, 2, 126, 255}


def has_run(data_seen: bool, code: int | None) -> bool:
    """Whether a service behind pipes may have run, so that it must not run
    again: data was seen to flow, or the exit code tells."""
    return data_seen or (
        code is not None and code >= 0 and code not in _NOT_RUN
    )


def signals(ending: Ending) -> list[tuple[signal.Signals, float]]:
    """How to end a qrexec-client-vm that is of no use any more: one signal
    after the other, and how many seconds it has after each."""
    if ending is Ending.LOST:
        return [(signal.SIGKILL, math.inf)]
    grace = STOP_GRACE if ending is Ending.STOPPED else HANG_UP_GRACE
    return [(signal.SIGTERM, grace), (signal.SIGKILL, math.inf)]


def output_grace(said_anything: bool) -> float:
    """How many seconds a qrexec-client-vm whose output is over has to end,
    before the client is told of the end of a stream."""
    return KILLED_GRACE if said_anything else EMPTY_GRACE


#: One for all: to seed another takes a tenth of what a call costs here.
_RANDOM = random.Random()


@dataclass(slots=True)
class Call:
    """What is known of a call, by the clock that it was begun with.

    A *try* is one qrexec-client-vm. Most calls have one.
    """

    accepted_at: float
    began_at: float = 0.0
    #: When this try was first seen to have dom0's answer.
    answered_at: float | None = None
    established_at: float | None = None
    tries: int = 0
    #: Tries whose answer was so slow that a person may have given it.
    prompts: int = 0
    interrupted: Ending | None = None
    #: Whether an earlier daemon began this try.
    adopted: bool = False
    #: Whether the client hung up, having sent what is still to arrive.
    client_left: bool = False
    random: random.Random = _RANDOM

    # ------------------------------------------------------------------ events

    def begins(self, now: float) -> None:
        """A qrexec-client-vm was started for it."""
        self.tries += 1
        self.began_at = now
        self.answered_at = None
        self.adopted = False

    def adopt(self, now: float, age: float) -> None:
        """An earlier daemon has begun it, so many seconds ago."""
        self.accepted_at = now - age
        self.begins(self.accepted_at)
        self.adopted = True

    def is_answered(self, now: float) -> None:
        """dom0 has answered: the data channel is open at this end."""
        if self.answered_at is None:
            self.answered_at = now

    def is_established(self, now: float) -> None:
        """The target has taken it: bytes can flow."""
        if self.established_at is None:
            self.established_at = now

    def interrupt(self, ending: Ending) -> None:
        """Something else ends it, or this try; the first reason counts."""
        if self.interrupted is None:
            self.interrupted = ending

    def hangs_up(self, left_nothing: bool) -> bool:
        """The client hangs up: whether that ends the call now.

        What it sent before waits until the call is set up, and is read.
        """
        if self.established_at is None and not left_nothing:
            self.client_left = True
            return False
        return True

    # --------------------------------------------------------------- decisions

    def is_over_at_once(self, code: int | None) -> bool:
        """Whether its end leaves nothing to try or to pass on."""
        return (
            code is not None
            and self.interrupted is None
            and self.established_at is not None
        )

    @property
    def reason(self) -> Ending:
        """Why it ends, or this try."""
        return self.interrupted or Ending.CLIENT_EXITED

    def ended_by_itself(self) -> Ending:
        """Why it is over, where qrexec-client-vm has ended after its client had
        gone."""
        return (
            self.reason if self.established_at is None else Ending.CLIENT_EXITED
        )

    def takes_no_socket(self, code: int | None) -> bool:
        """Whether this try tells that qrexec-client-vm does not know
        --use-stdin-socket (before 4.2.19): it has read nothing then."""
        return code == 2 and self.established_at is None

    def goes_on_alone(self, by_pipes: bool, all_sent: bool) -> bool:
        """Whether a qrexec-client-vm that runs needs no daemon: it holds the
        socket itself, or (by pipes) has all that the client will send."""
        if self.interrupted is Ending.LOST:
            # It is being ended, and the call is to be made again.
            return False
        return not by_pipes or (
            self.interrupted is Ending.CLIENT_GONE and all_sent
        )

    def over(
        self, now: float, ending: Ending, code: int | None, detail: str
    ) -> Outcome:
        """What became of it."""
        setup = None
        # When an earlier daemon's call was established, it knew.
        if self.established_at is not None and not self.adopted:
            setup = self.established_at - self.began_at
        return Outcome(
            ending,
            self.established_at is not None,
            duration=now - self.accepted_at,
            setup=setup,
            exit_code=code,
            tries=self.tries,
            detail=detail,
        )

    def due(
        self, now: float, setup_timeout: float, overtaken: bool
    ) -> Ending | None:
        """Whether to give up waiting for an answer, and why."""
        if self.established_at is not None:
            return None
        if now - self.began_at >= setup_timeout:
            return Ending.TIMED_OUT
        if self.answered_at is not None:
            patience = VCHAN_PATIENCE * 2 ** max(self.tries - 1, 0)
            lost = now - self.answered_at >= patience
        else:
            lost = overtaken and now - self.began_at >= OVERTAKEN_AGE
        return Ending.LOST if lost else None

    def takes_back(self, now: float) -> bool:
        """An interruption for want of an answer: whether one has come since."""
        late = (Ending.TIMED_OUT, Ending.LOST)
        if self.established_at is None or self.interrupted not in late:
            return False
        self.interrupted = None
        return True

    def after_try(
        self, now: float, ending: Ending, code: int | None, no_room: bool
    ) -> float | None:
        """A try has ended before any service ran: in how many seconds to make
        another, if there is room; None: not at all.

        `no_room`: it failed, or was refused, for want of room and not by
        policy; then what others do decides how long it waits, and not how often
        it has been tried.
        """
        answer = self.answered_at if self.answered_at is not None else now
        slow = answer - self.began_at >= PROMPT_AGE
        # Who is asked once is asked each time: a quick answer is no person's.
        self.prompts = self.prompts + 1 if slow else 0
        if self.established_at is not None or self.prompts >= PROMPTS:
            return None
        if self.interrupted not in (None, Ending.LOST):
            return None
        lost = ending is Ending.LOST
        exited = ending is Ending.CLIENT_EXITED
        refused_for_now = code == 126 and no_room and not slow
        if not (lost or (exited and (code == 1 or refused_for_now))):
            return None
        if no_room:
            self.tries -= 1
        elif self.tries > RETRIES:
            return None
        self.interrupted = None
        if lost:
            return 0.0
        delay: float = RETRY_DELAY * 2 ** max(self.tries - 1, 0)
        return delay * self.random.uniform(0.5, 1.5)


@dataclass(slots=True)
class Pace:
    """How calls of one route come about: the last that were quick to do so."""

    quick: list[float] = field(default_factory=list)

    def is_established(self, began_at: float, now: float) -> None:
        if now - began_at < QUICK:
            self.quick = [*self.quick, began_at][-OVERTAKERS:]

    def overtook(self, began_at: float) -> bool:
        """Whether enough calls that began later were quick."""
        later = [time for time in self.quick if time > began_at]
        return len(later) >= OVERTAKERS


@dataclass(slots=True)
class LastBytes:
    """How long a qrexec-client-vm is left whose client has gone.

    It ends by itself in all cases but two: a service that goes on sending it
    drains for ever, at most of a CPU; and a service may not care that nobody is
    there. What the client sent before it went is to arrive first, however
    slowly and whatever the service does meanwhile.
    """

    #: How many bytes of the client have yet to be read, as last seen.
    left: int
    #: When the last of them moved.
    since: float
    #: The seconds of CPU used when that was last looked at.
    used: float
    looked: float = field(init=False)
    #: How many they were when the client went, and when that was.
    first: int = field(init=False)
    gone: float = field(init=False)

    def __post_init__(self) -> None:
        self.first, self.gone, self.looked = self.left, self.since, self.since

    def are_over(self, left: int, now: float, used: float) -> bool:
        """Whether it is of no use to wait any longer."""
        before, self.left = self.left, left
        if left < before:
            self.since = self.looked = now
            self.used = used
            return False
        if not left and now - self.since >= self._grace():
            return True
        looked_for = now - self.looked
        if looked_for < STALL_GRACE:
            return False
        busy = used - self.used >= BUSY * looked_for
        self.looked, self.used = now, used
        return busy

    def _grace(self) -> float:
        """How long it has since it read the last of them."""
        took = self.since - self.gone
        if took < HANG_UP_GRACE:
            return HANG_UP_GRACE
        # A slow service is as slow with what is behind. A page moves as one.
        return max(HANG_UP_GRACE, took * BEHIND / max(self.first, PAGE))


def is_heard(waited: float, may_send: bool, unsent: int) -> bool:
    """Whether a socket whose service has ended, half-closed for so many
    seconds, need not be kept any longer.

    Closing a TCP socket with unread input, or input that comes later, sends a
    reset that destroys what the client has not read yet. So what the client
    still sends is dropped until it has everything. `may_send`: the client has
    not half-closed; `unsent`: so much it has yet to acknowledge.
    """
    return not may_send or not unsent or waited >= FAREWELL
