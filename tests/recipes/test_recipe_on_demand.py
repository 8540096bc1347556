"""Web apps on demand, in a booted Debian: started by `work`, ended when idle,
with a user, a database and a name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from booted import AS_USER, SERVICE_QUBE, Container
from recipe import ROOT, Recipe, until

#: The packages in short.
INSTALL = f"""{SERVICE_QUBE}
cp -r {ROOT}/qrexec_activate {{top}}/root/usr/lib/python3/dist-packages/
printf '#!/bin/sh\\nexec python3 -m qrexec_activate "$@"\\n' >{{top}}/root/usr/bin/qrexec-activate
chmod 755 {{top}}/root/usr/bin/qrexec-activate
cp {ROOT}/tests/publish/hostile.py {ROOT}/tests/publish/look.py {ROOT}/tests/publish/crowd.py {{top}}/root/etc/
"""
APP = "guestbook"
#: What --disk takes of the kernel.
LOOPS = sorted(Path("/dev").glob("loop[0-9-]*"))


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    with Container(
        "on-demand",
        "apps",
        tmp_path_factory.mktemp("apps"),
        INSTALL,
        system="services",
        binds=map(str, LOOPS),
    ) as container:
        state = "systemctl --user is-active basic.target"
        until(
            "the user's systemd runs",
            lambda: as_user(container, state, check=False).strip() == "active",
        )
        container.run("systemctl start postgresql caddy")
        yield container


@pytest.fixture(scope="module")
def recipe(apps: Container) -> Iterator[Recipe]:
    with Recipe("on-demand") as recipe:
        qube = recipe["apps"]
        qube.as_root = apps.run
        qube.as_user = lambda command: as_user(apps, command)
        apps.answer_calls(qube)
        yield recipe


def as_user(apps: Container, command: str, *, check: bool = True) -> str:
    return apps.run(
        f"cd /home/user && {AS_USER} /bin/sh -c {shlex.quote(command)}",
        check=check,
    )


def published(apps: Container) -> dict[str, dict[str, Any]]:
    return {
        one["name"]: one
        for one in json.loads(as_user(apps, "qrexec-activate published --json"))
    }


def plausible(memory: int | None) -> bool:
    """Whether a Python uses so much; None where the kernel does not count for
    systemd, as with old control groups."""
    return memory is None or 1 << 20 < memory < 1 << 28


def traces(apps: Container, name: str) -> str:
    """Everything in the system that has a name."""
    return apps.run(
        f"getent passwd {name}; getent group {name}; ls -d"
        f" /var/lib/qrexec-publish/{name};"
        f" ls /etc/systemd/system /etc/systemd/system/*.wants"
        f" /run/qubes.ConnectUnix | grep -- -{name};"
        f' runuser -u postgres -- psql -At -c "select rolname from pg_roles'
        f" where rolname = '{name}'\""
        f" -c \"select datname from pg_database where datname = '{name}'\";"
        f" curl --silent http://localhost:2019/config/ | grep -o"
        f" {name}.localhost",
        check=False,
    )


def test_a_program_as_it_is(apps: Container, recipe: Recipe) -> None:
    said = recipe.follow("A program as it is")
    assert "All that I know" in next(reversed(said.values()))
    wiki = published(apps)["wiki"]
    assert (wiki["state"], wiki["user"]) == ("running", None)
    assert plausible(wiki["memory"])


def test_a_user_a_database_and_a_name_of_its_own(
    apps: Container, recipe: Recipe
) -> None:
    assert traces(apps, APP) == ""
    dry = apps.run(
        dict(recipe.commands("A user, a database and a name of its own"))[
            "apps#"
        ]
        + " --dry-run"
    )
    assert "$ useradd --system" in dry
    assert traces(apps, APP) == ""
    said = recipe.follow("A user, a database and a name of its own")
    assert next(reversed(said.values())) == "1 visits, noted by guestbook\n"
    one = published(apps)[APP]
    assert (one["state"], one["user"], one["database"], one["domain"]) == (
        "running",
        APP,
        APP,
        "guestbook.localhost",
    )
    assert plausible(one["memory"])
    assert (
        apps.run("curl --silent http://guestbook.localhost/")
        == "2 visits, noted by guestbook\n"
    )


def test_it_can_do_nothing_else(apps: Container, recipe: Recipe) -> None:
    assert (
        apps.run(f"getent passwd {APP}")
        .strip()
        .endswith(":/var/lib/qrexec-publish/guestbook:/usr/sbin/nologin")
    )
    assert apps.run(
        "stat --format='%U %a' /var/lib/qrexec-publish/guestbook"
    ).split() == [APP, "700"]
    pid = apps.run(
        "systemctl show --value -p MainPID qrexec-program-guestbook.service"
    ).strip()
    status = dict(
        line.partition(":\t")[::2]
        for line in apps.run(f"cat /proc/{pid}/status").splitlines()
    )
    assert set(status["Uid"].split()) == {apps.run(f"id --user {APP}").strip()}
    assert (
        int(status["CapBnd"], 16),
        status["NoNewPrivs"],
        status["Seccomp"],
    ) == (0, "1", "2")
    mounts = apps.run(f"cat /proc/{pid}/mountinfo")
    options = {
        line.split()[4]: line.split()[5].split(",")
        for line in mounts.splitlines()
    }
    assert "ro" in options["/"]
    assert "rw" in options["/var/lib/qrexec-publish/guestbook"]
    said = apps.run(
        f"runuser -u {APP} -- psql -d postgres -c 'create table x ()' 2>&1",
        check=False,
    )
    assert "permission denied" in said
    # PostgreSQL has 100 connections for all.
    said = apps.run(
        'runuser -u postgres -- psql -At -c "select rolconnlimit from pg_roles'
        f" where rolname = '{APP}'\""
    )
    assert said == "20\n"


def test_who_may_connect(apps: Container, recipe: Recipe) -> None:
    path = "/run/qubes.ConnectUnix/guestbook"
    assert apps.run(f"stat --format='%U %G %a' {path}").split() == [
        "user",
        "caddy",
        "660",
    ]
    ask = (
        f"curl --silent --show-error --unix-socket {path} http://guestbook/"
        f" 2>&1"
    )
    assert "noted by guestbook" in as_user(apps, ask)
    for stranger in ("nobody", "www-data", APP):
        assert "curl: (7) " in apps.run(
            f"runuser -u {stranger} -- {ask}", check=False
        )


def test_what_is_there(apps: Container, recipe: Recipe) -> None:
    recipe.follow("What is there")
    assert "guestbook" in apps.run("qrexec-activate published")
    # A Caddy that has forgotten it.
    apps.run(
        "curl --silent -X DELETE"
        " http://localhost:2019/id/qrexec-publish-guestbook.socket"
    )
    assert "Caddy has lost guestbook.localhost" in as_user(
        apps, "qrexec-activate published --check", check=False
    )
    as_user(
        apps,
        f"qrexec-activate publish {APP} --domain guestbook.localhost &&"
        f" qrexec-activate published --check",
    )
    # A program that stays, and is no web server.
    apps.run(
        "qrexec-activate publish mute --user mute --domain mute.localhost"
        " --exec 'python3 /etc/hostile.py'"
    )
    said = as_user(apps, "qrexec-activate published --check", check=False)
    assert (
        "mute: mute.localhost answers 502 through Caddy: qrexec-activate logs"
        " mute" in said
    )
    assert "\nguestbook: " not in said
    apps.run("qrexec-activate unpublish mute --yes")
    # What another qube has called is counted; what came through Caddy is not.
    # The journal is open to root.
    (one,) = json.loads(apps.run("qrexec-activate published --json"))
    assert (one["name"], one["calls"], one["calls_failed"]) == (APP, 1, 0)
    assert one["program_failed"] == 0
    # Its log is the system's, which not everyone may read.
    said = apps.run(f"qrexec-activate logs {APP}")
    assert "Started" in said
    assert '"GET / HTTP/1.1" 200' in said
    assert "sudo qrexec-activate unpublish" in as_user(
        apps, "qrexec-activate unpublish guestbook 2>&1", check=False
    )


def test_a_name_comes_back_by_itself(apps: Container, recipe: Recipe) -> None:
    ask = "curl --silent --fail http://guestbook.localhost/"
    for change in (
        "systemctl reload caddy",
        "systemctl restart caddy",
        # As a reboot does.
        "systemctl stop caddy && systemctl start caddy",
    ):
        apps.run(change)
        until(
            f"the name is there again after {change}",
            lambda: "noted by guestbook" in apps.run(ask, check=False),
        )


def test_a_name_that_is_taken_is_refused(
    apps: Container, recipe: Recipe
) -> None:
    publish = (
        "qrexec-activate publish thief --user thief --exec /bin/cat --domain"
        " Guestbook.localhost 2>&1"
    )
    assert "another service's" in apps.run(publish, check=False)
    # Also where Caddy alone knows it.
    apps.run(
        "sed -i s/^Domain=.*// /etc/systemd/system/qrexec-publish-guestbook.socket"
    )
    assert "Caddy offers something else" in apps.run(publish, check=False)
    apps.run(
        "sed -i '/^Database=/aDomain=guestbook.localhost'"
        " /etc/systemd/system/qrexec-publish-guestbook.socket"
    )
    assert traces(apps, "thief") == ""
    assert "noted by" in apps.run("curl --silent http://guestbook.localhost/")


def test_it_is_idle_behind_caddy_too(apps: Container, recipe: Recipe) -> None:
    # One that keeps a connection for further requests.
    apps.run(
        "sed 's/^    def do_GET/    protocol_version = \"HTTP\\/1.1\"\\n&/'"
        " /etc/guestbook.py >/etc/keeping.py &&"
        " qrexec-activate publish brief --user brief --database --exec"
        " 'python3 /etc/keeping.py' --idle 1s --domain brief.localhost"
    )
    assert apps.run("curl --silent http://brief.localhost/")
    # Caddy would keep its connection for two minutes.
    until("it ends", lambda: published(apps)["brief"]["state"] == "idle")
    apps.run("qrexec-activate unpublish brief --yes")
    assert traces(apps, "brief") == ""


def test_an_admin_api_that_only_root_and_caddy_reach(
    apps: Container, recipe: Recipe
) -> None:
    socket = "unix//run/caddy/admin.socket"
    drop_in = "/run/systemd/system/caddy.service.d"
    apps.run(
        f"cp /etc/caddy/Caddyfile /root/ && mkdir {drop_in} &&"
        f" printf '%s\\n' '{{' 'admin {socket}' '}}' ':80' >/etc/caddy/Caddyfile &&"
        " printf '%s\\n' '[Service]' RuntimeDirectory=caddy"
        f" RuntimeDirectoryMode=0700 >{drop_in}/admin.conf &&"
        " systemctl daemon-reload && systemctl restart caddy"
    )
    try:
        apps.run(
            f"CADDY_ADMIN={socket} qrexec-activate publish quiet --user quiet"
            " --exec /bin/cat --domain quiet.localhost"
        )
        know = (
            "curl --silent --header 'Host;' --unix-socket"
            " /run/caddy/admin.socket http://localhost/id/qrexec-publish-quiet.socket"
        )
        assert "quiet.localhost" in apps.run(know)
        apps.run("systemctl reload caddy")
        until("it is back", lambda: "quiet.localhost" in apps.run(know))
        assert "7" in apps.run(
            f"runuser -u quiet -- {know} || echo $?", check=False
        )
        apps.run(f"CADDY_ADMIN={socket} qrexec-activate unpublish quiet --yes")
        assert "quiet.localhost" not in apps.run(know, check=False)
    finally:
        apps.run(
            f"cp /root/Caddyfile /etc/caddy/ && rm -r {drop_in} && systemctl daemon-reload &&"
            " systemctl restart caddy"
        )


def test_nobody_blocks_a_database(apps: Container, recipe: Recipe) -> None:
    apps.run(
        "systemd-run --quiet --unit=in-the-way --uid=postgres"
        " psql template1 --command='select pg_sleep(600)'"
    )
    until(
        "somebody uses template1",
        lambda: (
            "template1"
            in apps.run(
                'runuser -u postgres -- psql -At -c "select datname from'
                " pg_stat_activity where query like '%sleep%' and datname is"
                ' not null and pid <> pg_backend_pid()"'
            )
        ),
    )
    apps.run(
        "qrexec-activate publish more --user more --database --exec /bin/cat"
    )
    apps.run("qrexec-activate unpublish more --yes")
    apps.run("systemctl stop in-the-way")


def test_what_a_program_could_not_see_is_refused(
    apps: Container, recipe: Recipe
) -> None:
    apps.run("touch /home/user/app.py")
    for program in (
        "python3 /home/user/app.py",
        "/root/x/../../home/user/app.py",
    ):
        apps.run("mkdir -p /root/x && chmod 755 /home/user/app.py")
        assert "does not see /home/user/app.py" in apps.run(
            f"qrexec-activate publish x --user x --exec '{program}' 2>&1",
            check=False,
        )
    assert "not published" in apps.run(
        "qrexec-activate unpublish nosuch 2>&1", check=False
    )


def test_a_key_that_only_the_program_gets(
    apps: Container, recipe: Recipe
) -> None:
    apps.run(
        "cat >/etc/keyed.py <<'EOF'\n"
        "import os, socket\n"
        "client = socket.socket(fileno=3).accept()[0]\n"
        "folder = os.environ['CREDENTIALS_DIRECTORY']\n"
        "client.sendall(open(f'{folder}/key').read().encode())\n"
        "EOF\necho sesame >/root/key && chmod 600 /root/key"
    )
    apps.run(
        "qrexec-activate publish keyed --user keyed --credential /root/key"
        " --exec 'python3 /etc/keyed.py'"
    )
    path = "/run/qubes.ConnectUnix/keyed"
    said = as_user(apps, f"socat -u UNIX-CONNECT:{path} -")
    assert said == "sesame\n"
    apps.run("qrexec-activate unpublish keyed --yes")


#: Says who has connected, by uid, and what that one has sent to the end.
PEER = """\
import socket, struct
listener = socket.socket(fileno=3)
while True:
    with listener.accept()[0] as client:
        them = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        with client.makefile("rb") as file:
            said = file.read()
        client.sendall(b"%d says %s" % (struct.unpack("3i", them)[1], said))
