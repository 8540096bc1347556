"""The systemd generator: dom0's routes as units of the generator's folder.

The rule it keeps: what was there stays there. Where QubesDB does not answer,
the routes are those that it told last; and one that cannot be written is no
reason for another to go. It runs at each login and daemon-reload, so it imports
little, and says nothing on a machine without QubesDB.
"""

from __future__ import annotations

import os
import sys
from _collections_abc import Iterator, Mapping

from ..printable import printable
from ..routing.address import AddressKey, expand_specifiers, written_key
from .kinds import KINDS
from .line import LABEL, Bad, Given, decide
from .qubesdb import Words, ask, understand

__all__ = [
    "WATCH",
    "Place",
    "decided",
    "generate",
    "latest",
    "main",
    "written",
]

#: The unit that lives on: what dom0 says from then on.
WATCH = "qrexec-activate-dom0.service"


class Place:
    """Whose generator this is: the system's, or that of one user's manager."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        runtime = environment.get("XDG_RUNTIME_DIR", "")
        # systemd says so from 251 on.
        scope = environment.get("SYSTEMD_SCOPE")
        self.system = scope == "system" if scope else not runtime
        self.runtime = "/run" if self.system else runtime
        home = environment.get("HOME", "/")
        config = environment.get("XDG_CONFIG_HOME") or f"{home}/.config"
        self.specifiers = {"t": self.runtime, "h": home, "S": config}
        of_user = [
            f"{config}/systemd/user",
            f"{runtime}/systemd/user",
            "/etc/systemd/user",
            "/usr/lib/systemd/user",
        ]
        of_system = [
            "/etc/systemd/system",
            "/run/systemd/system",
            "/usr/lib/systemd/system",
        ]
        #: Where this qube's own units lie; what the system opens no user can.
        self.folders = of_system if self.system else of_user + of_system
        if self.system:
            del self.specifiers["S"]

    @property
    def memory(self) -> str:
        """Where QubesDB's last answer is kept."""
        return f"{self.runtime}/qrexec-activate/dom0"

    def serves(self, words: Words) -> bool:
        """Whether dom0's routes are for this manager at all."""
        import pwd

        try:
            return self.system or pwd.getpwuid(os.getuid())[0] == words.user
        except KeyError:
            return False


def main() -> None:
    """As systemd calls it: NORMAL-DIR EARLY-DIR LATE-DIR."""
    if len(sys.argv) != 4:
        sys.exit("usage: generator NORMAL-DIR EARLY-DIR LATE-DIR")
    generate(sys.argv[1], Place(os.environ))


def generate(folder: str, place: Place) -> None:
    """Write units for all routes that dom0 gives."""
    words = latest(place)
    if not place.serves(words):
        return
    scope = "system" if place.system else "user"
    target = "multi-user" if place.system else "default"
    _link(f"{folder}/{target}.target.wants", WATCH, scope, WATCH)
    given, bad = decided(words, place)
    for wrong in bad:
        _say(str(wrong), place)
    for one in given:
        try:
            os.mkdir(f"{folder}/{one.unit}.d")
            _write(f"{folder}/{one.unit}.d/{one.key}.conf", one.text.encode())
            template = f"{KINDS[one.kind]}@.socket"
            _link(f"{folder}/sockets.target.wants", one.unit, scope, template)
        except OSError as error:
            _say(f"cannot write {one.unit}: {error}", place)


def decided(words: Words, place: Place) -> tuple[list[Given], list[Bad]]:
    """Which routes a manager gets, and what is wrong."""
    if not (words.values and place.serves(words)):
        return [], []
    own = own_addresses(place)
    return decide(words.values, place.specifiers, own, system=place.system)


def latest(place: Place) -> Words:
    """What QubesDB says now or, if it does not, said last."""
    answer = ask()
    try:
        if answer is None:
            with open(place.memory, "rb") as last:
                answer = last.read()
        else:
            os.makedirs(os.path.dirname(place.memory), 0o700, exist_ok=True)
            unfinished = f"{place.memory}.{os.getpid()}"
            _write(unfinished, answer)
            os.rename(unfinished, place.memory)
    except OSError:
        # Without a memory, there is what it says now.
        pass
    return understand(answer or b"")


def written(folder: str) -> dict[str, str]:
    """Unit → text, of dom0's routes in a generator's folder."""
    found: dict[str, str] = {}
    for unit in _names(f"{folder}/sockets.target.wants"):
        if f":{LABEL}" not in unit:
            continue
        for name in _names(f"{folder}/{unit}.d"):
            found[unit] = _text(f"{folder}/{unit}.d/{name}")
    return found


# ------------------------------------------------------- what is the qube's own


def own_addresses(place: Place) -> dict[AddressKey, str]:
    """Address → file, of the sockets that this qube's own files enable."""
    found: dict[AddressKey, str] = {}
    for path, address in _own_lines(place):
        expanded = expand_specifiers(address, place.specifiers)
        key = written_key(expanded) if expanded else None
        if key is not None:
            found.setdefault(key, path)
    return found


def _own_lines(place: Place) -> Iterator[tuple[str, str]]:
    there = {folder: set(_names(folder)) for folder in place.folders}
    wants = "sockets.target.wants"
    enabled = {
        unit
        for folder, names in there.items()
        if wants in names
        for unit in _names(f"{folder}/{wants}")
        if unit.endswith(".socket")
    }
    for unit in sorted(enabled):
        template = f"{unit.partition('@')[0]}@.socket" if "@" in unit else unit
        owners = {unit, template}
        paths = [
            f"{folder}/{name}"
            for folder, names in there.items()
            for name in owners & names
        ]
        if any(os.path.realpath(path) == os.devnull for path in paths):
            continue
        paths += [
            f"{folder}/{name}.d/{file}"
            for folder, names in there.items()
            for name in owners
            if f"{name}.d" in names
            for file in _names(f"{folder}/{name}.d")
            if file.endswith(".conf")
        ]
        for path in paths:
            for line in _text(path).split("\n"):
                key, equals, value = line.partition("=")
                if equals and key.strip() == "ListenStream":
                    yield path, value.strip()


# ------------------------------------------------------------------------ files


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: bytes) -> None:
    """Write a file by three calls of the kernel, as there may be many."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(file, text)
    finally:
        os.close(file)


def _link(folder: str, name: str, scope: str, unit: str) -> None:
    target = f"/usr/lib/systemd/{scope}/{unit}"
    try:
        os.symlink(target, f"{folder}/{name}")
    except FileNotFoundError:
        os.mkdir(folder)
        os.symlink(target, f"{folder}/{name}")


def _say(line: str, place: Place) -> None:
    """Into the journal: what a user's generator says gets there, and what the
    system's does only by way of the kernel."""
    text = f"<4>qrexec-activate: {printable(line)}\n"
    if place.system:
        try:
            with open("/dev/kmsg", "w", encoding="utf-8") as kernel:
                kernel.write(text[:900])
            return
        except OSError:
            pass
    sys.stderr.write(text)
