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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click

from ..errors import ActivateError, UsageProblem
from ..given.address import parse_address
from ..routing.address import address_key
from ..routing.claim import Claim, Refusal, Route
from ..routing.unitfile import SourceFile, assignments
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import open_manager
from .address import is_plain, obstacle
from .dom0 import how_to_change
from .dropins import locked
from .finishing import finishing
from .netproc import overlaps
from .options import complete_routes, dry_run_option, system_option
from .select import the_routes
from .settle import Change, carry_out, show
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

__all__ = ["checked", "command", "foreseen", "use"]

EDITORS = ("sensible-editor", "editor", "nano", "vi")


@click.command(
    "edit",
    epilog="""\b
Example:
    $ qrexec-activate edit 127.0.0.1:1234
""",
)
@click.argument("route", shell_complete=complete_routes)
@dry_run_option
@system_option
def command(route: str, dry_run: bool, system: bool) -> None:
    """Open the file of a route in $VISUAL or $EDITOR, check what comes out, and
    let systemd use it.

    ROUTE is an address, a unit, a label, a target, a call or a file. What
    would be refused is not written: you can edit it again, or leave the file as
    it was.
    """
    user = not system
    folder = own_folder(user=user)
    path, unit = _file_of(survey(user=user), route, folder)
    before = read_file(path).text
    if before is None:
        raise ActivateError(f"{path} {read_file(path).problem}")
    if not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK):
        raise ActivateError(
            f"cannot write {path}: Permission denied"
            f"{'; run it with sudo' if system else ''}"
        )
    with _draft(before, Path(path).name) as draft:
        while True:
            _edit(draft)
            after = read_file(str(draft)).text
            if after is None or not after.strip():
                raise ActivateError(
                    f"the file came back empty, so {short_path(path)} is as it"
                    f" was: qrexec-activate remove removes a route"
                )
            if after == before:
                click.echo(f"{short_path(path)} is as it was", err=True)
                return
            with contextlib.nullcontext() if dry_run else locked(folder):
                with open_manager(user=user) as manager:
                    now = take_survey(manager)
                problems = _problems(now, unit, path, after)
                if not problems:
                    if read_file(path).text != before:
                        raise ActivateError(
                            f"somebody else has changed {path} meanwhile:"
                            f" edit it again"
                        )
                    use(now, Systemctl(user), {unit: {path: after}}, dry_run)
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
            return checked(str(path), unit.name, folder)
    entries = the_routes(now, [route], all_of_them=True)
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
    return checked(file, unit_name, folder)


def checked(path: str, unit: str, folder: Path) -> tuple[str, str]:
    """Return both; raises UsageProblem where the file is not to be changed
    here."""
    if how := how_to_change(path):
        raise UsageProblem(f"{path} cannot be changed here, as {how}")
    if not path.startswith(f"{folder}/"):
        raise UsageProblem(
            f"{path} is not among the units in {folder}: copy it there under"
            f" the same name, and edit that"
        )
    return path, unit


@contextlib.contextmanager
def _draft(text: str, name: str) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="qrexec-activate-"))
    draft = folder / name
    try:
        draft.write_text(
            text, encoding="utf-8", errors="surrogateescape", newline=""
        )
        yield draft
    except ActivateError as error:
        kept = read_file(str(draft)).text
        if kept is None or kept in ("", text):
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # What a person typed is not thrown away.
        raise ActivateError(f"{error}; your text is in {draft}") from None
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
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


def foreseen(now: Survey, unit: str, texts: Mapping[str, str]) -> list[Claim]:
    """Foresee the claims of a unit once these files have these texts."""
    files = [
        SourceFile(one.path, texts[one.path]) if one.path in texts else one
        for one in source_files(unit, now.files)
    ]
    return foresee(_daemon(now, unit), unit, files, now.specifiers)


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
    claims = foreseen(now, unit, {path: text})
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
        key = address_key(claim.address)
        if claim.file != path or key in known:
            continue
        # What this unit has open itself makes room when it is restarted.
        if key and any(one and overlaps(one, key) for one in known):
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
    if garbage := next(_garbage(text), None):
        problems.append(
            f"{garbage!r} is no setting: a unit file has lines like [Socket]"
            f" and ListenStream=127.0.0.1:1234"
        )
    return problems