"""
#: As much of a qrexec as dpkg has to know.
QREXEC = """\
mkdir -p /root/qrexec/DEBIAN /root/qrexec/usr/bin
printf '%s\\n' 'Package: qubes-core-qrexec' 'Version: {version}' \\
    'Architecture: all' 'Maintainer: x <x@localhost>' 'Description: x' \\
    >/root/qrexec/DEBIAN/control
touch /root/qrexec/usr/bin/qrexec-client-vm
dpkg-deb --build /root/qrexec /root/qrexec.deb && dpkg --install /root/qrexec.deb
"""
LINK = "/etc/qubes-rpc/qubes.ConnectUnix+bare"
CONFIG = "/etc/qubes/rpc-config/qubes.ConnectUnix+bare"


def call(recipe: Recipe, name: str, said: str) -> str:
    """What a program of `apps` answers to a call from `work`."""
    client = shlex.quote(str(recipe["work"].machine.client))
    return recipe["work"].run(
        f"{client} apps qubes.ConnectUnix+{name}", input=said
    )


def test_qrexec_itself_connects_to_a_native_one(
    apps: Container, recipe: Recipe
) -> None:
    before = apps.run("ls /etc/qubes-rpc /etc/qubes/rpc-config")
    apps.run(f"cat >/etc/peer.py <<'EOF'\n{PEER}EOF\n")
    script = (
        "qrexec-activate publish bare --user bare --exec 'python3 /etc/peer.py'"
    )
    native = f"{script} --native"
    # A program would read a line of an older one's first.
    for version in ("", "4.2.18-1+deb12u1"):
        if version:
            apps.run(QREXEC.format(version=version))
        said = apps.run(f"{native} 2>&1", check=False)
        assert f"here is {version and 'qubes-core-qrexec 4.2.18'}" in said
    apps.run(QREXEC.format(version="4.2.19-1+deb12u1"))
    assert "peer" in apps.run(f"{native} --database 2>&1", check=False)
    apps.run(f"ln -s /dev/tcp/127.0.0.1 {LINK}")
    said = apps.run(f"{native} 2>&1", check=False)
    assert f"{LINK} is there already" in said
    assert apps.run(f"readlink {LINK}") == "/dev/tcp/127.0.0.1\n"
    apps.run(f"rm {LINK}")
    said = apps.run(f"{native} --dry-run")
    assert f"# {CONFIG}\nskip-service-descriptor=true\n" in said
    assert f"$ ln -s /run/qubes.ConnectUnix/bare {LINK}\n" in said
    assert traces(apps, "bare") == ""
    # Neither way at first, then one, and the other, and back.
    policy = recipe["work"].machine.loopback / "policy"
    with policy.open("a") as file:
        file.write("qubes.ConnectUnix +bare work apps allow\n")
    rpc, configs = recipe["apps"].rpc, recipe["apps"].rpc_config
    apps.run(script)
    user = apps.run("id --user user").strip()
    assert call(recipe, "bare", "hello") == f"{user} says hello"
    assert "who connects is root" in apps.run(native)
    assert published(apps)["bare"]["native"]
    assert published(apps)["bare"]["calls"] is None
    assert " native\n" in apps.run("qrexec-activate published --check")
    said = apps.run("qrexec-activate check", check=False)
    assert f"is alive, by qrexec alone, as root ({LINK})" in said
    # The same link and the same config, as this machine sees them.
    here = f"/proc/{apps.leader}/root{apps.run(f'readlink {LINK}').strip()}"
    link = rpc / "qubes.ConnectUnix+bare"
    link.symlink_to(here)
    config = configs / "qubes.ConnectUnix+bare"
    config.write_text(apps.run(f"cat {CONFIG}"))
    assert call(recipe, "bare", "hello") == "0 says hello"
    config.unlink()
    assert call(recipe, "bare", "hello").startswith("0 says qubes.ConnectUnix")
    link.unlink()
    # What others do to it is seen.
    apps.run(f"sed -i s/true/false/ {CONFIG}")
    assert (
        "no skip-service-descriptor=true" in published(apps)["bare"]["problem"]
    )
    apps.run(f"ln -sfT /run/dbus/system_bus_socket {LINK}")
    assert "other qubes reach" in published(apps)["bare"]["problem"]
    # And is theirs.
    assert "Changed" in apps.run(script)
    assert apps.run(f"readlink {LINK}") == "/run/dbus/system_bus_socket\n"
    apps.run(f"rm {LINK} {CONFIG}")
    assert not published(apps)["bare"]["native"]
    apps.run(native)
    apps.run(f"rm {LINK}")
    assert "without --native" in published(apps)["bare"]["problem"]
    apps.run(script)
    assert published(apps)["bare"]["problem"] is None
    apps.run(native)
    said = apps.run("qrexec-activate unpublish bare --yes")
    assert f"Removed: {LINK}" in said
    assert traces(apps, "bare") == ""
    assert apps.run("ls /etc/qubes-rpc /etc/qubes/rpc-config") == before
    apps.run("dpkg --purge qubes-core-qrexec")


#: Writes what fits into its home, after what is there, and says how much that
#: was, and what is there.
FILLER = """\
import os, socket
listener = socket.socket(fileno=3)
while True:
    with listener.accept()[0] as client, open("filled", "ab", 0) as file:
        count = 0
        try:
            while count < 1 << 28:
                count += file.write(bytes(1 << 16))
        except OSError as error:
            client.sendall(f"{count} {os.listdir()} {error}".encode())
