"""Who may begin, decided without a process, a socket or a clock."""

from __future__ import annotations

import errno
import math

import pytest

from qrexec_activate.forward.admission import (
    CENSUS_INTERVAL,
    CENSUS_INTERVAL_NEAR,
    CENSUS_WAITING,
    FAILURES_IN_A_ROW,
    FIRST_PLACES,
    FIRST_PROBE,
    FULL_PATIENCE,
    LAST_PROBE,
    MANY_OPEN,
    PLACE_AGE,
    SLOW_AGE,
    SLOW_PLACES,
    Admission,
    Fault,
    Verdict,
    fault,
)
from qrexec_activate.forward.outcome import Ending


class Door:
    """An admission, with calls that are numbers."""

    def __init__(
        self, setups: int = 8, connections: int = 120, total: int = 240
    ) -> None:
        self.admission = Admission(setups, connections, total)
        self.count = 0

    def verdict(self, target: str = "work", now: float = 0.0) -> Verdict:
        return self.admission.verdict(target, now, opened=False)

    def begin(self, target: str = "work", now: float = 0.0) -> int:
        assert self.verdict(target, now) is Verdict.YES
        self.count += 1
        self.admission.opens(self.count, target)
        self.admission.begins(self.count, now)
        return self.count

    def establish(self, target: str = "work", now: float = 0.0) -> int:
        call = self.begin(target, now)
        self.admission.established(call)
        return call


@pytest.mark.parametrize(
    ("what", "numbers"),
    [
        (Fault.NOBODY, "EAGAIN"),
        (Fault.NO_LISTENER, "EBADF EFAULT EINVAL ENOTSOCK"),
        (
            Fault.LOST,
            "ECONNABORTED EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENONET"
            " ENOPROTOOPT EOPNOTSUPP EPROTO ETIMEDOUT",
        ),
        (Fault.SHORTAGE, "EMFILE ENFILE ENOBUFS ENOMEM EPERM EINTR EIO"),
    ],
)
def test_an_error_of_accept_tells_whose_it_is(
    what: Fault, numbers: str
) -> None:
    for number in numbers.split():
        assert fault(getattr(errno, number)) is what, number
    assert fault(None) is Fault.SHORTAGE


def test_no_more_set_ups_at_once_than_there_are_places() -> None:
    door = Door(setups=3)
    calls = [door.begin() for _ in range(3)]
    assert door.verdict() is Verdict.NO_PLACE
    door.admission.established(calls[0])
    assert door.verdict() is Verdict.YES


def test_each_qube_has_its_first_place_whatever_the_others_do() -> None:
    door = Door(setups=8)
    for _ in range(8):
        door.begin("silent")
    assert door.verdict("silent") is Verdict.NO_PLACE
    door.begin("work")
    assert door.verdict("work") is Verdict.NO_PLACE
    for number in range(8 * FIRST_PLACES - 9):
        door.begin(f"qube{number}")
    assert door.verdict("another") is Verdict.NO_PLACE


def test_a_qube_that_does_not_answer_gets_fewer_places() -> None:
    door = Door()
    for _ in range(SLOW_PLACES):
        door.begin("silent", 64)
    door.begin("work", 64 + SLOW_AGE)
    assert door.verdict("silent", 64 + SLOW_AGE / 2) is Verdict.YES
    assert door.verdict("silent", 65) is Verdict.NO_PLACE
    assert door.verdict("work", 65) is Verdict.YES
    # To the very moment.
    door = Door()
    for target in ("silent",) * SLOW_PLACES + ("work",):
        door.begin(target, 0)
    assert door.verdict("silent", SLOW_AGE) is Verdict.NO_PLACE


def test_alone_a_slow_qube_has_all_places() -> None:
    door = Door()
    for _ in range(7):
        door.begin("slow", 0)
    assert door.verdict("slow", 1) is Verdict.YES


def test_an_old_set_up_gives_its_place_back() -> None:
    door = Door(setups=1)
    call = door.begin(now=64)
    assert door.admission.next_look(64) == 64 + PLACE_AGE
    assert door.admission.next_look(64 + PLACE_AGE) == math.inf
    assert door.admission.old(64 + PLACE_AGE - 0.1) == []
    assert door.admission.old(64 + PLACE_AGE) == [call]
    assert door.admission.gives_place_back(call)
    assert not door.admission.gives_place_back(call)
    assert door.verdict() is Verdict.YES
    assert door.admission.without_place == 1


