"""What is decided about a passed socket: that it is served, as a route, or that
it is refused, and why.

Apart from `routes`, which decides it: a running daemon has no need of that. No
I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from .names import call_name

__all__ = ["Claim", "PassedSocket", "Refusal", "Route"]


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """A file descriptor from systemd, its name in LISTEN_FDNAMES, and its kind
    and address as the kernel tells them."""

    fd: int
    name: str
    kind: str
    address: str


@dataclass(frozen=True, slots=True)
class Route:
    """A listener that is served: every connection to `address` becomes the call
    `call` to the qube `target`."""

    address: str
    target: str
    service: str
    argument: str
    unit: str = ""
    file: str = ""

    @property
    def call(self) -> str:
        return call_name(self.service, self.argument)

    def __str__(self) -> str:
        origin = f" ({self.file})" if self.file else ""
        return f"{self.address} → {self.target} {self.call}{origin}"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A listener that is not served, why, and what to do about it."""

    address: str
    reason: str
    unit: str = ""
    file: str = ""

    def __str__(self) -> str:
        return f"{self.address} is refused: {self.reason}"


Claim = Route | Refusal
