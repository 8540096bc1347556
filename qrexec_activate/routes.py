"""Passed sockets and units in, routes out: each a listener, a target and a call, or a refusal and its reason.

The rule it keeps: a connection never goes to a qube that its listener's own file does not name. Wherever the
files, systemd and the passed socket do not agree, that listener is refused, and every other one is served. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import BadName
from .names import call_name, check_argument, check_service, check_target, decode_escapes, parse_unit_name
from .unitfile import (
    AddressKey,
    Declaration,
    Declared,
    FdName,
    SourceFile,
    address_key,
    declared_listeners,
    expand_specifiers,
)

__all__ = [
    "PassedSocket",
    "Refusal",
    "Route",
    "SocketUnit",
    "by_name",
    "by_unit",
    "claims",
    "unit_specifiers",
]


@dataclass(frozen=True, slots=True)
class SocketUnit:
    """A socket unit as systemd has loaded it; `listen` is its D-Bus property Listen: (kind, address) in order."""

    name: str
    files: tuple[SourceFile, ...]
    listen: tuple[tuple[str, str], ...]
    fd_name: str


@dataclass(frozen=True, slots=True)
class PassedSocket:
    """A file descriptor from systemd, its name in LISTEN_FDNAMES, and its kind and address as the kernel tells them."""

    fd: int
    name: str
    kind: str
    address: str


@dataclass(frozen=True, slots=True)
class Route:
    """A listener that is served: every connection to `address` becomes the call `call` to the qube `target`."""

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

_RELOAD = "run systemctl daemon-reload (with --user for a user unit), then restart {unit}"


def no_stream(kind: str) -> str:
    """Say why a socket of this kind cannot be served."""
    if kind == "Connection":
        return "it is a connection, not a listener; set Accept=no (systemd-socket-activate: leave --accept out)"
    return f"a {kind} socket cannot carry a byte stream; use ListenStream="


def unit_specifiers(unit: str, manager: Mapping[str, str]) -> dict[str, str]:
    """Return what `%i`, `%n` and their like stand for in a unit, on top of the manager's own (`%t`, `%h`, `%u`…)."""
    name = parse_unit_name(unit)
    instance = name.instance or ""
    last = name.prefix.rpartition("-")[2]
    values = {"n": unit, "N": unit.rpartition(".")[0], "p": name.prefix, "i": instance, "j": last}
    for plain, unescaped in (("i", "I"), ("p", "P"), ("j", "J")):
        try:
            values[unescaped] = decode_escapes(values[plain].replace("-", "/"))
        except BadName:
            continue
    return {**manager, **values}


def _same_address(written: str, shown: str) -> bool | None:
    """Compare an address from a file with one from systemd; None where the two cannot be compared."""
    ours, theirs = address_key(written), address_key(shown)
    if ours is None or theirs is None:
        return None
    # A bare port is IPv6 any, or IPv4 any where the kernel has no IPv6.
    return ours == theirs or (written.isdigit() and theirs == ("ip", "0.0.0.0", ours[2]))


def _pair(declared: Declared, unit: SocketUnit, specifiers: Mapping[str, str]) -> list[Declaration | None]:
    """Find the declaration of each entry of the unit's Listen property; None where that is in doubt.

    Addresses that can be compared decide. What is left (addresses with specifiers that are not known here, forms
    that are not known here) is paired in order, if there are as many on both sides and their kinds agree.
    """
    found: list[Declaration | None] = [None] * len(unit.listen)
    by_order: list[Declaration] = []
    for declaration in declared.listeners:
        written = expand_specifiers(declaration.address, specifiers)
        verdicts = [
            _same_address(written, shown) if written is not None and kind == declaration.kind else None
            for kind, shown in unit.listen
        ]
        # The same address twice in one unit is paired in order.
        exact = [index for index, same in enumerate(verdicts) if same and found[index] is None]
        if exact:
            found[exact[0]] = declaration
        elif written is None or address_key(written) is None:
            by_order.append(declaration)
    left = [index for index, owner in enumerate(found) if owner is None]
    if not declared.untrusted and [unit.listen[index][0] for index in left] == [item.kind for item in by_order]:
        for index, declaration in zip(left, by_order, strict=True):
            found[index] = declaration
    return found


