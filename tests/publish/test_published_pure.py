"""What is told of programs by what is seen of them, without any."""

from __future__ import annotations

import pytest

from qrexec_activate.publish.caddy import status_problem
from qrexec_activate.publish.counts import failures, parse_calls
from qrexec_activate.publish.published import SETTLED, SETTLING, Sight, stays

#: Between two looks at a program.
STEP = 0.1
ONE = Sight("running", ("1",), True)
BUSY = ONE._replace(waits=False)
TWO = ONE._replace(runs=("2",))


def seen(*sights: Sight, step: float = STEP) -> str | None:
    """What is told of these sights, the last of which lasts; it is an error if
    that is never known."""
    last = [sights[-1]] * int(2 * SETTLED / step)
    times = (number * step for number in range(len(sights) + len(last)))
    return stays(zip(times, [*sights, *last], strict=True))


@pytest.mark.parametrize(
    ("sights", "told"),
    [
        ([Sight("idle"), Sight("starting"), ONE], None),
        ([Sight("idle"), ONE, Sight("failed")], "failed"),
        ([ONE, Sight("idle")], "idle"),
        # Caught each time while it ran, as one that ends at once may be.
        ([Sight("idle"), ONE, TWO], "started again"),
        ([ONE, Sight("running"), ONE], "started again"),
        # Its processor is another's for a while.
        ([BUSY] * int(2 * SETTLING / STEP) + [Sight("idle")], "idle"),
        # It computes.
        ([BUSY], None),
        ([BUSY, BUSY, ONE], None),
        ([Sight("starting")], "starting"),
    ],
)
def test_a_program_stays_if_it_has_run_throughout(
    sights: list[Sight], told: str | None
) -> None:
    assert seen(*sights) == told


@pytest.mark.parametrize("sights", [[ONE, TWO], [ONE, BUSY, Sight("idle")]])
def test_however_seldom_one_looks(sights: list[Sight]) -> None:
    assert seen(*sights, step=2 * SETTLING) is not None


def test_one_look_is_too_few() -> None:
    assert stays([(0.0, ONE)]) == "running"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("work: connected to wiki, exit code 0", (1, 0)),
        ("unknown caller: connected to wiki, exit code 0", (1, 0)),
        # Its caller has gone.
        ("work: connected to wiki, exit code 143", (1, 0)),
        ("work: connected to wiki, exit code 1", (1, 1)),
        ("work: could not connect to wiki, exit code 1", (1, 1)),
        (
            "work: failed: cannot connect to /run/user/1/a:b/wiki: there is no"
            " folder /run/user/1/a:b",
            (1, 1),
        ),
        ("work: refused: the argument begins with a dot", None),
        ("connected to wiki, exit code 0", None),
        ("a b: connected to wiki, exit code 0", None),
        ("work: connected to wiki, exit code 0 and more", None),
        ("", None),
    ],
)
def test_a_call_is_counted_by_its_line(
    line: str, told: tuple[int, int] | None
) -> None:
    assert parse_calls([line]) == ({"wiki": told} if told else {})


def test_a_failure_is_counted_by_its_unit() -> None:
    said = "a.service: Failed with result 'exit-code'."
    assert failures([said, said, "b.service: x"]) == {
        "a.service": 2,
        "b.service": 1,
    }


@pytest.mark.parametrize(
    "listens",
    [
        f"127.0.0.1:{2**70}",
        "127.0.0.1:x",
        "",
        "unix/",
        "unix/\0",
        f"{'x' * 99}:1",
    ],
)
def test_wherever_caddy_says_that_it_listens(listens: str) -> None:
    assert "does not answer for wiki.localhost" in status_problem(
        "wiki.localhost", [listens], 1.0
    )