"""


def disk_words(apps: Container) -> str:
    """How a program here gets a file system of its own; empty where a container
    cannot have one."""
    loop = "losetup --find --show /root/image"
    said = apps.run(
        f"truncate --size 1M /root/image; device=$({loop}) && losetup --detach"
        f" $device; rm /root/image; echo $device",
        check=False,
    )
    return "--disk 16M" if said.strip() else ""


def test_what_a_program_writes_has_a_limit(
    apps: Container, recipe: Recipe
) -> None:
    mount = "systemctl is-active 'var-lib-qrexec\\x2dpublish-filler.mount'"
    homes = "/var/lib/qrexec-publish"
    publish = (
        "qrexec-activate publish filler --user filler --exec"
        " 'python3 /etc/filler.py'"
    )
    loops = "losetup --list --noheadings --output BACK-FILE 2>/dev/null; true"
    image = f"{homes}/filler.disk"
    there = f"ls -A {homes} 2>/dev/null; true"
    before = apps.run(there)
    if not disk_words(apps):
        pytest.skip("recipe on-demand: no loop devices in a container here")
    apps.run(f"cat >/etc/filler.py <<'EOF'\n{FILLER}EOF")

    def fill() -> tuple[int, str]:
        path = "/run/qubes.ConnectUnix/filler"
        said = as_user(apps, f"socat -u UNIX-CONNECT:{path} -")
        count, _, rest = said.partition(" ")
        return int(count), rest

    # All of it, or nothing.
    apps.run("systemctl stop caddy")
    caddy = f"{publish} --disk 16M --domain x.localhost 2>&1"
    assert "Caddy's admin API" in apps.run(caddy, check=False)
    apps.run("systemctl start caddy")
    assert traces(apps, "filler") == apps.run(loops) == ""
    assert apps.run(there) == before

    apps.run(f"{publish} --disk 16M")
    assert apps.run(f"stat --format='%U %a' {image} {homes}/filler") == (
        "root 600\nfiller 700\n"
    )
    first, said = fill()
    assert 8 << 20 < first < 16 << 20
    assert "No space left on device" in said
    assert ".bashrc" in said
    one = published(apps)["filler"]
    assert one["disk"] == 16 << 20
    assert first < one["disk_used"] < 16 << 20
    assert " of 16M\n" in apps.run("qrexec-activate published")
    assert "nothing changed" in apps.run(f"{publish} --disk 16M")
    for words in ("", "--disk 48M"):
        said = apps.run(f"{publish} {words} 2>&1", check=False)
        assert "with --disk 16M" in said
    # It is mounted again by who needs it, as after a reboot.
    apps.run("systemctl stop qrexec-publish-filler.service 'var-lib-*.mount'")
    assert apps.run(mount, check=False) == "inactive\n"
    assert published(apps)["filler"]["disk_used"] is None
    assert fill()[0] == 0
    assert apps.run(mount) == "active\n"
    assert "filler.mount" in apps.run(
        "ls /etc/systemd/system/local-fs.target.wants"
    )
    # Not while somebody is in it; and then with all that was made.
    # WorkingDirectory= would have it end with the mount.
    apps.run(
        f"systemd-run --quiet --unit=inside sh -c 'cd {homes}/filler; exec"
        f" sleep 600'; until [ $(readlink /proc/$(systemctl show --value -p"
        f" MainPID inside)/cwd) = {homes}/filler ]; do sleep 0.1; done"
    )
    said = apps.run("qrexec-activate unpublish filler --yes 2>&1", check=False)
    assert "is in use" in said
    apps.run("systemctl stop inside")
    apps.run("qrexec-activate unpublish filler --yes")
    assert traces(apps, "filler") == apps.run(loops) == ""
    assert apps.run(there) == before
    said = apps.run(f"{publish} --disk 1000T 2>&1", check=False)
    assert "to give" in said
    # Nor is it added to what has files already.
    apps.run(publish)
    assert "with no --disk" in apps.run(
        f"{publish} --disk 16M 2>&1", check=False
    )
    apps.run("qrexec-activate unpublish filler --yes")


def test_it_ends_when_idle(apps: Container, recipe: Recipe) -> None:
    apps.run(
        "qrexec-activate publish brief --user brief --database --exec"
        " 'python3 /etc/guestbook.py' --idle 1s"
    )
    ask = (
        "curl --silent --unix-socket /run/qubes.ConnectUnix/brief http://brief/"
    )
    state = "systemctl is-active qrexec-program-brief.service"
    for visits in (1, 2):
        assert as_user(apps, ask) == f"{visits} visits, noted by brief\n"
        until("it ends", lambda: published(apps)["brief"]["state"] == "idle")
        until(
            "its program ends",
            lambda: apps.run(state, check=False).strip() == "inactive",
        )
    assert published(apps)["brief"]["memory"] == 0
    # The database of one is closed to the other.
    assert "permission denied" in apps.run(
        f"runuser -u brief -- psql -d {APP} -c '' 2>&1", check=False
    )
    apps.run("qrexec-activate unpublish brief --yes")
    assert traces(apps, "brief") == ""


#: What asks a hostile program; and the same program without a room.
ASK = """\
import json, socket, sys
ways = json.load(sys.stdin)
if sys.argv[1:]:
    client = socket.socket(socket.AF_UNIX)
    client.connect(sys.argv[1])
    file = client.makefile("rw")
    def is_open(way):
        print(way, file=file, flush=True)
        return file.readline() == "open\\n"
