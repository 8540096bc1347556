"""qrexec-activate publish: give a socket of this qube a name that other qubes
can call."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path
from typing import Any

import click

from ..control.dropins import locked
from ..control.finishing import finishing
from ..control.netproc import listening
from ..control.options import (
    complete_files,
    complete_units,
    debug_option,
    dry_run_option,
)
from ..control.persistence import warn_of_loss
from ..control.policy import FILE as POLICY_FILE
from ..control.policy import this_qube
from ..control.publications import (
    FOLDER,
    RPC,
    Publication,
    check_name,
    folder,
    is_service,
    managers,
    published,
    socket_path,
    where_installed,
)
from ..control.rule import policy_line
from ..control.table import short_path
from ..errors import UsageProblem
from ..routing.names import parse_unit_name
from ..systemd.systemctl import Systemctl
from ..systemd.unitdirs import own_folder
from ..systemd.units import Manager, open_manager
from .caddy import known_routes
from .change import alteration, check_change, touched
from .details import MEMORY, TASKS, details
from .disk import parse_disk
from .native import native_files
from .services import Service, creation, domain_step
from .steps import (
    Step,
    audit,
    do_all,
    do_own,
    file_step,
    link_step,
    relink_step,
    show,
)
from .steps import command as command_step
from .unpublish import without_step

__all__ = ["command"]

CLIENT_QUBE = "CLIENT-QUBE"
DEFAULT_IDLE = "5min"


@click.command(
    "publish",
    epilog="""\b
Examples:
    $ qrexec-activate publish gpg-agent-ssh --unit gpg-agent-ssh.socket
    $ qrexec-activate publish notes --unix /run/user/1000/notes.sock
    $ qrexec-activate publish wiki --port 8000 --idle 5min \\
          --exec "python3 -m http.server --bind 127.0.0.1 --directory wiki 8000"
