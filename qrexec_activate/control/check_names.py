"""The steps of `check` about near misses: names of qubes, files and folders
that were most likely meant to be others."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import BadName
from ..given.escapes import escape_instance
from ..given.kinds import KINDS
from ..routing.names import check_argument, decode_escapes, parse_unit_name
from ..routing.unitfile import assignments
from ..systemd.unitdirs import names_in, own_folder
from .daemons import declared_daemon, read_file
from .steps import (
    PROGRAM_TIMEOUT,
    Context,
    Level,
    Step,
    joined,
    set_aside,
    sudo,
)

__all__ = ["strays", "targets"]

#: Names that are so similar are most likely one name and a slip.
SIMILAR = 0.8
#: What is a name of a qube, and was most likely meant as a keyword.
KEYWORDS = {"default": "@default", "dispvm": "@dispvm"}
#: Files that a person has put aside, or an editor or a package manager keeps.
_ASIDE = re.compile(
    r"\.(off|bak|old|orig|save|disabled|sw.|tmp|rpm\w+|dpkg-\w+)$|~$"
)


# ---------------------------------------------------------------------- qubes


def targets(context: Context) -> Iterator[Step]:
    """Qubes that are misspelt: qrexec takes a name that it does not know for
    @default, without a word."""
    used = Counter(
        entry.target
        for entry in context.now.entries
        if entry.target and not entry.target.startswith("@")
    )
    if not used:
        return
    suspects = False
    known = _known_qubes()
    reached = {
        record.fields.get("QREXEC_TARGET")
        for record in context.calls
        if record.fields.get("ESTABLISHED") == "1"
    }
    for target in sorted(used):
        if known and target not in known and target != "dom0":
            level = Level.ERROR
            close = difflib.get_close_matches(target, known, 1)
            hint = f"; there is {close[0]}" if close else ""
            text = (
                f"there is no qube {target}{hint}: qrexec would take it for"
                f" @default"
            )
        elif not known and target in KEYWORDS and target not in reached:
            level = Level.WARNING
            text = (
                f"{target} is the name of a qube; if dom0 is to choose, write"
                f" {KEYWORDS[target]}"
            )
        elif (
            not known
            and target not in reached
            and (likely := likely_target(target, used))
        ):
            level = Level.WARNING
            text = (
                f"{target} looks like {likely}: if there is no such qube,"
                f" qrexec takes it for @default"
            )
        else:
            continue
        suspects = True
        entry = next(e for e in context.now.entries if e.target == target)
        mend = context.edit(entry.unit, entry.file)
        yield Step("routes", level, text, *mend)
    if not suspects:
        whom = (
            "dom0 knows all targets"
            if known
            else "no target looks misspelt (only dom0 knows all names)"
        )
        yield Step("routes", Level.OK, f"{whom}: {', '.join(sorted(used))}")


def likely_target(target: str, used: Counter[str]) -> str:
    """A name that is used at least as often, and so similar that this one may
    be a slip; empty if there is none. Of two that are used as often, the later
    in the alphabet is the slip, and the one with capitals."""
    for other, count in used.most_common():
        if other == target or count < used[target]:
            continue
        # work-1 and work-2 are two qubes; gitweb and gitwb are one.
        if re.sub(r"\d", "0", other) == re.sub(r"\d", "0", target):
            continue
        if other.lower() == target.lower():
            if (count, other) > (used[target], target):
                return other
            continue
        if count == used[target] and (
            other > target or not _differ_by_a_slip(other, target)
        ):
            continue
        if (
            difflib.SequenceMatcher(None, other.lower(), target.lower()).ratio()
            >= SIMILAR
        ):
            return other
    return ""


def _differ_by_a_slip(one: str, other: str) -> bool:
    """Whether two names differ in one long word only: dev-mail and dev-mall
    do, mail-a and mail-b do not, nor do work and work-web."""
    words = [re.split(r"[-_.\d]+", name) for name in (one, other)]
    pairs = [pair for pair in zip(*words, strict=False) if pair[0] != pair[1]]
    return (
        len(words[0]) == len(words[1])
        and len(pairs) == 1
        and min(map(len, pairs[0])) > 3
        and abs(len(one) - len(other)) <= 1
    )


def _known_qubes() -> set[str]:
    """All qubes, where this one may ask for them, as a management qube may;
    else none."""
    if not shutil.which("qvm-ls"):
        return set()
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        result = subprocess.run(
            ["qvm-ls", "--raw-list"],
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT,
            check=True,
        )
        return set(result.stdout.split())
    return set()


# ------------------------------------------------------------ files and folders


def strays(context: Context) -> Iterator[Step]:
    """Files that declare a route where systemd does not look for them."""
    yield from _files(context)
    yield from _loose_files(context)
    yield from _no_folders(context)
    yield from _folders(context)


def _files(context: Context) -> Iterator[Step]:
    """Files in a folder of drop-ins that are not called .conf."""
    for unit, folders in sorted(context.now.files.folders.items()):
        if not unit.endswith(".socket") or not _is_ours(context, unit):
            continue
        for path in (
            Path(one, name)
            for one in folders
            for name in context.now.files.names_in(one)
            if os.path.splitext(name)[1] != ".conf"
        ):
            if not _declares(path):
                continue
            new = path.with_name(f"{path.name.partition('.')[0]}.conf")
            yield Step(
                "routes",
                Level.ERROR,
                f"{path} opens an address, but systemd reads only what ends in"
                f" .conf",
                joined(
                    sudo(
                        shlex.join(["mv", "-n", *map(str, (path, new))]),
                        str(path),
                    ),
                    context.start_again(unit),
                ),
            )


def _loose_files(context: Context) -> Iterator[Step]:
    """Drop-ins that lie among the units, and not in the folder of one."""
    top = own_folder(user=context.now.user)
    prefixes = _prefixes(context)
    for path in (top / name for name in names_in(str(top))):
        if path.suffix != ".conf" or not _declares(path):
            continue
        folder = f"{path.name.removesuffix('.conf').removesuffix('.d')}.d"
        unit = ""
        with contextlib.suppress(BadName):
            unit = meant_unit(folder, prefixes)
        if not unit and _is_ours(context, folder[:-2]):
            unit = folder[:-2]
        text = f"{path} opens an address, but lies in no folder of a unit"
        if not unit:
            yield Step(
                "routes",
                Level.ERROR,
                text,
                advice="move it into the folder of its unit, such as"
                f" {top}/qrexec-connect-tcp@1234.socket.d, then"
                f" {context.reload()}",
            )
            continue
        right = f"{top}/{unit}.d"
        words = ["mv", "-n", str(path), right]
        yield Step(
            "routes",
            Level.ERROR,
            text,
            joined(
                sudo(shlex.join(["mkdir", "-p", right]), str(path)),
                sudo(shlex.join(words), str(path)),
                context.start_again(unit),
            ),
        )


def _no_folders(context: Context) -> Iterator[Step]:
    """Files that are called as a folder of drop-ins is, links to nothing, and
    such folders that nobody can look into."""
    top = own_folder(user=context.now.user)
    for path in (top, *top.parents):
        if os.path.lexists(path) and not path.is_dir():
            yield Step(
                "routes",
                Level.ERROR,
                f"{path} is {_what_it_is(path)}, so nothing of yours is found"
                f" in {top}",
                advice=f"put the folder back where {path} should lead, then"
                f" {context.reload()}",
            )
    for unit, paths in sorted(context.now.files.folders.items()):
        if not unit.endswith(".socket") or not _is_ours(context, unit):
            continue
        for path in map(Path, paths):
            if path.is_file():
                yield _no_folder(context, unit, path)
            elif path.is_symlink() and not path.exists():
                yield Step(
                    "routes",
                    Level.ERROR,
                    f"{path} is {_what_it_is(path)}",
                    joined(
                        sudo(shlex.join(["rm", str(path)]), str(path)),
                        context.reload(),
                    ),
                )
            elif path.exists() and not os.access(path, os.R_OK | os.X_OK):
                mine = path.stat().st_uid == os.geteuid()
                words = ["chmod", "u+rwx" if mine else "a+rx", str(path)]
                command = shlex.join(words)
                yield Step(
                    "routes",
                    Level.ERROR,
                    f"{path} cannot be read, so what is in it is not known",
                    joined(
                        command if mine else sudo(command),
                        context.start_again(unit),
                    ),
                )


def _what_it_is(path: Path) -> str:
    return "a link to nothing" if path.is_symlink() else "no folder"


def _no_folder(context: Context, unit: str, path: Path) -> Step:
    text = f"{path} is a file, and should be a folder with files in it"
    if not _declares(path):
        mend = joined(set_aside(str(path)), context.reload())
        return Step("routes", Level.ERROR, text, mend)
    drop_in = path.with_name(f"{path.name}.conf")
    commands = (
        ["mv", "-n", str(path), str(drop_in)],
        ["mkdir", str(path)],
        ["mv", str(drop_in), f"{path}/route.conf"],
    )
    return Step(
        "routes",
        Level.ERROR,
        f"{text}, such as route.conf",
        joined(
            *(sudo(shlex.join(words), str(path)) for words in commands),
            context.start_again(unit),
        ),
    )


def _folders(context: Context) -> Iterator[Step]:
    """Folders of drop-ins whose name is a little wrong."""
    top = own_folder(user=context.now.user)
    prefixes = _prefixes(context)
    for name in names_in(str(top)):
        folder = top / name
        if not name.endswith(".d") or _is_ours(context, name[:-2]):
            continue
        if not any(_declares(folder / one) for one in names_in(str(folder))):
            continue
        try:
            unit = meant_unit(name, prefixes)
            if not unit:
                continue
            _check(unit, context)
        except BadName as error:
            yield Step(
                "routes",
                Level.ERROR,
                f"{folder} opens an address, but is of no unit: {error}",
                advice="give it the name of a unit, such as"
                f" qrexec-connect-tcp@1234.socket.d, then {context.reload()}",
            )
            continue
        right = top / f"{unit}.d"
        if right.exists():
            move = joined(
                f"mv -n {shlex.quote(str(folder))}/* {shlex.quote(str(right))}",
                shlex.join(["rmdir", str(folder)]),
            )
        else:
            move = shlex.join(["mv", str(folder), str(right)])
        yield Step(
            "routes",
            Level.ERROR,
            f"{folder} opens an address, but is of no unit: it should be called"
            f" {unit}.d",
            joined(sudo(move, str(folder)), context.start_again(unit)),
        )


def _prefixes(context: Context) -> set[str]:
    return {
        parse_unit_name(unit).prefix
        for unit in context.now.files.fragments
        if unit.endswith("@.socket") and _is_ours(context, unit)
    }


def meant_unit(folder: str, prefixes: Iterable[str]) -> str:
    """The socket unit that a folder of drop-ins was most likely meant for;
    empty if none, and BadName where it would have a name that cannot be."""
    known = {prefix: prefix for prefix in prefixes} | {
        kind: prefix for kind, prefix in KINDS.items() if prefix in prefixes
    }
    stem = re.sub(r"\.[A-Za-z]*$", "", folder.removesuffix(".d"))
    prefix, at, instance = stem.partition("@")
    if not at:
        for one in sorted(known, key=len, reverse=True):
            if stem.startswith(one) and stem[len(one) :][:1] in ("-", "_", "."):
                prefix, instance = one, stem[len(one) + 1 :]
                break
    close = difflib.get_close_matches(prefix, known, 1)
    if not close or not instance:
        return ""
    unit = f"{known[close[0]]}@{instance}.socket"
    try:
        parse_unit_name(unit)
    except BadName:
        argument, _, label = map(decode_escapes, instance.partition(":"))
        unit = f"{known[close[0]]}@{escape_instance(argument, label)}.socket"
        parse_unit_name(unit)
    return "" if f"{unit}.d" == folder else unit


def _check(unit: str, context: Context) -> None:
    """Raise BadName where a unit would have an argument that it cannot."""
    daemon = declared_daemon(unit, context.now.files)
    if daemon and daemon.argument is None:
        argument = decode_escapes(parse_unit_name(unit).argument)
        check_argument(daemon.service, argument)


def _is_ours(context: Context, unit: str) -> bool:
    if unit in context.now.units:
        return True
    try:
        return (
            unit.endswith(".socket")
            and declared_daemon(unit, context.now.files) is not None
        )
    except BadName:
        return False


def _declares(path: Path) -> bool:
    """Whether a file that nobody has put aside opens an address for a qube."""
    if path.name.startswith(".") or _ASIDE.search(path.name):
        return False
    keys = {
        one.key
        for one in assignments(read_file(str(path)).text or "")
        if one.section == "Socket"
    }
    return {"ListenStream", "FileDescriptorName"} <= keys
