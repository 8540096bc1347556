"""What is measured, and how. Every figure is kept with the round and the rival
it belongs to.

Within a round each measure goes to all rivals in turn, so that whatever else
the machine does hits all alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from qrexec_activate.loopback.machine import Machine

from .rivals import (
    CHARGEN,
    DISCARD,
    ECHO,
    LISTEN,
    Many,
    Programs,
    Rival,
    Routes,
)

__all__ = [
    "AT_ONCE",
    "BUSY",
    "COMMANDS",
    "FULL",
    "MEASURES",
    "QUICK",
    "STREAMS",
    "Bench",
    "Sizes",
]

AT_ONCE = (1, 16, 64)
#: name: (what it is called, the service, the load's word for it, how many
#: streams)
STREAMS = {
    "to": ("to the qube", DISCARD, "to", 1),
    "from": ("from the qube", CHARGEN, "from", 1),
    "both": ("both ways", ECHO, "both", 1),
    "eight": ("8 streams from the qube", CHARGEN, "from", 8),
}
#: What is measured once more beside a busy core has this at its end.
BUSY = "-busy"
MEASURES = (
    "first-byte",
    "connections",
    "busy",
    "throughput",
    "cold",
    "memory",
    "listeners",
    "commands",
)
#: What people say, in this order.
COMMANDS = {
    "list": ("list",),
    "status": ("status",),
    "check": ("check",),
    "add": ("add", "unix", "added", "work", "--listen", "%t/routes/added"),
    "remove": ("remove", "added"),
}
#: Rounds of these, each of which takes systemd seconds where routes are many.
SAYINGS = 3
#: How long the processes of one measure may take to be gone before the next;
#: proxyd leaves some for ever.
SETTLE = 3.0
#: What was asked for is over long before; a load that hangs is ended.
PATIENCE = 60.0


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Times in seconds."""

    rounds: int
    firsts: int
    seconds: float
    #: Streams are measured in so many parts of these seconds.
    slices: int
    colds: int
    held: tuple[int, ...]
    listeners: tuple[int, ...]
    routes: tuple[int, ...]
    #: The whole run takes no longer: rounds end early, and leave so much of it
    #: to what is measured once.
    limit: float
    tail: float


FULL = Sizes(
    rounds=5,
    firsts=200,
    seconds=1.0,
    slices=4,
    colds=15,
    held=(100, 1000),
    listeners=(1, 100, 2000),
    routes=(100, 2000),
    limit=600,
    tail=150,
)
QUICK = Sizes(
    rounds=3,
    firsts=30,
    seconds=0.2,
    slices=1,
    colds=2,
    held=(10, 100),
    listeners=(1, 100),
    routes=(10, 100),
    limit=120,
    tail=45,
)


class LoadFailed(Exception):
    """The load got no answer where there must be one."""


