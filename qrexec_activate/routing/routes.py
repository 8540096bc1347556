"""Passed sockets and units in, routes out: each a listener, a target and a
call, or a refusal and its reason.

The rule it keeps: a connection never goes to a qube that its listener's own
file does not name. Wherever the files, systemd and the passed socket do not
agree, that listener is refused, and every other one is served. No I/O.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from ..errors import BadName
from .address import AddressKey, address_key, expand_specifiers, written_key
from .claim import Claim, PassedSocket, Refusal, Route
from .names import (
    check_argument,
    check_service,
    check_target,
    decode_escapes,
    parse_unit_name,
)
from .unitfile import (
    Declaration,
    FdName,
    SourceFile,
    declared_listeners,
    is_fd_name,
    only_adds,
)

__all__ = [
    "SocketUnit",
    "by_name",
    "by_unit",
    "claims",
    "unit_specifiers",
]


@dataclass(frozen=True, slots=True)
class SocketUnit:
    """A socket unit as systemd has loaded it; `listen` is its D-Bus property
    Listen: (kind, address) in order.

    The first of its `files` is the fragment. `problem` says why the unit as a
    whole cannot be trusted, if so. `stale` is NeedDaemonReload.
    """

    name: str
    files: tuple[SourceFile, ...]
    listen: tuple[tuple[str, str], ...]
    fd_name: str
    problem: str = ""
    stale: bool = False


def no_stream(kind: str) -> str:
    """Say why a socket of this kind cannot be served."""
    if kind == "Connection":
        return (
            "it is a connection, not a listener; set Accept=no"
            " (systemd-socket-activate: leave --accept out)"
        )
    return f"a {kind} socket cannot carry a byte stream; use ListenStream="


def unit_specifiers(unit: str, manager: Mapping[str, str]) -> dict[str, str]:
    """Return what `%i`, `%n` and their like stand for in a unit, on top of the
    manager's own (`%t`, `%h`, `%u`…)."""
    name = parse_unit_name(unit)
    last = name.prefix.rpartition("-")[2]
    values = {
        "n": unit,
        "N": unit.rpartition(".")[0],
        "p": name.prefix,
        "i": name.instance or "",
        "j": last,
    }
    for plain, unescaped in (("i", "I"), ("p", "P"), ("j", "J")):
        with suppress(BadName):
            values[unescaped] = decode_escapes(values[plain].replace("-", "/"))
    return {**manager, **values}


