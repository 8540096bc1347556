"""PostgreSQL: the kernel and the policy decide who is which role, by unix
socket and TCP; a million rows pass."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe import Qube, Recipe, listens, require, until

ROWS = 1_000_000
POOL = 20
NEEDS_ROOT = "PostgreSQL and each client qube have a Linux user of their own"
#: A pool of the usual kind: all connections open at once, each used from a
#: thread of its own.
USE_POOL = f"""
import threading
import psycopg2.pool
pool = psycopg2.pool.ThreadedConnectionPool({POOL}, {POOL})
gate = threading.Barrier({POOL})
answers = []
def use(number):
    connection = pool.getconn()
    cursor = connection.cursor()
    gate.wait()
    for _ in range(20):
        cursor.execute("select pg_backend_pid(), count(*), %s from generate_series(1, 1000)", (number,))
        answers.append(cursor.fetchone())
    pool.putconn(connection)
threads = [threading.Thread(target=use, args=(number,)) for number in range({POOL})]
for thread in threads: thread.start()
for thread in threads: thread.join()
pool.closeall()
print(len(answers), len({{pid for pid, _, _ in answers}}), {{count for _, count, _ in answers}})
"""


def programs() -> str:
    """Where Debian keeps the programs of the newest PostgreSQL that is
    installed."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"),
        key=lambda path: int(path.parent.name),
    )
    return str(found[-1]) if found else "/usr/lib/postgresql"


@pytest.fixture(scope="module")
def linux_users() -> Iterator[None]:
    """The Linux users `work` and `shop`, while the tests run; those of other
    test runs on this machine wait."""
    require(
        "postgresql",
        f"{programs()}/initdb",
        "psql",
        "useradd",
        "setpriv",
        root=NEEDS_ROOT,
    )
    names = ("work", "shop")
    with open("/run/lock/qrexec-activate-recipes", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        new = [
            name
            for name in names
            if name not in {entry.pw_name for entry in pwd.getpwall()}
        ]
        for name in new:
            subprocess.run(
                [
                    "useradd",
                    "--system",
                    "--no-create-home",
                    "--user-group",
                    name,
                ],
                check=True,
            )
        try:
            yield
        finally:
            for name in new:
                subprocess.run(["userdel", name], check=True)


@pytest.fixture
def recipe(linux_users: None) -> Iterator[Recipe]:
    # Users other than root are to reach what is in here; a folder of pytest's
    # is closed to them.
    folder = Path(tempfile.mkdtemp(prefix="qa-pg-"))
    folder.chmod(0o755)
    try:
        # The socket's folder is that of the cluster; every client sees another
        # one, its own.
        with Recipe(
            "postgresql", substitutes={"/run/postgresql": str(folder)}
        ) as recipe:
            recipe["db"].force_users(folder)
            with cluster(folder, recipe["db"]):
                yield recipe
    finally:
        shutil.rmtree(folder)


class cluster:
    """A PostgreSQL of the recipe's own, with its pg_hba.conf, a role and a
    database per client qube."""

    def __init__(self, folder: Path, db: Qube) -> None:
        self.folder = folder
        self.db = db

    def as_postgres(self, *argv: str) -> list[str]:
        return [
            "setpriv",
            "--reuid=postgres",
            "--regid=postgres",
            "--init-groups",
            *argv,
        ]

    def __enter__(self) -> None:
        shutil.chown(self.folder, "postgres", "postgres")
        data = str(self.folder / "data")
        hba = self.folder / "pg_hba.conf"
        hba.write_text(
            (
                self.db.etc / "postgresql" / "15" / "main" / "pg_hba.conf"
            ).read_text()
        )
        quiet = {
            "cwd": self.folder,
            "check": True,
            "stdout": subprocess.DEVNULL,
        }
        subprocess.run(
            self.as_postgres(
                f"{programs()}/initdb",
                "-D",
                data,
                "-A",
                "peer",
                "--no-sync",
                "--locale=C.UTF-8",
            ),
            **quiet,
        )
        settings = {
            "hba_file": hba,
            "fsync": "off",
            "listen_addresses": self.db.host,
            "port": 5432,
        }
        self.process = subprocess.Popen(
            self.as_postgres(
                f"{programs()}/postgres",
                "-D",
                data,
                "-k",
                str(self.folder),
                *(f"--{k}={v}" for k, v in settings.items()),
            ),
            cwd=self.folder,
            stderr=subprocess.DEVNULL,
        )
        until(
            "PostgreSQL listens",
            lambda: listens(f"{self.folder}/.s.PGSQL.5432"),
        )
        sql = "".join(
            f"create role {name} login; create database {name} owner {name};\n"
            for name in ("work", "shop")
        )
        psql = [
            "psql",
            "-q",
            "-h",
            str(self.folder),
            "-v",
            "ON_ERROR_STOP=1",
            "postgres",
        ]
        until(
            "PostgreSQL is ready",
            lambda: (
                subprocess.run(
                    self.as_postgres(*psql, "-c", ""), capture_output=True
                ).returncode
                == 0
            ),
        )
        subprocess.run(self.as_postgres(*psql), input=sql, text=True, **quiet)

    def __exit__(self, *failure: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def check_roles(recipe: Recipe, section: str) -> None:
    for name, other in (("work", "shop"), ("shop", "work")):
        qube = recipe[name]
        command = "psql -At -c 'select current_user'"
        assert qube.run(command) == f"{name}\n"
        said = qube.run(
            f"psql -At -U {other} -d {other} -c 'select 1' 2>&1", check=False
        )
        assert (
            "Peer authentication failed"
            if section == "By its unix socket"
            else "no pg_hba.conf entry"
        ) in said


def copy_both_ways(work: Qube) -> None:
    """A million rows go in and come out, and are the same."""
    rows = work.machine.home / "rows"
    with rows.open("w") as file:
        file.writelines(
            f"{number}\t{hashlib.md5(str(number).encode()).hexdigest()}\n"
            for number in range(ROWS)
        )
    work.run("psql -q -c 'create table rows (number int, text text)'")
    assert work.run("psql -c '\\copy rows from rows'") == f"COPY {ROWS}\n"
    work.run("psql -q -c '\\copy rows to again'")
    assert (work.machine.home / "again").read_bytes() == rows.read_bytes()


@pytest.mark.limit(240)
def test_unix_socket(recipe: Recipe) -> None:
    recipe.follow("By its unix socket")
    check_roles(recipe, "By its unix socket")
    work = recipe["work"]
    copy_both_ways(work)
    assert (
        work.run(f"/usr/bin/python3 -c '{USE_POOL}'")
        == f"{POOL * 20} {POOL} {{1000}}\n"
    )
    # Nor can a qube be another one's role by calling what belongs to that one:
    # the policy does not let it.
    refused = subprocess.run(
        [work.machine.client, "db", "qubes.ConnectUnix+postgres-shop"],
        input=b"",
        capture_output=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr) == (126, b"Request refused\n")


@pytest.mark.limit(240)
def test_tcp(recipe: Recipe) -> None:
    for name in ("work", "shop"):
        recipe[name].environment["PGUSER"] = name
        recipe[name].run("systemctl --user daemon-reload")
    recipe.follow("By TCP")
    check_roles(recipe, "By TCP")
    copy_both_ways(recipe["work"])
    assert os.path.exists(recipe["work"].machine.home / "again")
