"""The life of a call, decided without a process, a socket or a clock."""

from __future__ import annotations

import math
import random
from signal import SIGKILL, SIGTERM

import pytest

from qrexec_activate.forward.call import (
    BEHIND,
    BUSY,
    EMPTY_GRACE,
    FAREWELL,
    HANG_UP_GRACE,
    KILLED_GRACE,
    OVERTAKEN_AGE,
    PAGE,
    PROMPT_AGE,
    QUICK,
    RETRIES,
    RETRY_DELAY,
    STALL_GRACE,
    STOP_GRACE,
    VCHAN_PATIENCE,
    Call,
    LastBytes,
    Pace,
    has_run,
    is_heard,
    output_grace,
    signals,
)
from qrexec_activate.forward.outcome import Ending

EXITED = Ending.CLIENT_EXITED


class Extreme(random.Random):
    """Chance at its least, or at its most."""

    def __init__(self, most: bool) -> None:
        super().__init__()
        self._most = most

    def uniform(self, a: float, b: float) -> float:
        return b if self._most else a


def begun(at: float = 0.0, most: bool = False) -> Call:
    call = Call(at, random=Extreme(most))
    call.begins(at)
    return call


# ------------------------------------------------------- has the service run?


@pytest.mark.parametrize(
    ("data_seen", "code", "run"),
    [
        *[(True, code, True) for code in (None, -9, 0, 1, 126, 255)],
        *[(False, code, True) for code in (0, 3, 125, 127, 143)],
        *[(False, code, False) for code in (None, -9, 1, 2, 126, 255)],
    ],
)
def test_behind_pipes_data_and_the_exit_code_tell(
    data_seen: bool, code: int | None, run: bool
) -> None:
    assert has_run(data_seen, code) is run


# ------------------------------------------------------ does it take a socket?


@pytest.mark.parametrize(
    ("code", "established", "takes_none"),
    [
        (2, False, True),
        # A service may end so, too.
        (2, True, False),
        (1, False, False),
        (126, False, False),
        (-2, False, False),
        (None, False, False),
    ],
)
def test_the_end_of_a_call_tells_whether_sockets_are_known(
    code: int | None, established: bool, takes_none: bool
) -> None:
    call = Call(0)
    call.begins(0)
    if established:
        call.is_established(0.1)
    assert call.takes_no_socket(code) is takes_none


# -------------------------------------------------------------- how it ends


def test_what_is_of_no_use_is_asked_to_end_and_then_made_to() -> None:
    for ending in (Ending.CLIENT_GONE, Ending.TIMED_OUT):
        assert signals(ending) == [
            (SIGTERM, HANG_UP_GRACE),
            (SIGKILL, math.inf),
        ]
    assert signals(Ending.STOPPED) == [
        (SIGTERM, STOP_GRACE),
        (SIGKILL, math.inf),
    ]


def test_what_is_lost_has_nothing_to_end_in_order() -> None:
    assert signals(Ending.LOST) == [(SIGKILL, math.inf)]


def test_one_that_has_said_nothing_has_longer_to_say_why() -> None:
    assert output_grace(False) == EMPTY_GRACE > output_grace(True)
    assert output_grace(True) == KILLED_GRACE


def test_a_client_that_goes_ends_what_runs_and_leaves_what_is_set_up() -> None:
    call = begun()
    assert not call.hangs_up(left_nothing=False)
    assert call.client_left
    for established, left_nothing in (
        (True, True),
        (True, False),
        (False, True),
    ):
        call = begun()
        if established:
            call.is_established(1)
        assert call.hangs_up(left_nothing)
        assert not call.client_left


def test_what_ran_and_ended_by_itself_is_over_at_once() -> None:
    call = begun()
    # It may have to be made again.
    assert not call.is_over_at_once(0)
    call.is_established(0.1)
    assert call.is_over_at_once(0)
    assert call.is_over_at_once(3)
    # What it said has yet to be passed on; its code is unknown; or something
    # else ends it.
    assert not call.is_over_at_once(None)
    call.interrupt(Ending.CLIENT_GONE)
    assert not call.is_over_at_once(0)


