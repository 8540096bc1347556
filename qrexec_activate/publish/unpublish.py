"""qrexec-activate unpublish: take a name away from a socket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import click

from ..control.dropins import (
    create_file,
    file_shown,
    is_idle,
    locked,
    remove_file,
    replace_file,
    without_lines,
)
from ..control.finishing import finishing
from ..control.options import debug_option, dry_run_option
from ..control.publications import (
    Publication,
    managers,
    published,
    symlink_lines,
)
from ..control.survey import read_file
from ..control.table import short_path
from ..errors import UsageProblem
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import open_manager
from .native import native_files, native_steps
from .published import complete_names
from .services import Service, removal
from .steps import Step, audit, do_own, link_step, show, undo_all
from .steps import command as command_step

__all__ = ["command", "without_step"]


@click.command(
    "unpublish",
    epilog="""\b
Example:
    $ qrexec-activate unpublish gpg-agent-ssh
""",
)
@click.argument(
    "names",
    metavar="NAME...",
    nargs=-1,
    required=True,
    shell_complete=complete_names,
)
@click.option(
    "-y",
    "--yes",
    is_flag=True,
    help="Do not ask before a user's files and a database are deleted.",
)
@dry_run_option
@debug_option
def command(names: tuple[str, ...], yes: bool, dry_run: bool) -> None:
    """In a service qube, take away a name that publish gave: the link, and the
    line of the drop-in that makes it.

    The socket itself, its unit and open connections stay. A program that was
    published with --exec ends, and all that was made for it goes: its units,
    its name in Caddy, its Linux user with all its files, and its database.
    """
    services = {
        name: Service.read(name, for_system=False)
        or Service.read(name, for_system=True)
        for name in names
    }
    links = _links([name for name in names if services[name] is None])
    for for_system in (False, True):
        if same := [
            one
            for one in services.values()
            if one and one.for_system == for_system
        ]:
            _end(same, yes=yes, dry_run=dry_run)
    for name in services:
        if name in links:
            _take_back(links[name], dry_run=dry_run)
        if not dry_run:
            click.echo(f"{name} is not published any more")


def _links(names: list[str]) -> dict[str, Publication]:
    """What makes these names, which are no services; raises UsageProblem where
    nothing does."""
    if not names:
        return {}
    with managers() as found:
        there = {
            one.name: one
            for manager in reversed(found)
            for one in published(manager)
        }
    if unknown := [name for name in names if name not in there]:
        raise UsageProblem(
            f"{', '.join(map(repr, unknown))}"
            f" {'are' if unknown[1:] else 'is'} not published;"
            f" qrexec-activate published shows what is"
        )
    for one in (there[name] for name in names):
        if one.for_system:
            raise UsageProblem(
                f"{one.link} is the system's, and not made by publish:"
                f" take it out of {one.unit or 'what makes it'} by hand"
            )
    return {name: there[name] for name in names}


def _end(services: list[Service], *, yes: bool, dry_run: bool) -> None:
    one = services[0]
    if dry_run:
        show(step.undone for step in reversed(removal(services)))
        return
    if one.for_system and os.geteuid() != 0:
        raise UsageProblem(
            f"{one.name} belongs to the system: sudo qrexec-activate"
            f" unpublish {one.name}"
        )
    if one.for_system and not yes:
        what = ", ".join(
            f"{one.user} with all its files"
            + " and its database" * one.database
            for one in services
        )
        click.confirm(
            f"This deletes the Linux user {what}. Go on?", abort=True, err=True
        )
    files = [
        file
        for service in services
        for file in (*service.files(), *service.drop_ins())
    ] + [
        file
        for service in services
        if service.native and native_steps(service.name, service.address)
        for file in native_files(service.name)
    ]
    with contextlib.ExitStack() as acts, locked(one.folder), finishing():
        for service in services:
            what = service.about
            acts.enter_context(
                audit(
                    f"unpublishing {what}",
                    done=f"unpublished {what}",
                    QREXEC_NAME=service.name,
                )
            )
        undo_all(removal(services))
    for file in files:
        click.echo(f"Removed: {short_path(str(file))}")


def _take_back(one: Publication, *, dry_run: bool) -> None:
    with open_manager(user=True) as manager:
        specifiers = manager.specifiers()
    name = one.name
    link = Path(one.link)
    if os.path.lexists(link) and not link.is_symlink():
        raise UsageProblem(
            f"{link} is a socket itself, and no link: it goes when"
            f" {one.unit or 'its program'} ends"
        )
    steps, said = [], ""
    if one.file:
        step, said = without_step(one, specifiers)
        steps.append(step)
    if os.path.lexists(link):
        away = link_step(link, "")
        steps.append(Step(away.undone, away.undo))
    if one.file:
        steps.append(command_step(*Systemctl(user=True).words, "daemon-reload"))
    if dry_run:
        show(step.text for step in steps)
        return
    do_own(steps, name, f"unpublishing {name}", f"unpublished {name}")
    if said:
        click.echo(said)


def without_step(
    one: Publication, specifiers: Mapping[str, str]
) -> tuple[Step, str]:
    """What takes a name out of the file that makes it, and what to say of
    it."""
    if not one.file.startswith(f"{own_folder(user=True)}/"):
        raise UsageProblem(
            f"{one.file}, which makes {one.name}, is not among your own"
            f" units: hide it there with"
            " an empty file of the same name"
        )
    path = Path(one.file)
    lines = symlink_lines(one.file, one.unit, one.link, specifiers)
    before = read_file(one.file).text or ""
    text = without_lines(before, lines)
    if is_idle(text) and ".d/" in one.file:
        return (
            Step(
                file_shown(path, None),
                lambda: remove_file(path),
                lambda: create_file(path, before),
            ),
            f"Removed: {short_path(one.file)}",
        )
    return (
        Step(
            file_shown(path, text),
            lambda: replace_file(path, text),
            lambda: replace_file(path, before),
        ),
        f"Changed: {short_path(one.file)}",
    )