def _resolved_name(name: FdName, declared: Declared, unit: SocketUnit, specifiers: Mapping[str, str]) -> str:
    """Expand and decode a FileDescriptorName, and check that it is a target; raises BadName."""
    expanded = expand_specifiers(name.text, specifiers)
    if expanded is None:
        # systemd knows every specifier, but tells the outcome of the last assignment only.
        if name is not declared.last_name:
            raise BadName(f"{name.text!r} holds a specifier whose value only systemd knows; write the name out")
        expanded = unit.fd_name
    return check_target(decode_escapes(expanded))


def _systemd_disagrees(declared: Declared, unit: SocketUnit, specifiers: Mapping[str, str]) -> str:
    """Say so where the name that systemd has loaded is not the one that the files would give it."""
    last = declared.last_name
    if declared.untrusted:
        return ""
    expanded = unit.name if last is None or not last.text else expand_specifiers(last.text, specifiers)
    # systemd drops a name that it finds invalid, with a warning of its own, and keeps the one before.
    if expanded is None or expanded == unit.fd_name or ":" in expanded or len(expanded) > 255:
        return ""
    if not (expanded.isascii() and expanded.isprintable()):
        return ""
    return (
        f"its files give FileDescriptorName={expanded}, but systemd has loaded {unit.fd_name};"
        f" {_RELOAD.format(unit=unit.name)}"
    )


def claims(service: str, unit: SocketUnit, manager_specifiers: Mapping[str, str]) -> list[Claim]:
    """Decide for each entry of a unit's Listen property, in order, where its connections go."""
    declared = declared_listeners(unit.files)
    reload = _RELOAD.format(unit=unit.name)
    specifiers = unit_specifiers(unit.name, manager_specifiers)
    unit_problem = _systemd_disagrees(declared, unit, specifiers)
    argument = ""
    try:
        argument = decode_escapes(parse_unit_name(unit.name).instance or "")
        check_argument(check_service(service), argument)
    except BadName as error:
        unit_problem = f"{error}; the argument is what stands between @ and .socket, so use a unit of another name"
    paired = _pair(declared, unit, specifiers)
    orphans = sum(owner is None for owner in paired)

    def claim(kind: str, address: str, owner: Declaration | None) -> Claim:
        def refuse(reason: str) -> Refusal:
            return Refusal(address, reason, unit.name, owner.path if owner else "")

        if kind != "Stream":
            return refuse(f"{owner.where if owner else unit.name}: {no_stream(kind)}")
        if unit_problem:
            return refuse(f"{unit.name}: {unit_problem}")
        if owner is None:
            lost = "; ".join(f"{file.path} {file.problem}" for file in declared.untrusted)
            return refuse(f"{lost or f'no file of {unit.name} declares it as systemd has loaded it'}; {reload}")
        # A file that cannot be read may have been an override for all that came before it. One that opened a
        # listener was none, so a single such file that accounts for a listener leaves no doubt.
        if owner.doubts and not (len(declared.untrusted) == 1 and orphans):
            file = owner.doubts[0]
            return refuse(f"{file.path} {file.problem}, and may have named another qube for it; {reload}")
        if owner.borrowed is not None:
            return refuse(
                f"{owner.where} opens it, but {owner.path} names no qube"
                f" (the name {owner.borrowed.text} belongs to {owner.borrowed.path});"
                f" add FileDescriptorName= to {owner.path}, then {reload}"
            )
        if owner.name is None or not owner.name.text:
            return refuse(
                f"{unit.name} has no target: {owner.where} opens it, but no file sets FileDescriptorName=;"
                f" add FileDescriptorName=QUBE to {owner.path}, then {reload}"
            )
        try:
            target = _resolved_name(owner.name, declared, unit, specifiers)
        except BadName as error:
            return refuse(f"{owner.name.where}: FileDescriptorName={owner.name.text}: {error}; mend it, then {reload}")
        return Route(address, target, service, argument, unit.name, owner.path)

    return [claim(kind, address, owner) for (kind, address), owner in zip(unit.listen, paired, strict=True)]


