"""Several changes, all of them or none.

A step that fails may have taken effect nevertheless, so it is undone as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from .errors import ActivateError
from .finishing import finishing

__all__ = ["Step", "all_or_none"]


class Step(NamedTuple):
    """A change, its opposite, and what a person must do if that fails."""

    do: Callable[[], object]
    undo: Callable[[], object]
    by_hand: str


def all_or_none(steps: Sequence[Step]) -> None:
    """Take the steps; if one fails, undo what was begun and raise its error.

    What would be left is named in an ActivateError. Ctrl-C and its like wait.
    """
    with finishing():
        begun: list[Step] = []
        try:
            for step in steps:
                begun.append(step)
                step.do()
        except BaseException as error:
            left = []
            for step in reversed(begun):
                try:
                    step.undo()
                except Exception as problem:
                    left.append(f"{step.by_hand} ({problem})")
            if left:
                raise ActivateError(
                    f"{error}; and it could not be undone: {'; '.join(left)}"
                ) from error
            raise
