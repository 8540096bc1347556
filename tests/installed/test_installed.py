"""The packages in a booted Debian: installed by apt, used as the README says,
upgraded, removed.

Run by `make check-installed`, as root: it takes minutes, and the first time it
fetches a Debian. The tests of one Debian follow each other, as the days of a
qube do.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from container import CACHE, ROOT, SUITES, USERS, WANTED, Container, Talk
from debs import UPGRADE

pytestmark = pytest.mark.skipif(
    not WANTED, reason="make check-installed does this"
)


@pytest.fixture(scope="module", params=SUITES)
def debian(
    request: pytest.FixtureRequest,
    possible: None,
    debs: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Container]:
    """A Debian with the packages; the first test boots it."""
    container = Container(request.param, tmp_path_factory.mktemp(request.param))
    # What the first release needed besides.
    container.install(debs, "python3-rich")
    container.prepare()
    yield container
    container.shut_down()


def readme_section(title: str) -> str:
    return (
        (ROOT / "README.md")
        .read_text()
        .split(f"\n## {title}\n")[1]
        .split("\n## ")[0]
    )


def do_as_the_readme_says(debian: Container, title: str) -> None:
    """Write the files of a section that are for the client qube, and run its
    systemctl commands."""
    path, text, commands = "", "", []
    for line in [*readme_section(title).splitlines(), "."]:
        if header := re.fullmatch(r"    # (?:(\w+): )?~/(\S+)", line) or (
            not line.startswith("    ") and line
        ):
            if path:
                debian.write(path, text, user="user")
            path, text = "", ""
            if isinstance(header, re.Match) and header[1] in (None, "work"):
                path = f"/home/user/{header[2]}"
        elif line.startswith("    systemctl --user"):
            if path:
                debian.write(path, text, user="user")
            path, text = "", ""
            commands.append(line.split())
        elif path:
            text += line[4:] + "\n"
    assert commands, f"the README says nothing to do in {title}"
    debian.user_systemctl("daemon-reload")
    for command in commands:
        # That is for the other qube.
        if "gpg-agent-ssh.socket" not in command:
            debian.run(*command, user="user")


def daemon(
    debian: Container, prefix: str = "qrexec-connect-tcp", user: str = "user"
) -> str:
    return debian.user_systemctl(
        "show", "--value", "-p", "MainPID", f"{prefix}.service", user=user
    ).strip()


def drop_in(address: str, qube: str) -> str:
    return f"[Socket]\nListenStream={address}\nFileDescriptorName={qube}\n"


def add_route(
    debian: Container, unit: str, address: str, qube: str, user: str = "user"
) -> None:
    debian.write(
        f"/home/{user}/.config/systemd/user/{unit}.d/{qube}.conf",
        drop_in(address, qube),
        user=user,
    )
    debian.user_systemctl("daemon-reload", user=user)
    debian.user_systemctl("enable", "--now", unit, user=user)


# -- the first day: an app qube


def test_installing_enables_nothing(debian: Container) -> None:
    debian.boot(read_only=True)
    assert (
        debian.run("qrexec-activate", "--version")
        == f"qrexec-activate {(ROOT / 'version').read_text()}"
    )
    for user in USERS:
        assert (
            debian.user_systemctl(
                "list-units", "--all", "--no-legend", "qrexec-*", user=user
            )
            == ""
        )
    assert (
        debian.run(
            "systemctl",
            "list-units",
            "--all",
            "--no-legend",
            "qrexec-connect-*",
        )
        == ""
    )
    assert (
        debian.run(
            "dpkg",
            "--verify",
            "qrexec-activate",
            "qrexec-activate-publish",
            "qrexec-activate-services",
        )
        == ""
    )


def test_the_root_file_system_is_that_of_an_app_qube(debian: Container) -> None:
    for folder in ("/etc", "/usr", "/opt"):
        assert "Read-only" in debian.run("touch", f"{folder}/x", check=False)
    debian.run("touch", "/rw/x", "/var/x", "/run/x", "/tmp/x")
    debian.run("touch", "/home/user/x", user="user")


def test_two_qubes_one_port(debian: Container) -> None:
    do_as_the_readme_says(debian, "Two qubes, one port")
    assert debian.ask("127.0.0.1", "1234").startswith("gitweb to ")
    assert debian.ask("127.0.0.2", "1234").startswith("work to ")


def listener(debian: Container, address: str) -> str:
    """The inode of the socket that listens there, as /proc/net/tcp has it."""
    (found,) = (
        fields[9]
        for fields in map(
            str.split, debian.run("cat", "/proc/net/tcp").split("\n")
        )
        if fields[1:2] == [address] and fields[3] == "0A"
    )
    return found


def test_a_unit_for_each_route_stops_alone(debian: Container) -> None:
    do_as_the_readme_says(debian, "A unit for each route")
    assert debian.ask("127.0.0.3", "1234").startswith("mail to ")
    debian.user_systemctl("stop", "qrexec-connect-tcp@1234:mail.socket")
    assert "Refused" in debian.ask("127.0.0.3", "1234", check=False)
    assert debian.ask("127.0.0.1", "1234").startswith("gitweb to ")
    assert debian.ask("127.0.0.2", "1234").startswith("work to ")


def test_no_port_closes_but_that_of_the_route_that_goes(
    debian: Container,
) -> None:
    def command(*arguments: str) -> str:
        return debian.run("qrexec-activate", *arguments, user="user")

    first, third = "0100007F:04D2", "0300007F:04D2"
    before = listener(debian, first)
    command("start", "mail")
    kept = listener(debian, third)
    command("retarget", "mail", "gitweb")
    assert debian.ask("127.0.0.3", "1234").startswith("gitweb to ")
    assert listener(debian, third) == kept
    # The unit of both goes on without one of them.
    command("remove", "127.0.0.2:1234")
    assert "Refused" in debian.ask("127.0.0.2", "1234", check=False)
    command("remove", "mail")
    assert "Refused" in debian.ask("127.0.0.3", "1234", check=False)
    assert debian.ask("127.0.0.1", "1234").startswith("gitweb to ")
    assert listener(debian, first) == before
    do_as_the_readme_says(debian, "Two qubes, one port")
    debian.user_systemctl("restart", "qrexec-connect-tcp@1234.socket")
    assert debian.ask("127.0.0.2", "1234").startswith("work to ")


def test_split_ssh_as_in_the_readme(debian: Container) -> None:
    do_as_the_readme_says(debian, "Split SSH")
    assert (
        debian.ask("/run/user/1000/qrexec/gpg-agent-ssh")
        == "vault to a unix socket"
    )


def test_a_source_address_of_its_own(debian: Container) -> None:
    do_as_the_readme_says(debian, "A source address of its own")
    assert debian.ask("127.0.0.1", "2049") == "nfs to 127.0.1.1"


def test_an_rpc_of_ones_own(debian: Container) -> None:
    do_as_the_readme_says(debian, "Your own RPC")
    assert debian.ask("/run/user/1000/backup") == "archive to a unix socket"


def test_the_commands_of_the_control_plane(debian: Container) -> None:
    def command(*arguments: str) -> str:
        return debian.run("qrexec-activate", *arguments, user="user")

    command("add", "tcp", "80", "web", "--listen", "127.0.0.1:8080")
    assert debian.ask("127.0.0.1", "8080").startswith("web to ")
    assert "8080" in command("list")
    assert command("check").endswith("All is well\n")
    command("remove", "tcp", "80", "web")
    assert "8080" not in command("list")
    assert "Refused" in debian.ask("127.0.0.1", "8080", check=False)


def test_the_shells_complete(debian: Container) -> None:
    script = (
        ". /usr/share/bash-completion/completions/qrexec-activate; complete"
        " -p qrexec-activate"
    )
    assert "_qrexec_activate_completion" in debian.run("bash", "-c", script)
    asked = (
        "COMP_WORDS=qrexec-activate li",
        "COMP_CWORD=1",
        "_QREXEC_ACTIVATE_COMPLETE=bash_complete",
    )
    assert "plain,list" in debian.run("env", *asked, "qrexec-activate")


def test_the_demo(debian: Container) -> None:
    assert "Each address reached its own qube." in debian.run(
        "qrexec-activate", "demo", user="user"
    )


SALT_CALL = """\
import sys
sys.path.append("/var/salt/modules")
from salt.scripts import salt_call
salt_call()
"""


def test_salt_gives_routes_to_a_user_who_is_there(
    debian: Container,
) -> None:
    (modules,) = (CACHE / "salt/lib").glob("python3*/site-packages")
    python = "import sys; print('python%d.%d' % sys.version_info[:2], end='')"
    if debian.run("python3", "-c", python) != modules.parent.name:
        pytest.skip(f"Salt was made for {modules.parent.name}")
    shutil.copytree(modules, debian.place("var/salt/modules"))
    shutil.copytree(ROOT / "salt", debian.place("var/salt/formula"))
    roots = {
        "file_roots": {"base": ["/var/salt/formula"]},
        "pillar_roots": {"base": ["/var/salt/pillar"]},
    }
    conf = {"file_client": "local", "root_dir": "/var/salt/root", **roots}
    routes = {
        f"r{number}": {
            "client": "work",
            "listen": f"127.0.5.{number}:8080",
            "rpc": "qubes.ConnectTCP",
            "argument": 80,
            "target": "web",
        }
        for number in range(1, 4)
    }
    for name, content in {
        "minion": conf,
        "pillar/top.sls": {"base": {"work": ["routes"]}},
        "pillar/routes.sls": {"qrexec-activate": {"routes": routes}},
    }.items():
        debian.write(f"/var/salt/{name}", json.dumps(content))

    def changed() -> list[str]:
        """What Salt changes as it applies the formula."""
        options = "--local --out=json --id=work --retcode-passthrough"
        said = debian.run(
            *("python3", "-c", SALT_CALL, *options.split()),
            *("--config-dir=/var/salt", "state.apply", "qrexec-activate"),
            timeout=600,
        )
        states = json.loads(said)["local"]
        return [name for name, state in states.items() if state["changes"]]

    assert changed()
    for number in (1, 2, 3):
        assert debian.ask(f"127.0.5.{number}", "8080").startswith("web to ")
    assert changed() == []
    unit = "qrexec-connect-tcp@80.socket"
    debian.user_systemctl("disable", "--now", unit)
    debian.run("rm", "-r", f"/home/user/.config/systemd/user/{unit}.d")
    debian.user_systemctl("daemon-reload")


def test_a_port_under_1024_for_the_whole_qube(debian: Container) -> None:
    # In an app qube /etc does not last, and a runtime drop-in is what rc.local
    # would write.
    debian.write(
        "/run/systemd/system/qrexec-connect-tcp@80.socket.d/web.conf",
        drop_in("127.0.0.1:80", "web"),
    )
    debian.run("systemctl", "daemon-reload")
    debian.run("systemctl", "start", "qrexec-connect-tcp@80.socket")
    assert debian.ask("127.0.0.1", "80", user="other").startswith("web to ")
    pid = debian.run(
        "systemctl",
        "show",
        "--value",
        "-p",
        "MainPID",
        "qrexec-connect-tcp.service",
    ).strip()
    status = dict(
        line.partition(":\t")[::2]
        for line in debian.run("cat", f"/proc/{pid}/status").splitlines()
    )
    who = debian.run("id", "--user", "qrexec-activate").strip()
    assert status["Uid"].split() == [who] * 4
    groups = {
        debian.run("getent", "group", name).split(":")[2]
        for name in ("qubes", "qrexec-activate")
    }
    assert set(status["Groups"].split()) == groups
    assert {
        status[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")
    } == {"0" * 16}
    assert status["NoNewPrivs"] == "1"
    assert debian.run("tail", "-n", "1", "/var/lib/pretend/callers").startswith(
        "qrexec-activate "
    )


def test_no_number_of_changes_makes_a_system_socket_fail(
    debian: Container,
) -> None:
    # Fewer starts than the unit allows, so that these are more in any case. And
    # each one must find its address free.
    debian.write(
        "/run/systemd/system/qrexec-connect-tcp.service.d/few.conf",
        "[Unit]\nStartLimitBurst=3\n",
    )
    debian.run("systemctl", "daemon-reload")
    for _ in range(20):
        debian.run("systemctl", "restart", "qrexec-connect-tcp@80.socket")
        assert debian.ask("127.0.0.1", "80").startswith("web to ")
    # Also where each is stopped before it is up.
    for _ in range(8):
        service = "qrexec-connect-tcp.service"
        debian.run("systemctl", "--no-block", "start", service)
        debian.run("systemctl", "stop", service)
    assert debian.ask("127.0.0.1", "80").startswith("web to ")
    assert (
        debian.run(
            "systemctl", "is-failed", "qrexec-connect-tcp.service", check=False
        ).strip()
        != "failed"
    )


# -- the second day: a standalone qube, or the template itself


def test_a_reboot_finds_the_routes_back(debian: Container) -> None:
    debian.boot(read_only=False)
    assert debian.ask("127.0.0.1", "1234").startswith("gitweb to ")
    assert debian.ask("127.0.0.2", "1234").startswith("work to ")
    assert (
        debian.ask("/run/user/1000/qrexec/gpg-agent-ssh")
        == "vault to a unix socket"
    )
    assert debian.ask("127.0.0.1", "2049") == "nfs to 127.0.1.1"
    assert debian.ask("/run/user/1000/backup") == "archive to a unix socket"


def all_go_on(
    debian: Container, talks: Sequence[Talk], before: Sequence[str]
) -> None:
    """After an upgrade: connections are as they were, and new ones are served
    by new daemons."""
    assert UPGRADE in debian.run("qrexec-activate", "--version")
    assert [talk.echo("still there") for talk in talks] == ["still there"] * 4
    assert debian.ask("127.0.0.1", "1234").startswith("gitweb to ")
    assert debian.ask("127.0.0.3", "1234", user="other").startswith("work to ")
    assert debian.ask("/run/user/1000/backup").startswith("archive to ")
    assert debian.ask("127.0.0.1", "80").startswith("web to ")
    after = old_daemons(debian)
    assert "0" not in after
    assert not set(before) & set(after)
    assert [talk.echo("and now") for talk in talks] == ["and now"] * 4


def test_an_upgrade_loses_no_connection_and_leaves_no_old_daemon(
    debian: Container, newer_debs: list[Path]
) -> None:
    add_route(
        debian,
        "qrexec-connect-tcp@1234.socket",
        "127.0.0.3:1234",
        "work",
        user="other",
    )
    debian.write(
        "/etc/systemd/system/qrexec-connect-tcp@80.socket.d/web.conf",
        drop_in("127.0.0.1:80", "web"),
    )
    debian.run("systemctl", "daemon-reload")
    debian.run("systemctl", "enable", "--now", "qrexec-connect-tcp@80.socket")
    with (
        debian.talk("127.0.0.1", "1234") as one,
        debian.talk("127.0.0.3", "1234", user="other") as two,
        debian.talk("/run/user/1000/backup") as three,
        debian.talk("127.0.0.1", "80") as four,
    ):
        talks = [one, two, three, four]
        assert [talk.greeting.split()[0] for talk in talks] == [
            "gitweb",
            "work",
            "archive",
            "web",
        ]
        before = old_daemons(debian)
        assert "0" not in before
        debian.put_while_booted(newer_debs)
        debian.run("sh", "-ec", "apt-get install --yes /root/*upgrade*.deb")
        all_go_on(debian, talks, before)
    for user in USERS:
        assert (
            debian.user_systemctl(
                "is-enabled", "qrexec-connect-tcp@1234.socket", user=user
            )
            == "enabled\n"
        )
    assert (
        debian.run("systemctl", "is-enabled", "qrexec-connect-tcp@80.socket")
        == "enabled\n"
    )


def old_daemons(debian: Container) -> list[str]:
    return [
        daemon(debian),
        daemon(debian, user="other"),
        daemon(debian, "my-rpc"),
        debian.run(
            "systemctl",
            "show",
            "--value",
            "-p",
            "MainPID",
            "qrexec-connect-tcp.service",
        ).strip(),
    ]


def test_an_upgrade_waits_for_connections_that_go_through_pipes(
    debian: Container,
) -> None:
    relay = "[Service]\nEnvironment=QREXEC_ACTIVATE_RELAY=splice\n"
    debian.write(
        "/home/user/.config/systemd/user/qrexec-connect-tcp.service.d/relay.conf",
        relay,
        user="user",
    )
    debian.user_systemctl("daemon-reload")
    debian.user_systemctl("stop", "qrexec-connect-tcp.service")
    with debian.talk("127.0.0.1", "1234") as talk:
        before = daemon(debian)
        said = debian.run(
            "sh", "-ec", "apt-get install --yes --reinstall /root/*upgrade*.deb"
        )
        assert "qrexec-connect-tcp.service (user 1000)" in said
        time.sleep(6)  # TimeoutStopSec= and more
        assert talk.echo("still there") == "still there"
        assert daemon(debian) == before


#: A user who wants into root's shell: the places where that user's systemd is
#: spoken to are taken, accept, and never answer; and whatever runs as that user
#: on a terminal is written down.
HOSTILE = """
import os, socket, time
runtime = f"/run/user/{os.getuid()}"
taken = []
for path in (f"{runtime}/bus", f"{runtime}/systemd/private"):
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    taken.append(socket.socket(socket.AF_UNIX))
    taken[-1].bind(path)
    taken[-1].listen(64)
