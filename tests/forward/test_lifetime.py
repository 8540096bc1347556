"""When a daemon ends, decided without one."""

from __future__ import annotations

import math

import pytest

from qrexec_activate.forward.lifetime import (
    STOP_MARGIN,
    STOP_PATIENCE,
    Idleness,
    Stop,
)


def test_an_idle_daemon_stays_so_long_after_its_last_connection() -> None:
    idleness = Idleness(60, 1000)
    assert idleness.left(1000, False) == 60
    assert idleness.left(1059, False) == 1
    assert idleness.left(1060, False) == 0
    assert idleness.left(9999, False) == 0
    idleness.since = 2000
    assert idleness.left(2001, False) == 59


def test_a_daemon_that_is_busy_or_told_to_stay_is_never_idle() -> None:
    assert Idleness(60, 0).left(1000, True) == math.inf
    assert Idleness(None, 0).left(1000, False) == math.inf


def test_a_stop_waits_for_nobody_who_can_do_without_the_daemon() -> None:
    assert not Stop(100, 10).waits(100, [], [])


def test_a_stop_waits_for_what_it_carries_until_systemd_would_kill() -> None:
    stop = Stop(100, 10)
    assert stop.waits(100, ["carried"], [])
    assert stop.waits(110 - STOP_MARGIN - 0.1, ["carried"], [])
    assert not stop.waits(110 - STOP_MARGIN, ["carried"], ["young"])


def test_a_stop_waits_for_set_ups_for_a_moment() -> None:
    stop = Stop(100, 10)
    assert stop.waits(100, [], ["young"])
    assert stop.waits(99.9 + STOP_PATIENCE, [], ["young"])
    assert not stop.waits(100 + STOP_PATIENCE, [], ["young"])


@pytest.mark.parametrize("timeout", [0, STOP_MARGIN])
def test_a_stop_without_time_waits_for_nobody(timeout: float) -> None:
    assert not Stop(100, timeout).waits(100, ["carried"], ["young"])