class _Loaded:
    """A unit with what its files declare: all that it takes to decide about its
    listeners."""

    def __init__(
        self,
        service: str,
        unit: SocketUnit,
        manager_specifiers: Mapping[str, str],
    ) -> None:
        self.service = service
        self.unit = unit
        self.declared = declared_listeners(unit.files)
        systemctl = "systemctl --user"
        if manager_specifiers.get("t") == "/run":  # Only the system manager's.
            systemctl = "systemctl"
        name = shlex.quote(unit.name)
        self.reload = (
            f"run: {systemctl} daemon-reload && {systemctl} restart {name}"
        )
        self.specifiers: Mapping[str, str] = {}
        self.argument = ""
        self.problem = self._problem(manager_specifiers)
        self.owners: dict[AddressKey | None, list[Declaration]] = {}
        for declaration in self.declared.listeners:
            if declaration.kind == "Stream":
                self.owners.setdefault(self._key(declaration), []).append(
                    declaration
                )
        opened = [address for kind, address in unit.listen if kind == "Stream"]
        self.opened = Counter(address_key(address) for address in opened)
        #: What systemd has open for no declaration that is understood here.
        self.strays = [
            address for address in opened if not self._owners_of(address)
        ]

    def _problem(self, manager_specifiers: Mapping[str, str]) -> str:
        """Say what, if anything, is wrong with the unit as a whole."""
        if self.unit.problem:
            return f"{self.unit.problem}; {self.reload}"
        try:
            self.specifiers = unit_specifiers(
                self.unit.name, manager_specifiers
            )
            self.argument = decode_escapes(
                parse_unit_name(self.unit.name).argument
            )
            check_argument(check_service(self.service), self.argument)
        except BadName as error:
            return (
                f"{error}; the argument is what stands between @ and .socket,"
                f" or @ and the first colon,"
                f" so use a unit of another name"
            )
        expected = self._expected_name()
        if expected not in (None, self.unit.fd_name):
            return (
                f"its files set FileDescriptorName={expected}, but systemd"
                f" has {self.unit.fd_name}; {self.reload}"
            )
        return ""

    def _expected_name(self) -> str | None:
        """Return the name that systemd should report, as it read the files;
        None where that cannot be told."""
        expected: str | None = self.unit.name
        for name in self.declared.names:
            expanded = expand_specifiers(name.text, self.specifiers)
            if not name.text:
                expected = self.unit.name
            elif expanded is None:
                expected = None
            elif is_fd_name(expanded):
                expected = expanded
        return None if self.declared.untrusted else expected

    def _key(self, declaration: Declaration) -> AddressKey | None:
        expanded = expand_specifiers(declaration.address, self.specifiers)
        return None if expanded is None else written_key(expanded)

    def _may_be(self, declaration: Declaration, shown: str) -> bool:
        """Whether a declaration of whatever kind opens an address as systemd
        shows it."""
        return declaration.address == shown or self._key(
            declaration
        ) == address_key(shown)

    def _owners_of(self, shown: str) -> list[Declaration]:
        """Return the declarations of an address as systemd shows it."""
        key = address_key(shown)
        if key is None:
            return []
        bare = ("ip", "::", key[2])
        if (
            key[:2] == ("ip", "0.0.0.0")
            and key not in self.owners
            and bare not in self.opened
        ):
            # A bare port is IPv6 any, or IPv4 any where the kernel has no IPv6.
            return [
                owner
                for owner in self.owners.get(bare, [])
                if not owner.address.startswith("[")
            ]
        return self.owners.get(key, [])

    def decide(self, kind: str, address: str) -> Claim:
        """Decide where the connections of one entry of the unit's Listen
        property go."""
        if kind != "Stream":
            where, path = self.unit.name, ""
            for item in self.declared.listeners:
                if item.kind == kind and self._may_be(item, address):
                    where, path = item.where, item.path
            return self._refuse(address, f"{where}: {no_stream(kind)}", path)
        owners = self._owners_of(address)
        path = owners[-1].path if owners else ""
        if self.problem:
            opener = f" (opened by {owners[-1].where})" if owners else ""
            return self._refuse(
                address, f"{self.unit.name}{opener}: {self.problem}", path
            )
        if not owners or self.opened[address_key(address)] > len(owners):
            return self._refuse(address, self._nobody(address))
        claims = [self._claim(address, owner) for owner in owners]
        targets = set()
        for claim in claims:
            if isinstance(claim, Refusal):
                return claim
            targets.add(claim.target)
        if len(targets) > 1:
            return self._refuse(
                address,
                f"{' and '.join(owner.where for owner in owners)} open it for"
                f" different qubes ({', '.join(sorted(targets))});"
                f" give each qube an address of its own, then {self.reload}",
                path,
            )
        return claims[-1]

    def _refuse(self, address: str, reason: str, path: str = "") -> Refusal:
        return Refusal(address, reason, self.unit.name, path)

    def _nobody(self, address: str) -> str:
        """Say why no declaration was found for an address that systemd has
        open."""
        if self.declared.untrusted:
            reason = "; ".join(
                f"{file.path} {file.problem}"
                for file in self.declared.untrusted
            )
            return (
                f"which file opens it cannot be told: {reason}; {self.reload}"
            )
        nobody = f"no file of {self.unit.name} opens it"
        for owner in self.owners.get(None, []):
            return (
                f"{nobody} in a form that is understood here; if"
                f" {owner.where} does (ListenStream={owner.address}), write"
                f" {address} there, then {self.reload}"
            )
        return f"{nobody}, though systemd has it so loaded; {self.reload}"

    def _claim(self, address: str, owner: Declaration) -> Claim:
        """Decide about an address that one declaration opens."""
        refuse = partial(self._refuse, address, path=owner.path)
        if owner.doubts and (
            owner.inherited or not self._harmless(owner.doubts)
        ):
            file = owner.doubts[0]
            return refuse(
                f"{file.path} {file.problem}, and may have named another qube"
                f" for it; {self.reload}"
            )
        name = owner.name
        if owner.borrowed is not None:
            return refuse(
                f"{owner.where} opens it, but that file names no qube, and"
                f" FileDescriptorName={owner.borrowed.text} at"
                f" {owner.borrowed.where} is for the listeners of its own"
                f" file; add FileDescriptorName=QUBE to"
                f" {owner.path}, then {self.reload}"
            )
        if name is None or not name.text:
            reset = f"{name.where} resets" if name else "no file sets"
            mend = f"add FileDescriptorName=QUBE to {owner.path}"
            if name and name.path != owner.path:
                mend = f"take FileDescriptorName= out of {name.path}"
            return refuse(
                f"{self.unit.name} has no target: {owner.where} opens it, but"
                f" {reset} FileDescriptorName=; {mend}, then {self.reload}"
            )
        if owner.rival is not None:
            return refuse(
                f"{name.path} names two qubes for it,"
                f" FileDescriptorName={owner.rival.text} in line"
                f" {owner.rival.line}"
                f" and FileDescriptorName={name.text} in line {name.line};"
                f" give each qube a file of its own,"
                f" then {self.reload}"
            )
        try:
            target = self._target(name, inherited=owner.inherited)
        except BadName as error:
            return refuse(
                f"{name.where}: FileDescriptorName={name.text}: {error}; mend"
                f" it, then {self.reload}"
            )
        return Route(
            address,
            target,
            self.service,
            self.argument,
            self.unit.name,
            owner.path,
        )

    def _harmless(self, doubts: Sequence[SourceFile]) -> bool:
        """Whether files that are not known as systemd read them have left the
        listeners before them alone.

        One that opened a listener was no mere override: if it is the only such
        file, and systemd has a listener that nothing else accounts for, then it
        did. That it reset the list, to open the same addresses again, is ruled
        out by what it holds now: only addresses that are its own.
        """
        return (
            len(self.declared.untrusted) == 1
            and all(
                key is not None and key in self.opened for key in self.owners
            )
            and bool(self.strays)
            and all(self._opens_its_own(file) for file in doubts)
        )

    def _opens_its_own(self, file: SourceFile) -> bool:
        """Whether a file, as it is now, leaves the addresses of others to
        them."""
        now = declared_listeners([SourceFile(file.path, file.now)])
        keys = [self._key(listener) for listener in now.listeners]
        return only_adds(file) and not any(key in self.owners for key in keys)

    def _target(self, name: FdName, *, inherited: bool) -> str:
        """Expand and decode a FileDescriptorName, and check that it is a
        target; raises BadName."""
        expanded = expand_specifiers(name.text, self.specifiers)
        if expanded is None:
            raise BadName(
                "it holds a specifier that is not known here; write the name"
                " out"
            )
        if ":" in expanded:
            raise BadName("systemd ignores a name with ':'; write it as \\x3a")
        if inherited and expanded != self.unit.fd_name:
            raise BadName(f"systemd has {self.unit.fd_name} loaded instead")
        return check_target(decode_escapes(expanded))


