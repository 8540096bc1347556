"""add, remove, edit, list and policy, under a real user manager, with the files
that a person and others wrote."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import Desk, free_port, listens

from qrexec_activate.loopback import policy as loopback_policy
from qrexec_activate.loopback.machine import Machine


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


# ---------------------------------------------------------------------- add


def test_adding_a_route_writes_what_a_person_would_and_starts_it(
    desk: Desk,
) -> None:
    printed = desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.is_golden("add.txt", printed)
    assert desk.files() == {
        f"{desk.gitweb}.d/gitweb.conf",
        f"sockets.target.wants/{desk.gitweb}",
    }
    text = (
        desk.machine.unit_dir / f"{desk.gitweb}.d" / "gitweb.conf"
    ).read_text()
    assert (
        text
        == f"[Socket]\nListenStream=127.0.0.1:{desk.port}\nFileDescriptorName=gitweb\n"
    )
    assert desk.active() == {desk.gitweb}
    assert listens(("127.0.0.1", desk.port))


def test_a_second_qube_gets_the_next_address_and_is_told_so(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    result = desk.try_("add", "tcp", str(desk.port), "work")
    assert result.stderr == (
        f"127.0.0.1:{desk.port} is taken by the route to gitweb, so this uses"
        f" 127.0.0.2:{desk.port}\n"
    )
    assert desk.routes() == {
        f"127.0.0.1:{desk.port}": "gitweb",
        f"127.0.0.2:{desk.port}": "work",
    }
    assert listens(("127.0.0.2", desk.port))


def test_an_address_that_another_program_has_is_not_taken_from_it(
    desk: Desk,
) -> None:
    with socket.create_server(("127.0.0.1", desk.port)):
        result = desk.try_("add", "tcp", str(desk.port), "gitweb")
        assert (
            f"taken by {Path('/proc/self/comm').read_text().strip()} (pid"
            f" {os.getpid()})" in result.stderr
        )
        assert f"127.0.0.2:{desk.port} now reaches gitweb" in result.stdout
        assert "127.0.0.3" in desk.fails(
            "add",
            "tcp",
            str(desk.port),
            "work",
            "--listen",
            "127.0.0.1",
            code=2,
        )
    assert set(desk.routes()) == {f"127.0.0.2:{desk.port}"}


def test_a_unix_socket_and_a_source_address_are_added(desk: Desk) -> None:
    desk.run("add", "unix", "notes", "@default")
    desk.run("add", "tcp-bind", f"{desk.port}-127.0.1.1", "nfs")
    desk.run("add", "unix", "notes", "@dispvm:debian-dvm")
    assert desk.routes() == {
        f"127.0.0.1:{desk.port}": "nfs",
        f"{desk.machine.runtime}/qrexec/notes": "@default",
        f"{desk.machine.runtime}/qrexec/notes-dispvm-debian-dvm": "@dispvm:debian-dvm",
    }
    assert listens(f"{desk.machine.runtime}/qrexec/notes-dispvm-debian-dvm")
    mode = (desk.machine.runtime / "qrexec" / "notes").stat().st_mode
    assert mode & 0o777 == 0o600


def test_an_address_that_the_service_refuses_is_told(desk: Desk) -> None:
    argument = f"{desk.port}-0++1"
    said = desk.try_("add", "tcp-bind", argument, "nfs").stderr
    assert "qubes.ConnectTCPBind refuses 0++1: write it ++1\n" in said
    assert "refuses 0++1: write it ++1" in desk.try_("check").stdout


def test_adding_twice_is_adding_once(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    before = desk.files()
    result = desk.try_("add", "tcp", str(desk.port), "gitweb")
    assert result.returncode == 0
    assert "reaches gitweb already" in result.stderr
    assert desk.files() == before


def test_what_was_written_but_not_started_is_started(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb", "--no-start")
    assert desk.active() == set()
    assert f"sockets.target.wants/{desk.gitweb}" in desk.files()
    desk.run("add", "tcp", str(desk.port), "gitweb")
    assert desk.active() == {desk.gitweb}
    assert len(desk.files()) == 2


def test_a_dry_run_shows_everything_and_changes_nothing(desk: Desk) -> None:
    printed = desk.run("add", "tcp", str(desk.port), "gitweb", "--dry-run")
    desk.is_golden("add-dry-run.txt", printed)
    assert desk.files() == set()
    assert desk.active() == set()


def test_the_system_manager_is_asked_for_its_own_folder(desk: Desk) -> None:
    bus = {
        "DBUS_SYSTEM_BUS_ADDRESS": desk.machine.environment[
            "DBUS_SESSION_BUS_ADDRESS"
        ]
    }
    printed = desk.run(
        "add", "unix", "notes", "work", "--system", "--dry-run", environment=bus
    )
    assert (
        "# /etc/systemd/system/qrexec-connect-unix@notes:work.socket.d/work.conf"
        in printed
    )
    assert (
        "$ env SYSTEMD_OFFLINE=1 systemctl enable --no-reload"
        " qrexec-connect-unix@notes:work.socket" in printed
    )


IMPOSSIBLE = [
    (("tcp", "80x", "work"), "is no port"),
    (("tcp", "080", "work"), "is no port"),
    (("tcp", "1234", "9work"), "begins with a letter"),
    (("tcp", "1234", "@adminvm"), "the keywords are"),
    (("unix", ".hidden", "work"), "may not begin with a dot"),
    (("unix", "a/b", "work"), "would silently turn into"),
    (("tcp-bind", "2049", "work"), "is no PORT-ADDRESS"),
    (("nope", "x", "work"), "add-rpc nope"),
    (("tcp", "1234", "work", "--listen", "8080"), "open to other machines"),
    (("tcp", "1234", "work", "--listen", "192.0.2.1"), "cannot be listened on"),
    (("unix", "x", "work", "--listen", "/etc/passwd/x"), "cannot be made"),
    (("tcp", "1234", "work", "--listen", "%t/" + "x" * 120), "too long"),
]


def test_what_cannot_work_is_refused_before_anything_is_written(
    desk: Desk,
) -> None:
    for words, said in IMPOSSIBLE:
        assert said in desk.fails("add", *words), words
    assert desk.files() == set()


def test_an_address_that_others_can_reach_is_warned_of(desk: Desk) -> None:
    result = desk.try_(
        "add",
        "tcp",
        str(desk.port),
        "work",
        "--listen",
        "0.0.0.0",
        "--no-start",
    )
    assert result.returncode == 0
    assert "other machines may reach" in result.stderr


def test_a_file_that_would_give_the_new_address_to_another_qube_stops_it(
    desk: Desk,
) -> None:
    desk.drop_in(desk.gitweb, "zz", "[Socket]", "FileDescriptorName=vault")
    said = desk.fails("add", "tcp", str(desk.port), "gitweb")
    assert "FileDescriptorName=vault" in said
    assert desk.files() == {f"{desk.gitweb}.d/zz.conf"}


def test_a_route_beside_units_of_the_plain_kind_leaves_them_alone(
    desk: Desk,
) -> None:
    desk.drop_in(desk.tcp, "00-all", "[Socket]", "FileDescriptorName=vault")
    desk.drop_in(
        desk.tcp, "a", "[Socket]", f"ListenStream=127.0.0.1:{desk.port}"
    )
    desk.start(desk.tcp)
    since = desk.machine.property(desk.tcp, "ActiveEnterTimestampMonotonic")
    desk.run("add", "tcp", str(desk.port), "gitweb")
    assert desk.routes() == {
        f"127.0.0.1:{desk.port}": "vault",
        f"127.0.0.2:{desk.port}": "gitweb",
    }
    assert (
        desk.machine.property(desk.tcp, "ActiveEnterTimestampMonotonic")
        == since
    )


def test_a_start_that_fails_is_undone(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    before = desk.files()
    desk.drop_in(
        desk.labelled("work"), "zz", "[Unit]", "AssertPathExists=/nowhere"
    )
    result = desk.try_("add", "tcp", str(desk.port), "work")
    assert result.returncode == 1
    assert f"systemctl --user status {desk.labelled('work')}" in result.stderr
    assert desk.files() == before | {f"{desk.labelled('work')}.d/zz.conf"}


def test_a_name_that_is_taken_gets_a_number(desk: Desk) -> None:
    desk.drop_in(desk.labelled("work"), "work", "# nothing yet")
    desk.run("add", "tcp", str(desk.port), "work")
    assert f"{desk.labelled('work')}.d/work-2.conf" in desk.files()


def test_an_rpc_of_ones_own_works_as_those_that_ship(desk: Desk) -> None:
    printed = desk.run("add-rpc", "my-rpc", "my.Rpc")
    desk.is_golden("add-rpc.txt", printed)
    assert desk.files() == {
        "my-rpc@.socket",
        "my-rpc.service",
        "my-rpc-quiesce.target",
    }
    assert "my.Rpc" in (desk.machine.unit_dir / "my-rpc.service").read_text()
    desk.run("add-rpc", "my-rpc", "my.Rpc")
    desk.run("add", "my-rpc", "backup", "archive")
    listener = f"{desk.machine.runtime}/qrexec/my-rpc-backup"
    (route,) = desk.json("list")
    assert (route["listener"], route["call"], route["listens"]) == (
        listener,
        "my.Rpc+backup",
        True,
    )
    assert "my.Rpc +backup" in desk.run("policy")
    assert "already" in desk.fails("add-rpc", "my-rpc", "other.Rpc")
    assert "ships with" in desk.fails("add-rpc", "tcp", "my.Rpc")
    desk.run("remove", "my-rpc", "backup")
    assert desk.active() == set()


# ---------------------------------------------------------------------- remove


def test_removing_a_route_leaves_its_neighbours_running(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.run("add", "tcp", str(desk.port), "work")
    printed = desk.run("remove", f"127.0.0.1:{desk.port}")
    desk.is_golden("remove.txt", printed)
    assert desk.files() == {
        f"{desk.labelled('work')}.d/work.conf",
        f"sockets.target.wants/{desk.labelled('work')}",
    }
    assert desk.active() == {desk.labelled("work")}
    assert not listens(("127.0.0.1", desk.port))
    assert listens(("127.0.0.2", desk.port))


def test_the_last_route_takes_its_instance_along(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.run("remove", "tcp", str(desk.port), "gitweb")
    assert desk.files() == set()
    assert desk.folders() == set()
    assert desk.active() == set()
    assert desk.failed() == ""
    assert not listens(("127.0.0.1", desk.port))


def test_comments_and_other_settings_stay(desk: Desk) -> None:
    path = desk.drop_in(
        desk.tcp,
        "mine",
        "# two ways to git",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        f"ListenStream=127.0.0.2:{desk.port}",
        "FileDescriptorName=gitweb",
        "; small writes",
        "NoDelay=no",
    )
    desk.start(desk.tcp)
    desk.run("remove", f"127.0.0.2:{desk.port}")
    assert path.read_text() == (
        "# two ways to git\n[Socket]\n"
        f"ListenStream=127.0.0.1:{desk.port}\nFileDescriptorName=gitweb\n;"
        f" small writes\nNoDelay=no\n"
    )
    assert listens(("127.0.0.1", desk.port))
    desk.run("remove", f"127.0.0.1:{desk.port}")
    assert (
        path.read_text()
        == "# two ways to git\n[Socket]\n; small writes\nNoDelay=no\n"
    )
    assert desk.active() == set()


def test_a_word_that_may_mean_several_routes_removes_none(desk: Desk) -> None:
    other = free_port()
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.run("add", "tcp", str(other), "gitweb")
    assert "may mean 2 routes" in desk.fails("remove", "gitweb", code=2)
    assert len(desk.routes()) == 2
    assert "there is no route 'nope'" in desk.fails("remove", "nope", code=2)
    words = ("tcp", str(desk.port), "gitwep")
    assert f"there is no route {' '.join(words)!r}" in desk.fails(
        "remove", *words, code=2
    )
    desk.run("remove", "gitweb", "--all")
    assert desk.files() == set()


def test_a_route_that_others_take_their_target_from_is_not_removed(
    desk: Desk,
) -> None:
    desk.drop_in(
        desk.tcp,
        "a",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=vault",
    )
    # An override of the name alone: it is that of all files before it.
    desk.drop_in(desk.tcp, "b", "[Socket]", "FileDescriptorName=work")
    desk.start(desk.tcp)
    assert desk.routes() == {f"127.0.0.1:{desk.port}": "work"}
    desk.run("remove", f"127.0.0.1:{desk.port}")
    assert desk.files() == {f"{desk.tcp}.d/b.conf"}


def test_a_route_of_a_package_is_not_touched(desk: Desk) -> None:
    vendor = desk.machine.directory / "units" / f"{desk.tcp}.d"
    vendor.mkdir()
    path = vendor / "vault.conf"
    path.write_text(
        f"[Socket]\nListenStream=127.0.0.1:{desk.port}\nFileDescriptorName=vault\n"
    )
    try:
        desk.machine.systemctl("daemon-reload")
        assert "not among the units in" in desk.fails("remove", "vault", code=2)
        for words in (("edit", "vault"), ("retarget", "vault", "work")):
            said = desk.fails(*words, code=2)
            assert "not among the units in" in said
            assert "copy it there under the same name" in said
    finally:
        path.unlink()
        vendor.rmdir()


def test_a_file_that_was_removed_by_hand_is_followed_by_its_unit(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    (desk.machine.unit_dir / f"{desk.gitweb}.d" / "gitweb.conf").unlink()
    desk.run("remove", f"127.0.0.1:{desk.port}")
    assert desk.active() == set()
    assert desk.routes() == {}
    assert desk.files() == set()


def test_a_dry_run_of_remove_changes_nothing(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    before = desk.files()
    printed = desk.run("remove", "gitweb", "--dry-run")
    assert "gitweb.conf: removed" in printed
    assert f"systemctl --user disable --no-reload {desk.gitweb}" in printed
    assert desk.files() == before


# ---------------------------------------------------------------------- edit


def editor(desk: Desk, script: str) -> dict[str, str]:
    """An editor that does the same as a person, at once; its file is $1."""
    path = desk.machine.home / "editor"
    path.write_text(f"#!/bin/sh\nset -e\n{script}\n")
    path.chmod(0o755)
    return {"VISUAL": str(path)}


def test_editing_changes_the_right_file_and_restarts_its_unit(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    printed = desk.run(
        "edit", "gitweb", environment=editor(desk, 'sed -i s/gitweb/work/ "$1"')
    )
    assert (
        printed == f"127.0.0.1:{desk.port} now reaches work, by"
        f" qubes.ConnectTCP+{desk.port}\n"
    )
    assert desk.routes() == {f"127.0.0.1:{desk.port}": "work"}
    printed = desk.run(
        "edit",
        "work",
        environment=editor(desk, 'sed -i s/127.0.0.1/127.0.0.4/ "$1"'),
    )
    assert listens(("127.0.0.4", desk.port))
    assert not listens(("127.0.0.1", desk.port))
    printed = desk.run(
        "edit", "work", environment=editor(desk, 'echo "[Socket]" >"$1"')
    )
    assert "stopped and disabled" in printed
    assert desk.active() == set()


BAD_EDITS = [
    ('sed -i s/gitweb/-evil/ "$1"', "would take it for an option"),
    ('echo nonsense >"$1"', "'nonsense' is no setting"),
    ('echo garbage >>"$1"', "'garbage' is no setting"),
    (': >"$1"', "came back empty"),
    ("exit 3", "ended with exit code 3"),
    ('sed -i /FileDesc/d "$1"', "no file sets FileDescriptorName="),
]


def test_what_would_be_refused_is_not_written(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    path = desk.machine.unit_dir / f"{desk.gitweb}.d" / "gitweb.conf"
    before = path.read_text()
    for script, said in BAD_EDITS:
        result = desk.try_("edit", "gitweb", environment=editor(desk, script))
        assert result.returncode == 1, script
        assert said in result.stderr
        assert path.read_text() == before
    assert desk.routes() == {f"127.0.0.1:{desk.port}": "gitweb"}


def test_a_file_that_opens_no_address_can_be_edited_by_its_path(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    path = desk.drop_in(
        desk.gitweb,
        "typo",
        "[Socket]",
        f"ListenStreem=127.0.0.2:{desk.port}",
        "FileDescriptorName=work",
    )
    printed = desk.run(
        "edit",
        str(path),
        environment=editor(desk, 'sed -i s/Streem/Stream/ "$1"'),
    )
    # Its name has been that of the other file's address until now.
    assert printed == (
        f"127.0.0.1:{desk.port} now reaches gitweb, by"
        f" qubes.ConnectTCP+{desk.port}\n"
        f"127.0.0.2:{desk.port} now reaches work, by"
        f" qubes.ConnectTCP+{desk.port}\n"
    )
    assert desk.routes() == {
        f"127.0.0.1:{desk.port}": "gitweb",
        f"127.0.0.2:{desk.port}": "work",
    }


def test_an_edit_that_changes_nothing_restarts_nothing(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    since = desk.machine.property(desk.gitweb, "ActiveEnterTimestampMonotonic")
    assert (
        "as it was"
        in desk.try_("edit", "gitweb", environment=editor(desk, "true")).stderr
    )
    assert (
        desk.machine.property(desk.gitweb, "ActiveEnterTimestampMonotonic")
        == since
    )


# -------------------------------------------------------------- list and policy


def a_mess(desk: Desk) -> None:
    """Routes that were written by hand, some of them wrong, and units of other
    programs."""
    port = desk.port
    desk.drop_in(
        desk.tcp,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{port}",
        "FileDescriptorName=gitweb",
    )
    desk.drop_in(
        desk.tcp, "noname", "[Socket]", f"ListenStream=127.0.0.2:{port}"
    )
    desk.drop_in(
        desk.tcp,
        "option",
        "[Socket]",
        f"ListenStream=127.0.0.3:{port}",
        "FileDescriptorName=-x",
    )
    desk.drop_in(
        "qrexec-connect-unix@bad.socket",
        "bad",
        "[Socket]",
        "ListenStream=nonsense:x",
        "FileDescriptorName=bad",
    )
    desk.drop_in(
        "qrexec-connect-unix@idle.socket",
        "work",
        "[Socket]",
        "ListenStream=%t/idle",
        "FileDescriptorName=work",
    )
    desk.machine.write_unit(
        "my-own.socket",
        "[Socket]\nListenStream=%t/own\nFileDescriptorName=vault\n",
    )
    command = " ".join(
        f'"{word}"'
        for word in desk.argv("serve", "my.Rpc", "--argument", "foo")
    )
    desk.machine.write_unit(
        "my-own.service",
        f"[Service]\nType=notify\nKillMode=process\nExecStart={command}\n",
    )
    desk.machine.write_unit(
        "my-unrelated.socket", "[Socket]\nListenStream=%t/unrelated\n"
    )
    desk.machine.write_unit(
        "my-unrelated.service", "[Service]\nExecStart=/bin/cat\n"
    )
    desk.start(desk.tcp)
    desk.machine.systemctl("start", "my-own.socket", "my-unrelated.socket")
    desk.drop_in(
        desk.tcp,
        "unread",
        "[Socket]",
        f"ListenStream=127.0.0.4:{port}",
        "FileDescriptorName=work",
    )


def test_every_route_is_listed_whoever_wrote_it(desk: Desk) -> None:
    a_mess(desk)
    desk.is_golden("list.txt", desk.run("list"))
    desk.is_golden("list.json", desk.run("list", "--json"))


def test_some_routes_are_listed(desk: Desk) -> None:
    a_mess(desk)
    assert [
        route["target"]
        for route in desk.json("list", "gitweb", f"{desk.machine.runtime}/own")
    ] == [
        "vault",
        "gitweb",
    ]
    assert desk.json("list", "my.Rpc+foo")[0]["unit"] == "my-own.socket"


def test_dom0_gets_a_line_for_each_route(desk: Desk) -> None:
    a_mess(desk)
    desk.run("add", "unix", "notes", "@default")
    desk.is_golden("policy.txt", desk.run("policy"))
    desk.is_golden(
        "policy-allow.txt",
        desk.run("policy", "--allow", "--default-target", "vault"),
    )
    some = desk.run("policy", "gitweb", "--allow")
    assert "above what is denied there" in some
    assert "deny" not in some


def test_what_dom0_is_given_denies_what_a_later_file_allows(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.run("add", "unix", "notes", "@default")
    printed = desk.run("policy", "--allow", "--default-target", "vault")
    text = printed.replace("THIS-QUBE", "client")
    rules = loopback_policy.parse(f"{text}* * @anyvm @anyvm allow\n")

    def reaches(target: str, service: str, argument: str) -> str:
        return loopback_policy.decide(
            rules, service, argument, "client", target, lambda _name: True
        ).resolved

    tcp = ("qubes.ConnectTCP", str(desk.port))
    notes = ("qubes.ConnectUnix", "notes")
    assert reaches("gitweb", *tcp) == "gitweb"
    assert reaches("vault", *tcp) == ""
    assert reaches("@default", *tcp) == ""
    assert reaches("@default", *notes) == "vault"
    assert reaches("gitweb", *notes) == ""
    assert reaches("gitweb", "my.Rpc", "x") == "gitweb"


def test_without_routes_the_way_to_the_first_is_shown(desk: Desk) -> None:
    for command in ("list", "status"):
        result = desk.try_(command)
        assert (result.returncode, result.stdout) == (0, "")
        assert "qrexec-activate add tcp 1234 QUBE" in result.stderr
    assert desk.json("list") == []


def test_odd_things_among_the_units_are_passed_over(desk: Desk) -> None:
    top = desk.machine.unit_dir
    desk.run("add", "tcp", str(desk.port), "gitweb")
    (top / "white space.socket").touch()
    (top / ".socket").touch()
    (top / "my-folder.socket").mkdir()
    (top / "my-file.socket.d").touch()
    (top / "my-loop.socket").symlink_to("my-loop.socket")
    (top / "qrexec-connect-tcp@7.socket.d").mkdir()
    (top / "qrexec-connect-tcp@7.socket.d" / "link.conf").symlink_to("/nowhere")
    (top / "qrexec-connect-tcp@8.socket.d").mkdir()
    (top / "qrexec-connect-tcp@8.socket.d" / "binary.conf").write_bytes(
        bytes(range(256))
    )
    os.makedirs(os.fsencode(top) + b"/qrexec-connect-tcp@\xff.socket.d")
    (top / "qrexec-connect-tcp@\udcff.socket.d" / "a.conf").write_text(
        "[Socket]\nListenStream=%t/x\n"
    )
    desk.machine.systemctl("daemon-reload")
    assert desk.routes() == {f"127.0.0.1:{desk.port}": "gitweb"}
    for command in (
        ["status"],
        ["check"],
        ["policy"],
        ["add", "tcp", str(desk.port), "work"],
        ["remove", "work"],
    ):
        result = desk.try_(*command)
        print(command, result)
        assert result.returncode in (0, 1, 2)
    assert desk.routes() == {f"127.0.0.1:{desk.port}": "gitweb"}


# --------------------------------------------------- errors, completion, output


def test_no_error_is_more_than_a_line_unless_one_asks(desk: Desk) -> None:
    nowhere = {
        "XDG_RUNTIME_DIR": "/nowhere",
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nowhere/bus",
    }
    result = desk.try_("list", environment=nowhere)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "cannot reach systemd" in result.stderr
    (desk.machine.home / "no-folder").touch()
    result = desk.try_(
        "add",
        "tcp",
        "1234",
        "work",
        environment={"XDG_CONFIG_HOME": str(desk.machine.home / "no-folder")},
    )
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)


def test_debug_shows_where_an_error_came_from(desk: Desk) -> None:
    result = desk.machine.run(desk.argv("list", "nope", "--debug"), check=False)
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith(
        "qrexec-activate: there is no route 'nope'"
    )


def test_a_reader_that_goes_away_is_no_error(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    command = " ".join(desk.argv("list"))
    # In this mode Python tells, as 3.14 always does, what it could not write as
    # it ended.
    told = f"PYTHONDEVMODE=1 {command} | true"
    result = desk.machine.run(["/bin/sh", "-c", told])
    assert result.stderr == ""


def test_shells_get_a_script(desk: Desk) -> None:
    for shell in ("bash", "zsh", "fish"):
        script = desk.run("completion", shell)
        assert f"{shell}_complete" in script
        assert "_QREXEC_ACTIVATE_COMPLETE" in script


COMPLETIONS = [
    (["ch"], {"check"}),
    (["remove", "127."], {"127.0.0.1:PORT"}),
    (["status", "git"], {"gitweb"}),
    (
        ["policy", "qrexec-connect-tcp"],
        {"qrexec-connect-tcp@PORT:gitweb.socket"},
    ),
    (["add", "tcp"], {"tcp", "tcp-bind"}),
    (["add", "tcp", "1", "g"], {"gitweb"}),
    (["add", "tcp", "1", "@d"], {"@default", "@dispvm"}),
    (
        ["publish", "x", "--unit", "qrexec-connect-tcp@"],
        {"qrexec-connect-tcp@PORT:gitweb.socket"},
    ),
]


def test_what_is_in_use_is_completed(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    for words, offered in COMPLETIONS:
        environment = {
            "_QREXEC_ACTIVATE_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(["qrexec-activate", *words]),
            "COMP_CWORD": str(len(words)),
        }
        printed = desk.try_(environment=environment).stdout
        values = {line.partition(",")[2] for line in printed.splitlines()}
        assert values == {
            value.replace("PORT", str(desk.port)) for value in offered
        }, words


def test_colour_is_for_terminals_and_those_who_want_it(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")

    def on_terminal(**environment: str) -> str:
        command = " ".join(desk.argv("list"))
        variables = " ".join(
            f"{key}={value}" for key, value in environment.items()
        )
        return desk.machine.run(
            [
                "script",
                "-qec",
                f"env TERM=xterm COLUMNS=200 {variables} {command}",
                "/dev/null",
            ]
        ).stdout

    assert "\x1b[32m" in on_terminal()
    assert "\x1b[3" not in on_terminal(NO_COLOR="1")
    assert "\x1b" not in desk.run("list")
    assert json.loads(desk.run("list", "--json"))
