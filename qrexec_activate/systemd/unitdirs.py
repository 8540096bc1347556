"""Where unit files lie, and what lies there: units, drop-ins, and the links
that enable units.

systemd tells what it has loaded; this tells what a person has written, also
since then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ActivateError
from ..routing.names import parse_unit_name

__all__ = ["UnitFiles", "names_in", "own_folder", "scan", "unit_words"]

_WANTS = (".wants", ".requires", ".upholds")


def own_folder(
    *, user: bool, environment: Mapping[str, str] = os.environ
) -> Path:
    """The folder for units and drop-ins of the person's own, or of the
    machine's administrator."""
    if not user:
        return Path("/etc/systemd/system")
    if config := environment.get("XDG_CONFIG_HOME"):
        return Path(config, "systemd", "user")
    if home := environment.get("HOME"):
        return Path(home, ".config", "systemd", "user")
    raise ActivateError(
        "where your units lie cannot be told: neither XDG_CONFIG_HOME nor"
        " HOME is set; log in properly"
    )


def unit_words(unit: str) -> set[str]:
    """What a person may call a socket unit, or any unit that was one: its name,
    its instance, its argument or its label."""
    name = unit.removesuffix(".socket")
    instance = name.partition("@")[2]
    argument, _, label = instance.partition(":")
    return {unit, name, instance, argument, label} - {""}


@dataclass(slots=True)
class UnitFiles:
    """What lies in systemd's search path, folders that win first."""

    #: Unit name → the path of its file; what another folder has by the same
    #: name is hidden.
    fragments: dict[str, str] = field(default_factory=dict)
    #: Unit name → all paths of its file, the one that wins first.
    all_fragments: dict[str, list[str]] = field(default_factory=dict)
    #: Unit name (or template) → folders of drop-ins, those that win first.
    folders: dict[str, list[str]] = field(default_factory=dict)
    #: Unit name → "enabled", or "enabled-runtime" where that ends with the
    #: session.
    enabled: dict[str, str] = field(default_factory=dict)
    #: Folder of drop-ins → what lies in it, once somebody has asked.
    _names: dict[str, list[str]] = field(default_factory=dict)

    def names_in(self, folder: str) -> list[str]:
        """What lay in a folder of drop-ins when it was first asked for."""
        if folder not in self._names:
            self._names[folder] = names_in(folder)
        return self._names[folder]

    def drop_ins(self, unit: str) -> list[str]:
        """Return the drop-ins of a unit, in the order in which systemd would
        apply them."""
        return [path for path in self.called_conf(unit) if os.path.isfile(path)]

    def called_conf(self, unit: str) -> list[str]:
        """Return all that has the name of a drop-in of a unit, whatever it
        is."""
        name = parse_unit_name(unit)
        template = f"{name.prefix}@.{name.suffix}" if name.instance else ""
        found: dict[str, str] = {}
        # A file of the unit hides one of the same name of its template, as does
        # one in a folder that wins.
        for owner in (unit, template):
            for folder in self.folders.get(owner, ()):
                for file in self.names_in(folder):
                    if file.endswith(".conf"):
                        found.setdefault(file, f"{folder}/{file}")
        return [path for _, path in sorted(found.items())]

    def units(self, suffix: str) -> set[str]:
        """Return every unit that has a file, a drop-in or a link that enables
        it; no templates."""
        ending = f".{suffix}"
        names = {
            *self.fragments,
            *self.enabled,
            *(unit for unit in self.folders if self._has_drop_in(unit)),
        }
        return {
            name
            for name in names
            # qrexec-.socket.d holds drop-ins for all units whose names begin
            # with qrexec-; it is of no unit itself.
            if name.endswith(ending)
            and not name.endswith(f"@{ending}")
            and ("@" in name or name[-len(ending) - 1] != "-")
        }

    def _has_drop_in(self, unit: str) -> bool:
        return any(
            file.endswith(".conf")
            for folder in self.folders[unit]
            for file in self.names_in(folder)
        )


def names_in(folder: str) -> list[str]:
    """What lies in a folder, in order; nothing where that cannot be told."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def scan(
    search_path: Iterable[str],
    *,
    suffixes: tuple[str, ...] = ("socket", "service"),
) -> UnitFiles:
    """Read the folders of systemd's search path; what cannot be read is left
    out."""
    files = UnitFiles()
    endings = tuple(f".{suffix}" for suffix in suffixes)
    folder_endings = tuple(f".{suffix}.d" for suffix in suffixes)
    for folder in search_path:
        runtime = (
            folder.startswith("/run/")
            or "/systemd/transient" in folder
            or folder.endswith(("user.control", "/systemd/generator"))
        )
        for name in names_in(folder):
            path = f"{folder}/{name}"
            if name.endswith(endings):
                if len(name) > len(name.rpartition(".")[2]) + 1:
                    files.fragments.setdefault(name, path)
                    files.all_fragments.setdefault(name, []).append(path)
            elif name.endswith(folder_endings):
                files.folders.setdefault(name.removesuffix(".d"), []).append(
                    path
                )
            elif name.endswith(_WANTS):
                for unit in names_in(path):
                    if (
                        unit.endswith(endings)
                        and files.enabled.get(unit) != "enabled"
                    ):
                        files.enabled[unit] = (
                            "enabled-runtime" if runtime else "enabled"
                        )
    return files