else:
    sys.path.insert(0, "/etc")
    from hostile import is_open
print(json.dumps([way for way in ways if is_open(way)]))
"""


def open_to(
    apps: Container, ways: list[str], path: str = "", *, user: str
) -> list[str]:
    """What of all that is open to the program that is published there; without
    a path, to any program of this user."""
    apps.run(f"cat >/etc/ask.py <<'EOF'\n{ASK}\nEOF")
    found = apps.run(
        f"runuser -u {user} -- python3 /etc/ask.py {path} <<'EOF'\n"
        f"{json.dumps(ways)}\nEOF"
    )
    return list(json.loads(found))


def all_ways(apps: Container) -> list[str]:
    """Every socket of the system, Caddy, a route to another qube, and what goes
    past the filters."""
    sockets = apps.run(
        "find /run /var /etc /home /root /tmp /dev -type s"
    ).splitlines()
    abstract = [
        line.split()[-1].removeprefix("@")
        for line in apps.run("cat /proc/net/unix").splitlines()
        if line.split()[-1].startswith("@")
    ]
    return [
        *(f"unix {path}" for path in sockets),
        *(f"abstract {name}" for name in abstract),
        *(f"tcp {host} 2019" for host in ("127.0.0.1", "::1")),
        *("tcp 127.0.0.1 80", "tcp 127.0.0.1 1234", "io_uring"),
        *("write /dev/shm/x", "write /etc/hostile.py"),
    ]


def test_a_hostile_program_stays_in_its_room(
    apps: Container, recipe: Recipe
) -> None:
    # As qrexec's agent does, and a route to another qube.
    apps.run("mkdir -p /run/qubes")
    for unit, listen in (
        ("agent", "UNIX-LISTEN:/run/qubes/qrexec-agent,mode=0666,fork"),
        ("route", "TCP-LISTEN:1234,bind=127.0.0.1,fork"),
        ("bus", "ABSTRACT-LISTEN:some-bus,fork"),
    ):
        apps.run(
            f"systemd-run --quiet --unit=pretend-{unit} socat {listen} EXEC:cat"
        )
    publish = "qrexec-activate publish"
    program = "python3 /etc/hostile.py"
    apps.run(f"{publish} taker --user taker --exec '{program}'")
    apps.run(f"{publish} idler --user idler --idle 1min --exec '{program}'")
    apps.run(
        f"{publish} porter --user porter --port 8000 --exec '{program} 8000'"
    )
    apps.run(
        f"{publish} keeper --user keeper --database --exec '{program}'"
        f" --domain keeper.localhost"
    )
    names = ("taker", "idler", "porter", "keeper")
    path = "/run/qubes.ConnectUnix"
    # All run, so that what each has is there for the others.
    for name in names:
        assert open_to(apps, [], f"{path}/{name}", user="user") == []
    ways = all_ways(apps)
    assert f"unix {path}/taker" in ways
    free = open_to(apps, ways, user="taker")
    assert {
        "tcp 127.0.0.1 2019",
        "tcp 127.0.0.1 1234",
        "abstract some-bus",
        "unix /run/dbus/system_bus_socket",
        "unix /run/qubes/qrexec-agent",
        "unix /run/systemd/journal/socket",
    } < set(free)
    postgresql = "unix /run/postgresql/.s.PGSQL.5432"
    allowed = {name: set[str]() for name in names}
    allowed["keeper"] = {postgresql}
    found = {
        name: set(open_to(apps, ways, f"{path}/{name}", user="user"))
        for name in names
    }
    assert found == allowed
    # With a network, and so what listens on it, but no more of /run.
    apps.run(f"{publish} netter --user netter --network --exec '{program}'")
    netter = set(open_to(apps, ways, f"{path}/netter", user="user"))
    assert not {
        way for way in netter if not way.startswith(("tcp ", "abstract "))
    }
    apps.run("qrexec-activate unpublish --yes netter " + " ".join(names))
    apps.run("systemctl stop pretend-agent pretend-route pretend-bus")


def test_each_part_of_a_room_is_there(apps: Container, recipe: Recipe) -> None:
    apps.run(
        "mkdir -p /usr/lib/modules/1 && touch /tmp/marker /var/tmp/marker /dev/shm/marker &&"
        " qrexec-activate publish looker --user looker --exec"
        " 'python3 /etc/look.py'"
    )
    path = "/run/qubes.ConnectUnix/looker"
    seen = json.loads(as_user(apps, f"socat -u UNIX-CONNECT:{path} -"))
    free = json.loads(
        apps.run(
            "runuser -u looker -- python3 /etc/look.py"
            " /var/lib/qrexec-publish/looker"
        )
    )
    assert seen.pop("umask") == "077"
    for name in ("host name", "queues and shared memory"):
        assert seen.pop(name) != free.pop(name)
    free.pop("umask")
    assert [name for name, is_so in seen.items() if is_so] == []
    # That any of these can be told apart from a program that has no room: what
    # the file system alone denies is no part of it.
    assert {
        *("writes /dev", "the kernel's /proc", "other processes", "homes"),
        *("modules", "namespaces", "netlink", "set-uid", "personality"),
        *("ptrace", "others' /tmp", "others' /dev/shm"),
    } <= {name for name, is_so in free.items() if is_so}
    # What shows nowhere by itself, as another of them denies the same.
    unit = "qrexec-publish-looker.service"
    shown = apps.run(f"systemctl show {unit}").splitlines()
    assert {
        *("NoNewPrivileges=yes", "RestrictRealtime=yes", "PrivateDevices=yes"),
        *("ProtectClock=yes", "ProtectKernelLogs=yes", "PrivateNetwork=yes"),
        *("ProtectKernelTunables=yes", "ProtectKernelModules=yes"),
        *("SystemCallArchitectures=native", "ProtectControlGroups=yes"),
    } <= set(shown)
    apps.run(
        "qrexec-activate unpublish looker --yes && rm /tmp/marker /dev/shm/marker"
    )


def test_a_name_and_a_database_come_later_and_go(
    apps: Container, recipe: Recipe
) -> None:
    publish = "qrexec-activate publish later --user later --exec"
    path = "/run/qubes.ConnectUnix/later"
    home = "/var/lib/qrexec-publish/later"
    apps.run(f"{publish} 'python3 /etc/hostile.py'")
    assert open_to(apps, [], path, user="user") == []
    apps.run(f"touch {home}/kept")
    whole = (
        f"{publish} 'python3 /etc/guestbook.py' --idle 1min --database"
        " --domain later.localhost"
    )
    socket = apps.run(f"stat --format=%i {path}")
    dry = apps.run(f"{whole} --dry-run")
    assert "useradd" not in dry
    assert "createdb" in dry
    assert published(apps)["later"]["database"] is None
    apps.run(whole)
    assert (
        apps.run("curl --silent http://later.localhost/")
        == "1 visits, noted by later\n"
    )
    assert apps.run(f"ls {home}") == "kept\n"
    assert apps.run(f"stat --format=%i {path}") == socket
    assert apps.run(f"stat --format='%U %G %a' {path}").split() == [
        *("user", "caddy", "660"),
    ]
    assert "nothing changed" in apps.run(whole)
    less = f"{publish} 'python3 /etc/hostile.py'"
    assert "Go on?" in apps.run(f"{less} 2>&1 </dev/null", check=False)
    assert published(apps)["later"]["database"] == "later"
    apps.run(f"{less} --yes")
    assert open_to(apps, [], path, user="user") == []
    left = traces(apps, "later").splitlines()
    assert "later.localhost" not in left
    assert left.count("later") == 0
    assert apps.run(f"stat --format='%U %G %a' {path}").split() == [
        *("user", "root", "600"),
    ]
    assert apps.run(f"ls {home}") == "kept\n"
    assert "keeps its user" in apps.run(
        "qrexec-activate publish later --exec /bin/cat 2>&1", check=False
    )
    apps.run("qrexec-activate unpublish later --yes")
    assert traces(apps, "later") == ""


def test_a_users_own_program_has_no_network_either(
    apps: Container, recipe: Recipe
) -> None:
    """The user's systemd has no rights of its own, and needs a user
    namespace."""
    ways = ["tcp 127.0.0.1 2019", "tcp 127.0.0.1 5432"]
    program = "python3 /etc/hostile.py"
    path = "/run/user/1000/qubes.ConnectUnix"
    assert open_to(apps, ways, user="user") == ways
    for name, words in (
        ("mine", ""),
        ("idle", "--idle 1min"),
        ("o+ne", "--port 2020"),
        ("other", "--port 2020"),
    ):
        port = "2020" if "port" in words else ""
        as_user(
            apps,
            f"qrexec-activate publish {name} {words} --exec '{program} {port}'",
        )
        # Twice: also once it has been ended and started again.
        for _ in range(2):
            assert open_to(apps, ways, f"{path}/{name}", user="user") == []
            as_user(apps, f"systemctl --user stop 'qrexec-program-{name}*'")
    # A port of the qube is none of the program's.
    as_user(apps, "systemctl --user start qrexec-program-other.service")
    assert open_to(apps, ["tcp 127.0.0.1 2020"], user="user") == []
    as_user(apps, "qrexec-activate unpublish mine idle o+ne other")


def test_failing_midway_undoes_all(apps: Container, recipe: Recipe) -> None:
    apps.run("systemctl stop caddy")
    publish = (
        "qrexec-activate publish late --user late --database --domain"
        " late.localhost --exec /bin/cat 2>&1"
    )
    assert "Caddy's admin API" in apps.run(publish, check=False)
    apps.run("systemctl start caddy")
    assert traces(apps, "late") == ""
    apps.run("systemctl stop postgresql")
    assert "createuser" in apps.run(publish, check=False)
    apps.run("systemctl start postgresql")
    assert traces(apps, "late") == ""
    apps.run("mv /usr/bin/createdb /root/")
    assert (
        "--database needs PostgreSQL in this qube (missing: createdb)"
        in apps.run(publish, check=False)
    )
    apps.run("mv /root/createdb /usr/bin/")
    said = apps.run("journalctl --output=cat QREXEC_NAME=late")
    assert (
        said.count(
            "publishing late: /bin/cat, Linux user late, database late,"
            " late.localhost in Caddy failed"
        )
        == 2
    )


def test_another_user_is_never_removed(apps: Container, recipe: Recipe) -> None:
    apps.run("qrexec-activate publish odd --user odd --exec /bin/cat")
    apps.run(
        "sed -i s/^User=odd/User=www-data/"
        " /etc/systemd/system/qrexec-publish-odd.socket"
    )
    assert "is no user that" in apps.run(
        "qrexec-activate unpublish odd --yes 2>&1", check=False
    )
    assert apps.run("getent passwd www-data")
    apps.run(
        "sed -i s/^User=www-data/User=odd/"
        " /etc/systemd/system/qrexec-publish-odd.socket"
    )
    apps.run("qrexec-activate unpublish odd --yes")
    assert traces(apps, "odd") == ""


def test_taking_it_away(apps: Container, recipe: Recipe) -> None:
    # Nothing goes without a yes.
    assert "Go on?" in apps.run(
        "qrexec-activate unpublish guestbook 2>&1 </dev/null", check=False
    )
    assert published(apps)[APP]["alive"]
    recipe.follow("Take it away")
    assert traces(apps, APP) == ""
    assert published(apps) == {}
    assert (
        apps.run("ls -A /var/lib/qrexec-publish 2>/dev/null", check=False) == ""
    )


def test_many(apps: Container, recipe: Recipe) -> None:
    publish, unpublish = recipe.commands("Try many")
    recipe.type(publish)
    assert [one["state"] for one in published(apps).values()] == ["idle"] * 50
    recipe.type(unpublish)
    assert published(apps) == {}


#: Asks each of many programs, all at once, by its own socket or by its name in
#: Caddy; with ways, common ones and its own, what of them is open to it.
ASK_MANY = """\
import concurrent.futures, http.client, json, socket, sys
def ask(where):
    name, place, own = where
    body = json.dumps(ways + own) if own else None
    connection = http.client.HTTPConnection(name, timeout=600)
    if place:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(place)
    else:
        connection.sock = socket.create_connection(("localhost", 80))
    connection.request("POST" if body else "GET", "/", body)
    response = connection.getresponse()
    said = response.read()
    assert response.status == 200 and said, (where, response.status, said)
    return json.loads(said)
