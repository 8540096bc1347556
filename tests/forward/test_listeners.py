"""What can be listened on, and what the command says where it was given nothing
that it can serve."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence

import pytest
import trio
from scenario import (
    PATIENCE,
    Scene,
    ask,
    connect,
    free_port,
    is_reset,
    measured,
    receive_all,
    says,
    until,
    write_script,
    written,
)

#: This machine itself; Python 3.11 has no name for it.
VMADDR_CID_LOCAL = 1
COMMAND = [sys.executable, "-m", "qrexec_activate"]


async def test_tcp4_tcp6_unix_and_abstract_listeners_are_served(
    scene: Scene,
) -> None:
    machine = scene.machine
    addresses = {
        "four": scene.address(),
        "six": ("::1", scene.port),
        "path": str(machine.runtime / "work.sock"),
        "abstract": f"@{machine.directory.name}/abstract",
    }
    for name, address in addresses.items():
        await scene.qube(name)
        scene.drop_in(name, address)
    await scene.start()
    for name, address in addresses.items():
        assert await ask(address) == name
    assert len(scene.lines("serving")) == 4


async def test_a_bare_port_is_every_address(scene: Scene) -> None:
    port = free_port()
    await scene.qube("work")
    scene.write(
        "work", "[Socket]", f"ListenStream={port}", "FileDescriptorName=work"
    )
    await scene.start()
    assert await ask(("127.0.0.1", port)) == "work"
    assert await ask(("::1", port)) == "work"


def vsock_problem(cid: int) -> str:
    """Why this kernel cannot listen on a vsock address; empty where it can."""
    try:
        with socket.socket(socket.AF_VSOCK) as sock:
            sock.bind((cid, socket.VMADDR_PORT_ANY))
    except OSError as error:
        return f"this kernel cannot bind vsock CID {cid}: {error}"
    return ""


@pytest.mark.skipif(
    bool(vsock_problem(VMADDR_CID_LOCAL)),
    reason=vsock_problem(VMADDR_CID_LOCAL) or "no",
)
async def test_a_vsock_listener_is_served(scene: Scene) -> None:
    port = free_port()
    await scene.qube("work")
    scene.write(
        "work",
        "[Socket]",
        f"ListenStream=vsock:1:{port}",
        "FileDescriptorName=work",
    )
    await scene.start()
    sock = trio.socket.socket(socket.AF_VSOCK)
    with trio.fail_after(PATIENCE):
        await sock.connect((VMADDR_CID_LOCAL, port))
    async with trio.SocketStream(sock) as stream:
        await stream.send_all(b"who?")
        await stream.send_eof()
        assert await receive_all(stream) == b"work"


@pytest.mark.skipif(
    bool(vsock_problem(socket.VMADDR_CID_ANY)),
    reason=vsock_problem(socket.VMADDR_CID_ANY) or "no",
)
async def test_a_vsock_listener_is_known_by_its_port(scene: Scene) -> None:
    """Also where nothing can connect to it, it is bound, told apart and
    announced."""
    address, port = scene.address(), free_port()
    await scene.qube("gitweb")
    scene.write(
        "work",
        "[Socket]",
        f"ListenStream=vsock::{port}",
        "FileDescriptorName=work",
    )
    scene.drop_in("gitweb", address)
    await scene.start()
    assert await ask(address) == "gitweb"
    await scene.logged(f"serving vsock::{port} → work")


async def test_sockets_of_the_unix_prefix_are_for_their_user_only(
    scene: Scene,
) -> None:
    machine = scene.machine
    unit = "qrexec-connect-unix@notes.socket"
    path = machine.runtime / "made" / "notes"
    script = machine.add_qube("vault") / "rpc" / "qubes.ConnectUnix"
    write_script(script, "#!/bin/sh\nexec cat\n")
    scene.drop_in("vault", str(path), unit=unit)
    await scene.start(unit)
    assert await ask(str(path), b"hello") == "hello"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    (line,) = await scene.logged("→ vault qubes.ConnectUnix+notes: ended")
    assert f"pid {os.getpid()} uid {os.getuid()}" in line


async def test_a_real_unix_socket_of_another_qube_is_reached(
    scene: Scene,
) -> None:
    """The one RPC service of this project's own that the unix prefix needs, as
    it ships."""
    machine = scene.machine
    folder = machine.add_qube("vault") / "run" / "qubes.ConnectUnix"
    folder.mkdir()
    machine.add_rpc("vault", "qubes.ConnectUnix")
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(str(folder / "notes"))
    listener.listen()
    scene.nursery.start_soon(
        trio.serve_listeners, says("vault"), [trio.SocketListener(listener)]
    )
    unit = "qrexec-connect-unix@notes.socket"
    path = str(machine.runtime / "notes")
    scene.drop_in("vault", path, unit=unit)
    await scene.start(unit)
    assert await ask(path) == "vault"


@pytest.mark.parametrize(
    ("setting", "kind"),
    [
        ("ListenDatagram={host}:{port}", "Datagram"),
        ("ListenDatagram=%t/datagram", "Datagram"),
        ("ListenSequentialPacket=%t/packets", "SequentialPacket"),
        ("ListenFIFO=%t/fifo", "FIFO"),
        # The kernel tells a netlink socket's address in no form that a file
        # could hold, so no file is named.
        ("ListenNetlink=kobject-uevent 1", "Netlink"),
    ],
)
async def test_what_carries_no_byte_stream_is_refused_and_the_rest_works(
    scene: Scene, setting: str, kind: str
) -> None:
    good = scene.address()
    host, port = scene.address()
    await scene.qube("work")
    path = scene.write(
        "bad",
        "[Socket]",
        setting.format(host=host, port=port),
        "FileDescriptorName=work",
    )
    scene.drop_in("work", good)
    await scene.start()
    assert await ask(good) == "work"
    (line,) = await scene.logged(
        "is refused",
        f"a {kind} socket cannot carry a byte stream; use ListenStream=",
    )
    assert f"{path}:2" in line or kind == "Netlink"
    assert " 1 refused;" in scene.machine.property(
        "qrexec-connect-tcp.service", "StatusText"
    )


async def test_packets_to_a_refused_listener_neither_spin_nor_stop_the_daemon(
    scene: Scene,
) -> None:
    good, bad = scene.address(), scene.address()
    packets = str(scene.machine.runtime / "packets")
    await scene.qube("work")
    scene.write(
        "bad",
        "[Socket]",
        f"ListenDatagram={written(bad)}",
        f"ListenSequentialPacket={packets}",
    )
    scene.drop_in("work", good)
    await scene.start()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _ in range(100):
            sock.sendto(b"hello", bad)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect(packets)
        assert await ask(good) == "work"
        pid = scene.pid()
        spent = cpu_ticks(pid)
        await trio.sleep(0.5)
        assert cpu_ticks(pid) - spent < 0.4 * os.sysconf("SC_CLK_TCK")
    assert [call["target"] for call in scene.calls()] == ["work"]


def cpu_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# --------------------------------------------------------------- without a unit


@contextlib.asynccontextmanager
async def socket_activate(
    scene: Scene, arguments: Sequence[str], command: Sequence[str]
) -> AsyncIterator[list[str]]:
    """Run systemd-socket-activate until the block ends; yields what the daemon
    has said so far, line by line."""
    environment = {**scene.machine.environment, **measured()}
    passed = [
        name
        for name in ("PYTHONPATH", "QREXEC_ACTIVATE_CLIENT", *measured())
        if name in environment
    ]
    argv = ["systemd-socket-activate", *[f"--setenv={name}" for name in passed]]
    process = await trio.lowlevel.open_process(
        [*argv, *arguments, *COMMAND, *command],
        env=environment,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said: list[str] = []

    async def read(stream: trio.abc.ReceiveStream) -> None:
        text = ""
        async for chunk in stream:
            text += chunk.decode()
            said[:] = text.splitlines()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, process.stderr)
        try:
            await until(
                "systemd-socket-activate listens",
                lambda: any("Listening" in line for line in said),
            )
            yield said
        finally:
            process.terminate()
            with trio.fail_after(PATIENCE), trio.CancelScope(shield=True):
                await process.wait()
        nursery.cancel_scope.cancel()


async def test_systemd_socket_activate_serves_with_its_fdname_as_the_target(
    scene: Scene,
) -> None:
    address = scene.address()
    await scene.qube("work")
    arguments = ["-l", written(address), "--fdname=work"]
    async with socket_activate(
        scene,
        arguments,
        ["serve", "qubes.ConnectTCP", "--argument", str(scene.port)],
    ) as said:
        assert await ask(address) == "work"
        await until(
            "the daemon says so", lambda: any("ended" in line for line in said)
        )
        assert any(
            line.startswith(
                f"serving {written(address)} → work qubes.ConnectTCP+"
            )
            for line in said
        )


async def test_systemd_socket_activate_without_a_name_is_told_what_is_missing(
    scene: Scene,
) -> None:
    address = scene.address()
    arguments = ["-l", written(address)]
    async with socket_activate(
        scene,
        arguments,
        ["serve", "qubes.ConnectTCP", "--argument", str(scene.port)],
    ) as said:
        assert await is_reset(address)
        await until(
            "the daemon says so",
            lambda: any("--fdname=work" in line for line in said),
        )
    assert scene.calls() == []


async def test_each_socket_of_systemd_socket_activate_has_its_own_name(
    scene: Scene,
) -> None:
    first, second, bad = scene.address(), scene.address(), scene.address()
    for name in ("gitweb", "work"):
        await scene.qube(name)
    arguments = [
        word
        for address in (first, second, bad)
        for word in ("-l", written(address))
    ]
    arguments.append("--fdname=gitweb:work:-x")
    async with socket_activate(
        scene,
        arguments,
        ["serve", "qubes.ConnectTCP", "--argument", str(scene.port)],
    ):
        assert await ask(first) == "gitweb"
        assert await ask(second) == "work"
        assert await is_reset(bad)


async def test_a_connection_of_accept_mode_is_refused_with_the_reason(
    scene: Scene,
) -> None:
    address = scene.address()
    await scene.qube("work")
    arguments = ["-l", written(address), "--fdname=work", "--accept"]
    async with (
        socket_activate(
            scene,
            arguments,
            ["serve", "qubes.ConnectTCP", "--argument", str(scene.port)],
        ) as said,
        await connect(address),
    ):
        await until(
            "the daemon says so",
            lambda: any("leave --accept out" in line for line in said),
        )
    assert scene.calls() == []


async def run(
    scene: Scene, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(PATIENCE):
        return await trio.run_process(
            [*COMMAND, *arguments],
            env={**scene.machine.environment, **environment},
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )


async def test_without_a_passed_socket_it_explains_how_it_is_started(
    scene: Scene,
) -> None:
    result = await run(
        scene,
        "serve",
        "qubes.ConnectTCP",
        "--unit",
        "qrexec-connect-tcp.service",
    )
    assert result.returncode == 2
    for words in (
        "started by systemd",
        "qrexec-connect-tcp@1234.socket",
        "FileDescriptorName=",
        "--fdname=",
    ):
        assert words in result.stderr.decode()
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("count", ["x", "-1", "1000", "99999999999", "0"])
async def test_a_senseless_listen_fds_is_an_error_in_words(
    scene: Scene, count: str
) -> None:
    script = 'LISTEN_PID=$$ LISTEN_FDS="$0" exec "$@"'
    argv = [
        "/bin/sh",
        "-c",
        script,
        count,
        *COMMAND,
        "serve",
        "qubes.ConnectTCP",
        "--argument",
        "80",
    ]
    with trio.fail_after(PATIENCE):
        result = await trio.run_process(
            argv,
            env=scene.machine.environment,
            capture_stderr=True,
            check=False,
        )
    said = result.stderr.decode()
    assert result.returncode == 2, said
    assert "Traceback" not in said
    assert "LISTEN_FDS" in said or "no socket was passed" in said


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["serve", "qubes.ConnectTCP", "--argument", "0"], "is no port"),
        (["serve", "my.Rpc", "--argument", "x" * 1025], "longer than 1024"),
        (["serve", "my.Rpc", "--argument", "a b"], "would silently turn"),
        (["serve", "-x"], "No such option"),
        (["serve", "my.Rpc+x"], "is no RPC name"),
        (
            ["serve", "my.Rpc", "--unit", "a.service", "--argument", "x"],
            "exclude each other",
        ),
        (["serve", "my.Rpc", "--exit-idle-time", "soon"], "is no time span"),
    ],
)
async def test_a_command_line_that_cannot_work_is_refused(
    scene: Scene, arguments: list[str], word: str
) -> None:
    # A socket is there, so that nothing else is to blame.
    script = (
        'exec 3<&0; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=work exec "$@"'
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        trio.fail_after(PATIENCE),
    ):
        result = await trio.run_process(
            ["/bin/sh", "-c", script, "sh", *COMMAND, *arguments],
            env=scene.machine.environment,
            stdin=listener.fileno(),
            capture_stderr=True,
            check=False,
        )
    said = result.stderr.decode()
    assert result.returncode == 2, said
    assert word in said
    assert "Traceback" not in said


async def test_a_service_unit_without_unit_option_is_told_to_add_it(
    scene: Scene,
) -> None:
    """All sockets of a unit have one name, so trusting names there could send
    bytes to the wrong qube."""
    machine = scene.machine
    address = scene.address()
    machine.write_unit(
        "my-tcp.socket",
        f"[Socket]\nListenStream={written(address)}\nFileDescriptorName=work\n",
    )
    machine.write_unit(
        "my-tcp.service",
        f"[Service]\nType=notify\nExecStart={' '.join(COMMAND)} serve my.Rpc\n",
    )
    await scene.systemctl("daemon-reload")
    await scene.systemctl("start", "my-tcp.socket")
    async with await connect(address):
        await scene.logged("add --unit %n to ExecStart=")
    assert scene.calls() == []