class Bench:
    """One run. `results` holds a dictionary for every figure, in the order in
    which they were taken."""

    def __init__(
        self,
        machine: Machine,
        programs: Programs,
        found: Sequence[Rival],
        sizes: Sizes,
    ) -> None:
        self._machine = machine
        self._programs = programs
        self._rivals = list(found)
        self._sizes = sizes
        self._began = time.monotonic()
        self._client = os.path.realpath(programs.client)
        #: Calls of the genuine qrexec-client-vm that have nothing to do with
        #: this.
        self._others = _running(self._client)
        self.results: list[dict[str, Any]] = []

    def run(self, only: Sequence[str], say: Callable[[str], None]) -> None:
        """Take all measures named, the repeated ones in rounds."""
        repeated = {
            "first-byte": self._first_byte,
            "connections": self._connections,
            "busy": self._beside_load,
            "throughput": self._throughput,
        }
        longest, most = 0.0, self._sizes.limit - self._sizes.tail
        for number in (
            range(self._sizes.rounds) if set(only) & set(repeated) else ()
        ):
            if self._elapsed() + longest > most and number:
                say(
                    f"only {number} of {self._sizes.rounds} rounds, to be"
                    f" done in {self._sizes.limit:.0f} s"
                )
                break
            began = time.monotonic()
            # Whoever comes first in one round comes last in the next.
            order = (
                self._rivals[number % len(self._rivals) :]
                + self._rivals[: number % len(self._rivals)]
            )
            for name, take in repeated.items():
                if name in only:
                    say(f"round {number + 1} of {self._sizes.rounds}: {name}")
                    take(number, order)
            longest = max(longest, time.monotonic() - began)
        if "cold" in only:
            say("cold")
            self._cold()
        if "memory" in only:
            say("memory")
            for rival in self._rivals:
                self._memory(rival)
        if "listeners" in only and any(
            rival.name == "hand-over" for rival in self._rivals
        ):
            say("listeners")
            self._listeners()
        if "commands" in only:
            say("commands")
            self._commands()

    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    # ---------------------------------------------------------------- in rounds

    def _beside_load(self, number: int, order: Sequence[Rival]) -> None:
        """The same beside another program that takes a core: a process that
        sleeps often loses its turn then."""
        with subprocess.Popen([self._programs.busy]) as busy:
            try:
                self._first_byte(number, order, BUSY)
                self._connections(number, order, BUSY)
            finally:
                busy.kill()

    def _first_byte(
        self, number: int, order: Sequence[Rival], beside: str = ""
    ) -> None:
        """In slices, too; each figure is the median of those of the slices."""
        slices: dict[str, list[dict[str, Any]]] = {
            rival.name: [] for rival in order if not rival.only_relays
        }
        for _ in range(self._sizes.slices):
            for rival in order:
                if not rival.only_relays:
                    words = (
                        "first",
                        rival.hosts[0],
                        LISTEN[ECHO],
                        self._sizes.firsts // self._sizes.slices,
                    )
                    slices[rival.name].append(
                        self._attempt(partial(self._load, *words))
                    )
        for name, taken in slices.items():
            self.results.append(
                {
                    "measure": f"first-byte{beside}",
                    "rival": name,
                    "round": number,
                }
                | _middle(taken)
            )

    def _connections(
        self, number: int, order: Sequence[Rival], beside: str = ""
    ) -> None:
        for at_once in AT_ONCE:
            for rival in order:
                if not rival.only_relays:
                    with self._taken(
                        f"connections-{at_once}{beside}", rival, round=number
                    ) as result:
                        result |= self._load(
                            "rate",
                            rival.hosts[0],
                            LISTEN[ECHO],
                            at_once,
                            self._sizes.seconds,
                        )
                        result["per_second"] = (
                            result["served"] / result["seconds"]
                        )

    def _throughput(self, number: int, order: Sequence[Rival]) -> None:
        """In short slices, each of a new connection: on which cores its
        processes come to lie changes the speed."""
        for name, (_, service, which, streams) in STREAMS.items():
            slices: dict[str, list[dict[str, Any]]] = {
                rival.name: [] for rival in order
            }
            for _ in range(self._sizes.slices):
                for rival in order:
                    words = (rival, LISTEN[service], which, streams)
                    slices[rival.name].append(
                        self._attempt(partial(self._slice, *words))
                    )
            for rival in order:
                result = {
                    "measure": f"throughput-{name}",
                    "rival": rival.name,
                    "round": number,
                }
                self.results.append(result | _sum(slices[rival.name]))

    def _slice(
        self, rival: Rival, port: int, which: str, streams: int
    ) -> dict[str, Any]:
        words = (
            "stream",
            rival.hosts[0],
            port,
            which,
            streams,
            self._sizes.seconds / self._sizes.slices,
        )
        with self._load_kept(*words) as load:
            _line(load, "ready")
            # One that a first connection started, or that forks for each, is
            # there now.
            pids = rival.pids()
            before = _cpu(pids)
            _send_line(load)
            result = json.loads(_line(load))
            assert isinstance(result, dict)
            return result | {"cpu": _cpu(pids) - before}

    # ------------------------------------------------------------------ once

    def _cold(self) -> None:
        """From the first connection to its first byte, beside the import of
        trio by the same interpreter."""
        machine = self._machine
        for number in range(self._sizes.colds):
            self._python("import-trio", number, "-c", "import trio")
            for rival in self._rivals:
                if rival.units:
                    machine.systemctl("stop", rival.units[ECHO])
                    with self._taken("cold", rival, round=number) as result:
                        result |= self._load(
                            "first", rival.hosts[0], LISTEN[ECHO], 1
                        )

    def _memory(self, rival: Rival) -> None:
        """With no connection, and with more and more of them; a service starts
        afresh for it."""
        if rival.units:
            self._machine.systemctl("stop", *set(rival.units.values()))
        with self._taken("memory", rival, open=0) as result:
            self._load("first", rival.hosts[0], LISTEN[ECHO], 1)
            self._settle()
            result |= _memory(rival.pids())
        for count in self._sizes.held:
            # One target takes no more than 128 connections, and there is only
            # one where a person has named it.
            if count > 100 * len(rival.hosts) and rival.name in (
                "hand-over",
                "splice",
            ):
                continue
            with (
                self._taken("memory", rival, open=count) as result,
                self._load_kept(
                    "hold", LISTEN[ECHO], count, *rival.hosts
                ) as load,
            ):
                result |= {"open": json.loads(_line(load))["open"]}
                # What is looked at now and then for a new connection is looked
                # at no more.
                time.sleep(0.3)
                result |= _memory(rival.pids())

    def _listeners(self) -> None:
        with contextlib.closing(Many(self._machine)) as many:
            for count in self._sizes.listeners:
                result: dict[str, Any] = {
                    "measure": "listeners",
                    "rival": "hand-over",
                    "listeners": count,
                }
                host = many.listen(count)
                # The daemon's start is in it.
                result["start"] = self._load("first", host, LISTEN[ECHO], 1)[
                    "p50"
                ]
                time.sleep(0.3)
                self.results.append(result | _memory(many.pids()))

    def _commands(self) -> None:
        """The commands for people: --help beside the import of click, and what
        shows and changes routes where there are many."""
        for number in range(self._sizes.colds):
            self._python("import-click", number, "-c", "import click")
            self._python("help", number, "-m", "qrexec_activate", "--help")
        with contextlib.closing(Routes(self._machine)) as routes:
            for count in self._sizes.routes:
                routes.have(count)
                for number in range(min(SAYINGS, self._sizes.rounds)):
                    for name, words in COMMANDS.items():
                        self._python(
                            f"{name}-{count}",
                            number,
                            *("-m", "qrexec_activate", *words),
                            # Of the bench's other units there is much to say.
                            check=name != "check",
                        )

    # ------------------------------------------------------------------ helpers

    def _attempt(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What it gives, or why it gives nothing; returns when all is quiet
        again."""
        try:
            result = measure()
        except LoadFailed as error:
            result = {"error": str(error)}
        self._settle()
        return result

    def _python(
        self, measure: str, number: int, *words: str, check: bool = True
    ) -> None:
        """Run the interpreter, and keep how long it took, and the CPU time of
        its processes and of systemd meanwhile."""
        systemd = -_cpu([self._machine.pid])
        own = -_cpu_of_children()
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, *words],
            env=self._machine.environment,
            cwd=self._machine.home,
            stdout=subprocess.DEVNULL,
            check=check,
        )
        took = round((time.perf_counter() - began) * 1e9)
        self.results.append(
            {
                "measure": measure,
                "rival": "python3",
                "round": number,
                "p50": took,
                "own": own + _cpu_of_children(),
                "systemd": systemd + _cpu([self._machine.pid]),
            }
        )

    @contextlib.contextmanager
    def _taken(
        self, measure: str, rival: Rival, **where: int
    ) -> Iterator[dict[str, Any]]:
        """Keep what the block puts into the result, or why there is none."""
        result: dict[str, Any] = {
            "measure": measure,
            "rival": rival.name,
            **where,
        }
        try:
            yield result
        except LoadFailed as error:
            result["error"] = str(error)
        self.results.append(result)
        self._settle()

    def _load(self, *words: str | int | float) -> dict[str, Any]:
        argv = [str(self._programs.load), *map(str, words)]
        try:
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise LoadFailed(
                f"{' '.join(argv[1:])}: no end in {PATIENCE:.0f} s"
            ) from None
        if done.returncode:
            raise LoadFailed(
                f"{' '.join(argv[1:])}:"
                f" {done.stderr.strip() or f'exit code {done.returncode}'}"
            )
        result = json.loads(done.stdout)
        assert isinstance(result, dict)
        return result

    @contextlib.contextmanager
    def _load_kept(
        self, *words: str | int | float
    ) -> Iterator[subprocess.Popen[str]]:
        """A load whose connections stay open until the block ends."""
        argv = [str(self._programs.load), *map(str, words)]
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                # Closing its stdin is what it waits for; what it does not see,
                # ends it.
                assert process.stdin is not None
                with contextlib.suppress(OSError):
                    process.stdin.close()
                try:
                    process.wait(2)
                except subprocess.TimeoutExpired:
                    process.kill()

    def _settle(self) -> None:
        """Until no qrexec-client-vm is left, so that the end of one measure is
        no part of the next."""
        deadline = time.monotonic() + SETTLE
        while left := _running(self._client) - self._others:
            if time.monotonic() >= deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)
        # Their parents have yet to see that they ended.
        time.sleep(0.02)


def _middle(slices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure; the first error, if there was any."""
    for one in slices:
        if "error" in one:
            return one
    return {
        key: statistics.median(one[key] for one in slices) for key in slices[0]
    }


def _sum(slices: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several measurements as one; the first error, if there was any."""
    for one in slices:
        if "error" in one:
            return one
    total = {
        key: sum(one[key] for one in slices)
        for key in ("bytes", "seconds", "cpu")
    }
    return {
        **total,
        "mib_per_second": total["bytes"] / total["seconds"] / 2**20,
        "cpu_per_gib": total["cpu"] / total["bytes"] * 2**30
        if total["bytes"]
        else None,
    }


def _line(load: subprocess.Popen[str], expected: str | None = None) -> str:
    """The next line of a load; it ends by itself if it takes too long."""
    assert load.stdout is not None
    line = load.stdout.readline().strip()
    if not line or (expected is not None and line != expected):
        raise LoadFailed(f"the load said {line!r}")
    return line


def _send_line(load: subprocess.Popen[str]) -> None:
    assert load.stdin is not None
    load.stdin.write("\n")
    load.stdin.flush()


def _running(program: str) -> set[int]:
    """The processes that run this very program, or what it has become: a
    stack's bears its name."""
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name = Path(entry, "cmdline").read_bytes().partition(b"\0")[0]
                if program in (
                    os.readlink(f"{entry.path}/exe"),
                    os.fsdecode(name),
                ):
                    found.add(int(entry.name))
    return found


def _cpu_of_children() -> float:
    used = os.times()
    return used.children_user + used.children_system


def _cpu(pids: Sequence[int]) -> float:
    """Seconds of CPU that these processes have used, to the nanosecond; one
    that has ended counts as nothing."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _memory(pids: Sequence[int]) -> dict[str, int]:
    """What these processes hold, in KiB: resident, with a fair share of what is
    shared, and their own alone."""
    sums = {"rss": 0, "pss": 0, "uss": 0}
    fields = {
        "Rss": "rss",
        "Pss": "pss",
        "Private_Clean": "uss",
        "Private_Dirty": "uss",
    }
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (
                Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            ):
                name, _, value = line.partition(":")
                if name in fields:
                    sums[fields[name]] += int(value.split()[0])
    return {"processes": len(pids), **sums}