def _fits(shown: tuple[str, str], kind: str, bound: AddressKey | None) -> bool:
    """Whether an entry of systemd's Listen may be the socket bound there (port 0: any port)."""
    key = address_key(shown[1])
    if shown[0] != kind or key is None or bound is None:
        return False
    if key[0] == "ip" and key[2] == 0:
        return key[:2] == bound[:2]
    return key == bound


def by_unit(
    service: str,
    units: Iterable[SocketUnit],
    sockets: Sequence[PassedSocket],
    manager_specifiers: Mapping[str, str],
) -> list[Claim]:
    """Find out, for each passed socket in order, which unit and file it belongs to and where its connections go.

    systemd passes the sockets of one unit in the order of its Listen property, those of several units in no order.
    """
    units = list(units)
    claimed = [claims(service, unit, manager_specifiers) for unit in units]
    entries = [(at, index) for at, unit in enumerate(units) for index in range(len(unit.listen))]

    def shown(entry: tuple[int, int]) -> tuple[str, str]:
        return units[entry[0]].listen[entry[1]]

    def candidates(socket: PassedSocket) -> list[tuple[int, int]]:
        bound = address_key(socket.address)
        fitting = [entry for entry in entries if _fits(shown(entry), socket.kind, bound)]
        return [entry for entry in fitting if address_key(shown(entry)[1]) == bound] or fitting

    possible = [candidates(socket) for socket in sockets]
    decided: list[Claim] = []
    for position, socket in enumerate(sockets):
        mine = possible[position]
        if len(mine) > 1:
            # More entries than one could be this socket. Within one unit the order tells, if all of them are here.
            rivals = [other for other, theirs in enumerate(possible) if theirs == mine]
            one_unit = len({unit_index for unit_index, _ in mine}) == 1
            mine = [mine[rivals.index(position)]] if one_unit and len(rivals) == len(mine) else mine
        if len(mine) == 1:
            unit_index, index = mine[0]
            claim = claimed[unit_index][index]
            if units[unit_index].fd_name != socket.name:
                claim = Refusal(
                    socket.address,
                    f"systemd passed it as {socket.name!r}, but has {units[unit_index].name} loaded with"
                    f" FileDescriptorName={units[unit_index].fd_name}; restart {units[unit_index].name}",
                    units[unit_index].name,
                )
            decided.append(_at(claim, socket.address))
        elif mine:
            names = ", ".join(sorted({units[unit_index].name for unit_index, _ in mine}))
            decided.append(
                Refusal(
                    socket.address,
                    f"which listener of {names} it is cannot be told; give each its own address",
                )
            )
        elif socket.kind != "Stream":
            decided.append(Refusal(socket.address, no_stream(socket.kind)))
        else:
            decided.append(
                Refusal(
                    socket.address,
                    "no socket unit that starts this service declares it as systemd has it loaded now;"
                    " restart the socket unit that opened it",
                )
            )
    return decided


def _at(claim: Claim, address: str) -> Claim:
    """Show the address that the socket is really bound to, where the unit left the port to the kernel."""
    if claim.address == address:
        return claim
    if isinstance(claim, Refusal):
        return Refusal(address, claim.reason, claim.unit, claim.file)
    return Route(address, claim.target, claim.service, claim.argument, claim.unit, claim.file)


def by_name(service: str, argument: str, sockets: Sequence[PassedSocket]) -> list[Claim]:
    """Take each socket's name in LISTEN_FDNAMES as its target, without asking systemd.

    Raises BadName where the service or the argument is none, as then there is nothing to serve.
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
                    "no target is set; name the socket after the qube, as with systemd-socket-activate --fdname=work"
                )
            target = check_target(decode_escapes(socket.name))
        except BadName as error:
            decided.append(Refusal(socket.address, str(error)))
        else:
            decided.append(Route(socket.address, target, service, argument))
    return decided
