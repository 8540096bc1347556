"""The core in pretend worlds: a fixed set of seeds, and that what does not hold
is found. `make simulate` takes other seeds, for as long as it is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from qrexec_activate.forward import admission, call
from qrexec_activate.forward.admission import Admission, Verdict
from qrexec_activate.forward.call import Call
from qrexec_activate.forward.lifetime import Idleness, Stop
from qrexec_activate.forward.outcome import Ending
from qrexec_activate.forward.setups import Setups
from tests.simulation import driver
from tests.simulation.simulation import Simulation, failure, shrunk
from tests.simulation.world import Scenario

#: Half a minute or so, by the number of events and not by a clock.
SEEDS, EVENTS = 100, 5000


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_whatever_happens_each_connection_has_one_outcome_in_time(
    first: int,
) -> None:
    for seed in range(first, first + 10):
        scenario = Scenario.of(seed, EVENTS)
        problem = failure(scenario)
        if problem is not None:
            pytest.fail(
                f"{problem}\npython -m tests.simulation {shrunk(scenario)}"
            )


def test_a_seed_repeats_a_run_to_the_last_event() -> None:
    runs = []
    for _ in range(2):
        simulation = Simulation(Scenario.of(3, 2000))
        simulation.run()
        runs.append((simulation.now, simulation.events, simulation.over_count))
    assert runs[0] == runs[1]


# What would be wrong, and what is then found.


def tries_what_has_run(patch: pytest.MonkeyPatch) -> None:
    def after_try(self: Call, *_: object) -> float | None:
        return 0.1 if self.tries < 3 else None

    patch.setattr(Call, "after_try", after_try)
    patch.setattr(Call, "is_established", lambda self, now: None)


def forgets_that_there_is_room(patch: pytest.MonkeyPatch) -> None:
    before = Admission.gives_place_back

    def gives_place_back(self: Admission, who: object) -> bool:
        given = before(self, who)
        self._may_have_room = False
        return given

    patch.setattr(Admission, "gives_place_back", gives_place_back)


def admits_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "verdict", lambda *_, **__: Verdict.YES)


def shares_all_places(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(admission, "SLOW_PLACES", 100)


def asks_again_and_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(call, "PROMPTS", 100)


def forgets_to_stop_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "waits_no_more", lambda *_: None)


def never_gives_up(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Call, "due", lambda *_: None)


def closes_twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "closes", lambda *_: None)


def takes_a_failure_for_everybodys(patch: pytest.MonkeyPatch) -> None:
    before = Admission.failed

    def failed(self: Admission, who: object, now: float) -> bool:
        full = before(self, who, now)
        for ceiling in list(self._no_room.values()):
            for target in set(self._per_target):
                self._no_room.setdefault(target, ceiling)
        return full

    patch.setattr(Admission, "failed", failed)


def counts_others_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Admission, "waits_for_others", property(lambda _: False))


def accepts_before_it_knows_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Admission,
        "knows_all",
        property(lambda _: True, lambda *_: None),
        raising=False,
    )


def stops_at_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stop, "waits", lambda *_: False)


def stops_too_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stop, "waits", lambda _, now, kept, soon: kept or soon)


def ends_while_it_is_busy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Idleness, "left", lambda self, *_: 0.0 if self.limit else 1e9)


def tries_what_is_established(patch: pytest.MonkeyPatch) -> None:
    before = Call.after_try

    def after_try(self: Call, *told: Any) -> float | None:
        established, self.established_at = self.established_at, None
        again = before(self, *told)
        self.established_at = established
        return again

    patch.setattr(Call, "after_try", after_try)


def gives_no_place_back(patch: pytest.MonkeyPatch) -> None:
    before = Setups.ends

    def ends(self: Setups[Any], who: Any) -> bool | None:
        began_at = self.admission._places.get(who)
        known = before(self, who)
        if known is False and began_at is not None:
            self.admission.begins(who, began_at)
        return known

    patch.setattr(Setups, "ends", ends)


def looks_at_no_bytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(driver, "has_run", lambda seen, code: False)


def gives_up_what_is_established(patch: pytest.MonkeyPatch) -> None:
    def takes_back(self: Call, now: float) -> bool:
        late = (Ending.TIMED_OUT, Ending.LOST)
        return self.established_at is not None and self.interrupted in late

    patch.setattr(Call, "takes_back", takes_back)


def remembers_a_ceiling(patch: pytest.MonkeyPatch) -> None:
    before = Admission.closes

    def closes(self: Admission, call: object) -> None:
        kept = dict(self._no_room)
        before(self, call)
        self._no_room.update(kept)

    patch.setattr(Admission, "closes", closes)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (tries_what_has_run, "service has run"),
        (forgets_that_there_is_room, "a place is free"),
        (admits_all, "more"),
        (shares_all_places, "takes what others need"),
        (asks_again_and_again, "asked too often"),
        (forgets_to_stop_waiting, "waits, and is over"),
        (never_gives_up, "hang"),
        (closes_twice, "the core counts others"),
        (takes_a_failure_for_everybodys, "its share|a place is free"),
        (counts_others_once, "for ever|a place is free|hang"),
        (accepts_before_it_knows_all, "more than may be open"),
        (stops_at_once, "had time|another try"),
        (stops_too_late, "systemd kills"),
        (ends_while_it_is_busy, "ends with connections"),
        (tries_what_is_established, "service has run"),
        (gives_no_place_back, "in _takes_place|holds a place"),
        (looks_at_no_bytes, "said to have run|service has run"),
        (gives_up_what_is_established, "has ended by itself"),
        (remembers_a_ceiling, "nothing is open"),
    ],
)
def test_what_does_not_hold_is_found(
    spoil: Callable[[pytest.MonkeyPatch], None],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch)
    for seed in range(200):
        problem = failure(Scenario.of(seed, 2000))
        if problem is not None:
            break
    assert problem is not None
    assert re.search(words, problem), problem
