"""Which connection reaches which qube: drop-ins as people write, edit, break
and delete them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import trio
from scenario import (
    Scene,
    ask,
    connect,
    free_port,
    is_reset,
    receive_all,
    says,
    send,
    write_script,
)

from qrexec_activate.loopback.machine import Machine


async def test_two_drop_ins_reach_two_qubes(scene: Scene) -> None:
    gitweb, work = ("127.0.0.1", scene.port), ("127.0.0.2", scene.port)
    await scene.qube("gitweb")
    await scene.qube("work")
    scene.write(
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{scene.port}",
        "FileDescriptorName=gitweb",
    )
    scene.write(
        "work",
        "[Socket]",
        f"ListenStream=127.0.0.2:{scene.port}",
        "FileDescriptorName=work",
    )
    await scene.start()
    assert await ask(gitweb) == "gitweb"
    assert await ask(work) == "work"
    assert [
        (call["target"], call["service"], call["argument"])
        for call in scene.calls()
    ] == [
        ("gitweb", "qubes.ConnectTCP", str(scene.port)),
        ("work", "qubes.ConnectTCP", str(scene.port)),
    ]


async def test_three_drop_ins_reach_three_qubes(scene: Scene) -> None:
    addresses = {name: scene.address() for name in ("zebra", "alpha", "middle")}
    for name, address in addresses.items():
        await scene.qube(name)
        scene.drop_in(name, address)
    await scene.start()
    for name, address in addresses.items():
        assert await ask(address) == name


async def test_one_port_of_two_instances_each_reaches_its_own_service(
    scene: Scene,
) -> None:
    other = free_port()
    first, second = scene.address(), scene.address(other)
    await scene.qube("work", says("work on the one port"))
    await scene.serve("work", says("work on the other port"), other)
    scene.drop_in("work", first)
    scene.drop_in("work", second, unit=f"qrexec-connect-tcp@{other}.socket")
    await scene.start(scene.unit, f"qrexec-connect-tcp@{other}.socket")
    assert await ask(first) == "work on the one port"
    assert await ask(second) == "work on the other port"


def edit(machine: Machine, unit: str, text: str) -> None:
    """`systemctl edit`, at a terminal, with an editor that writes this text
    into the file that it is given."""
    content = machine.home / "typed"
    content.write_text(text)
    # From systemd 257 on, the number of a line comes before the file.
    editor = machine.home / "editor"
    editor.write_text(
        f'#!/bin/sh\nfor file; do :; done\ncat {content} >"$file"\n'
    )
    editor.chmod(0o755)
    controller, terminal = os.openpty()
    try:
        subprocess.run(
            ["systemctl", "--user", "edit", unit],
            env={**machine.environment, "SYSTEMD_EDITOR": str(editor)},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            check=True,
            timeout=60,
        )
    finally:
        os.close(controller)
        os.close(terminal)


async def test_an_override_by_systemctl_edit_sends_all_listeners_to_another_qube(
    scene: Scene,
) -> None:
    first, second = scene.address(), scene.address()
    for name in ("gitweb", "work", "vault"):
        await scene.qube(name)
    scene.drop_in("gitweb", first)
    scene.drop_in("mail", second, "work")
    await scene.start()
    assert await ask(first) == "gitweb"
    edit(scene.machine, scene.unit, "[Socket]\nFileDescriptorName=vault\n")
    assert (
        scene.machine.unit_dir / f"{scene.unit}.d" / "override.conf"
    ).exists()
    await scene.systemctl("restart", scene.unit)
    assert await ask(first) == "vault"
    assert await ask(second) == "vault"


async def test_an_override_adds_a_listener_of_its_own(scene: Scene) -> None:
    first, second = scene.address(), scene.address()
    for name in ("gitweb", "work"):
        await scene.qube(name)
    scene.drop_in("gitweb", first)
    await scene.start()
    edit(
        scene.machine,
        scene.unit,
        f"[Socket]\nListenStream={second[0]}:{second[1]}\nFileDescriptorName=work\n",
    )
    await scene.systemctl("restart", scene.unit)
    assert await ask(first) == "gitweb"
    assert await ask(second) == "work"


async def test_an_empty_listen_stream_takes_away_what_came_before(
    scene: Scene,
) -> None:
    old, new, kept = scene.address(), scene.address(), scene.address()
    for name in ("gitweb", "work"):
        await scene.qube(name)
    scene.drop_in("a", old, "gitweb")
    scene.write(
        "b",
        "[Socket]",
        "ListenStream=",
        f"ListenStream={new[0]}:{new[1]}",
        "FileDescriptorName=work",
    )
    scene.drop_in("c", kept, "gitweb")
    await scene.start()
    with pytest.raises(ConnectionRefusedError):
        await connect(old)
    assert await ask(new) == "work"
    assert await ask(kept) == "gitweb"


async def test_several_listeners_in_one_file_reach_one_qube(
    scene: Scene,
) -> None:
    addresses = [scene.address() for _ in range(3)]
    other = scene.address()
    path = scene.machine.runtime / "work.sock"
    await scene.qube("work")
    await scene.qube("gitweb")
    listeners = [f"ListenStream={host}:{port}" for host, port in addresses]
    scene.write(
        "work",
        "[Socket]",
        *listeners,
        "FileDescriptorName=work",
        f"ListenStream={path}",
    )
    scene.drop_in("gitweb", other)
    await scene.start()
    for address in (*addresses, str(path)):
        assert await ask(address) == "work"
    assert await ask(other) == "gitweb"


async def test_specifiers_stand_for_the_instance_and_the_runtime_folder(
    scene: Scene,
) -> None:
    name = f"q-{scene.port}"
    address = scene.address()
    await scene.qube(name)
    await scene.qube("work")
    scene.write(
        "percent",
        "[Socket]",
        "ListenStream=%t/of-%i",
        f"ListenStream={address[0]}:%i",
        "FileDescriptorName=q-%i",
    )
    scene.write(
        "work", "[Socket]", "ListenStream=%t/100%%", "FileDescriptorName=work"
    )
    await scene.start()
    assert await ask(str(scene.machine.runtime / f"of-{scene.port}")) == name
    assert await ask(address) == name
    assert await ask(str(scene.machine.runtime / "100%")) == "work"


async def test_repeated_sections_and_joined_lines_are_read_as_systemd_reads_them(
    scene: Scene,
) -> None:
    first, second = scene.address(), scene.address()
    await scene.qube("work")
    await scene.qube("gitweb")
    scene.write(
        "work",
        "# ListenStream=127.0.0.9:1",
        "[Socket]",
        "FileDescriptorName=gitweb",
        "ListenStream=\\",
        "; a comment inside of a joined line",
        f"  {first[0]}:{first[1]}",
        "[Unit]",
        "Description=FileDescriptorName=gitweb",
        "[Socket]",
        "FileDescriptorName = work",
    )
    scene.drop_in("xgitweb", second, "gitweb")
    await scene.start()
    assert await ask(first) == "work"
    assert await ask(second) == "gitweb"


# ---------------------------------------------- changed without a daemon-reload


async def test_a_drop_in_changed_without_daemon_reload_is_refused_and_its_neighbours_work(
    scene: Scene,
) -> None:
    gitweb, work = scene.address(), scene.address()
    for name in ("gitweb", "work", "vault"):
        await scene.qube(name)
    scene.drop_in("gitweb", gitweb)
    scene.drop_in("work", work)
    await scene.start()
    path = scene.drop_in("work", work, "vault")
    assert await is_reset(work)
    assert await ask(gitweb) == "gitweb"
    await scene.refusal(work, str(path), "daemon-reload")
    assert [call["target"] for call in scene.calls()] == ["gitweb"]

    await scene.systemctl("daemon-reload")
    await scene.systemctl("restart", scene.unit)
    assert await ask(work) == "vault"


async def test_a_drop_in_changed_back_and_reloaded_is_served_again(
    scene: Scene,
) -> None:
    work = await scene.route()
    scene.drop_in("work", work, "vault")
    assert await is_reset(work)
    scene.drop_in("work", work, "work")
    await scene.systemctl("daemon-reload")
    await scene.systemctl("restart", scene.unit)
    assert await ask(work) == "work"


async def test_a_running_daemon_keeps_to_what_systemd_has_loaded(
    scene: Scene,
) -> None:
    """Nothing changes under it: a drop-in takes effect when its instance is
    restarted, as with any other unit."""
    work = await scene.route()
    await scene.qube("vault")
    assert await ask(work) == "work"
    scene.drop_in("work", work, "vault")
    await scene.systemctl("daemon-reload")
    assert await ask(work) == "work"
    await scene.systemctl("restart", scene.unit)
    assert await ask(work) == "vault"


async def test_a_reload_without_a_restart_never_sends_the_old_listener_to_the_new_qube_of_another(
    scene: Scene,
) -> None:
    """Two drop-ins swap their qubes on disk and in systemd, but the sockets
    were opened by the old ones."""
    first, second = scene.address(), scene.address()
    for name in ("gitweb", "work"):
        await scene.qube(name)
    scene.drop_in("a", first, "gitweb")
    scene.drop_in("b", second, "work")
    await scene.start()
    scene.drop_in("a", second, "gitweb")
    scene.drop_in("b", first, "work")
    await scene.systemctl("daemon-reload")
    # By now the files say so, and so does systemd: each address belongs to the
    # qube that its own file names.
    assert await ask(first) == "work"
    assert await ask(second) == "gitweb"


@pytest.mark.parametrize("deleted", ["gitweb", "work"])
async def test_a_drop_in_deleted_under_a_running_manager_is_refused_alone(
    scene: Scene, deleted: str
) -> None:
    addresses = {name: scene.address() for name in ("gitweb", "work")}
    paths = {}
    for name, address in addresses.items():
        await scene.qube(name)
        paths[name] = scene.drop_in(name, address)
    await scene.start()
    paths[deleted].unlink()
    left = "work" if deleted == "gitweb" else "gitweb"
    assert await is_reset(addresses[deleted])
    assert await ask(addresses[left]) == left
    await scene.refusal(addresses[deleted], str(paths[deleted]), "is gone")
    assert [call["target"] for call in scene.calls()] == [left]


# ------------------------------------------------ bad drop-ins beside good ones


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("1work", "is no target"),
        ("-x", "option"),
        ("--help", "option"),
        ("@anyvm", "keywords"),
        ("work!", "is no target"),
        ("my work", "is no target"),
        ("w" * 32, "at most 31"),
        ("@dispvm\\x3a-x", "option"),
        ("work\\x0a", "is no target"),
        ("wo\\rk", "backslash"),
    ],
)
async def test_a_misspelt_target_is_refused_by_file_and_its_neighbour_works(
    scene: Scene, target: str, word: str
) -> None:
    bad, good = scene.address(), scene.address()
    await scene.qube("gitweb")
    path = scene.drop_in("bad", bad, target)
    scene.drop_in("gitweb", good)
    await scene.start()
    assert await is_reset(bad)
    assert await ask(good) == "gitweb"
    await scene.refusal(bad, f"{path}:3", word)
    assert [call["target"] for call in scene.calls()] == ["gitweb"]


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("target", ["work:x", "wörk", "w" * 256, ""])
async def test_a_name_that_systemd_drops_is_no_name_and_borrows_none(
    scene: Scene, target: str, position: str
) -> None:
    bad, good = scene.address(), scene.address()
    await scene.qube("gitweb")
    path = scene.drop_in(
        "a-bad" if position == "before" else "z-bad", bad, target
    )
    scene.drop_in("gitweb", good)
    await scene.start()
    assert await is_reset(bad)
    assert await ask(good) == "gitweb"
    await scene.refusal(bad, str(path))
    assert [call["target"] for call in scene.calls()] == ["gitweb"]


async def test_a_unit_without_a_name_says_so(scene: Scene) -> None:
    address = scene.address()
    path = scene.drop_in("gitweb", address, "")
    await scene.start()
    assert await is_reset(address)
    await scene.refusal(address, scene.unit, "FileDescriptorName", f"{path}:2")
    assert scene.calls() == []


@pytest.mark.parametrize("port", ["0", "65536", "080", "abc", "1.2", "+80"])
async def test_a_port_that_is_none_is_refused(scene: Scene, port: str) -> None:
    unit = f"qrexec-connect-tcp@{port.replace('+', chr(92) + 'x2b')}.socket"
    bad, good = scene.address(), scene.address()
    await scene.qube("work")
    scene.drop_in("work", bad, unit=unit)
    scene.drop_in("work", good)
    await scene.start(unit, scene.unit)
    assert await is_reset(bad)
    assert await ask(good) == "work"
    await scene.refusal(bad, unit, "is no port")
    assert [call["argument"] for call in scene.calls()] == [str(scene.port)]


async def test_a_listener_that_is_refused_stays_refused_and_says_so_once(
    scene: Scene,
) -> None:
    address = scene.address()
    scene.drop_in("work", address, "1work")
    await scene.start()
    for _ in range(10):
        assert await is_reset(address)
    assert len(scene.lines("reset a connection")) == 1
    assert scene.calls() == []
    assert "1 refused" in scene.machine.property(
        "qrexec-connect-tcp.service", "StatusText"
    )


# ------------------------------------------------ keywords, escapes, other RPCs


async def test_keywords_reach_qrexec_as_they_are(scene: Scene) -> None:
    addresses = {
        name: scene.address()
        for name in ("@default", "@dispvm", "@dispvm:work", "dom0")
    }
    for name in ("work", "default-dvm"):
        await scene.qube(name)
    scene.policy("* * client @default allow target=work", "* * client * allow")
    for number, (target, address) in enumerate(addresses.items()):
        scene.drop_in(f"{number}", address, target.replace(":", "\\x3a"))
    await scene.start()
    assert await ask(addresses["@default"]) == "work"
    assert await ask(addresses["@dispvm"]) == "default-dvm"
    assert await ask(addresses["@dispvm:work"]) == "work"
    assert await is_reset(addresses["dom0"])
    assert [call["target"] for call in scene.calls()] == list(addresses)


UNIX_SERVICE = "qrexec-connect-unix.service"


@pytest.mark.parametrize(
    ("instance", "argument"),
    [
        ("a\\x2bb", "a+b"),
        ("my-name", "my-name"),
        ("a.b_c", "a.b_c"),
        ("\\x61\\x2d", "a-"),
    ],
)
async def test_escapes_in_an_instance_are_decoded_and_dashes_left_alone(
    scene: Scene, instance: str, argument: str
) -> None:
    unit = f"qrexec-connect-unix@{instance}.socket"
    path = str(scene.machine.runtime / "here")
    script = scene.add_qube("work") / "rpc" / "qubes.ConnectUnix"
    write_script(
        script,
        '#!/bin/sh\ncat >/dev/null\nprintf %s "$QREXEC_SERVICE_ARGUMENT"\n',
    )
    scene.drop_in("work", path, unit=unit)
    await scene.start(unit)
    assert await ask(path) == argument


@pytest.mark.parametrize(
    "instance",
    ["a\\x2fb", "a\\x3ab", "a\\x20b", "\\x2ehidden", "a\\xff", "\\xc3\\xa4"],
)
async def test_an_argument_that_qrexec_would_alter_is_refused(
    scene: Scene, instance: str
) -> None:
    bad, good = (
        f"qrexec-connect-unix@{instance}.socket",
        "qrexec-connect-unix@good.socket",
    )
    paths = {
        unit: str(scene.machine.runtime / name)
        for name, unit in (("bad", bad), ("good", good))
    }
    script = scene.add_qube("work") / "rpc" / "qubes.ConnectUnix"
    write_script(script, "#!/bin/sh\nexec cat\n")
    for unit, path in paths.items():
        scene.drop_in("work", path, unit=unit)
    await scene.start(bad, good)
    # The kernel tells a unix client of no reset, but its byte must not arrive
    # anywhere.
    async with await connect(paths[bad]) as stream:
        with contextlib.suppress(trio.BrokenResourceError):
            await send(stream, b"secret")
            assert await receive_all(stream) == b""
    assert await ask(paths[good], b"fine") == "fine"
    await scene.refusal(paths[bad], bad)
    assert [call["argument"] for call in scene.calls()] == ["good"]


OWN_SOCKET = """\
[Socket]
ListenStream={listen}
FileDescriptorName=work
Service={service}
"""
OWN_SERVICE = """\
[Service]
Type=notify
ExecStart={command} serve {rpc} --unit %n
KillMode=process
"""


async def test_a_users_own_rpc_works_with_units_of_their_own(
    scene: Scene,
) -> None:
    machine = scene.machine
    rpc = scene.add_qube("work") / "rpc" / "my.Notes"
    write_script(
        rpc,
        '#!/bin/sh\nprintf "%s:" "${0##*/}+$QREXEC_SERVICE_ARGUMENT"\nexec cat\n',
    )
    command = f"{sys.executable} -m qrexec_activate"
    plain, instance = (
        str(machine.runtime / "notes"),
        str(machine.runtime / "notes-of-today"),
    )
    machine.write_unit(
        "my-notes.socket",
        OWN_SOCKET.format(listen=plain, service="my-notes.service"),
    )
    machine.write_unit(
        "my-notes@.socket",
        OWN_SOCKET.format(listen="%t/notes-of-%i", service="my-notes.service"),
    )
    machine.write_unit(
        "my-notes.service", OWN_SERVICE.format(command=command, rpc="my.Notes")
    )
    await scene.systemctl("daemon-reload")
    await scene.systemctl("start", "my-notes.socket", "my-notes@today.socket")
    assert await ask(plain, b"hello") == "my.Notes+:hello"
    assert await ask(instance, b"hello") == "my.Notes+today:hello"
    assert "(" in scene.lines("serving", plain)[0]


@pytest.mark.parametrize("place", ["alone", "last", "in the middle"])
async def test_a_disposable_of_a_named_template_works_wherever_it_stands(
    scene: Scene, place: str
) -> None:
    """systemd allows no colon in a name, and passes an escaped one on as it
    is."""
    disposable, others = scene.address(), []
    await scene.qube("proxy-dvm", says("a disposable"))
    names = {"alone": [], "last": ["a"], "in the middle": ["a", "z"]}[place]
    for name in names:
        others.append((name, scene.address()))
        await scene.qube(name)
        scene.drop_in(name, others[-1][1])
    scene.drop_in("m", disposable, r"@dispvm\x3aproxy-dvm")
    await scene.start()
    assert await ask(disposable) == "a disposable"
    assert scene.calls()[0]["target"] == "@dispvm:proxy-dvm"
    for name, address in others:
        assert await ask(address) == name