def test_a_look_at_the_time_that_was_told_finds_what_is_old() -> None:
    door = Door()
    # The difference of the two is less than PLACE_AGE, as floats are.
    call = door.begin(now=7.38768311547948)
    assert door.admission.old(door.admission.next_look(8)) == [call]


def test_a_place_is_given_back_once_whatever_becomes_of_its_call() -> None:
    door = Door()
    admission = door.admission
    for ends in (
        admission.established,
        admission.closes,
        lambda call: admission.failed(call, 0),
        lambda call: admission.refused(call, 0),
    ):
        calls = [door.begin() for _ in range(2)]
        for call in calls:
            ends(call)
            assert not admission.gives_place_back(call)
    assert len(admission._places) == 0
    assert not admission.next_look(0) < math.inf


def test_nothing_is_limited_before_there_is_anything() -> None:
    admission = Admission(1, 1, 1)
    assert admission.verdict("work", 0, opened=False) is Verdict.YES
    # Of others it is known where they are connected to: not to here.
    admission = Admission(8, 3, 10)
    admission.counted(3, 0)
    assert admission.verdict("work", 0, opened=False) is Verdict.YES


def test_a_full_qube_keeps_only_its_own_waiting() -> None:
    door = Door(connections=2)
    calls = [door.establish() for _ in range(2)]
    assert door.verdict("work") is Verdict.TARGET_FULL
    assert door.verdict("gitweb") is Verdict.YES
    door.admission.closes(calls[0])
    assert door.verdict("work") is Verdict.YES


def test_all_qubes_and_all_others_together_are_limited() -> None:
    door = Door(total=5)
    door.admission.others = 2
    for number in range(3):
        door.establish(f"qube{number}")
    assert door.verdict("another") is Verdict.ALL_FULL
    assert door.admission.verdict("qube1", 0, opened=True) is Verdict.YES
    door.admission.others = 1
    assert door.verdict("another") is Verdict.YES


def test_who_waits_for_others_has_them_counted_again() -> None:
    admission = Admission(8, 120, 5)
    assert admission.count_is_due(10)
    admission.counted(5, 10)
    assert not admission.waits_for_others
    admission.waits("listener", "work")
    assert admission.waits_for_others
    assert admission.next_look(10) == 10 + CENSUS_WAITING
    # Whoever begins to wait later is not forgotten for that.
    assert admission.next_look(20) == 20
    assert not admission.count_is_due(10)
    assert admission.count_is_due(10 + CENSUS_WAITING)
    assert list(admission.turns(10)) == []
    admission.counted(4, 10 + CENSUS_WAITING)
    assert not admission.waits_for_others
    assert admission.next_look(11) == math.inf
    assert list(admission.turns(11)) == ["listener"]


def test_what_an_earlier_daemon_left_may_all_be_open_to_one_qube() -> None:
    admission = Admission(8, 3, 10)
    admission.knows_all = False
    admission.counted(3, 0)
    assert admission.verdict("work", 0, opened=False) is Verdict.TARGET_FULL
    admission.counted(2, 0)
    assert admission.verdict("work", 0, opened=False) is Verdict.YES
    admission.counted(3, 0)
    admission.waits("listener", "work")
    assert list(admission.turns(0)) == []
    admission.knows_all_now()
    assert list(admission.turns(0)) == ["listener"]


def test_who_waits_is_asked_again_only_where_there_may_be_room() -> None:
    door = Door(setups=1)
    calls = [door.establish()]
    lack_room(door)
    door.admission.waits("listener", "work")
    assert list(door.admission.turns(0)) == []
    assert list(door.admission.turns(FIRST_PROBE - 0.01)) == []
    assert list(door.admission.turns(FIRST_PROBE)) == ["listener"]
    # Its turn is not yet the probe.
    assert door.verdict("work", FIRST_PROBE) is Verdict.YES
    door.admission.waits("listener", "work")
    calls.append(door.begin("other"))
    assert list(door.admission.turns(0)) == []
    door.admission.gives_place_back(calls[1])
    assert list(door.admission.turns(FIRST_PROBE)) == ["listener"]


def test_others_are_counted_more_often_near_the_limit() -> None:
    admission = Admission(8, 120, 10)
    admission.counted(4, 0)
    assert not admission.count_is_due(CENSUS_INTERVAL - 0.01)
    assert admission.count_is_due(CENSUS_INTERVAL)
    admission.counted(5, 0)
    assert not admission.count_is_due(CENSUS_INTERVAL_NEAR / 2)
    assert admission.count_is_due(CENSUS_INTERVAL_NEAR)