open("/home/other/ready", "w").close()
while True:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid != os.getuid():
                continue
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[4] != "0":
                    open("/home/other/prey", "w").close()
        except OSError:
            pass
    time.sleep(0.05)
"""


def test_a_users_manager_neither_holds_an_upgrade_nor_reaches_its_terminal(
    debian: Container,
) -> None:
    debian.write("/home/other/hostile.py", HOSTILE, user="other")
    debian.run(
        *("systemd-run", "--quiet", "--uid=other", "--unit=hostile"),
        *("python3", "/home/other/hostile.py"),
    )
    wait = "until test -e /home/other/ready; do sleep 0.1; done"
    debian.run("sh", "-ec", wait)
    # On a terminal, as a person does it; and what a removal leaves to do.
    for command in (
        "apt-get install --yes --reinstall /root/*upgrade*.deb",
        "/var/lib/dpkg/info/qrexec-activate.postrm remove",
    ):
        debian.run(
            "script", "--quiet", "--return", "--command", command, "/dev/null"
        )
    debian.run("systemctl", "is-active", "hostile.service")
    assert debian.run("ls", "/home/other/prey", check=False).startswith("ls: ")
    debian.run("systemctl", "stop", "hostile.service")
    debian.run("systemctl", "restart", "user@1001.service")


def test_an_administrator_may_forbid_to_touch_services(
    debian: Container,
) -> None:
    managers = "/usr/libexec/qrexec-activate/managers"
    before = debian.ask("127.0.0.1", "80"), old_daemons(debian)[-1]
    debian.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")
    debian.run("chmod", "+x", "/usr/sbin/policy-rc.d")
    debian.run(managers, "renew")
    assert old_daemons(debian)[-1] == before[1]
    debian.run(managers, "stop")
    assert (debian.ask("127.0.0.1", "80"), old_daemons(debian)[-1]) == before
    debian.run("rm", "/usr/sbin/policy-rc.d")
    debian.run(managers, "renew")
    assert debian.ask("127.0.0.1", "80") == before[0]
    assert old_daemons(debian)[-1] != before[1]


#: What a user's manager may answer, if it is one's own.
LIAR = """#!/bin/sh
case "$*" in
    *list-units*) echo "user@1000.service loaded active running" ;;
    *ExecStart*)
        printf 'Id=\\033[31mred.service\\nExecStart={ argv[]=/usr/bin/qrexec-activate serve x ;\\n\\n'
        printf 'Id=--host=there.service\\nExecStart={ argv[]=/usr/bin/qrexec-activate serve x ;\\n\\n'
        printf 'Id=good.service\\nExecStart={ argv[]=/usr/bin/qrexec-activate serve x ;\\n\\n'
        ;;
    *MainPID*good*) echo 4194305 ;;
    *MainPID*) echo "1; reboot" ;;
    *) echo "$*" >>/root/asked ;;
