"""A Linux user for one service, and a role and a database of the same name in
this qube's PostgreSQL.

The user can do nothing but run the service: it has no password, no shell and no
login. PostgreSQL knows it by `peer`, that is, by what the kernel says of a unix
socket's other end, so that there is no password to keep either.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
from pathlib import Path

from ..errors import ActivateError, UsageProblem
from ..systemd.programs import ROOTS_PATH, run
from .steps import Step, command

__all__ = [
    "HOMES",
    "check_database",
    "check_ours",
    "check_user",
    "database_steps",
    "home",
    "image",
    "user_steps",
]

#: Homes are not in /home, which services of the system need not see.
HOMES = Path("/var/lib/qrexec-publish")
#: What useradd takes everywhere; a name that SQL and systemd take as it is,
#: too.
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,30}", re.ASCII)
#: To the database, for one service: PostgreSQL has 100 for all, by default.
CONNECTIONS = 20
_AS_POSTGRES = ("runuser", "-u", "postgres", "--")


def home(user: str) -> Path:
    return HOMES / user


def image(user: str) -> Path:
    """Where the file system of a home lies that has one of its own; no user is
    named so."""
    return HOMES / f"{user}.disk"


def _find(user: str) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam(user)
    except KeyError:
        return None


def check_ours(user: str, file: Path) -> None:
    """Raise ActivateError unless a service's file names a user that was made
    for it, or one that is gone already.

    Whoever has edited that file does not get another user, or that one's
    database, removed by it.
    """
    entry = _find(user)
    if not _USER.fullmatch(user) or (
        entry is not None and entry.pw_dir != str(home(user))
    ):
        raise ActivateError(
            f"{file}: User={user} is no user that qrexec-activate has made:"
            f" its home is not {home(user)}"
        )


def check_user(user: str) -> None:
    """Raise UsageProblem for a name that no new user can have."""
    if not _USER.fullmatch(user):
        raise UsageProblem(
            f"--user {user!r}: a user's name is up to 31 of a-z 0-9 _ and -,"
            f" and begins with a letter"
        )
    if _find(user):
        raise UsageProblem(
            f"--user {user}: there is a Linux user {user} already, and each"
            f" service has one of its own"
        )
    for path in (home(user), image(user)):
        if os.path.lexists(path):
            raise UsageProblem(
                f"--user {user}: {path} is there already: remove it, or choose"
                f" another name"
            )


def check_database() -> None:
    """Raise UsageProblem where there is no PostgreSQL."""
    missing = [
        name
        for name in ("psql", "createuser", "createdb", "runuser")
        if not shutil.which(name, path=_path())
    ]
    if missing or not _find("postgres"):
        lacking = ", ".join(missing) or "its user postgres"
        raise UsageProblem(
            f"--database needs PostgreSQL in this qube (missing: {lacking}):"
            f" apt install postgresql"
        )


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:{ROOTS_PATH}"


def user_steps(user: str) -> list[Step]:
    words = (
        "--system",
        "--user-group",
        "--create-home",
        "--key",
        "HOME_MODE=0700",
        "--home-dir",
        str(home(user)),
    )
    add = command("useradd", *words, "--shell", "/usr/sbin/nologin", user)

    def remove() -> None:
        if _find(user):
            run("userdel", "--remove", user)
        with contextlib.suppress(OSError):
            HOMES.rmdir()

    undone = f"$ userdel --remove {user}" if _find(user) else ""
    return [Step("", _make_homes), Step(add.text, add.do, remove, undone)]


def _make_homes() -> None:
    HOMES.mkdir(exist_ok=True)
    HOMES.chmod(0o755)


def database_steps(user: str) -> list[Step]:
    quiet = "--no-password"
    return [
        command(
            *(
                *_AS_POSTGRES,
                "createuser",
                quiet,
                "--no-superuser",
                "--no-createdb",
                "--no-createrole",
                f"--connection-limit={CONNECTIONS}",
                user,
            ),
            undo=(*_AS_POSTGRES, "dropuser", quiet, "--if-exists", user),
        ),
        command(
            # Not of template1, which nobody can copy while anybody is connected
            # to it.
            *(*_AS_POSTGRES, "createdb", quiet, "--template=template0"),
            *(f"--owner={user}", user),
            undo=(
                *_AS_POSTGRES,
                "dropdb",
                quiet,
                "--if-exists",
                "--force",
                user,
            ),
        ),
        # By default every role may connect to every database.
        command(
            *(*_AS_POSTGRES, "psql", quiet, "--no-psqlrc", "--quiet"),
            *(
                "--dbname=postgres",
                f'--command=REVOKE ALL ON DATABASE "{user}" FROM PUBLIC',
            ),
        ),
        # Whether pg_hba.conf lets the user in by peer shows here, and not when
        # the service needs it.
        command(
            "runuser",
            "-u",
            user,
            "--",
            "psql",
            quiet,
            "--no-psqlrc",
            f"--dbname={user}",
            "--command=",
        ),
    ]
