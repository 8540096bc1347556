"""The errors that reach a user.

Every one is a single line: what is wrong, where (file and line, unit, address),
what to do.
"""

from __future__ import annotations

__all__ = ["ActivateError", "BadName", "ManagerError", "UsageProblem"]


class ActivateError(Exception):
    """Something a person can mend; the text says how."""


class BadName(ActivateError, ValueError):
    """A qube, service, argument or unit name that qrexec or systemd would
    refuse, alter or misread."""


class ManagerError(ActivateError):
    """systemd could not be asked, or gave an answer that makes no sense."""


class UsageProblem(ActivateError):
    """The program was started in a way in which it cannot work."""
