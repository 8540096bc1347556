"""What a person can break by hand: check finds it, and what it prints, run just
as it is printed, mends it. What no command can mend is no command."""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from desk import PATIENCE, Desk
from scenario import measured

from qrexec_activate.loopback.machine import Machine, start_journald

SERVICE = "qrexec-connect-tcp.service"


@pytest.fixture(scope="module")
def journal_machine() -> Iterator[Machine]:
    with (
        start_journald(),
        Machine(journal=True, environment=measured()) as machine,
    ):
        bin = machine.directory / "bin"
        bin.mkdir()
        command = bin / "qrexec-activate"
        command.write_text(
            f'#!/bin/sh\nexec {sys.executable} -m qrexec_activate "$@"\n'
        )
        command.chmod(0o755)
        yield machine


@pytest.fixture
def desk(journal_machine: Machine) -> Iterator[Desk]:
    desk = Desk(journal_machine)
    yield desk
    desk.leave()
    (desk.machine.unit_dir / f"{desk.tcp}.d" / "x.conf").unlink(missing_ok=True)
    shutil.rmtree(desk.machine.unit_dir / "dead", ignore_errors=True)


def printed(desk: Desk) -> list[tuple[str, str, str]]:
    """What check says that is not well: text, mend and advice, as a person
    reads it."""
    result = desk.try_("check", "--quiet")
    assert result.returncode in (1, 2), result.stdout + result.stderr
    found: list[tuple[str, str, str]] = []
    for line in result.stdout.splitlines():
        if line.startswith("        $ "):
            found[-1] = (found[-1][0], line[10:], found[-1][2])
        elif line.startswith("        → "):
            found[-1] = (*found[-1][:2], line[10:])
        elif ": " in line:
            found.append((line, "", ""))
    return found