ways, wheres = json.load(sys.stdin)
with concurrent.futures.ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(ask, wheres))))
"""
FIFTY = 50
#: Seconds for one of their commands, which is fifty of others.
FIFTY_TIMES = 400.0


def ask_many(
    apps: Container,
    wheres: list[tuple[str, str, list[str]]],
    ways: Iterable[str] = (),
) -> list[list[str]]:
    return list(
        json.loads(
            apps.run(
                f"cat >/etc/ask_many.py <<'EOF'\n{ASK_MANY}\nEOF\n"
                f"cat >/root/wheres <<'EOF'\n{json.dumps([list(ways), wheres])}\nEOF\n"
                "chmod 644 /etc/ask_many.py; runuser -u user -- python3"
                " /etc/ask_many.py </root/wheres",
                patience=FIFTY_TIMES,
            )
        )
    )


@pytest.mark.limit(1800)
def test_fifty_and_no_one_can_touch_another(
    apps: Container, recipe: Recipe
) -> None:
    """Each a Linux user, a database and a name; made, changed and removed by a
    command each."""
    publish = (
        f"qrexec-activate publish crowd --count {FIFTY} --user crowd --database"
        " --domain crowd.localhost --exec 'python3 /etc/crowd.py'"
    )
    names = [f"crowd-{number}" for number in range(1, FIFTY + 1)]
    sockets = {name: f"/run/qubes.ConnectUnix/{name}" for name in names}
    apps.run(publish, patience=FIFTY_TIMES)
    # Each is itself, by its socket and by its name in Caddy.
    domains = [f"{number}.crowd.localhost" for number in range(1, FIFTY + 1)]
    selves = [[name] * 3 for name in names]
    assert ask_many(apps, [(n, sockets[n], []) for n in names]) == selves
    assert ask_many(apps, [(one, "", []) for one in domains]) == selves
    # All run. What each has, it has alone: of all that is there, nothing else is
    # open to it but PostgreSQL.
    units = [f"qrexec-publish-{name}.service" for name in names]
    pids = apps.run(
        f"systemctl show --value --property=MainPID {' '.join(units)}"
    ).split()
    postgresql = "unix /run/postgresql/.s.PGSQL.5432"
    everybody = [
        *all_ways(apps),
        *(f"home /var/lib/qrexec-publish/{name}" for name in names),
        *(f"process {pid}" for pid in pids),
    ]
    assert {f"unix {path}" for path in sockets.values()} < set(everybody)
    # Of the databases, some of the others; PostgreSQL says it of all.
    tried = [
        (
            name,
            sockets[name],
            [f"database {names[at - other]}" for other in range(4)],
        )
        for at, name in enumerate(names)
    ]
    found = ask_many(apps, tried, everybody)
    for name, pid, ways in zip(names, pids, found, strict=True):
        assert set(ways) == {
            *(postgresql, f"home /var/lib/qrexec-publish/{name}"),
            *(f"process {pid}", f"database {name}"),
        }, name
    said = apps.run(
        'runuser -u postgres -- psql -At -c "select rolname, datname from'
        " pg_roles, pg_database where rolname like 'crowd-%' and"
        " has_database_privilege(rolname, datname, 'connect') and datname like"
        " 'crowd-%'\""
    )
    assert sorted(said.split()) == sorted(f"{name}|{name}" for name in names)
    # Changed in place, and all of it is as it was.
    stat = f"stat --format=%i {' '.join(sockets.values())}"
    inodes = apps.run(stat)
    assert f"{names[-1]} starts" in apps.run(
        f"{publish} --memory 300M", patience=FIFTY_TIMES
    )
    assert apps.run(stat) == inodes
    assert ask_many(apps, [(one, "", []) for one in domains]) == selves
    limits = apps.run(
        f"systemctl show --value --property=MemoryMax {' '.join(units)}"
    ).split()
    assert set(limits) == {str(300 << 20)}
    said = apps.run(
        f"qrexec-activate unpublish --yes {' '.join(names)} 2>&1",
        patience=FIFTY_TIMES,
    )
    assert "Caddy" not in said, said
    assert traces(apps, "crowd") == traces(apps, "crowd-1") == ""
    assert "crowd" not in apps.run(
        "getent passwd; getent group; ls /var/lib/qrexec-publish;"
        " runuser -u postgres -- psql -At -c 'select rolname from pg_roles'"
        " -c 'select datname from pg_database';"
        " curl --silent http://localhost:2019/config/"
        " 2>/dev/null; true"
    )