def claims(
    service: str, unit: SocketUnit, manager_specifiers: Mapping[str, str]
) -> list[Claim]:
    """Decide for each entry of a unit's Listen property, in order, where its
    connections go."""
    loaded = _Loaded(service, unit, manager_specifiers)
    return [loaded.decide(kind, address) for kind, address in unit.listen]


def by_unit(
    service: str,
    units: Iterable[SocketUnit],
    sockets: Sequence[PassedSocket],
    manager_specifiers: Mapping[str, str],
) -> list[Claim]:
    """Find out, for each passed socket in order, which unit and file it belongs
    to and where its connections go.

    A socket is known by its bound address: systemd passes those of several
    units in no order, and those of a unit that were opened before a
    daemon-reload beside entries of Listen that are not open yet.
    """
    found: dict[tuple[str, AddressKey], list[tuple[SocketUnit, Claim]]] = {}
    for unit in units:
        for (kind, address), claim in zip(
            unit.listen, claims(service, unit, manager_specifiers), strict=True
        ):
            if key := address_key(address):
                found.setdefault((kind, key), []).append((unit, claim))
    decided = []
    for socket in sockets:
        key = address_key(socket.address)
        here = found.get((socket.kind, key), []) if key else []
        decided.append(_choose(socket, here))
    return decided


def _choose(
    socket: PassedSocket, found: Sequence[tuple[SocketUnit, Claim]]
) -> Claim:
    """Decide about a passed socket, from all that is claimed for its
    address."""
    if not found:
        reason = (
            "no socket unit that starts this service opens it, as systemd has"
            " them loaded now; restart the socket unit that did"
        )
        if socket.kind != "Stream":
            reason = no_stream(socket.kind)
        return Refusal(socket.address, reason)
    unit, claim = found[0]
    names = " and ".join(sorted({unit.name for unit, _ in found}))
    if socket.name not in {unit.fd_name for unit, _ in found}:
        return Refusal(
            socket.address,
            f"systemd passed it as {socket.name!r}, but now has {names} loaded"
            f" with FileDescriptorName={unit.fd_name}; restart {unit.name}",
            unit.name,
        )
    calls = {
        (other.target, other.call) if isinstance(other, Route) else None
        for _, other in found
    }
    # Several claims are fine as long as it makes no difference which of them
    # the socket belongs to.
    if len(calls) > 1:
        return Refusal(
            socket.address,
            f"{names} open it for different calls; give each an address of its"
            f" own",
        )
    return replace(claim, address=socket.address)


def by_name(
    service: str, argument: str, sockets: Sequence[PassedSocket]
) -> list[Claim]:
    """Take each socket's name in LISTEN_FDNAMES as its target, without asking
    systemd.

    Raises BadName where the service or the argument is none, as then there is
    nothing to serve.
    """
    check_service(service)
    check_argument(service, argument)
    decided: list[Claim] = []
    for socket in sockets:
        if socket.kind != "Stream":
            decided.append(Refusal(socket.address, no_stream(socket.kind)))
            continue
        try:
            if socket.name in ("", "unknown", "LISTEN_FD"):
                raise BadName(
                    "no target is set; name the socket after the qube, as"
                    " with systemd-socket-activate --fdname=work"
                )
            target = check_target(decode_escapes(socket.name))
        except BadName as error:
            decided.append(Refusal(socket.address, str(error)))
        else:
            decided.append(Route(socket.address, target, service, argument))
    return decided
