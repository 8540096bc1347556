"""How long the commands take, in time of the processor: a busy machine is no failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from control import Desk

from qrexec_activate.loopback.machine import Machine

#: Bytecode and the disk's cache are warm after the first; of the rest the best counts.
RUNS = 7


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def processor_time(words: list[str], environment: dict[str, str]) -> float:
    """The best of several runs, in seconds. What measures coverage would be measured, too."""
    best = 1e9
    for _ in range(RUNS):
        with subprocess.Popen(
            words,
            env={key: value for key, value in environment.items() if not key.startswith("COVERAGE_")},
            stdout=subprocess.DEVNULL,
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        best = min(best, usage.ru_utime + usage.ru_stime)
    return best


def test_help_takes_little_more_than_click(desk: Desk) -> None:
    environment = desk.machine.environment
    click = processor_time([sys.executable, "-c", "import click"], environment)
    # 1.2 on a quiet machine.
    assert processor_time(desk.argv("--help"), environment) < 1.5 * click


def test_a_hundred_routes_are_listed_at_once(desk: Desk) -> None:
    for number in range(100):
        desk.drop_in(
            f"qrexec-connect-unix@r{number}.socket",
            "work",
            "[Socket]",
            f"ListenStream=%t/qrexec/r{number}",
            "FileDescriptorName=work",
        )
    units = [f"qrexec-connect-unix@r{number}.socket" for number in range(100)]
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("start", *units)
    assert len(desk.routes()) == 100
    # 0.1 s on a quiet machine, and 0.16 s by the clock.
    assert processor_time(desk.argv("list"), desk.machine.environment) < 0.3
