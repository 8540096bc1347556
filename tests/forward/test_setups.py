"""When set-ups are looked at, and what is due, without a process or a clock."""

from __future__ import annotations

import math

import pytest

from qrexec_activate.forward.admission import PLACE_AGE, Admission, Verdict
from qrexec_activate.forward.call import OVERTAKEN_AGE, PROMPT_AGE, Call
from qrexec_activate.forward.outcome import Ending
from qrexec_activate.forward.setups import (
    ANSWER_LOOK,
    LOOK_INTERVAL,
    PROMPT_INTERVAL,
    WANTED_INTERVAL,
    YOUNG,
    YOUNG_INTERVAL,
    Setups,
)


class Scene:
    """Set-ups of calls that are numbers, beginning at 0."""

    def __init__(self, timeout: float = 300.0) -> None:
        self.admission = Admission(8, 120, 240)
        self.setups: Setups[int] = Setups(self.admission, timeout)
        self.calls: list[Call] = []

    def begin(
        self, now: float, target: str = "work", service: str = "s"
    ) -> int:
        number = len(self.calls)
        call = Call(now)
        call.begins(now)
        self.calls.append(call)
        self.admission.opens(number, target)
        self.admission.begins(number, now)
        self.setups.begins(number, call, target, service)
        return number

    def establish(self, number: int, now: float) -> None:
        self.calls[number].is_established(now)
        assert self.setups.ends(number) is True


def test_nothing_to_set_up_is_nothing_to_look_at() -> None:
    assert Scene().setups.next_look(0) == math.inf


def test_the_younger_a_set_up_the_more_often_it_is_looked_at() -> None:
    scene = Scene()
    scene.begin(0)
    # The youngest decides.
    scene.begin(10)
    look = scene.setups.next_look
    assert look(10) == YOUNG_INTERVAL
    assert look(10 + YOUNG - 0.01) == YOUNG_INTERVAL
    assert look(10.001 + YOUNG) == LOOK_INTERVAL
    assert look(10 + PROMPT_AGE - 0.1) == LOOK_INTERVAL
    assert look(10 + PROMPT_AGE) == PROMPT_INTERVAL


def test_who_is_no_longer_young_and_just_old_enough_is_seen_as_such() -> None:
    scene = Scene()
    number = scene.begin(0)
    assert scene.setups.next_look(YOUNG) == LOOK_INTERVAL
    assert scene.setups.look(ANSWER_LOOK) == [(number, True)]


def test_a_place_that_is_about_to_be_old_is_looked_at_in_time() -> None:
    scene = Scene()
    scene.begin(0)
    assert 0 < scene.setups.next_look(PLACE_AGE - 0.01) <= 0.0101


def test_while_somebody_waits_for_a_place_it_is_looked_at_at_once() -> None:
    scene = Scene()
    scene.begin(0)
    scene.admission.waits("listener", "work")
    assert scene.setups.next_look(1) == WANTED_INTERVAL


def test_no_look_comes_sooner_than_makes_sense() -> None:
    scene = Scene()
    scene.admission.counted(240, 0)
    scene.admission.waits("listener", "work")
    assert scene.setups.next_look(0.2499999) == WANTED_INTERVAL


def test_an_end_is_told_once_and_gives_the_place_back() -> None:
    scene = Scene()
    number = scene.begin(0)
    assert scene.setups.ends(number) is False
    assert scene.setups.ends(number) is None
    assert not scene.admission.gives_place_back(number)
    assert scene.admission.without_place == 1
    other = scene.begin(0)
    scene.establish(other, 0.1)
    assert scene.admission.without_place == 1


def test_who_is_established_holds_no_place() -> None:
    scene = Scene()
    for _ in range(8):
        scene.establish(scene.begin(0), 0.1)
    assert scene.admission.verdict("work", 1, opened=False) is Verdict.YES


def test_dom0_is_asked_about_now_and_then_and_only_for_what_is_old() -> None:
    scene = Scene()
    old = scene.begin(0)
    young = scene.begin(0.5)

    def look(now: float) -> dict[int, bool]:
        return dict(scene.setups.look(now))

    assert look(0.875) == {old: False, young: False}
    assert look(0.875 + ANSWER_LOOK) == {old: True, young: True}
    assert look(1.0 + ANSWER_LOOK) == {old: False, young: False}
    third = scene.begin(1.5)
    assert look(0.875 + 2 * ANSWER_LOOK - 0.01)[third] is False
    assert look(0.875 + 2 * ANSWER_LOOK) == {
        old: True,
        young: True,
        third: True,
    }
    fourth = scene.begin(3)
    assert look(0.9 + 3 * ANSWER_LOOK)[fourth] is False


@pytest.mark.parametrize(
    ("timeout", "age"), [(300.0, OVERTAKEN_AGE), (4.0, 4.0)]
)
def test_no_call_is_due_that_is_too_young_for_it(
    timeout: float, age: float
) -> None:
    scene = Scene(timeout)
    number = scene.begin(0)
    overtake(scene)
    assert scene.setups.due(number, age - 0.01) is None
    assert scene.setups.due(number, age) is not None


def overtake(scene: Scene, target: str = "work", service: str = "s") -> None:
    for began_at in (1.0, 2.0):
        scene.establish(scene.begin(began_at, target, service), began_at + 0.1)


def test_a_call_that_was_overtaken_on_its_route_is_lost() -> None:
    scene = Scene()
    number = scene.begin(0.5)
    overtake(scene, "other")
    overtake(scene, service="other")
    assert scene.setups.due(number, 0.5 + OVERTAKEN_AGE) is None
    overtake(scene)
    assert scene.setups.due(number, 0.5 + OVERTAKEN_AGE - 0.1) is None
    assert scene.setups.due(number, 0.5 + OVERTAKEN_AGE) is Ending.LOST


def test_no_disposable_overtakes_another() -> None:
    scene = Scene()
    number = scene.begin(0, "@dispvm:web")
    overtake(scene, "@dispvm:web")
    assert scene.setups.due(number, OVERTAKEN_AGE) is None
    assert scene.setups.due(number, 300) is Ending.TIMED_OUT


def test_a_stop_waits_for_those_that_need_no_person() -> None:
    scene = Scene()
    scene.begin(0)
    young = scene.begin(1)
    assert scene.setups.soon(PROMPT_AGE) == [young]
    assert scene.setups.soon(1 + PROMPT_AGE) == []