def _garbage(text: str) -> Iterator[str]:
    """Find what systemd would pass over with no more than a line in its log:
    neither comment, section nor setting."""
    goes_on = False
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith(("#", ";")):
            continue
        if bare and not goes_on and "=" not in bare and bare[0] != "[":
            yield bare
        goes_on = bare.endswith("\\")


def use(
    now: Survey,
    systemctl: Systemctl,
    units: Mapping[str, Mapping[str, str]],
    dry_run: bool,
) -> None:
    """Give files of units other texts (unit → path → text), and let systemd use
    them; or show how that would be done.

    Only what is new in them closes a port, for as long as the unit restarts: an
    address that was not open before, or another setting than an address or a
    name.
    """
    change = Change()
    befores = {unit: foreseen(now, unit, {}) for unit in units}
    afters = {unit: foreseen(now, unit, units[unit]) for unit in units}
    for unit, texts in units.items():
        change.files |= texts
        if not afters[unit]:
            change.stop.append(unit)
            change.disable.append(unit)
        elif not _is_active(now, unit):
            continue
        elif _opens_nothing_new(now, unit, texts, afters[unit]):
            change.refresh.add(_daemon(now, unit).unit)
        else:
            change.restart.append(unit)
            change.wanted[unit] = [claim.address for claim in afters[unit]]
            change.before |= {
                claim.address: claim.target
                for claim in befores[unit]
                if isinstance(claim, Route)
            }
    if dry_run:
        show(change, systemctl)
        return
    with finishing():
        carry_out(change, systemctl)
    for unit in units:
        active = _is_active(now, unit)
        dead = _daemon(now, unit).dead
        _report(unit, befores[unit], afters[unit], active, dead, systemctl)


def _is_active(now: Survey, unit: str) -> bool:
    return now.units[unit].active in ("active", "activating", "reloading")


def _opens_nothing_new(
    now: Survey, unit: str, texts: Mapping[str, str], after: Sequence[Claim]
) -> bool:
    opened = {
        address_key(entry.listener)
        for entry in now.entries
        if entry.unit == unit and entry.listens is not False
    }
    return all(
        address_key(claim.address) in opened and is_plain(claim.address)
        for claim in after
    ) and all(
        _rest(text) == _rest(read_file(path).text or "")
        for path, text in texts.items()
    )


def _rest(text: str) -> list[tuple[str, str, str]]:
    """All that a file says but which addresses reach which qubes."""
    return [
        (one.section, one.key, one.value)
        for one in assignments(text)
        if (one.section, one.key)
        not in (("Socket", "FileDescriptorName"), ("Socket", "ListenStream"))
    ]


def _report(
    unit: str,
    before: Sequence[Claim],
    after: Sequence[Claim],
    active: bool,
    dead: str,
    systemctl: Systemctl,
) -> None:
    had = {one.address: one for one in before if isinstance(one, Route)}
    have = {one.address: one for one in after if isinstance(one, Route)}
    for address, route in had.items():
        if address not in have:
            click.echo(f"{address} does not reach {route.target} any more")
    for address, route in have.items():
        old = had.get(address)
        if old is None or (old.target, old.call) != (route.target, route.call):
            click.echo(
                f"{address}"
                f" {'now reaches' if active and not dead else 'will reach'}"
                f" {route.target}, by {route.call}"
            )
    if not after:
        click.echo(f"{unit} has no address left: stopped and disabled")
    elif not active:
        click.echo(f"Start it: {systemctl.written('enable', '--now', unit)}")
    if after and dead:
        click.echo(f"Now it reaches nobody: {dead}", err=True)