def fail(door: Door, target: str = "work", now: float = 0.0) -> bool:
    """A new call that cannot be set up, and is over."""
    call = door.begin(target, now)
    full = door.admission.failed(call, now)
    door.admission.closes(call)
    return full


def lack_room(door: Door, target: str = "work") -> None:
    results = [fail(door, target) for _ in range(FAILURES_IN_A_ROW)]
    assert results[-1]


def test_failures_while_calls_are_open_mean_that_there_is_no_room() -> None:
    door = Door()
    opened = [door.establish() for _ in range(3)]
    results = [fail(door) for _ in range(FAILURES_IN_A_ROW)]
    assert results == [False] * (FAILURES_IN_A_ROW - 1) + [True]
    assert door.verdict() is Verdict.ALL_FULL
    door.admission.closes(opened[0])
    door.begin()
    # That one has the room that there was.
    assert door.verdict() is Verdict.ALL_FULL


def test_a_qube_that_fails_keeps_nobody_waiting_for_another() -> None:
    door = Door()
    door.establish("work")
    lack_room(door, "broken")
    assert door.verdict("broken") is Verdict.ALL_FULL
    assert door.verdict("work") is Verdict.YES
    door.establish("work")
    assert door.verdict("broken") is Verdict.ALL_FULL


def test_a_success_in_between_shows_that_there_is_room() -> None:
    door = Door()
    door.establish()
    for _ in range(3 * FAILURES_IN_A_ROW):
        assert not fail(door)
        door.establish()


def test_failures_with_nothing_open_have_another_reason() -> None:
    door = Door()
    assert not any(fail(door) for _ in range(10))
    assert door.verdict() is Verdict.YES


def test_where_nothing_is_scarce_failures_have_another_reason() -> None:
    door = Door()
    door.establish()
    lack_room(door)
    # As Qubes' GUI agent sees to it, once it has started.
    door.admission.scarce = False
    assert not fail(door, now=FIRST_PROBE)
    assert not any(fail(door) for _ in range(10))
    assert door.verdict() is Verdict.YES


def test_where_nobody_takes_room_a_failure_has_another_reason() -> None:
    door = Door()
    only = door.establish()
    lack_room(door)
    door.admission.closes(only)
    assert not door.admission.failed(door.begin(now=1), 1)


def test_who_waits_for_room_is_asked_once_nothing_is_scarce() -> None:
    door = Door()
    door.establish()
    old = door.begin("slow")
    door.admission.gives_place_back(old)
    lack_room(door)
    door.admission.waits("listener", "work")
    assert list(door.admission.turns(0)) == []
    door.admission.scarce = False
    assert not door.admission.failed(old, 0)
    assert list(door.admission.turns(0)) == ["listener"]


def test_a_ceiling_is_tried_from_time_to_time_and_then_less_often() -> None:
    door = Door()
    door.establish()
    lack_room(door)
    now, delay, tries = 0.0, FIRST_PROBE, 0
    while now < 120:
        assert door.verdict(now=now + delay - 0.01) is Verdict.ALL_FULL
        now += delay
        delay = min(2 * delay, LAST_PROBE)
        assert fail(door, now=now)
        tries += 1
    # With three watches each, of 128 that a qube has on Xen.
    assert tries < 12


def test_a_probe_that_succeeds_lifts_the_ceiling() -> None:
    door = Door()
    door.establish()
    lack_room(door)
    door.establish(now=FIRST_PROBE)
    assert door.verdict(now=FIRST_PROBE) is Verdict.YES


def test_one_that_holds_no_place_may_show_that_there_is_room() -> None:
    """Such as one of an earlier daemon."""
    door = Door()
    for number in (100, 101):
        door.admission.opens(number, "work")
    door.admission.established(100)
    lack_room(door)
    door.admission.waits("listener", "work")
    assert list(door.admission.turns(0)) == []
    door.admission.established(101)
    assert list(door.admission.turns(0)) == ["listener"]


def test_as_many_as_there_were_do_not_show_that_there_is_more_room() -> None:
    door = Door()
    opened = [door.establish() for _ in range(2)]
    lack_room(door)
    door.admission.closes(opened[0])
    door.establish()
    assert door.verdict() is Verdict.ALL_FULL


