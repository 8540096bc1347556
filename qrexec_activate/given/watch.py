"""Let what dom0 says be so at once: a process that waits for changes in
QubesDB, and starts and stops what came and went.

The rule it keeps: a unit whose route is as it was is not touched.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator

from .generator import Place, decided, latest, written
from .line import LABEL
from .qubesdb import FOLDER, PREFIX

__all__ = ["main"]

#: dom0 may write several at a time.
PAUSE = 0.1
#: When the watch is there for certain: qubesdb-watch does not say so itself.
SECOND_LOOK = 1.0
#: A socket is refused while its daemon starts, which a connection to another
#: one may bring about at any moment.
TRIES = 5


def main() -> None:
    """Run until QubesDB goes; systemd then starts it again."""
    place = Place(os.environ)
    known: set[str] = set()
    for _ in changes():
        known = settle(place, known)
    sys.exit("qubesdb-watch has ended")


def changes() -> Iterator[None]:
    """Yield at the start, soon after, and whenever a route changes."""
    # To a pipe it would write only when it has 4 KiB: to a terminal, each line.
    reading, writing = os.openpty()
    with subprocess.Popen(
        ["qubesdb-watch", "-n", "-1", FOLDER],
        stdin=subprocess.DEVNULL,
        stdout=writing,
    ) as process:
        os.close(writing)
        try:
            yield
            if not _readable(reading, SECOND_LOOK):
                yield
            rest = b""
            while lines := _read(reading):
                *whole, rest = (rest + lines).split(b"\n")
                if any(line.startswith(PREFIX.encode()) for line in whole):
                    time.sleep(PAUSE)
                    while _readable(reading, 0) and (more := _read(reading)):
                        rest = (rest + more).rpartition(b"\n")[2]
                    yield
        finally:
            process.kill()
            os.close(reading)


def _readable(descriptor: int, seconds: float) -> bool:
    return bool(select.select([descriptor], [], [], seconds)[0])


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        # How the end of a terminal is told.
        return b""


def settle(place: Place, known: set[str]) -> set[str]:
    """Bring systemd in line with QubesDB; returns the units that should be,
    and starts those of them that were not `known`: a person may have stopped
    others."""
    given, _ = decided(latest(place), place)
    wanted = {one.unit: one.text for one in given}
    folder = f"{place.runtime}/systemd/generator"
    gone = sorted(_active(place) - wanted.keys())
    if gone:
        _systemctl(place, "stop", *gone)
        _systemctl(place, "reset-failed", *gone)
    if wanted != written(folder):
        _systemctl(place, "daemon-reload")
    new = wanted.keys() - known
    for _ in range(TRIES):
        waiting = sorted(new - _active(place))
        if not waiting or not _systemctl(place, "start", *waiting).returncode:
            break
    return set(wanted)


def _active(place: Place) -> set[str]:
    """The units of dom0's routes that are active."""
    pattern = f"qrexec-connect-*@*:{LABEL}*.socket"
    listed = _systemctl(
        *(place, "list-units", "--state=active", "--plain", "--no-legend"),
        pattern,
    )
    return {line.split()[0] for line in listed.stdout.splitlines()}


def _systemctl(place: Place, *words: str) -> subprocess.CompletedProcess[str]:
    """Run systemctl; what it complains of goes into the journal."""
    argv = ["systemctl", "--system" if place.system else "--user", *words]
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
