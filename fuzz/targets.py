# ruff: noqa: PT017 - these are no tests of pytest, and check what is said in an error.
"""What is fuzzed: each target takes bytes, runs one piece of the program on
them, and asserts what must always hold.

Targets are deterministic and free of side effects but for descriptors that they
close again, so that a case that fails can be kept in corpus/ and run for ever
after.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import jeepney
from jeepney import MessageType

from qrexec_activate.errors import (
    ActivateError,
    BadName,
    ManagerError,
    UsageProblem,
)
from qrexec_activate.forward import serve
from qrexec_activate.given import escapes, line, qubesdb
from qrexec_activate.loopback import client_vm, faults, policy, rpc_config
from qrexec_activate.routing import address as addresses
from qrexec_activate.routing import names, routes, unitfile
from qrexec_activate.routing.claim import PassedSocket, Refusal
from qrexec_activate.routing.unitfile import SourceFile
from qrexec_activate.systemd import manager, passed, units

__all__ = ["TARGETS"]

CORPUS = Path(__file__).resolve().parent / "corpus"
#: In place of this in a case, its parts are taken apart: files of a unit, words
#: of a command line, and so on.
SEPARATOR = b"\n%%\n"

_QREXEC_TEXT = re.compile(r"[A-Za-z0-9_.+-]*", re.ASCII)
_TARGET = re.compile(
    r"@default|@dispvm|(@dispvm:)?[A-Za-z][A-Za-z0-9_.-]{0,30}", re.ASCII
)


def text(data: bytes) -> str:
    return data.decode(errors="surrogateescape")


def parts(data: bytes) -> list[str]:
    return [text(part) for part in data.split(SEPARATOR)]


def one_line(error: BaseException) -> None:
    """An error is told in one line, whatever it is about."""
    assert str(error)
    assert "\n" not in str(error)


# -- unit files


def unit_file(data: bytes) -> None:
    """The parser of unit files never fails, and the rule about names and
    listeners holds."""
    whole = text(data)
    lines = len(unitfile._LINE_END.split(whole))
    for item in unitfile.assignments(whole):
        assert item.section
        assert 1 <= item.line <= lines
        assert "\n" not in item.key + item.value
        assert (item.key, item.value) == (
            item.key.strip(" \t\n\r"),
            item.value.strip(" \t\n\r"),
        )
        addresses.expand_specifiers(item.value, {"i": "x"})
        key = addresses.address_key(item.value)
        assert key is None or (
            key[0] in ("path", "abstract", "vsock", "ip") and key[2] >= 0
        )
    files = [
        SourceFile(f"/{number}.conf", part)
        for number, part in enumerate(parts(data))
    ]
    declared = unitfile.declared_listeners(files)
    for listener in declared.listeners:
        assert listener.kind in unitfile.LISTEN_KINDS.values()
        assert listener.address
        if listener.name is not None:
            own = unitfile.assignments(_text_of(files, listener.name.path))
            assert any(
                item.value == listener.name.text
                for item in own
                if item.key == "FileDescriptorName"
            )


def _text_of(files: list[SourceFile], path: str) -> str:
    found = next(file.text for file in files if file.path == path)
    assert found is not None
    return found


def routing(data: bytes) -> None:
    """A connection never goes to a qube that its listener's own file, or an
    override, does not name.

    A case: the unit's name, its FileDescriptorName, its Listen (`KIND ADDRESS`
    lines), and then its files.
    """
    unit, fd_name, listen, *files = [*parts(data), "", "", ""][
        : max(3, data.count(SEPARATOR) + 1)
    ]
    entries = tuple(
        (kind, address)
        for kind, _, address in (
            line.partition(" ") for line in listen.split("\n")
        )
    )
    sources = tuple(
        SourceFile(f"/{number}.conf", file) for number, file in enumerate(files)
    )
    loaded = routes.SocketUnit(unit, sources, entries, fd_name)
    passed_ones = [
        PassedSocket(number, fd_name, kind, address)
        for number, (kind, address) in enumerate(entries, 3)
    ]
    try:
        claims = routes.claims("my.Rpc", loaded, _MANAGER)
        decided = routes.by_unit("my.Rpc", [loaded], passed_ones, _MANAGER)
    except BadName as error:
        # Only a unit that systemd itself would not load: its name is from
        # D-Bus.
        one_line(error)
        assert not _is_unit_name(unit), (
            f"{unit!r} is a unit's name, but: {error}"
        )
        return
    assert len(claims) == len(entries)
    assert len(decided) == len(passed_ones)
    for claim in (*claims, *decided):
        if isinstance(claim, Refusal):
            one_line(
                ActivateError(Refusal("", claim.reason.replace("\n", " ")))
            )
            continue
        assert _TARGET.fullmatch(claim.target)
        assert _QREXEC_TEXT.fullmatch(claim.argument)
        assert claim.target in _may_be_named(loaded, claim.file), (
            f"{claim} is named by nobody"
        )


def _is_unit_name(word: str) -> bool:
    try:
        names.parse_unit_name(word)
    except BadName:
        return False
    return True


def _may_be_named(unit: routes.SocketUnit, own: str) -> Iterator[str]:
    """The targets that a listener of this file may reach, found in a way of its
    own: line by line, in no context."""
    specifiers = routes.unit_specifiers(unit.name, _MANAGER)
    for number, file in enumerate(unit.files):
        assert file.text is not None
        read = [
            item
            for item in unitfile.assignments(file.text)
            if item.section == "Socket"
        ]
        listens = any(
            item.key in unitfile.LISTEN_KINDS and item.value for item in read
        )
        if file.path == own or not listens or number == 0:
            for item in read:
                if item.key == "FileDescriptorName":
                    with contextlib.suppress(BadName):
                        # What other specifiers stand for, systemd says.
                        expanded = addresses.expand_specifiers(
                            item.value, specifiers
                        )
                        yield names.decode_escapes(
                            unit.fd_name if expanded is None else expanded
                        )


#: What specifiers stand for in the manager of the cases.
_MANAGER = {"t": "/run/user/1000", "h": "/home/user"}


# -- names


def name(data: bytes) -> None:
    """What is accepted, qrexec takes as it is; what is refused is refused with
    one line."""
    word = text(data)
    with contextlib.suppress(BadName):
        target = names.check_target(word)
        assert _TARGET.fullmatch(target)
        assert policy.effective_target(target, lambda _: True) == (
            policy.ADMIN if target == "dom0" else target
        )
    with contextlib.suppress(BadName):
        assert policy.sanitise(names.check_service(word)) == word
    for service in (
        "my.Rpc",
        "qubes.ConnectTCP",
        "qubes.ConnectUnix",
        "qubes.ConnectTCPBind",
    ):
        with contextlib.suppress(BadName):
            argument = names.check_argument(service, word)
            assert policy.sanitise(argument) == argument == word
            assert len(argument) <= client_vm.MAX_ARGUMENT
    with contextlib.suppress(BadName):
        unit = names.parse_unit_name(word)
        assert str(unit) == word
    with contextlib.suppress(BadName):
        names.decode_escapes(word)
    if not any("\ud800" <= char <= "\udfff" for char in word):
        assert names.decode_escapes(escapes.escape_instance(word)) == word
        assert names.decode_escapes(escapes.escape_target(word)) == word
    for check in (
        names.check_target,
        names.check_service,
        names.decode_escapes,
    ):
        try:
            check(word)
        except BadName as error:
            assert "\n" not in str(error).replace(word, "")


# -- D-Bus


_FIXED = ("/usr/lib/systemd/user/qrexec-connect-tcp@.socket",)


def _replies(unit: str, kind: type[manager.Manager]) -> bytes:
    """What systemd answers to the questions of the daemon, or of a command, in
    their order."""

    def variant(
        signature: str, value: object
    ) -> tuple[str, tuple[tuple[str, object]]]:
        return "v", ((signature, value),)

    row = (unit, "", "loaded", "active", "listening", "", "/o", 0, "", "/")
    bodies: list[tuple[str, tuple[object, ...]]] = [
        variant("as", [unit]),
        *(
            [("a(ssssssouso)", ([row],))]
            if kind is units.Manager
            else [variant("s", "loaded"), variant("s", "active")]
        ),
        variant("t", 1),
        variant("t", 1),
        variant("s", _FIXED[0]),
        variant("as", []),
        variant("b", False),
        variant("t", 1),
        variant("a(ss)", [("Stream", "127.0.0.1:1234")]),
        variant("s", "work"),
        variant("t", 5_000_000),
    ]
    raw = b""
    for serial, (signature, body) in enumerate(bodies, 1):
        header = jeepney.Header(
            jeepney.Endianness.little,
            MessageType.method_return,
            0,
            1,
            0,
            serial,
            {jeepney.HeaderFields.reply_serial: serial},
        )
        header.fields[jeepney.HeaderFields.signature] = signature
        raw += jeepney.Message(header, body).serialise(serial=serial)
    return raw


def bus(data: bytes) -> None:
    """Whatever the bus says, there is a ManagerError of one line, or what
    systemd documents."""
    # D-Bus knows no empty structure, so that no bus relays one; jeepney 0.9
    # reads an array of them for ever.
    if b"()" in data:
        return
    for kind in (manager.Manager, units.Manager):
        _ask(data, kind)


def _ask(data: bytes, kind: type[manager.Manager]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        # All of it at once, and then the end: nothing waits.
        theirs.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            theirs.sendall(data[: 1 << 16])
        theirs.shutdown(socket.SHUT_WR)
        ours.settimeout(5)
        systemd = kind(ours, user=True)
        try:
            triggers = systemd.trigger_units("qrexec-connect-tcp.service")
            found = systemd.socket_units(triggers, only_active=True)
            timeout = systemd.stop_timeout("qrexec-connect-tcp.service")
        except ManagerError as error:
            one_line(error)
            return
    assert all(isinstance(unit, str) for unit in triggers)
    assert timeout is None or 0 <= timeout <= 86400
    for unit in found:
        assert isinstance(unit.name, str)
        assert isinstance(unit.fd_name, str)
        assert all(
            isinstance(kind, str) and isinstance(address, str)
            for kind, address in unit.listen
        )
        with contextlib.suppress(BadName):
            routes.claims("qubes.ConnectTCP", unit, {})


# -- what systemd passes


#: Something at the first descriptors, so that some values of the variables are
#: right.
_open: list[socket.socket] = []


def listen_variables(data: bytes) -> None:
    """LISTEN_FDS, LISTEN_PID and LISTEN_FDNAMES: sockets, or one line that says
    that they do not agree.

    A case: these three, of which one that is left out is not set. `SELF` stands
    for this process.
    """
    if not _open:
        _open.extend(
            (
                socket.create_server(("127.0.0.1", 0)),
                socket.socket(socket.AF_UNIX),
                *socket.socketpair(),
            )
        )
    variables = dict(
        zip(
            ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"),
            parts(data),
            strict=False,
        )
    )
    for key, value in variables.items():
        os.environ.pop(key, None)
        if "\0" not in value:
            os.environ[key] = value.replace("SELF", str(os.getpid()))
    try:
        found = serve._sockets()
    except UsageProblem as error:
        assert str(error)
        return
    finally:
        for key in variables:
            os.environ.pop(key, None)
    for one in found:
        assert one.fd >= 3
        assert os.fstat(one.fd)
    for claim in routes.by_name("my.Rpc", "x", found):
        assert isinstance(claim, Refusal) or _TARGET.fullmatch(claim.target)


def address(data: bytes) -> None:
    """Every name of a socket that the kernel may give is written in some
    way."""
    (family,) = struct.unpack_from("=H", data.ljust(2, b"\0"))
    word = data[2:]
    passed.format_address(family, word)
    passed.format_address(socket.AF_UNIX, word)
    passed.format_address(socket.AF_UNIX, text(word))
    passed.format_address(socket.AF_INET6, (text(word), family, 0, 0))
    addresses.address_key(text(data))


# -- the loopback qrexec


def policy_file(data: bytes) -> None:
    """A policy that cannot be read allows nothing, and what is allowed, a line
    that allows it is the reason."""
    words, *rest = parts(data)
    try:
        rules = policy.parse("\n".join(rest))
    except policy.PolicyError as error:
        assert str(error).startswith("line ")
        return
    service, argument, source, target = [*words.split(" "), "", "", "", ""][:4]
    decision = policy.decide(
        rules,
        policy.sanitise(service),
        policy.sanitise(argument),
        source,
        target,
        policy.is_qube_name,
    )
    assert decision.action in ("allow", "ask", "refuse")
    if decision.action != "refuse":
        assert any(rule.action == decision.action for rule in rules)
        assert decision.resolved


def rpc_config_file(data: bytes) -> None:
    try:
        config = rpc_config.parse(text(data))
    except rpc_config.ConfigError as error:
        assert str(error).startswith("line ")
        return
    assert isinstance(config.wait_for_session, bool)


def faults_file(data: bytes) -> None:
    try:
        lines = faults.parse(text(data))
    except faults.FaultsError as error:
        assert str(error).startswith("line ")
        return
    faults.chosen(lines, "work", lambda _: 1)


def options(data: bytes) -> None:
    """The command line of qrexec-client-vm: options, a usage error, or help."""
    try:
        read = client_vm.parse_options(
            ["qrexec-client-vm", *parts(data)], (4, 4, 2)
        )
    except client_vm.Ended as ended:
        assert ended.code in (0, 1, 2)
        return
    assert isinstance(read.target, str)
    assert read.service is not None


# -- what dom0 says


def dom0_value(data: bytes) -> None:
    """Whatever QubesDB holds, no route is misread: each is one whose words
    stand in the value, in a unit and a file that say just that."""
    value = text(data)
    said = {tuple(part.split()[:3]) for part in re.split("[;\n\r]", value)}
    for system in (False, True):
        given, bad = line.decide(
            {"connect-x": value}, {"t": "/run/u", "h": "/h"}, {}, system=system
        )
        for wrong in bad:
            one_line(ValueError(str(wrong)))
            assert str(wrong).isprintable()
            assert len(str(wrong)) < 1000
        for one in given:
            assert (one.kind, one.argument, one.target) in said
            assert _TARGET.fullmatch(one.target)
            assert _QREXEC_TEXT.fullmatch(one.argument)
            assert _is_unit_name(one.unit)
            assert "/" not in one.unit
            declared = unitfile.declared_listeners(
                [SourceFile("/x.conf", one.text)]
            )
            (listener,) = declared.listeners
            assert listener.address == one.address.written
            assert listener.name is not None
            named = names.decode_escapes(listener.name.text)
            assert named == one.target
    qubesdb.understand(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "dom0": dom0_value,
    "unit-file": unit_file,
    "routing": routing,
    "name": name,
    "bus": bus,
    "listen-variables": listen_variables,
    "address": address,
    "policy": policy_file,
    "rpc-config": rpc_config_file,
    "faults": faults_file,
    "options": options,
}


def write_seeds() -> None:
    """Write the seed of each target that is no text that a person would write;
    see `fuzz/run --seeds`."""
    folder = CORPUS / "bus"
    folder.mkdir(parents=True, exist_ok=True)
    for kind, name in (
        (manager.Manager, "seed"),
        (units.Manager, "seed-commands"),
    ):
        unit = "qrexec-connect-tcp@1234.socket"
        (folder / name).write_bytes(_replies(unit, kind))