def test_a_qube_to_which_nothing_is_open_any_more_is_not_full() -> None:
    door = Door()
    opened = [door.establish() for _ in range(MANY_OPEN)]
    assert refuse(door, 0)
    for call in opened:
        door.admission.closes(call)
    for _ in range(MANY_OPEN):
        door.establish()
    assert door.verdict() is Verdict.YES


def test_a_ceiling_is_gone_with_the_last_open_call() -> None:
    door = Door()
    opened = door.establish()
    lack_room(door)
    door.admission.closes(opened)
    assert door.verdict() is Verdict.YES


def refuse(door: Door, now: float) -> bool:
    call = door.begin("work", now)
    full = door.admission.refused(call, now)
    door.admission.closes(call)
    return full


def test_a_refusal_by_a_qube_with_many_open_calls_may_mean_full() -> None:
    door = Door()
    for _ in range(MANY_OPEN - 1):
        door.establish()
    assert not refuse(door, 0)
    opened = door.establish()
    assert refuse(door, 0)
    assert door.verdict("work") is Verdict.TARGET_FULL
    assert door.verdict("gitweb") is Verdict.YES
    assert refuse(door, FIRST_PROBE)
    door.admission.closes(opened)
    assert door.verdict("work", FIRST_PROBE) is Verdict.YES


def test_a_refusal_is_taken_for_full_only_so_long() -> None:
    door = Door()
    for _ in range(MANY_OPEN):
        door.establish()
    assert refuse(door, 64)
    assert refuse(door, 64 + FULL_PATIENCE / 2)
    assert not refuse(door, 64 + FULL_PATIENCE)
    assert door.verdict("work", 64 + FULL_PATIENCE) is Verdict.YES


def test_who_waits_for_a_full_qube_is_asked_once_it_is_not_taken_for_full() -> (
    None
):
    door = Door()
    for _ in range(MANY_OPEN):
        door.establish()
    old = door.begin()
    door.admission.gives_place_back(old)
    for now in (0, 1, 3, 7, 15, 31):
        assert refuse(door, now)
    door.admission.waits("listener", "work")
    assert list(door.admission.turns(FULL_PATIENCE)) == []
    assert not door.admission.refused(old, FULL_PATIENCE)
    assert list(door.admission.turns(FULL_PATIENCE)) == ["listener"]


def test_another_call_that_is_established_shows_that_it_was_not_full() -> None:
    door = Door()
    for _ in range(MANY_OPEN):
        door.establish()
    assert refuse(door, 0)
    door.establish(now=FIRST_PROBE)
    assert door.verdict("work", FIRST_PROBE) is Verdict.YES


def test_who_is_neither_set_up_nor_established_is_without_a_place() -> None:
    door = Door()
    for _ in range(3):
        door.establish()
    door.admission.gives_place_back(door.begin())
    door.admission.gives_place_back(door.begin())
    assert not door.admission.is_wanted
    door.begin()
    assert not door.admission.is_wanted
    assert door.admission.without_place == 2
    door.admission.closes(1)
    assert door.admission.without_place == 2


def test_nobody_wants_a_place_of_others_where_there_are_none() -> None:
    door = Door()
    assert not door.admission.somebody_waits
    door.admission.waits("listener", "work")
    assert door.admission.somebody_waits
    assert not door.admission.is_wanted


def test_who_waits_goes_in_turn_as_far_as_there_is_room() -> None:
    door = Door(setups=1)
    first = door.begin()
    calls = []
    for number in (100, 101):
        door.admission.opens(number, "work")
        door.admission.waits(number, "work")
        calls.append(number)
    assert door.admission.is_wanted
    assert list(door.admission.turns(0)) == []
    door.admission.established(first)
    for who in door.admission.turns(0):
        assert who == calls.pop(0)
        door.admission.begins(who, 0)
    assert calls == [101]
    for _ in range(2):
        door.admission.waits_no_more(101)
    door.admission.closes(100)
    assert list(door.admission.turns(0)) == []
    assert not door.admission.is_wanted


def crowded(setups: int = 1) -> tuple[Door, list[int]]:
    """All places are held, and three listeners wait for one."""
    door = Door(setups)
    calls = [door.begin() for _ in range(setups)]
    for who in ("first", "second", "third"):
        assert door.verdict() is Verdict.NO_PLACE
        door.admission.waits(who, "work")
    assert list(door.admission.turns(0)) == []
    return door, calls