esac
"""


def test_what_a_users_manager_says_is_not_believed(debian: Container) -> None:
    debian.write("/root/liar/systemctl", LIAR)
    debian.run("chmod", "+x", "/root/liar/systemctl")
    said = debian.run(
        *("env", "PATH=/root/liar:/usr/sbin:/usr/bin:/sbin:/bin"),
        *("/usr/libexec/qrexec-activate/managers", "renew"),
    )
    assert said == ""
    asked = debian.run("cat", "/root/asked")
    assert "stop -- good.service" in asked
    assert "red" not in asked
    assert "there" not in asked
    debian.run("rm", "-r", "/root/liar", "/root/asked")


#: The way to a user's manager breaks at the first order to reload, and the first
#: question for services; with $ALWAYS, at each request of which that is a part.
LOSING = """#!/bin/sh
case "$*" in
    *--machine=1001@*"${ALWAYS-nothing}"*) exit 1 ;;
    *--machine=1001@*daemon-reload | *--machine=1001@*ExecStart*)
        seen=/root/losing/$(echo "$*" | md5sum | head -c 32)
        [ -e "$seen" ] || { : >"$seen"; exit 1; }
        ;;
esac
exec /usr/bin/systemctl "$@"
"""


def test_a_manager_that_gave_no_answer_is_asked_again(
    debian: Container,
) -> None:
    debian.write("/root/losing/systemctl", LOSING)
    debian.run("chmod", "+x", "/root/losing/systemctl")
    unit = "/usr/lib/systemd/user/qrexec-connect-tcp@.socket"

    def ask() -> str:
        return debian.ask("127.0.0.3", "1234", user="other")

    def renew(*environment: str) -> str:
        # As an upgrade leaves it: a daemon that starts now believes nothing.
        debian.run("touch", unit)
        path = "PATH=/root/losing:/usr/sbin:/usr/bin:/sbin:/bin"
        managers = "/usr/libexec/qrexec-activate/managers"
        return debian.run("env", path, *environment, managers, "renew")

    assert ask().startswith("work to ")
    before = daemon(debian, user="other")
    # Where it stays so, the old daemon stays, and what to do is said.
    assert "(user 1001)" in renew("ALWAYS=daemon-reload")
    assert ask().startswith("work to ")
    assert daemon(debian, user="other") == before
    assert "(user 1001)" not in renew()
    assert daemon(debian, user="other") != before
    assert ask().startswith("work to ")
    debian.run("rm", "-r", "/root/losing")


def test_removal_leaves_no_unit_and_breaks_no_login(debian: Container) -> None:
    debian.run(
        "apt-get",
        "remove",
        "--yes",
        "qrexec-activate",
        "qrexec-activate-publish",
        "qrexec-activate-services",
    )
    for user in USERS:
        active = debian.user_systemctl(
            "list-units",
            "--no-legend",
            "--plain",
            "--state=active",
            "qrexec-*",
            user=user,
        )
        assert active == ""
        debian.user_systemctl("daemon-reload", user=user)
        known = debian.user_systemctl(
            "list-unit-files", "--no-legend", "qrexec-*", user=user, check=False
        )
        # A link that the user made, to nothing, is all that is left.
        assert not [
            line
            for line in known.splitlines()
            if line.split()[1] not in ("enabled", "bad", "not-found")
        ]
    assert (
        debian.run(
            "systemctl",
            "list-units",
            "--no-legend",
            "--state=active",
            "qrexec-connect-*",
        )
        == ""
    )
    assert "ConnectionRefused" in debian.ask("127.0.0.1", "1234", check=False)
    assert debian.run("find", "/usr", "-name", "*qrexec-connect*") == ""
    debian.run("systemctl", "restart", "user@1000.service")
    assert (
        debian.user_systemctl("is-system-running", check=False).strip()
        == "running"
    )


def test_purging_leaves_the_users_own_files_alone(debian: Container) -> None:
    homes = (
        "cd /home; find . -path '*systemd*' | sort; cat"
        " */.config/systemd/user/*.d/*.conf"
    )
    mine = debian.run("sh", "-ec", homes)
    debian.run(
        "apt-get",
        "purge",
        "--yes",
        "qrexec-activate",
        "qrexec-activate-publish",
        "qrexec-activate-services",
    )
    found = (
        "find /etc /usr /var/lib/systemd -name '*qrexec-*' -o -name"
        " 'qubes.Con*'"
    )
    # What an administrator wrote, and what qrexec itself brought.
    assert sorted(debian.run("sh", "-ec", found).split()) == [
        "/etc/systemd/system/multi-user.target.wants/qubes-qrexec-agent.service",
        "/etc/systemd/system/qrexec-connect-tcp@80.socket.d",
        "/etc/systemd/system/qubes-qrexec-agent.service",
        "/usr/bin/qrexec-client-vm",
    ]
    assert debian.run("sh", "-ec", homes) == mine
    wants = ("find", "/etc/systemd", "-name", "sockets.target.wants", "-empty")
    assert debian.run(*wants) == ""


def test_installing_again_finds_the_routes_back(debian: Container) -> None:
    debian.run("sh", "-ec", "apt-get install --yes /root/*upgrade*.deb")
    debian.run("systemctl", "restart", "user@1000.service")
    assert debian.ask("127.0.0.1", "1234").startswith("gitweb to ")


#: Takes the socket that systemd passes, and greets.
PROGRAM = """
import socket
with socket.socket(fileno=3) as listener:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"published\\n")
"""


def test_an_upgrade_from_the_first_release_loses_nothing(
    debian: Container, first_debs: list[Path]
) -> None:
    everything = "qrexec-activate-services qrexec-activate-publish"
    debian.run("sh", "-ec", f"apt-get purge --yes qrexec-activate {everything}")
    # No pipes, which make an upgrade wait.
    relay = "/home/user/.config/systemd/user/qrexec-connect-tcp.service.d"
    debian.run("rm", "-r", relay)
    debian.put_while_booted(first_debs)
    debian.run("sh", "-ec", "apt-get install --yes /root/*_0.1.0_all.deb")
    for user in USERS.values():
        debian.run("systemctl", "restart", f"user@{user}.service")
    debian.run("systemctl", "enable", "--now", "qrexec-connect-tcp@80.socket")
    debian.write("/home/user/program.py", PROGRAM, user="user")
    debian.run(
        *("qrexec-activate", "publish", "wiki", "--exec"),
        "python3 /home/user/program.py",
        user="user",
    )
    wiki = "/run/user/1000/qubes.ConnectUnix/wiki"
    assert debian.ask(wiki) == "published"
    with (
        debian.talk("127.0.0.1", "1234") as one,
        debian.talk("127.0.0.3", "1234", user="other") as two,
        debian.talk("/run/user/1000/backup") as three,
        debian.talk("127.0.0.1", "80") as four,
    ):
        talks = [one, two, three, four]
        before = old_daemons(debian)
        assert "0" not in before
        # What moves is not taken from under the old one.
        publish = f"/root/qrexec-activate-publish_{UPGRADE}-1_all.deb"
        assert "breaks qrexec-activate" in debian.run(
            "dpkg", "--unpack", publish, check=False
        )
        names = ("qrexec-activate", "qrexec-activate-services")
        debs = " ".join(f"/root/{name}_{UPGRADE}-1_all.deb" for name in names)
        debian.run("sh", "-ec", f"apt-get install --yes {debs}")
        all_go_on(debian, talks, before)
    # What was published is reached; who wants the commands is told what to do.
    assert debian.ask(wiki) == "published"
    needs = "qrexec-activate-publish"
    news = "/usr/share/doc/qrexec-activate/NEWS.Debian.gz"
    assert needs in debian.run("zcat", news)
    said = debian.run("qrexec-activate", "published", user="user", check=False)
    assert needs in said
    debian.run("apt-get", "install", "--yes", publish)
    assert "wiki" in debian.run("qrexec-activate", "published", user="user")
    assert debian.ask(wiki) == "published"
