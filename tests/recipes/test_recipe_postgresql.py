"""PostgreSQL, in a booted Debian: the kernel and the policy decide who is which
role, by unix socket and TCP; a million rows pass."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator

import pytest
from booted import SERVICE_QUBE, Container
from recipe import Qube, Recipe, require

ROWS = 1_000_000
POOL = 20
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
#: It starts with other rules than those of the page, as where it runs already.
OTHER_RULES = """
cd {top}/root/etc/postgresql/15/main
cp -p pg_hba.conf {top}/root/root/
echo 'local all postgres peer' >pg_hba.conf
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recipe]:
    require("postgresql", "psql")
    with Container(
        "postgresql",
        "db",
        tmp_path_factory.mktemp("db"),
        SERVICE_QUBE + OTHER_RULES,
        system="services",
    ) as db:
        db.run(
            "systemctl start postgresql && mv /root/pg_hba.conf"
            " /etc/postgresql/15/main/"
        )
        with Recipe("postgresql") as recipe:
            recipe["db"].as_root = db.run
            db.answer_calls(recipe["db"])
            recipe.follow("")
            yield recipe


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
    work.run(
        "psql -q -c 'drop table if exists rows' -c 'create table rows (number int, text text)'"
    )
    assert work.run("psql -c '\\copy rows from rows'") == f"COPY {ROWS}\n"
    work.run("psql -q -c '\\copy rows to again'")
    assert (work.machine.home / "again").read_bytes() == rows.read_bytes()


def test_unix_socket(recipe: Recipe) -> None:
    recipe.follow("By its unix socket")
    check_roles(recipe, "By its unix socket")
    work = recipe["work"]
    copy_both_ways(work)
    assert (
        work.run(f"/usr/bin/python3 -c '{USE_POOL}'")
        == f"{POOL * 20} {POOL} {{1000}}\n"
    )
    refuses_what_belongs_to_another(recipe, "qubes.ConnectUnix+postgres-{}")


def test_tcp(recipe: Recipe) -> None:
    for name in ("work", "shop"):
        recipe[name].environment["PGUSER"] = name
        recipe[name].run("systemctl --user daemon-reload")
    recipe.follow("By TCP")
    check_roles(recipe, "By TCP")
    copy_both_ways(recipe["work"])
    refuses_what_belongs_to_another(
        recipe,
        "qubes.ConnectTCPBind+5432-{}",
        work="127.0.1.1",
        shop="127.0.1.2",
    )


def refuses_what_belongs_to_another(
    recipe: Recipe, service: str, work: str = "work", shop: str = "shop"
) -> None:
    """A qube cannot be another one's role by calling what belongs to that one:
    the policy does not let it."""
    for caller, other in (("work", shop), ("shop", work)):
        refused = subprocess.run(
            [recipe[caller].machine.client, "db", service.format(other)],
            input=b"",
            capture_output=True,
            check=False,
        )
        assert (refused.returncode, refused.stderr) == (
            126,
            b"Request refused\n",
        )