def test_one_free_place_is_one_listeners_turn() -> None:
    door, calls = crowded()
    for who in ("first", "second", "third"):
        door.admission.established(calls.pop())
        assert list(door.admission.turns(0)) == [who]
        calls.append(door.begin())
        assert list(door.admission.turns(0)) == []
    assert door.admission.next_look(0) == PLACE_AGE


def test_as_many_places_as_are_free_are_given_in_turn() -> None:
    door, calls = crowded(setups=2)
    for call in calls:
        door.admission.established(call)
    assert list(door.admission.turns(0)) == ["first", "second"]
    # They hold nothing themselves.
    assert door.admission.open == 2
    door.begin()
    door.begin()
    assert list(door.admission.turns(0)) == []


def test_a_turn_of_which_nothing_comes_is_the_next_ones() -> None:
    door, calls = crowded(setups=2)
    for call in calls:
        door.admission.established(call)
    assert list(door.admission.turns(0)) == ["first", "second"]
    # One of them accepts a call; the client of the other had gone.
    door.begin()
    assert door.admission.next_look(0) == 0
    assert list(door.admission.turns(0)) == ["third"]
    assert list(door.admission.turns(0)) == []
    assert door.admission.next_look(0) == PLACE_AGE


def test_a_call_to_another_qube_is_nobody_elses_turn() -> None:
    door = Door(connections=1)
    only = door.establish()
    for who in ("first", "second"):
        door.admission.waits(who, "work")
    assert list(door.admission.turns(0)) == []
    door.admission.closes(only)
    assert list(door.admission.turns(0)) == ["first"]
    door.begin("gitweb")
    assert list(door.admission.turns(0)) == ["second"]


def test_who_counts_already_takes_no_room_of_its_own() -> None:
    door = Door(connections=1, total=1)
    door.admission.opens(100, "work")
    door.admission.begins(100, 0)
    door.admission.gives_place_back(100)
    door.admission.waits(100, "work")
    assert list(door.admission.turns(0)) == [100]


def test_who_has_to_wait_keeps_nobody_behind_from_another_qube() -> None:
    door = Door(connections=1)
    door.establish("full")
    for who, target in enumerate(("full", "full", "work"), start=100):
        door.admission.waits(who, target)
    assert list(door.admission.turns(0)) == [102]


def test_who_has_gone_meanwhile_has_no_turn() -> None:
    door = Door(setups=1)
    first = door.begin()
    for number in (100, 101):
        door.admission.opens(number, f"qube{number}")
        door.admission.waits(number, f"qube{number}")
    door.admission.closes(first)
    turns = door.admission.turns(0)
    assert next(turns) == 100
    door.admission.waits_no_more(101)
    assert list(turns) == []


def test_the_next_look_is_when_something_changes_by_itself() -> None:
    door = Door()
    assert door.admission.next_look(0) == math.inf
    door.establish()
    lack_room(door)
    assert door.admission.next_look(0) == math.inf
    door.admission.waits("listener", "work")
    assert door.admission.next_look(0) == FIRST_PROBE
    assert door.admission.open == 1
    assert door.admission.open_to("work") == 1


def test_only_an_exit_of_its_own_tells_of_room() -> None:
    """With code 126 the qube refuses it, with 1 nothing can be set up."""
    codes = (None, 0, 1, 2, 125, 126, 127, 255)
    for ending in (Ending.CLIENT_EXITED, Ending.LOST, Ending.TIMED_OUT):
        lacking = []
        for code in codes:
            door = Door()
            for _ in range(MANY_OPEN):
                door.establish()
            for _ in range(FAILURES_IN_A_ROW - 1):
                assert not fail(door)
            call = door.begin()
            if door.admission.no_room(call, ending, code, 0):
                lacking.append(code)
        expected = [1, 126] if ending is Ending.CLIENT_EXITED else []
        assert lacking == expected


def test_the_ceiling_that_may_be_tried_first_is_looked_at_first() -> None:
    door = Door()
    door.establish()
    for _ in range(FAILURES_IN_A_ROW):
        fail(door, "first")
    for _ in range(FAILURES_IN_A_ROW):
        fail(door, "second", FIRST_PROBE / 2)
    door.admission.waits("listener", "second")
    assert door.admission.next_look(FIRST_PROBE / 2) == FIRST_PROBE
    assert door.admission.next_look(FIRST_PROBE) == 1.5 * FIRST_PROBE
