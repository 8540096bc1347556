"""What became of a connection, in words and fields. No I/O.

The exit codes are those of qrexec-client-vm 4.2.18 to 4.4.2. A service may
itself exit with any of them, so the words for a call that was established name
both.
"""

from __future__ import annotations

import enum
import signal
import struct
from dataclasses import dataclass

__all__ = [
    "DISCONNECT",
    "TCP_INFO",
    "Ending",
    "Outcome",
    "format_bytes",
    "format_seconds",
]

#: How a person has a connection ended, by `qrexec-activate disconnect`: nothing
#: else sends this signal to a qrexec-client-vm, which dies of it.
DISCONNECT = signal.SIGHUP
_DISCONNECTED = "ended by a person, with qrexec-activate disconnect"


#: tcpi_state, tcpi_bytes_received, tcpi_notsent_bytes, tcpi_bytes_sent and
#: tcpi_bytes_retrans in struct tcp_info (linux/tcp.h, 4.19 up).
TCP_INFO = struct.Struct("=B127xQ8xI52xQQ")
#: States in which the peer's FIN has come, which the kernel counts as a byte:
#: CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT.
_FIN_RECEIVED = {6, 8, 9, 11}
#: ... and in which ours waits behind what is yet to be sent, and counts among
#: it: FIN_WAIT1, LAST_ACK, CLOSING.
_FIN_QUEUED = {4, 9, 11}
_TCP_CLOSE = 7
#: An exit code that nobody knows (an earlier daemon's child), and the one with
#: which qrexec-client-vm 4.4.2 ends at once where its data channel fails.
_MAY_BE_CUT = (None, 1)


class Ending(enum.Enum):
    """Why a connection is over; the value is what the record says."""

    CLIENT_EXITED = "ended"
    CLIENT_GONE = "the client hung up"
    TIMED_OUT = "no answer in time"
    LOST = "lost in qrexec"
    NOT_STARTED = "not started"
    STOPPED = "cut off by a stop of the daemon"


_CANNOT_START = (
    "the service could not be started there: nothing listens on that port or"
    " socket, or its rpc-config is wrong"
)
_NO_SERVICE = "no such service in the target qube; install it there"
#: What an exit code means where the call was never established, and what to do.
_NEVER_ESTABLISHED = {
    0: "qrexec-client-vm ended before the call was set up",
    1: (
        "qrexec could not set the call up (no agent, or its data channel"
        " failed); see the journal of qubes-qrexec-agent"
    ),
    2: "qrexec-client-vm was called wrongly; see its message in the journal",
    125: _CANNOT_START,
    126: (
        "refused: by the policy in dom0, or the qube is halted, its agent is"
        " gone, or it has too many connections open;"
        " qrexec-activate policy shows the line that dom0 needs"
    ),
    127: _NO_SERVICE,
    255: "the target qube closed the call before it was set up",
}
#: What it most likely means where the target had taken the call, and not a byte
#: came back.
_WITHOUT_A_BYTE = {
    125: _CANNOT_START,
    127: _NO_SERVICE,
    255: "the target qube closed the call before it had said anything",
}

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """Write a number of bytes for people: `512 B`, `1.5 MiB`."""
    size, units = float(count), iter(_UNITS)
    unit = next(units)
    # 1,048,575 bytes are 1.0 MiB, not 1024.0 KiB.
    while round(size, 1) >= 1024 and (larger := next(units, None)):
        size, unit = size / 1024, larger
    return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"


def format_seconds(seconds: float) -> str:
    """Write a duration for people: `0.012 s`, `3 min 20 s`, `2 h 5 min`."""
    if round(seconds, 1) < 60:
        return (
            f"{seconds:.3f} s" if round(seconds, 3) < 10 else f"{seconds:.1f} s"
        )
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


