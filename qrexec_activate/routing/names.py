"""Names of qubes, RPCs, arguments and units: validate, decode.

Whatever qrexec would silently alter or misread is refused here, before any
program sees it: qrexec keeps `A-Za-z0-9_-.+` of a service and its argument and
turns every other byte into `_`; it treats a malformed target as `@default`; and
it takes a target that begins with `-` for an option (qrexec 4.4.2). No I/O, and
no regular expressions: where dom0 gives routes, a login would wait for them
longer than for all else.
"""

from __future__ import annotations

from ..errors import BadName

__all__ = [
    "C_ESCAPES",
    "LETTERS",
    "MAX_ARGUMENT",
    "NAME",
    "UnitName",
    "c_escape",
    "call_name",
    "check_argument",
    "check_service",
    "check_target",
    "decode_escapes",
    "is_number",
    "parse_unit_name",
]

#: An argument of about 3,900 characters wedges qrexec-agent 4.4.2 for good; no
#: honest one comes near this.
MAX_ARGUMENT = 1024

#: qubesd's own limit for the name of a qube.
MAX_QUBE_NAME = 31

#: systemd's own limit for the name of a unit (its UNIT_NAME_MAX, 256, counts
#: the terminating zero).
MAX_UNIT_NAME = 255

UNIT_TYPES = {
    "automount",
    "device",
    "mount",
    "path",
    "scope",
    "service",
    "slice",
    "socket",
    "swap",
    "target",
    "timer",
}

_DIGITS = frozenset("0123456789")
_HEX = _DIGITS | frozenset("abcdefABCDEF")
LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
#: What a qube's name and an RPC's consist of, and an instance without escapes.
NAME = LETTERS | _DIGITS | frozenset("_.-")
_TARGET = NAME | {"@"}
_ARGUMENT = NAME | {"+"}
_UNIT = _TARGET | frozenset(":\\")


def decode_escapes(text: str) -> str:
    r"""Turn systemd's `\xNN` into the characters they stand for, and leave `-`
    alone.

    `%I` would also turn `-` into `/`, which an RPC argument must not suffer.
    Raises BadName for a backslash that begins no such escape and for bytes that
    are no UTF-8.
    """
    plain, *escapes = text.split("\\")
    try:
        raw = plain.encode()
        for escape in escapes:
            digits = escape[1:3]
            if escape[:1] != "x" or len(digits) < 2 or set(digits) - _HEX:
                raise BadName(
                    f"{text!r} holds a backslash that begins no \\xNN escape;"
                    f" write it as \\x5c"
                )
            raw += bytes.fromhex(digits) + escape[3:].encode()
        return raw.decode()
    except UnicodeError:
        raise BadName(
            f"{text!r} is no UTF-8 text once its \\xNN escapes are decoded"
        ) from None


def check_target(target: str) -> str:
    """Return `target` if qrexec takes it as it is: a qube's name, `@default`,
    `@dispvm` or `@dispvm:NAME`.

    Raises BadName for anything else, as qrexec would send it to the policy as
    `@default`.
    """
    if target in ("@default", "@dispvm"):
        return target
    name = target.removeprefix("@dispvm:")
    if not target:
        raise BadName(
            "the target qube's name is empty; set FileDescriptorName= to the"
            " name of a qube"
        )
    if name.startswith("-"):
        raise BadName(
            f"{target!r} is no target: qrexec-client-vm would take it for an"
            f" option"
        )
    if name.startswith(("@", "$")):
        raise BadName(
            f"{target!r} is no target: the keywords are @default, @dispvm and"
            f" @dispvm\\x3aNAME; dom0 is written dom0"
        )
    if len(name) > MAX_QUBE_NAME:
        raise BadName(
            f"{target!r} is no target: a qube's name has at most"
            f" {MAX_QUBE_NAME} characters"
        )
    if name[:1] not in LETTERS or not NAME.issuperset(name):
        raise BadName(
            f"{target!r} is no target: a qube's name begins with a letter and"
            f" holds letters, digits, '_', '-' and '.';"
            " qrexec would take it for @default"
        )
    return target


def check_service(service: str) -> str:
    """Return the RPC's name (`qubes.ConnectTCP`) if qrexec takes it as it is;
    raises BadName."""
    if service[:1] in ("", "-", ".") or not NAME.issuperset(service):
        raise BadName(
            f"{service!r} is no RPC name: letters, digits, '_', '-' and '.',"
            f" beginning with neither '-' nor '.'"
        )
    if len(service) > MAX_ARGUMENT:
        raise BadName(
            f"the RPC name {service[:32]!r}… is longer than {MAX_ARGUMENT}"
            f" characters"
        )
    return service


def is_number(text: str, digits: int) -> bool:
    """Whether this is a number without leading zeros, of so many digits at
    most: int() takes more than that, and no more than 4,300."""
    return (
        0 < len(text) <= digits
        and _DIGITS.issuperset(text)
        and (text[0] != "0" or text == "0")
    )