def test_one_that_ends_after_its_client_has_gone_ends_well_if_it_has_run() -> (
    None
):
    call = begun()
    call.interrupt(Ending.CLIENT_GONE)
    assert call.ended_by_itself() is Ending.CLIENT_GONE
    call.is_established(1)
    assert call.ended_by_itself() is EXITED
    assert call.reason is Ending.CLIENT_GONE
    assert begun().reason is EXITED


@pytest.mark.parametrize(
    ("interrupted", "by_pipes", "all_sent", "alone"),
    [
        (None, False, False, True),
        (Ending.CLIENT_GONE, False, False, True),
        (Ending.LOST, False, False, False),
        # By pipes the daemon brings the bytes, but for those already sent by
        # a client that has gone.
        (None, True, True, False),
        (Ending.CLIENT_GONE, True, True, True),
        (Ending.CLIENT_GONE, True, False, False),
        (Ending.STOPPED, True, True, False),
        (Ending.LOST, True, True, False),
    ],
)
def test_a_daemon_that_goes_leaves_what_needs_none(
    interrupted: Ending | None, by_pipes: bool, all_sent: bool, alone: bool
) -> None:
    call = begun()
    if interrupted is not None:
        call.interrupt(interrupted)
    assert call.goes_on_alone(by_pipes, all_sent) is alone


def test_the_end_of_a_call_tells_its_times_and_tries() -> None:
    call = begun(10)
    call.begins(12)
    outcome = call.over(20, EXITED, 126, "why")
    assert (outcome.ending, outcome.exit_code) == (EXITED, 126)
    assert (outcome.detail, outcome.tries) == ("why", 2)
    assert (outcome.duration, outcome.established) == (10, False)
    assert outcome.setup is None
    call.is_established(15)
    outcome = call.over(20, EXITED, 0, "")
    assert (outcome.setup, outcome.established) == (3, True)


def test_how_long_an_adopted_call_was_set_up_is_not_known() -> None:
    call = Call(100)
    call.adopt(100, 30)
    assert (call.accepted_at, call.began_at, call.tries) == (70, 70, 1)
    call.is_established(101)
    outcome = call.over(120, EXITED, None, "")
    assert (outcome.duration, outcome.setup) == (50, None)
    # Of another try of it, it is.
    call = Call(100)
    call.adopt(100, 30)
    call.begins(110)
    call.is_established(111)
    assert call.over(120, EXITED, 0, "").setup == 1
    assert call.tries == 2


# ------------------------------------------------------------- another try?


def test_what_was_established_is_never_tried_again() -> None:
    for code in (None, -9, 0, 1, 126, 255):
        call = begun()
        call.is_established(0.1)
        assert call.after_try(0.2, EXITED, code, False) is None
        assert call.after_try(0.2, EXITED, code, True) is None
        assert call.after_try(0.2, Ending.LOST, code, False) is None


@pytest.mark.parametrize(("most", "factor"), [(False, 0.5), (True, 1.5)])
def test_a_failure_is_tried_again_so_often_after_growing_delays(
    most: bool, factor: float
) -> None:
    call = begun(most=most)
    for number in range(RETRIES):
        again = call.after_try(0.1, EXITED, 1, False)
        assert again == RETRY_DELAY * 2**number * factor
        call.begins(0.0)
    assert call.after_try(0.1, EXITED, 1, False) is None


@pytest.mark.parametrize("code", [None, -9, 0, 2, 125, 126, 127, 255])
def test_any_other_end_is_final(code: int | None) -> None:
    assert begun().after_try(0.1, EXITED, code, False) is None


def test_a_refusal_is_tried_again_only_if_the_qube_may_be_full() -> None:
    assert begun().after_try(0.1, EXITED, 126, False) is None
    assert begun().after_try(0.1, EXITED, 126, True) is not None


def test_a_refusal_that_a_person_may_have_given_is_final() -> None:
    assert begun().after_try(PROMPT_AGE, EXITED, 126, True) is None