@dataclass(slots=True)
class Outcome:
    """The end of one connection. Times in seconds; bytes are None where the
    kernel does not tell."""

    ending: Ending
    established: bool
    duration: float
    setup: float | None = None
    exit_code: int | None = None
    tries: int = 1
    bytes_to_qube: int | None = None
    bytes_from_qube: int | None = None
    detail: str = ""
    #: qrexec-client-vm ended without having ended the stream, as one does that
    #: is killed.
    cut: bool = False

    def count(self, info: bytes) -> None:
        """Take what the kernel moved on a TCP socket from its TCP_INFO; older
        kernels tell less."""
        if len(info) < TCP_INFO.size:
            return
        state, received, unsent, sent, sent_again = TCP_INFO.unpack(info)
        closed = state == _TCP_CLOSE and self.ending is Ending.CLIENT_EXITED
        fin = state in _FIN_RECEIVED or closed
        self.bytes_to_qube = max(received - fin, 0)
        self.bytes_from_qube = sent - sent_again
        # A client that has half-closed is not waited for: the kernel goes on.
        if unsent and state != _TCP_CLOSE:
            self.bytes_from_qube += unsent - (state in _FIN_QUEUED)

    @property
    def has_run(self) -> bool:
        """Whether it was established, and qrexec-client-vm ended by itself."""
        return self.established and self.ending is Ending.CLIENT_EXITED

    @property
    def may_be_cut(self) -> bool:
        """Whether a qrexec-client-vm that held the socket may have left its
        stream without an end."""
        return self.has_run and self.exit_code in _MAY_BE_CUT

    @property
    def failed(self) -> bool:
        """Whether the client did not get what it came for, as far as can be
        told from here."""
        if self.by_a_person:
            return False
        if self.ending is Ending.CLIENT_EXITED:
            return (
                not self.established
                or self.cut
                or self.exit_code in (1, 255)
                or (self.exit_code or 0) < 0
                or self.without_a_byte
            )
        return self.ending is not Ending.CLIENT_GONE

    @property
    def by_a_person(self) -> bool:
        return (
            self.ending is Ending.CLIENT_EXITED
            and self.exit_code == -DISCONNECT
        )

    @property
    def ends_cleanly(self) -> bool:
        """Whether the client may see the end of a stream: all others see a
        reset, where that is still possible."""
        return (
            self.has_run
            and not (self.exit_code is not None and self.exit_code < 0)
            and not self.cut
            and not self.without_a_byte
        )

    @property
    def without_a_byte(self) -> bool:
        """Whether qrexec says that no service ran, or that the target went
        away, and nothing came back.

        The target had taken the call before, so that the client may have seen
        the end of an empty stream.
        """
        if not self.established or self.exit_code not in _WITHOUT_A_BYTE:
            return False
        # Where bytes are not counted, a target that goes away has most likely
        # said something before.
        return self.bytes_from_qube == 0 or (
            self.bytes_from_qube is None and self.exit_code != 255
        )

    def words(self) -> str:
        """Say what happened and, if it failed, what it means."""
        parts = [self._what()]
        if self.tries > 1:
            parts.append(f"after {self.tries} tries")
        if self.setup is not None:
            parts.append(f"set up in {format_seconds(self.setup)}")
        parts.append(f"lasted {format_seconds(self.duration)}")
        if self.bytes_to_qube is not None:
            parts.append(f"{format_bytes(self.bytes_to_qube)} to the qube")
        if self.bytes_from_qube is not None:
            parts.append(f"{format_bytes(self.bytes_from_qube)} from it")
        return ", ".join(parts)

    def _what(self) -> str:
        if self.detail:
            return f"{self.ending.value}: {self.detail}"
        if self.by_a_person:
            return _DISCONNECTED
        if self.ending is not Ending.CLIENT_EXITED:
            return str(self.ending.value)
        code = self.exit_code
        if code is None:
            if not self.established:
                return (
                    "failed: qrexec-client-vm ended before the call was set up"
                )
            return (
                "cut off: qrexec-client-vm was killed" if self.cut else "ended"
            )
        if self.established:
            return self._what_was_established(code)
        if code < 0:
            return (
                f"failed: qrexec-client-vm was killed by"
                f" {_signal_name(-code)} before the call was set up"
            )
        meaning = _NEVER_ESTABLISHED.get(
            code, "the service ended before the call was set up"
        )
        return f"failed with exit code {code}: {meaning}"

    def _what_was_established(self, code: int) -> str:
        if self.without_a_byte:
            return (
                f"failed with exit code {code}: {_WITHOUT_A_BYTE[code]} (or it"
                " is the service's own exit code); the client may have seen an"
                " empty answer"
            )
        if code < 0:
            return (
                f"cut off: qrexec-client-vm was killed by {_signal_name(-code)}"
            )
        if self.cut:
            return f"cut off: qrexec-client-vm failed with exit code {code}"
        if code == 0:
            return "ended"
        if code == 255:
            return (
                "ended with exit code 255: the service's own, or the target"
                " qube closed the call early"
            )
        if code > 128:
            return (
                f"ended with exit code {code}: the service's own, or it was"
                f" killed by {_signal_name(code - 128)}"
            )
        return f"ended with the service's exit code {code}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