def _check_port(port: str) -> None:
    if not is_number(port, 5) or not 0 < int(port) < 65536:
        raise BadName(
            f"{port!r} is no port: write a number from 1 to 65535 without"
            f" leading zeros"
        )


def _check_connect_unix(argument: str) -> None:
    if not argument:
        raise BadName(
            "qubes.ConnectUnix needs the name of a socket as its argument"
        )
    if argument.startswith("."):
        raise BadName(
            f"the argument {argument!r} of qubes.ConnectUnix may not begin"
            f" with a dot"
        )


def _check_connect_tcp_bind(argument: str) -> None:
    port, dash, address = argument.partition("-")
    if not dash:
        raise BadName(
            f"{argument!r} is no PORT-ADDRESS for qubes.ConnectTCPBind, such"
            f" as 2049-127.0.1.1"
        )
    _check_port(port)
    # Not at the top: it takes its time, at each login, where dom0 gives routes.
    import ipaddress

    try:
        # qrexec allows no ':' in an argument, so an IPv6 address is written
        # with '+'.
        ipaddress.ip_address(address.replace("+", ":"))
    except ValueError:
        raise BadName(
            f"{address!r} in {argument!r} is no address: write IPv4 as"
            f" 127.0.1.1, IPv6 with '+' for ':' as fd00++7"
        ) from None


#: RPCs whose arguments have a form that is known here. Those of other RPCs are
#: the service's own business.
_ARGUMENT_RULES = {
    "qubes.ConnectTCP": _check_port,
    "qubes.ConnectUnix": _check_connect_unix,
    "qubes.ConnectTCPBind": _check_connect_tcp_bind,
}


def check_argument(service: str, argument: str) -> str:
    """Return `argument` if qrexec passes it on unaltered and the RPC can make
    sense of it; raises BadName."""
    if len(argument) > MAX_ARGUMENT:
        raise BadName(
            f"the argument {argument[:32]!r}… is longer than {MAX_ARGUMENT}"
            f" characters"
        )
    if bad := sorted(set(argument) - _ARGUMENT):
        hint = "; write an IPv6 address with '+' for ':'" if ":" in bad else ""
        raise BadName(
            f"the argument {argument!r} holds {' '.join(map(repr, bad))},"
            f" which qrexec would silently turn into '_':"
            f" only letters, digits, '_', '-', '.' and '+' reach the"
            f" service{hint}"
        )
    if rule := _ARGUMENT_RULES.get(service):
        rule(argument)
    return argument


def call_name(service: str, argument: str) -> str:
    """Return what qrexec-client-vm and the policy call the service:
    `RPC+ARGUMENT`, or `RPC` without an argument."""
    return f"{service}+{argument}" if argument else service


class UnitName:
    """A unit's name taken apart: `qrexec-connect-tcp@1234.socket`; `instance`
    is None where there is no `@`.

    What follows the first `:` of an instance is a label: it tells units of one
    argument apart, and means nothing to qrexec, which allows no `:` in an
    argument.
    """

    __slots__ = ("instance", "prefix", "suffix")

    def __init__(self, prefix: str, instance: str | None, suffix: str) -> None:
        self.prefix = prefix
        self.instance = instance
        self.suffix = suffix

    def __str__(self) -> str:
        at = "" if self.instance is None else f"@{self.instance}"
        return f"{self.prefix}{at}.{self.suffix}"

    @property
    def argument(self) -> str:
        """The RPC's argument, with its escapes; empty where there is none."""
        return (self.instance or "").partition(":")[0]

    @property
    def label(self) -> str:
        """The label, with its escapes; empty where there is none."""
        return (self.instance or "").partition(":")[2]


def parse_unit_name(name: str) -> UnitName:
    """Take apart a unit's name as systemd does; raises BadName where systemd
    would not load such a unit."""
    stem, _, suffix = name.rpartition(".")
    prefix, at, instance = stem.partition("@")
    if not prefix or suffix not in UNIT_TYPES:
        raise BadName(
            f"{name!r} is no unit name: write it like"
            f" qrexec-connect-tcp@1234.socket"
        )
    if len(name) > MAX_UNIT_NAME:
        raise BadName(
            f"the unit name {name[:32]!r}… is longer than {MAX_UNIT_NAME}"
            f" characters"
        )
    if not _UNIT.issuperset(stem):
        raise BadName(
            f"{name!r} is no unit name: systemd allows only letters, digits"
            f" and :-_.\\ beside the @ in one"
        )
    return UnitName(prefix, instance if at else None, suffix)


C_ESCAPES = dict(zip(b"\a\b\f\n\r\t\v\\\"'", "abfnrtv\\\"'", strict=True))
_C_ESCAPED = {byte: f"\\{byte:03o}" for byte in (*range(32), *range(127, 256))}
_C_ESCAPED |= {byte: f"\\{letter}" for byte, letter in C_ESCAPES.items()}


def c_escape(raw: bytes) -> str:
    r"""Write bytes as systemd prints the path or abstract name of a unix
    socket: `sp\303\244ce`, `\"`, `\\`."""
    return raw.decode("latin-1").translate(_C_ESCAPED)