""",
)
@click.argument("name")
@click.option(
    "--unit",
    metavar="NAME.socket",
    help="The socket of this unit, from now on.",
    shell_complete=complete_units,
)
@click.option(
    "--unix",
    "path",
    metavar="PATH",
    shell_complete=complete_files,
    help="The socket of this path, until you log out.",
)
@click.option(
    "--exec",
    "program",
    metavar="COMMAND",
    help="A program that runs while other qubes use it.",
)
@click.option(
    "--port",
    type=int,
    help="With --exec: it listens on this port of 127.0.0.1 by itself.",
)
@click.option(
    "--idle",
    metavar="TIME",
    help="With --exec: it is ended after so long without a connection. [5min]",
)
@click.option(
    "--user",
    metavar="USER",
    help="With --exec: make a Linux user for it, and units of the system (as"
    " root).",
)
@click.option(
    "--database",
    is_flag=True,
    help="With --user: make a PostgreSQL role and database of the user's name.",
)
@click.option(
    "--network",
    is_flag=True,
    help="With --exec: it has this qube's network; without, it has none.",
)
@click.option(
    "--native",
    is_flag=True,
    help="With --user: qrexec itself connects callers, as root, and no program"
    " runs between.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help=f"With --exec: it gets no more than this. [{MEMORY}]",
)
@click.option(
    "--tasks",
    metavar="NUMBER",
    type=click.IntRange(1),
    help=f"With --exec: so many processes and threads at most. [{TASKS}]",
)
@click.option(
    "--cpu",
    metavar="PERCENT",
    help="With --exec: so much of one processor at most, like 50%.",
)
@click.option(
    "--disk",
    metavar="SIZE",
    help="With --user: its files get no more than this, which is set aside for"
    " them.",
)
@click.option(
    "--env",
    metavar="KEY=VALUE",
    multiple=True,
    help="With --exec: a variable of its environment; any number of these.",
)
@click.option(
    "--env-file",
    metavar="PATH",
    shell_complete=complete_files,
    help="With --exec: more of them, a KEY=VALUE on each line.",
)
@click.option(
    "--credential",
    metavar="PATH",
    multiple=True,
    shell_complete=complete_files,
    help="With --user: a file that it finds in $CREDENTIALS_DIRECTORY.",
)
@click.option(
    "--working-directory",
    metavar="PATH",
    shell_complete=complete_files,
    help="With --exec: the folder in which it runs.",
)
@click.option(
    "--domain",
    metavar="HOST",
    help="With --exec: Caddy, which runs in this qube, offers it by this name.",
)
@click.option(
    "--count",
    type=click.IntRange(1, 1000),
    help="With --exec: so many at once, for a trial: NAME-1 and so on.",
)
@click.option(
    "-y",
    "--yes",
    is_flag=True,
    help="Do not ask before a database is deleted.",
)
@dry_run_option
@debug_option
def command(
    name: str,
    unit: str | None,
    path: str | None,
    program: str | None,
    count: int | None,
    yes: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """In a service qube, let other qubes reach a unix socket by
    qubes.ConnectUnix+NAME.

    With --unit, a drop-in with Symlinks= makes the name whenever the socket
    unit starts. With --unix, it is a symbolic link, and gone with the folder
    when you log out.

    With --exec, systemd holds the socket, and starts COMMAND with the first
    connection. COMMAND is split into words as by a shell, but no shell runs it.
    It is passed the socket (LISTEN_FDS), and with --idle ended when nobody uses
    it; without, it ends by itself. With --port or --unix it opens that address
    itself, and is ended when nobody uses it. {name}, {number} and {port} stand
    for those of each of --count services. --domain alone gives Caddy once more
    what it has forgotten.

    Said again with other words, it changes what differs: a name leads elsewhere
    from then on, and what --exec has started ends as soon as nobody is
    connected to it. A database that is not wanted any more is
    deleted, after asking.
    """
    check_name(name)
    if program is not None:
        if unit is not None or (
            options["port"] is not None and path is not None
        ):
            raise UsageProblem(
                "with --exec give one of --port and --unix, or neither; and"
                " no --unit"
            )
        if options["database"] and not options["user"]:
            raise UsageProblem(
                "--database needs --user: PostgreSQL tells by the Linux user"
                " who is who"
            )
        _publish_services(
            _services(name, program, path or "", count, **options),
            yes=yes,
            dry_run=dry_run,
        )
        return
    if (domain := options.pop("domain")) and not (
        unit or path or count or any(options.values())
    ):
        _put_back_domain(name, domain, dry_run=dry_run)
        return
    if (
        domain
        or count
        or any(value not in (None, False, ()) for value in options.values())
    ):
        raise UsageProblem(
            "--port, --idle, --user, --database, --network, --native, --domain,"
            " --count and what a program is given, or may use, are for --exec"
        )
    if (unit is None) == (path is None):
        raise UsageProblem(
            "give either --unit NAME.socket or --unix PATH, or a program by"
            " --exec COMMAND"
        )
    socket = unit and unit.removesuffix(".socket") + ".socket"
    link = folder() / name
    before = os.readlink(link) if link.is_symlink() else ""
    steps, notes = (
        _unit_steps(name, socket) if socket else _path_steps(name, path or "")
    )
    if dry_run:
        show(step.text for step in steps)
        return
    do_own(
        steps, name, f"publishing {name}", f"published {name}: {unit or path}"
    )
    for note in notes:
        click.echo(note)
    if before and before != (os.readlink(link) if link.is_symlink() else ""):
        click.echo(f"{name} led to {before} before")
    _report(name)


def _put_back_domain(name: str, domain: str, *, dry_run: bool) -> None:
    """Give Caddy a service's name once more: it forgets it when it is started
    or reloaded."""
    root = os.geteuid() == 0
    service = Service.read(name, for_system=root) or Service.read(
        name, for_system=not root
    )
    if service is None or service.domain != domain:
        raise UsageProblem(
            f"--domain {domain}: {name} was not published with that; give it"
            f" with the --exec of {name}, and all else that it is to have"
        )
    known = service.socket_unit in known_routes()
    steps = [] if known else [domain_step(service)]
    if dry_run:
        show(step.text for step in steps)
        return
    with audit(
        f"offering {domain}",
        done=f"{domain} in Caddy leads to {name} again",
        QREXEC_NAME=name,
    ):
        do_all(steps)
    click.echo(f"{domain} in Caddy leads to {name}")


def _services(
    name: str,
    program: str,
    path: str,
    count: int | None,
    *,
    port: int | None,
    idle: str | None,
    user: str | None,
    database: bool,
    network: bool,
    native: bool,
    domain: str | None,
    disk: str | None,
    **given: Any,
) -> list[Service]:
    """One service, or as many as are wanted, each with a name, address, user
    and domain of its own."""
    given["memory"] = given["memory"] or MEMORY
    given["tasks"] = given["tasks"] or TASKS
    more = tuple(details(**given, user=user))
    listens_itself = port is not None or bool(path)
    services = []
    for number in range(1, (count or 1) + 1):
        one = f"-{number}" if count else ""
        its_port = None if port is None else port + number - 1
        words = {
            "{name}": f"{name}{one}",
            "{number}": str(number),
            "{port}": str(its_port or ""),
        }
        services.append(
            Service(
                name=check_name(f"{name}{one}"),
                command=_filled(program, words),
                idle=idle or (DEFAULT_IDLE if listens_itself else ""),
                port=its_port,
                path=_filled(path, words),
                user=f"{user}{one}" if user else "",
                database=database,
                network=network,
                native=native,
                disk=parse_disk(disk) if disk else 0,
                more=more,
                domain=f"{number}.{domain}"
                if domain and count
                else domain or "",
            )
        )
    if len({service.path for service in services}) < len(services) and path:
        raise UsageProblem(
            "with --count, --unix must hold {name} or {number}: each program"
            " listens for itself"
        )
    if count and port is not None and "{port}" not in program:
        raise UsageProblem(
            "with --count and --port, --exec must hold {port}: each program"
            " listens on a port of its own"
        )
    return services


def _filled(text: str, words: dict[str, str]) -> str:
    for placeholder, word in words.items():
        text = text.replace(placeholder, word)
    return text


def _publish_services(
    services: list[Service], *, yes: bool, dry_run: bool
) -> None:
    """Make them, or make what is there under their names as they are to be, all
    of it or nothing."""
    one = services[0]
    if not dry_run and one.for_system and os.geteuid() != 0:
        raise UsageProblem("--user needs root: say the same with sudo")
    there = _there(services)
    pairs = [(there[new.name], new) for new in services if new.name in there]
    for before, after in pairs:
        check_change(before, after)
    made = [new for new in services if new.name not in there]
    steps = (creation(made) if made else []) + alteration(pairs)
    changed = {after.name: touched(before, after) for before, after in pairs}
    for name in (name for name, files in changed.items() if not files):
        click.echo(f"{name} is published so already: nothing changed")
    if not steps:
        return
    warn_of_loss(one.folder, *([Path("/etc/passwd")] if one.for_system else []))
    if dry_run:
        show(step.text for step in steps)
        return
    _ask_for_databases(pairs, yes=yes)
    acts = [("publishing", "published", new) for new in made]
    acts += [
        ("changing", "changed", after)
        for _, after in pairs
        if changed[after.name]
    ]
    with contextlib.ExitStack() as stack, locked(one.folder), finishing():
        for doing, done, service in acts:
            what = service.about
            stack.enter_context(
                audit(
                    f"{doing} {what}",
                    done=f"{done} {what}",
                    QREXEC_NAME=service.name,
                )
            )
        do_all(steps)
    for _, done, service in acts:
        click.echo(
            f"{RPC}+{service.name} starts {service.command}"
            + " from now on" * (done == "changed")
        )
        files = changed.get(service.name) or dict.fromkeys(
            service.files(), ("", "made")
        )
        for file, (old, new) in files.items():
            act = "Changed" if old and new else "File" if new else "Removed"
            click.echo(f"{act}: {short_path(str(file))}")
        if service.native:
            click.echo(
                f"{native_files(service.name)[1]} leads qrexec to its socket:"
                f" who connects is root, whatever dom0 says of force-user"
            )
    if made:
        _report_policy([service.name for service in made])


def _there(services: list[Service]) -> dict[str, Service]:
    """Those that are published already, as they are; raises UsageProblem where
    something else has the name."""
    units = {new.name: new.socket_unit for new in services}
    with managers() as found:
        taken = [
            there.name
            for manager in found
            for there in published(manager)
            if units.get(there.name, there.unit) != there.unit
        ]
    found_there = {}
    for new in services:
        if before := Service.read(new.name, for_system=new.for_system):
            found_there[new.name] = before
        elif other := Service.read(new.name, for_system=not new.for_system):
            check_change(other, new)
    if taken:
        raise UsageProblem(
            f"{min(taken)} is published already: qrexec-activate unpublish it"
            f" first"
        )
    return found_there


def _ask_for_databases(
    pairs: list[tuple[Service, Service]], *, yes: bool
) -> None:
    ended = [
        before.user
        for before, after in pairs
        if before.database and not after.database
    ]
    if ended and not yes:
        click.confirm(
            f"This deletes the database {', '.join(ended)}. Go on?",
            abort=True,
            err=True,
        )


def _unit_steps(name: str, unit: str) -> tuple[list[Step], list[str]]:
    """What makes the name by a drop-in of the unit, in place of what makes it
    now, and what to say of it."""
    parse_unit_name(unit)
    drop_in = own_folder(user=True) / f"{unit}.d" / f"qrexec-{name}.conf"
    with open_manager(user=True) as manager:
        (row,) = manager.unit_properties(
            [unit], "Unit", ["LoadState", "ActiveState"]
        )
        if row["LoadState"] != "loaded":
            raise UsageProblem(
                f"systemd has no {unit} that it can start: see systemctl"
                f" --user status {unit}"
            )
        (socket,) = manager.unit_properties([unit], "Socket", ["Listen"])
        target = socket_path(socket, unit)
        before = _before(name, manager)
        steps, notes = _away_steps(before, manager, stays=unit)
    if before and before.unit == unit and before.file:
        click.echo(f"{short_path(before.file)} makes it already", err=True)
        drop_in = Path(before.file)
    warn_of_loss(drop_in)
    notes.append(f"File: {short_path(str(drop_in))}")
    if not drop_in.exists():
        text = f"[Socket]\nSymlinks={FOLDER}/{name}\n"
        steps.append(file_step(drop_in, text))
    steps.append(_reload())
    link = folder() / name
    if row["ActiveState"] == "active":
        # systemd makes the link when the socket starts, but does not start it
        # again while its service runs.
        steps += _link_steps(link, target)
    else:
        if os.path.lexists(link) and _target(link) != target:
            # systemd makes none where there is one.
            gone = link_step(link, _target(link))
            steps.append(Step(gone.undone, gone.undo, gone.do))
        notes.append(
            f"It comes when the socket starts: systemctl --user enable --now"
            f" {unit}"
        )
    return steps, notes


def _path_steps(name: str, path: str) -> tuple[list[Step], list[str]]:
    """What makes the name a link to this path, in place of what makes it now,
    and what to say of it."""
    target = os.path.abspath(path)
    if not os.path.isabs(path):
        raise UsageProblem(f"{path!r} is no path from / on: give {target}")
    if os.path.exists(target) and not stat.S_ISSOCK(os.stat(target).st_mode):
        raise UsageProblem(
            f"{target} is no socket: --unix takes one that a program listens on"
        )
    with open_manager(user=True) as manager:
        before = _before(name, manager)
        steps, notes = _away_steps(before, manager)
    steps += [_reload()] * bool(steps)
    steps += _link_steps(folder() / name, target)
    if (
        os.path.exists(target)
        and listening().holds(os.path.realpath(target)) is not True
    ):
        click.echo(f"Nobody listens on {target} yet", err=True)
    elif not os.path.exists(target):
        click.echo(f"{target} is not there yet", err=True)
    return steps, notes


def _before(name: str, manager: Manager) -> Publication | None:
    """What has the name now; raises UsageProblem for a program that was
    published with it."""
    one = next((one for one in published(manager) if one.name == name), None)
    if one is not None and is_service(one.unit):
        raise UsageProblem(
            f"{name} is published already, with a program: qrexec-activate"
            f" unpublish {name} first"
        )
    return one


def _away_steps(
    before: Publication | None, manager: Manager, *, stays: str = ""
) -> tuple[list[Step], list[str]]:
    """What keeps another unit than the one that stays from making the name, and
    what to say of it."""
    if before is None or not before.unit or before.unit == stays:
        return [], []
    step, said = without_step(before, manager.specifiers())
    return [step], [said]


def _reload() -> Step:
    return command_step(*Systemctl(user=True).words, "daemon-reload")


def _link_steps(link: Path, target: str) -> list[Step]:
    """What makes a symbolic link, or lets it lead elsewhere; raises
    UsageProblem where something else has its name."""
    if not os.path.lexists(link):
        return [link_step(link, target)]
    if _target(link) == target:
        return []
    return [relink_step(link, _target(link), target)]


def _target(link: Path) -> str:
    if not link.is_symlink():
        raise UsageProblem(
            f"{link} is there already, and no symbolic link: remove it first"
        )
    return os.readlink(link)


def _report(name: str) -> None:
    with open_manager(user=True) as manager:
        one = next(
            (one for one in published(manager) if one.name == name), None
        )
    if one is not None:
        click.echo(
            f"{RPC}+{name} leads to {one.socket or 'nothing yet'}:"
            f" {'alive' if one.alive else one.problem}"
        )
    _report_policy([name])


def _report_policy(names: list[str]) -> None:
    if not where_installed(RPC):
        click.echo(
            f"{RPC} is not installed in this qube: install the package"
            f" qrexec-activate-services",
            err=True,
        )
    click.echo(
        f"In dom0, {POLICY_FILE} needs ({CLIENT_QUBE} stands for the qube"
        f" that calls):"
    )
    for name in names:
        click.echo(
            f"    {' '.join(policy_line(RPC, name, CLIENT_QUBE, this_qube()))}"
        )