def shell(desk: Desk, command: str, editor: str) -> None:
    """Run a command as it was printed; `editor` is what the person does in
    it."""
    if "systemctl --user edit" in command:
        # It insists on a terminal.
        command = f"script -qec {shlex.quote(command)} /dev/null"
    result = subprocess.run(
        ["/bin/sh", "-c", command],
        env={
            **desk.machine.environment,
            "PATH": f"{desk.machine.directory}/bin:"
            f"{desk.machine.environment['PATH']}",
            "EDITOR": editor,
        },
        cwd=desk.machine.home,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, (command, result.stdout + result.stderr)


def is_content(desk: Desk) -> None:
    result = desk.try_("check", "--quiet")
    assert result.returncode == 0, result.stdout
    assert result.stdout == "All is well\n"


def own(desk: Desk, *lines: str, name: str = "gitweb", unit: str = "") -> Path:
    return desk.drop_in(unit or desk.tcp, name, *(lines or section(desk)))


def section(
    desk: Desk, listen: str = "", target: str = "gitweb"
) -> tuple[str, ...]:
    return (
        "[Socket]",
        f"ListenStream={listen or f'127.0.0.1:{desk.port}'}",
        f"FileDescriptorName={target}",
    )


def again(desk: Desk) -> None:
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("enable", desk.tcp, check=False)
    desk.machine.systemctl("restart", desk.tcp, check=False)


# ------------------------------------------------------------------- breakages


class Breakage(NamedTuple):
    do: Callable[[Desk], Any]
    said: str
    #: What the person does in the editor, where the mend opens one.
    editor: str = "false"


def forgotten_reload(desk: Desk) -> None:
    own(desk, *section(desk, f"127.0.0.2:{desk.port}", "work"), name="work")


def changed_file(desk: Desk) -> None:
    own(desk, *section(desk), f"ListenStream=127.0.0.2:{desk.port}")


def not_enabled(desk: Desk) -> None:
    desk.machine.systemctl("disable", desk.tcp)


def not_started(desk: Desk) -> None:
    desk.machine.systemctl("stop", desk.tcp)


def neither(desk: Desk) -> None:
    desk.machine.systemctl("disable", "--now", desk.tcp)


def wants_link_gone(desk: Desk) -> None:
    (desk.machine.unit_dir / "sockets.target.wants" / desk.tcp).unlink()


def old_copy(desk: Desk) -> None:
    text = (desk.machine.directory / "units" / SERVICE).read_text()
    desk.machine.write_unit(
        SERVICE, text.replace("KillMode=process", "KillMode=control-group")
    )
    desk.machine.systemctl("daemon-reload")


def masked(desk: Desk) -> None:
    desk.machine.systemctl("mask", "--now", desk.tcp)


def masked_template(desk: Desk) -> None:
    desk.machine.systemctl("mask", "qrexec-connect-tcp@.socket")
    desk.machine.systemctl("stop", desk.tcp)
    desk.machine.systemctl("daemon-reload")


def masked_service(desk: Desk) -> None:
    desk.machine.systemctl("stop", desk.tcp)
    desk.machine.systemctl("mask", SERVICE)


def client_not_executable(desk: Desk) -> None:
    client = desk.machine.home / "client"
    shutil.copy(desk.machine.client, client)
    client.chmod(0o644)
    desk.scene.options(CLIENT=str(client))
    again(desk)


def wrong_mode(desk: Desk) -> None:
    path = f"/tmp/qa-open-{desk.port}/socket"
    own(
        desk,
        *section(desk, path, "vault"),
        "SocketMode=0666",
        "DirectoryMode=0755",
        name="vault",
    )
    again(desk)


def no_name(desk: Desk) -> None:
    own(desk, *section(desk)[:2])
    again(desk)


def colon(desk: Desk) -> None:
    own(desk, *section(desk, target="@dispvm:web"))
    again(desk)


def wrong_section(desk: Desk) -> None:
    own(desk, "[Unit]", *section(desk)[1:])
    again(desk)


def misspelt_key(desk: Desk) -> None:
    own(desk, *section(desk), "SocketMod=0600")
    again(desk)


def labelled(desk: Desk) -> tuple[str, ...]:
    """A second route, with a label, whose section has a misspelt key."""
    lines = section(desk, f"127.0.0.2:{desk.port}", "work")
    return (*lines, "SocketMod=0600")


def misspelt_key_of_a_label(desk: Desk) -> None:
    unit = desk.labelled("work")
    own(desk, *labelled(desk), name="work", unit=unit)
    desk.start(unit)


def misspelt_key_in_a_unit_of_a_label(desk: Desk) -> None:
    unit = desk.labelled("work")
    text = "\n".join((*labelled(desk), f"Service={SERVICE}", "[Install]"))
    wanted = "WantedBy=sockets.target\n"
    (desk.machine.unit_dir / unit).write_text(f"{text}\n{wanted}")
    desk.start(unit)


def unclosed_header(desk: Desk) -> None:
    own(desk, *section(desk), "[Install", "WantedBy=sockets.target")
    again(desk)


def no_utf_8(desk: Desk) -> None:
    path = own(desk)
    path.write_bytes(path.read_bytes() + b"SocketMode=\xe9\n")
    again(desk)


def long_line(desk: Desk) -> None:
    own(desk, *section(desk), f"Foo={'x' * 2**20}")
    again(desk)


def datagram(desk: Desk) -> None:
    own(desk, *section(desk), f"ListenDatagram=127.0.0.1:{desk.port}")
    again(desk)


def all_addresses(desk: Desk) -> None:
    own(desk, *section(desk, f"0.0.0.0:{desk.port}"))
    again(desk)


def broken_exec_start(desk: Desk) -> None:
    own(
        desk,
        "[Service]",
        "ExecStart=",
        "ExecStart=/bin/x",
        unit=SERVICE,
        name="x",
    )
    again(desk)


def missing_program(desk: Desk) -> None:
    own(
        desk,
        "[Service]",
        "ExecStart=",
        "ExecStart=/opt/nowhere/qrexec-activate serve qubes.ConnectTCP"
        " --unit %n",
        unit=SERVICE,
        name="x",
    )
    again(desk)


def accept_yes(desk: Desk) -> None:
    own(desk, *section(desk), "Accept=yes")
    again(desk)


def accept_yes_elsewhere(desk: Desk) -> None:
    own(desk, "[Socket]", "Accept=yes", "Backlog=64", name="zz")
    again(desk)


def empty_unit(desk: Desk) -> None:
    """What is empty masks as /dev/null does."""
    (desk.machine.unit_dir / desk.tcp).touch()
    again(desk)


def two_programs(desk: Desk) -> None:
    own(desk, "[Service]", "ExecStart=/bin/true", unit=SERVICE, name="x")
    again(desk)


def no_folder(desk: Desk) -> None:
    """A path below what is no folder."""
    (desk.machine.home / "file").write_text("")
    own(desk, *section(desk, "%h/file/socket"))
    again(desk)


def same_address(desk: Desk) -> None:
    unit = "qrexec-connect-unix@notes.socket"
    own(desk, *section(desk, target="vault"), unit=unit, name="vault")
    desk.start(unit, check=False)


def same_address_in_one_unit(desk: Desk) -> None:
    own(desk, *section(desk, target="work"), name="work")
    again(desk)


def twice_in_one_unit(desk: Desk) -> None:
    own(desk, *section(desk), name="hasty")
    again(desk)


def override(desk: Desk) -> None:
    """override.conf retargets what gitweb.conf opens."""
    own(desk, "[Socket]", "FileDescriptorName=work", name="override")
    again(desk)


def empty_override(desk: Desk) -> None:
    own(desk, "[Socket]", "FileDescriptorName=", name="zz")
    again(desk)


def dangling_link(desk: Desk) -> None:
    folder = desk.machine.unit_dir / f"{desk.tcp}.d"
    (folder / "work.conf").symlink_to("/nowhere/work.conf")
    again(desk)


def link_to_itself(desk: Desk) -> None:
    path = desk.machine.unit_dir / f"{desk.tcp}.d" / "loop.conf"
    path.symlink_to(path)


def fifo(desk: Desk) -> None:
    """systemd must not be told to read it."""
    os.mkfifo(desk.machine.unit_dir / f"{desk.tcp}.d" / "x.conf")


def name_of_other_bytes(desk: Desk) -> None:
    path = own(desk, *section(desk, f"127.0.0.2:{desk.port}"), name="é'")
    path.rename(path.with_name("b'\udcff.conf"))
    again(desk)


def misspelt_suffix(desk: Desk) -> None:
    desk.machine.systemctl("disable", "--now", desk.tcp)
    path = own(desk)
    path.rename(path.with_suffix(".cfg"))
    desk.machine.systemctl("daemon-reload")


def misspelt_suffix_of_a_second(desk: Desk) -> None:
    path = own(
        desk, *section(desk, f"127.0.0.2:{desk.port}", "work"), name="work"
    )
    path.rename(path.with_suffix(""))


def misspelt(pattern: str) -> Callable[[Desk], None]:
    def do(desk: Desk) -> None:
        desk.machine.systemctl("disable", "--now", desk.tcp)
        folder = desk.machine.unit_dir / f"{desk.tcp}.d"
        folder.rename(desk.machine.unit_dir / pattern.format(desk.port))
        desk.machine.systemctl("daemon-reload")

    do.__name__ = pattern
    return do


def no_folder_of_drop_ins(desk: Desk) -> None:
    """A file that is called as the folder should be."""
    desk.machine.systemctl("disable", "--now", desk.tcp)
    folder = desk.machine.unit_dir / f"{desk.tcp}.d"
    shutil.rmtree(folder)
    folder.write_text("\n".join(section(desk)))
    desk.machine.systemctl("daemon-reload")


def empty_file_for_a_folder(desk: Desk) -> None:
    folder = f"qrexec-connect-tcp@{desk.port + 1}.socket.d"
    (desk.machine.unit_dir / folder).touch()


def link_to_nothing_for_a_folder(desk: Desk) -> None:
    folder = f"qrexec-connect-tcp@{desk.port + 1}.socket.d"
    (desk.machine.unit_dir / folder).symlink_to("/nowhere")


def beside_its_folder(pattern: str) -> Callable[[Desk], None]:
    def do(desk: Desk) -> None:
        desk.machine.systemctl("disable", "--now", desk.tcp)
        folder = desk.machine.unit_dir / f"{desk.tcp}.d"
        (folder / "gitweb.conf").rename(
            desk.machine.unit_dir / pattern.format(desk.port)
        )
        folder.rmdir()
        desk.machine.systemctl("daemon-reload")

    do.__name__ = pattern
    return do


def starts_another_service(desk: Desk) -> None:
    """A whole unit of one's own hides the template, and what that says."""
    (desk.machine.unit_dir / desk.tcp).write_text("[Socket]\nBacklog=64\n")
    again(desk)


def unescaped(desk: Desk) -> None:
    """A `+`, which no unit's name may have."""
    folder = desk.machine.unit_dir / "qrexec-connect-unix@a+b.socket.d"
    folder.mkdir()
    lines = section(desk, "%t/a+b")
    (folder / "work.conf").write_text("\n".join((*lines, "")))


def misspelt_beside(desk: Desk) -> None:
    """The right folder is there, too, with another route."""
    own(
        desk,
        *section(desk, f"127.0.0.2:{desk.port}", "work"),
        unit=f"qrexec-connect-tcp-{desk.port}.socket",
        name="work",
    )


def retarget(target: str) -> Callable[[Desk], None]:
    def do(desk: Desk) -> None:
        listen = f"127.0.0.2:{desk.port}"
        own(desk, *section(desk, listen, target), name="other")
        again(desk)

    do.__name__ = target
    return do


def file_deleted(desk: Desk) -> None:
    desk.run("add", "unix", "notes", "vault")
    (desk.machine.runtime / "qrexec" / "notes").unlink()


def no_device(desk: Desk) -> None:
    desk.machine.systemctl("stop", desk.tcp)
    own(desk, *section(desk), "BindToDevice=nosuch")
    desk.machine.systemctl("daemon-reload")


def allow_uid(desk: Desk) -> None:
    """As the daemon may not ask whose a connection is."""
    desk.scene.options(ALLOW_UID="0")
    desk.drop_in(
        SERVICE,
        "zz",
        "[Service]",
        "RestrictAddressFamilies=",
        "RestrictAddressFamilies=AF_UNIX",
    )
    again(desk)
    desk.machine.systemctl("start", SERVICE)


BREAKAGES = [
    Breakage(forgotten_reload, "has not read this file yet"),
    Breakage(forgotten_reload, "were changed after systemd read them"),
    Breakage(changed_file, "was changed after systemd read it"),
    Breakage(changed_file, "were changed after systemd read them"),
    Breakage(not_enabled, "not after the next login"),
    Breakage(not_started, "is not started"),
    Breakage(neither, "is not started"),
    Breakage(wants_link_gone, "not after the next login"),
    Breakage(old_copy, "and is not the same"),
    Breakage(old_copy, "KillMode=control-group"),
    Breakage(masked, "is masked"),
    Breakage(masked_template, "is masked"),
    Breakage(masked_service, f"units: {SERVICE} is masked"),
    Breakage(client_not_executable, "cannot be run"),
    Breakage(
        wrong_mode,
        "set SocketMode=0600",
        "sed -i s/SocketMode=.*/SocketMode=0600/",
    ),
    Breakage(
        no_name,
        "names no qube|has no target",
        "sed -i $aFileDescriptorName=web",
    ),
    Breakage(colon, "write it as \\x3a", "sed -i s/m:w/m\\\\\\\\x3aw/"),
    Breakage(
        wrong_section, "in section [Unit]|has failed", "sed -i s/Unit/Socket/"
    ),
    Breakage(misspelt_key, "SocketMod", "sed -i s/SocketMod=/SocketMode=/"),
    Breakage(
        misspelt_key_of_a_label,
        "SocketMod",
        "sed -i s/SocketMod=/SocketMode=/",
    ),
    Breakage(
        misspelt_key_in_a_unit_of_a_label,
        "SocketMod",
        "sed -i s/SocketMod=/SocketMode=/",
    ),
    Breakage(unclosed_header, "gitweb.conf at line 4", "sed -i 4,$d"),
    Breakage(no_utf_8, "gitweb.conf at line 4", "sed -i 4d"),
    Breakage(long_line, "gitweb.conf at line 4", "sed -i 4d"),
    Breakage(datagram, "byte stream|stream", "sed -i /Datagram/d"),
    Breakage(
        all_addresses,
        "other machines may reach it",
        "sed -i s/0.0.0.0/127.0.0.1/",
    ),
    Breakage(broken_exec_start, "does not run qrexec-activate serve; "),
    Breakage(missing_program, "which is not there"),
    Breakage(accept_yes, "sets Accept=yes", "sed -i /Accept/d"),
    Breakage(accept_yes_elsewhere, "sets Accept=yes", "sed -i /Accept/d"),
    Breakage(empty_unit, "is masked"),
    Breakage(two_programs, "systemd cannot load"),
    Breakage(no_folder, "cannot be", "sed -i s-file/-sockets/-"),
    Breakage(
        same_address,
        "is taken by the route to gitweb",
        "sed -i s/127.0.0.1/127.0.0.2/",
    ),
    Breakage(
        same_address, "exclude each other", "sed -i s/127.0.0.1/127.0.0.2/"
    ),
    Breakage(
        same_address_in_one_unit,
        "for different qubes",
        "sed -i s/127.0.0.1/127.0.0.2/",
    ),
    Breakage(twice_in_one_unit, "2 times", "sed -i s/127.0.0.1/127.0.0.2/"),
    Breakage(
        override, "reaches work and not gitweb", "sed -i /FileDescriptor/d"
    ),
    Breakage(
        empty_override,
        "take FileDescriptorName= out of",
        "sed -i /FileDescriptor/d",
    ),
    Breakage(
        empty_override,
        "reaches no qube and not gitweb",
        "sed -i /FileDescriptor/d",
    ),
    Breakage(dangling_link, "is a symbolic link to nothing"),
    Breakage(link_to_itself, "is a symbolic link to nothing"),
    Breakage(fifo, "is no file"),
    Breakage(name_of_other_bytes, "a name that is no UTF-8"),
    Breakage(misspelt_suffix, "reads only what ends in .conf"),
    Breakage(misspelt_suffix_of_a_second, "reads only what ends in .conf"),
    Breakage(misspelt("qrexec-connect-tcp@{}.sockets.d"), "should be called"),
    Breakage(misspelt("qrexec-connect-tpc@{}.socket.d"), "should be called"),
    Breakage(misspelt("qrexec-connect-tcp-{}.socket.d"), "should be called"),
    Breakage(misspelt("tcp-{}.socket.d"), "should be called"),
    Breakage(unescaped, "should be called"),
    Breakage(misspelt_beside, "should be called"),
    Breakage(
        beside_its_folder("qrexec-connect-tcp@{}.socket.conf"),
        "lies in no folder of a unit",
    ),
    Breakage(beside_its_folder("tcp-{}.conf"), "lies in no folder of a unit"),
    Breakage(
        starts_another_service,
        "does not start qrexec-connect-tcp.service",
        "sed -i $aService=qrexec-connect-tcp.service",
    ),
    Breakage(no_folder_of_drop_ins, "is a file, and should be a folder"),
    Breakage(empty_file_for_a_folder, "is a file, and should be a folder"),
    Breakage(link_to_nothing_for_a_folder, "is a link to nothing"),
    Breakage(
        retarget("GitWeb"),
        "GitWeb looks like gitweb",
        "sed -i s/GitWeb/gitweb/",
    ),
    Breakage(
        retarget("gitwep"),
        "gitwep looks like gitweb",
        "sed -i s/gitwep/gitweb/",
    ),
    Breakage(
        retarget("default"), "write @default", "sed -i s/=default/=@default/"
    ),
    Breakage(file_deleted, "the file of the socket was removed"),
    Breakage(no_device, "sets BindToDevice=", "sed -i /BindToDevice/d"),
    Breakage(allow_uid, "refuses 1 of its listeners"),
]


@pytest.mark.parametrize("break_it", [unclosed_header, no_utf_8, long_line])
def test_a_file_that_systemd_reads_in_part_needs_no_reload(
    desk: Desk, break_it: Callable[[Desk], None]
) -> None:
    own(desk)
    desk.start(desk.tcp)
    break_it(desk)
    ((text, mend, _),) = printed(desk)
    assert "gitweb.conf at line 4" in text
    assert "daemon-reload" not in mend


@pytest.mark.slow
@pytest.mark.parametrize(
    "breakage", BREAKAGES, ids=lambda one: f"{one.do.__name__}: {one.said}"
)
def test_what_check_prints_mends_what_was_broken(
    desk: Desk, breakage: Breakage
) -> None:
    own(desk)
    desk.start(desk.tcp)
    try:
        breakage.do(desk)
        found = printed(desk)
        mends = [
            mend
            for text, mend, _ in found
            if any(word in text for word in breakage.said.split("|"))
        ]
        assert any(mends), found
        editor = breakage.editor
        if breakage.do is allow_uid:
            editor = edits_options(desk)
        shell(desk, mends[0], editor)
        is_content(desk)
        routes = desk.json("list")
        assert routes
        assert all(one["listens"] for one in routes)
    finally:
        shutil.rmtree(f"/tmp/qa-open-{desk.port}", ignore_errors=True)


def edits_options(desk: Desk) -> str:
    """An editor in which the person lets the daemon ask."""
    script = desk.machine.home / "editor"
    script.write_text(
        '#!/bin/sh\nfor file; do :; done\nprintf "[Service]\\n'
        'RestrictAddressFamilies=AF_UNIX AF_NETLINK\\n" >"$file"\n'
    )
    script.chmod(0o755)
    (desk.machine.unit_dir / f"{SERVICE}.d" / "zz.conf").rename(
        desk.machine.unit_dir / f"{SERVICE}.d" / "aa.conf"
    )
    desk.machine.systemctl("daemon-reload")
    return str(script)


# -------------------------------------------------- what a person has to do


def test_a_port_that_a_program_has_is_no_matter_of_a_command(
    desk: Desk,
) -> None:
    own(desk)
    with socket.create_server(("127.0.0.1", desk.port)):
        desk.start(desk.tcp, check=False)
        ((text, mend, advice),) = printed(desk)
        assert f"127.0.0.1:{desk.port} is taken by" in text
        assert mend == ""
        assert advice.startswith("end that program, then ")
    shell(desk, advice.partition("then ")[2].partition(";")[0], "false")
    is_content(desk)


def call(desk: Desk) -> bytes:
    with socket.create_connection(
        ("127.0.0.1", desk.port), timeout=PATIENCE
    ) as sock:
        try:
            return sock.recv(100)
        except ConnectionResetError:
            return b""


def wait_for(desk: Desk, condition: Callable[[], bool]) -> None:
    """The journal takes its time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, desk.try_("check").stdout
        time.sleep(0.1)


def service(desk: Desk, code: int = 0) -> None:
    """A qubes.ConnectTCP in the qube work that says hello and exits so."""
    path = desk.machine.loopback / "qubes" / "work" / "rpc"
    script = path / "qubes.ConnectTCP"
    script.write_text(
        f"#!/bin/sh\n{'echo hello' if not code else f'exit {code}'}\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


FAILURES = [
    ("policy", "with exit code 126: refused", "30-user.policy"),
    ("127", "with exit code 127: no such service", "in the template of work"),
    ("125", "with exit code 125: the service could", "start in work what"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "said", "advised"), FAILURES)
def test_a_call_that_failed_is_told_with_what_to_do_elsewhere(
    desk: Desk, how: str, said: str, advised: str
) -> None:
    desk.machine.add_qube("work")
    if how == "policy":
        desk.scene.policy("* * @anyvm @anyvm deny")
    elif how == "125":
        # Nothing listens on the port there.
        pass
    else:
        (desk.machine.loopback / "qubes" / "work" / "rpc" / "none").touch()
        desk.scene.faults()
        desk.machine.run(["true"])
    desk.run("add", "tcp", str(desk.port), "work")
    if how == "127":
        service(desk, 127)
    assert call(desk) == b""
    wait_for(desk, lambda: desk.try_("check").returncode != 0)
    ((text, mend, advice),) = printed(desk)
    assert said in text
    assert mend == ""
    assert advised in advice
    # What the person then does there, and another call.
    if how == "policy":
        desk.scene.policy("* * @anyvm @anyvm allow")
    service(desk)
    assert call(desk) == b"hello\n"
    wait_for(desk, lambda: desk.try_("check").returncode == 0)


def test_a_client_that_is_not_there_is_no_matter_of_a_command(
    desk: Desk,
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.scene.options(CLIENT="/nowhere/qrexec-client-vm")
    desk.machine.systemctl("daemon-reload")
    ((text, mend, advice),) = printed(desk)
    assert "/nowhere/qrexec-client-vm is not there" in text
    assert (mend, "take out what sets it" in advice) == ("", True)


@pytest.mark.parametrize(
    "lines",
    [
        ("WorkingDirectory=/nowhere", "RestartSec=1h"),
        # Seen while it is being tried once more.
        ("ExecStartPre=sh -c 'test -e x && exec sleep 1h; touch x; exit 1'",),
    ],
)
def test_a_daemon_that_does_not_come_up_is_no_matter_of_a_command(
    desk: Desk, lines: tuple[str, ...]
) -> None:
    desk.run("add", "tcp", str(desk.port), "gitweb")
    drop_in = own(
        desk,
        "[Service]",
        f"WorkingDirectory={desk.machine.home}",
        "KillSignal=SIGTERM",
        *lines,
        unit=SERVICE,
        name="x",
    )
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("start", "--no-block", SERVICE)

    def is_seen() -> bool:
        return "is started again" in desk.try_("check").stdout

    wait_for(desk, is_seen)
    (found,) = [one for one in printed(desk) if "is started again" in one[0]]
    assert f"journalctl --user -u {SERVICE}" in found[0]
    assert (found[1], "mend what it says" in found[2]) == ("", True)
    desk.machine.systemctl("stop", SERVICE)
    desk.machine.systemctl("reset-failed", SERVICE, check=False)
    drop_in.unlink()
    desk.machine.systemctl("daemon-reload")
    is_content(desk)


def test_a_file_that_may_be_of_any_unit_is_no_matter_of_a_command(
    desk: Desk,
) -> None:
    (desk.machine.unit_dir / "gitweb.conf").write_text("\n".join(section(desk)))
    (found,) = [one for one in printed(desk) if "gitweb.conf" in one[0]]
    assert (found[1], "move it into the folder" in found[2]) == ("", True)


def test_a_unit_whose_name_has_no_argument_is_no_matter_of_a_command(
    desk: Desk,
) -> None:
    (desk.machine.unit_dir / "qrexec-connect-tcp-x.socket").write_text(
        "\n".join((*section(desk), f"Service={SERVICE}", ""))
    )
    desk.start("qrexec-connect-tcp-x.socket", check=False)
    (found,) = [one for one in printed(desk) if "is no port" in one[0]]
    assert (found[1], "unit that is named for it" in found[2]) == ("", True)


def test_what_an_empty_file_of_a_template_masks_is_told_by_its_name(
    desk: Desk,
) -> None:
    own(desk)
    (desk.machine.unit_dir / "qrexec-connect-tcp@.socket").touch()
    desk.machine.systemctl("daemon-reload")
    (found,) = desk.json("list")
    assert found["refused"].endswith("unmask qrexec-connect-tcp@.socket")


def test_without_routes_nobody_is_told_to_run_an_example(desk: Desk) -> None:
    ((_, mend, advice),) = (
        one for one in printed(desk) if "there are no routes" in one[0]
    )
    assert mend == ""
    assert shlex.split(advice)[-1] == "QUBE"
