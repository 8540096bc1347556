"""Faults on demand: parse the faults file of a loopback root, and pick those
that hit one call. No I/O.

Each line is `[QUBE] fault=value …`; without `[QUBE]` it meets calls to every
qube, and a later line overrides an earlier one.

  delay=SECONDS          wait so long before dom0's answer
  connect-delay=SECONDS  wait so long between that and the target's
  lose=P                 hang for ever before dom0's answer, as a race in
                         qrexec-daemon 4.4.2 does with up to 1.1 % of calls
  lose-late=P            hang after it: the target never connects
  lost-timeout=SECONDS   … until this end gives up, with 1 (default 120)
  refuse=P               126, `Request refused`
  vchan-failure=P        1, `Data vchan connection failed`, before any byte is
                         read
  max-setups=N           the same, for the call that finds N others being set
                         up, as Xen does beyond 10 to 25
  max-open=N             the same, for the call that finds N others open, as Xen
                         does without Qubes' GUI agent
  busy=N                 so many of the qube's 128 connections belong to others
  exit=CODE              exit with CODE before any byte is read
  end-early=P            the vchan closes during the call: FIN to the client,
                         then 255
  end-early-after=BYTES  … once so many bytes went either way (default 1)
  die-after=SECONDS      the client is killed by SIGKILL so long after bytes
                         began to flow
  first=N                this line meets only the first N calls that it selects

P is a probability from 0 to 1.
"""

from __future__ import annotations

# typing.TYPE_CHECKING without its import: the client must start quickly.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PROBABILITIES = ("lose", "lose-late", "refuse", "vchan-failure", "end-early")
SECONDS = ("delay", "connect-delay", "die-after", "lost-timeout")
WHOLE_NUMBERS = (
    "busy",
    "end-early-after",
    "exit",
    "first",
    "max-open",
    "max-setups",
)


class FaultsError(ValueError):
    """A line that cannot be read; the text names the line and what is wrong
    with it."""


class Line:
    """One line: the qube that it selects (empty: every qube), and its faults by
    name."""

    __slots__ = ("number", "qube", "values")

    def __init__(
        self, number: int, qube: str, values: dict[str, float]
    ) -> None:
        self.number = number
        self.qube = qube
        self.values = values


def parse(text: str) -> list[Line]:
    lines = []
    for number, text_line in enumerate(text.split("\n"), 1):
        words = text_line.split("#", 1)[0].split()
        if not words:
            continue
        qube = ""
        if words[0].startswith("["):
            if not words[0].endswith("]") or len(words[0]) < 3:
                raise FaultsError(f"line {number}: {words[0]!r} is no [QUBE]")
            qube = words.pop(0)[1:-1]
        lines.append(
            Line(
                number,
                "" if qube == "*" else qube,
                dict(_parse_fault(number, word) for word in words),
            )
        )
    return lines


def _parse_fault(number: int, word: str) -> tuple[str, float]:
    key, equals, text = word.partition("=")
    try:
        if not equals:
            raise ValueError
        value = float(int(text)) if key in WHOLE_NUMBERS else float(text)
    except (ValueError, OverflowError):
        raise FaultsError(
            f"line {number}: {word!r} is no fault=number"
        ) from None
    if key in PROBABILITIES:
        valid = 0 <= value <= 1
    elif key == "exit":
        valid = 0 <= value <= 255
    elif key in SECONDS or key in WHOLE_NUMBERS:
        valid = 0 <= value <= 1e9
    else:
        raise FaultsError(f"line {number}: there is no fault {key!r}")
    if not valid:
        raise FaultsError(f"line {number}: {word!r} is out of range")
    return key, value


def chosen(
    lines: list[Line], qube: str, nth_call: Callable[[Line], int]
) -> dict[str, float]:
    """The faults of a call to `qube`.

    `nth_call` counts the calls that a line with `first=` has met, this one
    included.
    """
    values: dict[str, float] = {}
    for line in lines:
        if line.qube in ("", qube) and (
            "first" not in line.values or nth_call(line) <= line.values["first"]
        ):
            values.update(line.values)
    return values