def test_want_of_room_does_not_use_up_tries() -> None:
    call = begun()
    for _ in range(10 * RETRIES):
        assert call.after_try(0.1, EXITED, 1, True) is not None
        call.begins(0.0)
    assert call.tries == 1


def test_a_person_is_asked_at_most_twice() -> None:
    call = begun()
    assert call.after_try(PROMPT_AGE + 1, EXITED, 1, False) is not None
    call.begins(10)
    assert call.after_try(10 + PROMPT_AGE + 1, EXITED, 1, False) is None


def test_a_quick_answer_shows_that_nobody_was_asked() -> None:
    """As after the start of a qube, for which all calls had waited."""
    call = begun()
    assert call.after_try(PROMPT_AGE + 1, EXITED, 1, False) is not None
    for _ in range(3):
        call.begins(10)
        assert call.after_try(10.1, EXITED, 1, False) is not None


def test_what_came_after_the_answer_is_not_a_persons_time() -> None:
    call = begun()
    call.is_answered(1)
    call.is_answered(5)
    assert call.after_try(100, Ending.LOST, None, False) == 0.0
    assert call.prompts == 0


def test_a_call_that_ends_for_another_reason_is_not_tried_again() -> None:
    for ending in (Ending.CLIENT_GONE, Ending.TIMED_OUT, Ending.STOPPED):
        call = begun()
        call.interrupt(ending)
        call.interrupt(Ending.LOST)
        assert call.interrupted is ending
        assert call.after_try(0.1, EXITED, 1, False) is None


def test_a_lost_call_is_made_again_at_once() -> None:
    call = begun()
    call.interrupt(Ending.LOST)
    assert call.after_try(0.5, Ending.LOST, None, False) == 0.0
    assert call.interrupted is None


# ------------------------------------------------------- is it lost, or late?


def test_without_an_answer_it_waits_for_the_set_up_timeout() -> None:
    call = begun(64)
    assert call.due(64 + 299, 300, False) is None
    assert call.due(64 + 300, 300, False) is Ending.TIMED_OUT


def test_a_call_that_dom0_has_answered_and_the_target_has_not_is_lost() -> None:
    call = begun()
    call.is_answered(100)
    assert call.due(100 + VCHAN_PATIENCE - 0.1, 300, False) is None
    assert call.due(100 + VCHAN_PATIENCE, 300, False) is Ending.LOST


def test_each_further_try_is_given_twice_the_time() -> None:
    """The target may be waiting for a session to start."""
    call = begun()
    waited = 0.0
    for doubled in (1, 2, 4, 8):
        call.is_answered(0)
        assert call.due(VCHAN_PATIENCE * doubled - 0.1, 300, False) is None
        assert call.due(VCHAN_PATIENCE * doubled, 300, False) is Ending.LOST
        waited += VCHAN_PATIENCE * doubled
        assert call.after_try(0.1, Ending.LOST, None, False) is not None
        call.begins(0)
    # qrexec itself waits for 120 s.
    assert waited > 120


def test_a_call_that_was_overtaken_is_lost_once_it_is_old() -> None:
    call = begun(64)
    assert call.due(64 + OVERTAKEN_AGE - 0.1, 300, True) is None
    assert call.due(64 + OVERTAKEN_AGE, 300, True) is Ending.LOST


def test_an_answer_at_the_last_moment_counts() -> None:
    call = begun()
    call.interrupt(Ending.TIMED_OUT)
    assert not call.takes_back(300)
    call.is_established(300)
    call.is_established(301)
    assert call.established_at == 300
    assert call.takes_back(300)
    assert call.interrupted is None
    assert call.due(1000, 300, True) is None
    call.interrupt(Ending.CLIENT_GONE)
    assert not call.takes_back(301)


