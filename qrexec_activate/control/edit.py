"""qrexec-activate edit: the right file in an editor, and a look at what came
out of it before it counts."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from ..errors import ActivateError, UsageProblem
from ..routing.claim import Refusal
from ..routing.unitfile import SourceFile, address_key, assignments
from ..systemd.manager import open_manager
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from .address import obstacle, parse_address
from .dropins import finishing, locked, replace_file
from .options import complete_routes, system_option
from .select import select
from .settle import is_active, start, stop
from .survey import (
    Daemon,
    Survey,
    foresee,
    read_file,
    source_files,
    survey,
    take_survey,
)
from .table import short_path

__all__ = ["command"]

EDITORS = ("sensible-editor", "editor", "nano", "vi")


@click.command(
    "edit",
    epilog="""\b
Example:
    $ qrexec-activate edit 127.0.0.1:1234
""",
)
@click.argument("route", shell_complete=complete_routes)
@system_option
def command(route: str, system: bool) -> None:
    """Open the file of a route in $VISUAL or $EDITOR, check what comes out, and
    let systemd use it.

    ROUTE is an address, a unit, a target, a call or a file. What would be
    refused is not written: you can edit it again, or leave the file as it was.
    """
    user = not system
    path, unit = _file_of(survey(user=user), route, own_folder(user=user))
    before = read_file(path).text
    if before is None:
        raise ActivateError(f"{path} {read_file(path).problem}")
    with _draft(before, Path(path).name) as draft:
        while True:
            _edit(draft)
            after = draft.read_text(encoding="utf-8", errors="surrogateescape")
            if after == before:
                click.echo(f"{short_path(path)} is as it was", err=True)
                return
            with locked(own_folder(user=user)):
                with open_manager(user=user) as manager:
                    now = take_survey(manager)
                problems = _problems(now, unit, path, after)
                if not problems:
                    if read_file(path).text != before:
                        raise ActivateError(
                            f"somebody else has changed {path} meanwhile:"
                            f" edit it again"
                        )
                    _carry_out(now, Systemctl(user), unit, path, after)
                    return
            for problem in problems:
                click.echo(f"{short_path(path)}: {problem}", err=True)
            if not sys.stdin.isatty() or not click.confirm(
                "Edit it again?", default=True, err=True
            ):
                raise ActivateError(f"{short_path(path)} is as it was")


def _file_of(now: Survey, route: str, folder: Path) -> tuple[str, str]:
    """Find the file that is meant, and its unit: also one that opens no
    address, which check may have complained of."""
    path = Path(route).expanduser()
    for unit in now.units.values():
        if (
            str(path)
            in (*(file.path for file in unit.socket.files), *unit.unread)
            and "@." not in path.parent.name
        ):
            return _checked(str(path), unit.name, folder)
    entries = select(now.entries, [route])
    files = {(entry.file, entry.unit) for entry in entries if entry.file}
    if not files:
        raise UsageProblem(
            f"{route!r} has no file that could be edited; see systemctl cat"
            f" {entries[0].unit}"
        )
    if len(files) > 1:
        names = ", ".join(sorted({entry.listener for entry in entries}))
        raise UsageProblem(
            f"{route!r} may mean {len(files)} files: name one of {names}"
        )
    ((file, unit_name),) = files
    return _checked(file, unit_name, folder)


def _checked(path: str, unit: str, folder: Path) -> tuple[str, str]:
    if not path.startswith(f"{folder}/"):
        raise UsageProblem(
            f"{path} is not among the units in {folder}: copy it there under"
            f" the same name, and edit that"
        )
    return path, unit


@contextlib.contextmanager
def _draft(text: str, name: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="qrexec-activate-"))
    try:
        draft = folder / name
        draft.write_text(text, encoding="utf-8", errors="surrogateescape")
        yield draft
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _edit(draft: Path) -> None:
    choice = (
        os.environ.get("VISUAL")
        or os.environ.get("EDITOR")
        or next(filter(shutil.which, EDITORS), "vi")
    )
    try:
        code = subprocess.call([*shlex.split(choice), str(draft)])
    except (OSError, ValueError) as error:
        raise ActivateError(
            f"cannot start the editor {choice!r}: {error}; set EDITOR to one"
            f" that is installed"
        ) from None
    if code:
        raise ActivateError(
            f"the editor {choice!r} ended with exit code {code}: nothing is"
            f" changed"
        )


def _foreseen_files(
    now: Survey, unit: str, path: str, text: str
) -> list[SourceFile]:
    return [
        SourceFile(path, text) if one.path == path else one
        for one in source_files(unit, now.files)
    ]


def _daemon(now: Survey, unit: str) -> Daemon:
    try:
        return now.units[unit].daemon
    except KeyError:
        raise ActivateError(
            f"{unit} has gone meanwhile: see qrexec-activate list"
        ) from None


def _problems(now: Survey, unit: str, path: str, text: str) -> list[str]:
    """Say what would not work, were this the text of the file."""
    problems = []
    claims = foresee(
        _daemon(now, unit),
        unit,
        _foreseen_files(now, unit, path, text),
        now.specifiers,
    )
    others = [entry for entry in now.entries if entry.unit != unit]
    known = {
        address_key(entry.listener)
        for entry in now.entries
        if entry.unit == unit and entry.listens
    }
    for claim in claims:
        if isinstance(claim, Refusal):
            if claim.file in ("", path):
                problems.append(
                    f"{claim.address} would be refused: {claim.reason}"
                )
            continue
        if claim.file != path or address_key(claim.address) in known:
            continue
        try:
            address = parse_address(claim.address, None, now.specifiers)
        except UsageProblem as error:
            # systemd takes more than add does: a bare port, for one.
            if address_key(claim.address) is None:
                problems.append(str(error))
            continue
        if hindrance := obstacle(address, others, now.listening):
            problems.append(hindrance.words)
    says = [
        line
        for line in text.splitlines()
        if line.strip() and not line.strip().startswith(("[", "#", ";"))
    ]
    if says and next(assignments(text), None) is None:
        problems.append(
            "there is no setting in it: a unit file has lines like [Socket]"
            " and ListenStream=127.0.0.1:1234"
        )
    return problems


def _carry_out(
    now: Survey, systemctl: Systemctl, unit: str, path: str, text: str
) -> None:
    claims = foresee(
        _daemon(now, unit),
        unit,
        _foreseen_files(now, unit, path, text),
        now.specifiers,
    )
    was_active = is_active(systemctl, unit)
    with finishing():
        replace_file(Path(path), text)
        if claims:
            systemctl.daemon_reload()
            if was_active:
                start(systemctl, unit, [claim.address for claim in claims])
        else:
            stop(systemctl, unit)
    for claim in claims:
        if not isinstance(claim, Refusal) and claim.file == path:
            click.echo(
                f"{claim.address}"
                f" {'now reaches' if was_active else 'will reach'}"
                f" {claim.target}, by {claim.call}"
            )
    if not claims:
        click.echo(f"{unit} has no address left: stopped and disabled")
    elif not was_active:
        click.echo(f"Start it: {systemctl.written('enable', '--now', unit)}")
