"""What dom0 says, `tcp 1234 gitweb 127.0.0.1:1234`, and what becomes of it: an
address each, or why none.

The rule it keeps: what is no route is refused by itself, and what is one is the
same unit with the same text, whatever stands beside it. No I/O.
"""

from __future__ import annotations

from _collections_abc import Iterator, Mapping

from ..errors import ActivateError, UsageProblem
from ..printable import printable
from ..routing.address import AddressKey
from ..routing.names import NAME, check_argument, check_target
from .address import Address, parse_address
from .escapes import escape_target
from .kinds import KINDS, RPCS, default_listen, port_of, unit_of

__all__ = ["LABEL", "Bad", "Given", "decide", "is_of_dom0"]

#: What the label of a unit begins with that dom0 has given.
LABEL = "dom0-"
#: What needs a privilege, and so is the system's. Fixed, whatever
#: net.ipv4.ip_unprivileged_port_start says: both managers are to read the same.
PRIVILEGED = 1024
#: What is said of one key at most, and how long: whoever writes nonsense fills
#: no journal.
MOST_SAID = 5
LONGEST = 300
#: What a name in QubesDB holds at most.
LONGEST_KEY = 63


class Given:
    """An address that dom0 has given; `key` is the feature that said so."""

    __slots__ = ("address", "argument", "key", "kind", "target", "unit")

    def __init__(
        self, key: str, kind: str, argument: str, target: str, address: Address
    ) -> None:
        self.key = key
        self.kind = kind
        self.argument = argument
        self.target = target
        self.address = address
        usual = default_listen(kind, argument)
        if address.is_ip:
            usual = f"{usual}:{port_of(kind, argument)}"
        # Neither the target nor what comes before it can hold what every
        # address has one of, : / or @, so that no two routes have one label.
        where = "" if address.written == usual else f"-{address.written}"
        self.unit = unit_of(kind, argument, f"{LABEL}{target}{where}")

    @property
    def is_privileged(self) -> bool:
        """Whether only the system's manager can open it."""
        return self.address.is_ip and self.address.port < PRIVILEGED

    @property
    def text(self) -> str:
        """The whole of its drop-in."""
        return (
            f"# dom0: qvm-features, vm-config.{self.key}\n[Socket]\n"
            f"ListenStream={self.address.written}\n"
            f"FileDescriptorName={escape_target(self.target)}\n"
        )


class Bad:
    """What dom0 has said that is no route, or that gives way to another one;
    one line, that anybody may see."""

    __slots__ = ("key", "reason")

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        said = printable(reason)
        self.reason = said if len(said) <= LONGEST else f"{said[:LONGEST]}…"

    def __str__(self) -> str:
        return f"vm-config.{printable(self.key)}, from dom0: {self.reason}"


def is_of_dom0(path: str) -> str:
    """The key that a drop-in is made from, by its path; empty of others."""
    parts = path.rsplit("/", 3)
    if (
        len(parts) == 4
        and parts[1] == "generator"
        and f":{LABEL}" in parts[2]
        and parts[3].endswith(".conf")
    ):
        return parts[3].removesuffix(".conf")
    return ""


def decide(
    values: Mapping[str, str],
    specifiers: Mapping[str, str],
    own: Mapping[AddressKey, str],
    *,
    system: bool,
) -> tuple[list[Given], list[Bad]]:
    """From keys and values to the routes of one manager, in the order of their
    keys, and what is wrong.

    An address that one of this qube's own files opens, as `own` has it, is that
    file's; of two in dom0 that claim one, the first has it.
    """
    taken: dict[AddressKey, Given] = {}
    bad: list[Bad] = []
    for key in sorted(values):
        said = 0
        for one in _of_value(key, values[key], specifiers):
            if isinstance(one, Given):
                other = taken.setdefault(one.address.key, one)
                reason = ""
                if one.unit != other.unit:
                    reason = (
                        f"{one.address.expanded} is for {other.target} already,"
                        f" by vm-config.{other.key}"
                    )
                elif path := own.get(one.address.key):
                    reason = (
                        f"{one.address.expanded} is opened by {path}, and what"
                        f" is this qube's own comes first"
                    )
                if not reason or one.is_privileged is not system:
                    continue
                one = Bad(key, reason)
            elif system:
                # Whose it is cannot be told, and once is enough.
                continue
            if said < MOST_SAID:
                bad.append(one)
            said += 1
        if said > MOST_SAID:
            bad.append(Bad(key, f"and {said - MOST_SAID} more of that kind"))
    return [
        one
        for one in taken.values()
        if one.is_privileged is system and one.address.key not in own
    ], bad


def _of_value(
    key: str, value: str, specifiers: Mapping[str, str]
) -> Iterator[Given | Bad]:
    # It becomes the name of a file.
    if not (key and len(key) <= LONGEST_KEY and NAME.issuperset(key)):
        yield Bad(key, "a feature's name holds letters, digits, '_', '.', '-'")
        return
    for line in value.replace("\n", ";").replace("\r", ";").split(";"):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        try:
            kind, argument, target, addresses = _words(words)
        except ActivateError as error:
            yield Bad(key, f"{line.strip()[:80]!r}: {error}")
            continue
        for address in addresses:
            try:
                where = parse_address(
                    address, port_of(kind, argument), specifiers
                )
                yield Given(key, kind, argument, target, where)
            except ActivateError as error:
                yield Bad(key, f"{line.strip()[:80]!r}: {error}")


def _words(words: list[str]) -> tuple[str, str, str, list[str]]:
    """Check all of a route but its addresses; raises ActivateError."""
    kind = words[0]
    if kind not in KINDS:
        raise UsageProblem(
            f"{kind[:40]!r} is no kind of route from dom0: {', '.join(KINDS)}"
        )
    if len(words) < 3:
        raise UsageProblem(
            "write KIND ARGUMENT TARGET [ADDRESS], such as tcp 1234 gitweb"
            " 127.0.0.1:1234"
        )
    _, argument, target, *addresses = words
    check_argument(RPCS[kind], argument)
    check_target(target)
    return (
        kind,
        argument,
        target,
        addresses or [default_listen(kind, argument)],
    )