def test_only_quick_calls_that_began_later_overtake() -> None:
    pace = Pace()
    pace.is_established(10, 10 + QUICK / 2)
    assert not pace.overtook(5)
    pace.is_established(11, 11 + QUICK / 2)
    assert pace.overtook(5)
    assert not pace.overtook(10)
    pace = Pace()
    for began_at in range(10, 20):
        # A person may have answered these.
        pace.is_established(began_at, began_at + QUICK)
    assert not pace.overtook(5)


# ------------------------------------------------- the client's last bytes


def test_what_has_nothing_to_read_is_left_two_seconds() -> None:
    last = LastBytes(0, 10, 0)
    assert not last.are_over(0, 10 + HANG_UP_GRACE - 0.1, 0)
    assert last.are_over(0, 10 + HANG_UP_GRACE, 0)


def test_bytes_that_move_are_waited_for_however_slowly() -> None:
    last, now = LastBytes(100, 0, 0), 0.0
    for left in range(99, 0, -1):
        now += STALL_GRACE
        # Also by one that is busy.
        assert not last.are_over(left, now, now)
    now += 1
    assert not last.are_over(0, now, now)
    assert not last.are_over(0, now + HANG_UP_GRACE, now)


def test_what_is_behind_is_left_the_time_that_what_was_seen_took() -> None:
    last = LastBytes(BEHIND // 4, 100, 0)
    assert not last.are_over(1, 101, 0)
    assert not last.are_over(0, 105, 0)
    assert not last.are_over(0, 124.9, 0)
    assert last.are_over(0, 125, 0)


@pytest.mark.parametrize("first", [1, PAGE])
def test_less_than_a_page_tells_no_less_of_what_is_behind(first: int) -> None:
    last = LastBytes(first, 1, 0)
    assert not last.are_over(0, 3, 0)
    assert not last.are_over(0, 3 + 2 * BEHIND / PAGE - 0.1, 0)
    assert last.are_over(0, 3 + 2 * BEHIND / PAGE, 0)


@pytest.mark.parametrize(
    # Much in four seconds, or little in less than two.
    ("left", "now"),
    [(8 * BEHIND, 104), (1, 101.9)],
)
def test_behind_a_quick_service_nothing_is_waited_for(
    left: int, now: float
) -> None:
    last = LastBytes(left, 100, 0)
    assert not last.are_over(0, now, 0)
    assert not last.are_over(0, now + HANG_UP_GRACE - 0.1, 0)
    assert last.are_over(0, now + HANG_UP_GRACE, 0)


def test_one_that_drains_a_service_is_not_left_what_is_behind() -> None:
    last = LastBytes(1, 0, 0)
    assert not last.are_over(0, 5, 5)
    assert not last.are_over(0, 5 + STALL_GRACE - 0.1, 15)
    assert last.are_over(0, 5 + STALL_GRACE, 15)


def test_an_idle_qrexec_client_vm_is_left_its_bytes_for_ever() -> None:
    last = LastBytes(100, 0, 0)
    used = 0.0
    for now in range(1, 1000):
        used += BUSY / 2
        assert not last.are_over(100, now, used)


def test_a_busy_one_whose_bytes_do_not_move_drains_a_service() -> None:
    last = LastBytes(100, 0, 5)
    assert not last.are_over(100, STALL_GRACE - 0.1, 15)
    assert last.are_over(100, STALL_GRACE, 5 + BUSY * STALL_GRACE)


def test_one_that_was_busy_while_bytes_moved_may_rest() -> None:
    last = LastBytes(100, 0, 0)
    assert not last.are_over(50, 5, 5)
    assert not last.are_over(50, 5 + STALL_GRACE, 5)
    assert not last.are_over(50, 5 + 2 * STALL_GRACE - 0.1, 100)
    assert last.are_over(50, 5 + 2 * STALL_GRACE, 100)


# ----------------------------------------------------------------- the farewell


def test_a_client_that_goes_on_sending_is_heard_until_it_has_everything() -> (
    None
):
    assert not is_heard(0, True, 1)
    assert is_heard(0, True, 0)
    assert is_heard(0, False, 1)
    assert not is_heard(FAREWELL - 0.1, True, 1)
    assert is_heard(FAREWELL, True, 1)
