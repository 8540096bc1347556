"""Which of the two managers is asked: a command that only shows asks the user's
and the system's, as far as each can be read; one that changes something asks
one of them, as --system says.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

from ..errors import ManagerError

__all__ = ["ask"]

_Seen = TypeVar("_Seen")


def ask(
    which: str | None,
    look: Callable[[bool], _Seen],
    declares: Callable[[_Seen], bool],
) -> tuple[list[_Seen], str]:
    """Look at the manager that is named, "user" or "system", or else at both;
    also say in words what is not shown.

    Of the system's, nothing is shown where nothing is declared. Raises
    ManagerError where there is nobody to ask.
    """
    if which:
        return [look(which == "user")], ""
    try:
        found, lost = [look(True)], None
    except ManagerError as error:
        found, lost = [], error
    try:
        system = look(False)
    except ManagerError:
        system = None
    # Who is root by sudo or at the console has no manager of their own; one
    # that does not answer is one.
    by_root = (
        lost is not None
        and os.geteuid() == 0
        and not isinstance(lost.__cause__, TimeoutError)
    )
    if system is not None and (by_root or declares(system)):
        found.append(system)
    if lost is None or not found:
        if lost is not None:
            raise lost
        return found, ""
    if by_root:
        name = os.environ.get("SUDO_USER")
        return found, (
            f"routes of {name} are not shown: run it without sudo"
            if name
            else ""
        )
    return found, f"only the system's routes are shown: {lost}"
