"""What dom0's policy, as a whole, says of a call: a line that comes first
decides, whoever wrote it."""

from __future__ import annotations

from typing import Any, NamedTuple

from qrexec.exc import AccessDenied
from qrexec.policy.parser import FilePolicy, Request

from .policyfile import Call
from .printable import printable

__all__ = ["Decision", "Decisions"]


class Decision(NamedTuple):
    """An action, and the file and line that decide."""

    action: str
    where: str

    def __str__(self) -> str:
        return f"{self.action}, by {self.where}" if self.where else self.action

    @property
    def denies(self) -> bool:
        return self.action not in ("ask", "allow")


class Decisions:
    """dom0's policy as it is now."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._policy = None
        self._problem = ""
        try:
            self._policy = FilePolicy()
        except AccessDenied as error:
            self._problem = printable(str(error))

    def of(self, call: Call) -> Decision:
        if self._policy is None:
            return Decision(f"deny, as it is broken: {self._problem}", "")
        names = {call.qube, call.target.removeprefix("@dispvm:")}
        try:
            request = Request(
                call.service,
                f"+{call.argument}",
                call.qube,
                call.target,
                system_info={"domains": self._domains(names)},
            )
            rule = self._policy.find_matching_rule(request)
        except AccessDenied as error:
            return Decision("deny", printable(str(error)))
        return Decision(
            type(rule.action).__name__.lower(),
            f"{rule.filepath.name}:{rule.lineno}",
        )

    def _domains(self, names: set[str]) -> dict[str, dict[str, Any]]:
        """What a rule can ask of the qubes of a call, in the form in which
        qubesd tells it to qrexec."""
        waiting, found = list(names), {}
        while waiting:
            name = waiting.pop()
            if name in found or name not in self._app.domains:
                continue
            qube = self._app.domains[name]
            disposable = getattr(qube, "default_dispvm", None)
            found[name] = {
                "name": name,
                "tags": list(qube.tags),
                "type": qube.klass,
                "template_for_dispvms": bool(
                    getattr(qube, "template_for_dispvms", False)
                ),
                "default_dispvm": str(disposable) if disposable else None,
                "uuid": str(getattr(qube, "uuid", "")),
                "power_state": "Running",
            }
            waiting += [str(disposable)] if disposable else []
        return found
