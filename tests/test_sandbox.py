"""The sandbox of the units: each directive holds in the daemon and in what
qrexec-client-vm inherits, and all works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from scenario import SERVICE, Scene, ask, connect, echo, echoes

UNITS = Path(__file__).resolve().parent.parent / "units"
SYSTEM = (
    UNITS.parent
    / "units-system"
    / "qrexec-connect-.service.d"
    / "10-system.conf"
)
SERVICES = sorted(UNITS.glob("*.service"))

#: What `systemd-analyze security` says at most: 0 is safe, 10 is not.
SYSTEM_CEILING = 2.0
USER_CEILING = 5.9

#: What systemd reports of itself: nothing in a process shows it where the
#: cgroup controllers are not there.
BY_PROPERTY = {
    "TasksMax": "4096",
    "MemoryHigh": str(512 << 20),
    "KeyringMode": "private",
}

#: Run in a pretend qube as the service, which inherits from qrexec-client-vm
#: what that inherits from the daemon.
ATTEMPTS = """\
import ctypes, errno, json, mmap, os, resource, socket, tempfile

libc = ctypes.CDLL(None, use_errno=True)


def attempt(action):
    try:
        result = action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return errno.errorcode[ctypes.get_errno()] if result == -1 else "ok"


def family(number, kind=socket.SOCK_STREAM):
    return attempt(lambda: socket.socket(number, kind).close())


def set_bit(bit):
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0o700 | bit)


with tempfile.TemporaryDirectory() as folder:
    os.close(os.open(f"{folder}/new", os.O_CREAT, 0o666))
    mode = os.stat(f"{folder}/new").st_mode & 0o777

status = {key: value.strip() for key, value in (line.split(":", 1) for line in open("/proc/self/status"))}
print(json.dumps({
    "NoNewPrivileges": status["NoNewPrivs"],
    "RestrictAddressFamilies": [
        family(socket.AF_UNIX), family(socket.AF_INET), family(socket.AF_INET6),
        family(socket.AF_NETLINK, socket.SOCK_RAW), family(socket.AF_PACKET, socket.SOCK_RAW),
    ],
    "SystemCallFilter": [
        attempt(lambda: libc.mount(b"none", b"/nowhere", b"tmpfs", 0, None)),
        attempt(lambda: libc.ptrace(0, 0, 0, 0)),
        attempt(lambda: os.setuid(os.getuid())),
        attempt(lambda: os.sched_setaffinity(0, os.sched_getaffinity(0))),
        # bpf(2) on x86-64 and on the rest of the architectures.
        attempt(lambda: libc.syscall(321 if os.uname().machine == "x86_64" else 280, 0, 0, 0)),
        # io_uring_setup(2), by which sockets and files could be opened past all
        # of this, and io_setup(2).
        attempt(lambda: libc.syscall(425, 8, ctypes.create_string_buffer(120))),
        attempt(lambda: libc.syscall(206 if os.uname().machine == "x86_64" else 0, 1, ctypes.create_string_buffer(8))),
    ],
    "Seccomp": status["Seccomp"],
    "MemoryDenyWriteExecute": attempt(
        lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    ),
    "LockPersonality": attempt(lambda: libc.personality(8)),
    "RestrictRealtime": attempt(lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))),
    "RestrictSUIDSGID": [attempt(lambda: set_bit(0o4000)), attempt(lambda: set_bit(0o2000))],
    "RestrictNamespaces": attempt(lambda: libc.unshare(0x10000000)),
    "UMask": [status["Umask"], f"{mode:04o}"],
    "LimitCORE": resource.getrlimit(resource.RLIMIT_CORE),
    "LimitNOFILE": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
}))
"""
HELD = {
    "NoNewPrivileges": "1",
    "RestrictAddressFamilies": ["ok", *["EAFNOSUPPORT"] * 4],
    "SystemCallFilter": ["EPERM"] * 7,
    "Seccomp": "2",
    "MemoryDenyWriteExecute": "EPERM",
    "LockPersonality": "EPERM",
    "RestrictRealtime": "EPERM",
    "RestrictSUIDSGID": ["EPERM", "EPERM"],
    "RestrictNamespaces": "EPERM",
    "UMask": ["0077", "0600"],
    "LimitCORE": [0, 0],
    "LimitNOFILE": 16384,
}
#: The sandbox is the part of [Service] from the first of these on; SystemCall…
#: are held by SystemCallFilter together.
FIRST = "NoNewPrivileges"


def sandbox_of(unit: Path) -> list[str]:
    lines = unit.read_text().splitlines()
    return [
        line
        for line in lines[lines.index(f"{FIRST}=yes") :]
        if line and not line.startswith("#")
    ]


def shipped(scene: Scene) -> None:
    """Undo what lets the services of pretend qubes use TCP, which in Qubes
    happens in another machine."""
    scene.write(
        "shipped",
        "[Service]",
        "RestrictAddressFamilies=",
        "RestrictAddressFamilies=AF_UNIX",
        unit=SERVICE,
    )


def add_service(scene: Scene, name: str, text: str) -> None:
    path = scene.machine.add_qube("work") / "rpc" / name
    path.write_text(text)
    path.chmod(0o755)


def exposure(unit: Path, *options: str) -> float:
    """The overall exposure level that systemd-analyze computes from a unit file
    and the drop-ins beside it alone."""
    said = subprocess.run(
        [
            "systemd-analyze",
            *options,
            "security",
            "--offline=true",
            "--no-pager",
            str(unit),
        ],
        env={
            **os.environ,
            "XDG_RUNTIME_DIR": str(unit.parent),
            "SYSTEMD_UNIT_PATH": str(unit.parent),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Overall exposure level" in said.stdout, said.stderr
    return float(
        said.stdout.rpartition("level for ")[2].partition(": ")[2].split()[0]
    )


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    for unit in SERVICES:
        shutil.copy(unit, tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [unit.name for unit in SERVICES])
def test_user_units_expose_little(name: str, copies: Path) -> None:
    assert exposure(copies / name, "--user") <= USER_CEILING


@pytest.mark.parametrize("name", [unit.name for unit in SERVICES])
def test_system_units_expose_less(name: str, copies: Path) -> None:
    shutil.copytree(SYSTEM.parent, copies / SYSTEM.parent.name)
    assert exposure(copies / name) <= SYSTEM_CEILING


def test_all_units_have_the_same_sandbox() -> None:
    first, *others = map(sandbox_of, SERVICES)
    assert all(other == first for other in others)


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_a_slow_machine_has_time_to_start_python(unit: Path) -> None:
    """Under emulation the first start took more than 30 s."""
    assert "\nTimeoutStartSec=90s\n" in unit.read_text()


def test_every_directive_is_tried_out() -> None:
    keys = {line.partition("=")[0] for line in sandbox_of(SERVICES[0])}
    held_together = {"SystemCallErrorNumber", "SystemCallArchitectures"}
    assert (
        keys - held_together == (HELD.keys() - {"Seccomp"}) | BY_PROPERTY.keys()
    )


async def test_each_directive_holds_in_what_qrexec_client_vm_starts(
    scene: Scene,
) -> None:
    shipped(scene)
    add_service(scene, "qubes.ConnectTCP", f"#!{sys.executable} -I\n{ATTEMPTS}")
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    held = json.loads(await ask(address))
    # From systemd 253 and Linux 6.3 on, the kernel itself refuses that.
    if held["MemoryDenyWriteExecute"] == "EACCES":
        held["MemoryDenyWriteExecute"] = "EPERM"
    assert held == HELD


async def test_each_directive_holds_in_the_daemon(scene: Scene) -> None:
    shipped(scene)
    add_service(scene, "qubes.ConnectTCP", "#!/bin/sh\ncat\n")
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    assert await ask(address) == "who?"
    folder = Path(f"/proc/{scene.pid()}")
    status = (folder / "status").read_text().splitlines()
    assert {"NoNewPrivs:\t1", "Seccomp:\t2", "Umask:\t0077"} <= set(status)
    limits = (folder / "limits").read_text()
    # The daemon has raised the first of the two, the soft limit, to the second.
    assert limits.partition("Max open files")[2].split()[:2] == [
        "16384",
        "16384",
    ]
    assert limits.partition("Max core file size")[2].split()[:2] == ["0", "0"]
    for name, value in BY_PROPERTY.items():
        assert scene.machine.property(SERVICE, name) == value


async def test_a_new_daemon_takes_over_connections_in_the_sandbox(
    scene: Scene,
) -> None:
    shipped(scene)
    add_service(scene, "qubes.ConnectTCP", "#!/bin/sh\ncat\n")
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    async with await connect(address) as stream:
        assert await echoes(stream)
        await scene.systemctl(
            "kill", "--kill-whom=main", "--signal=KILL", SERVICE
        )
        assert await ask(address) == "who?"
        await scene.logged("watching over 1 connection")
        assert await echoes(stream)


async def test_tcp_and_unix_listeners_and_both_relays_work_in_the_sandbox(
    scene: Scene, relay: str
) -> None:
    shipped(scene)
    add_service(scene, "qubes.ConnectTCP", "#!/bin/sh\ncat\n")
    listeners = [
        scene.address(),
        str(scene.machine.runtime / "s"),
        f"@{scene.machine.directory.name}-{relay}",
    ]
    for number, listener in enumerate(listeners):
        scene.drop_in(f"l{number}", listener, "work")
    await scene.start()
    assert [await ask(listener) for listener in listeners] == ["who?"] * 3


async def test_an_inherited_tcp_socket_is_all_the_network_there_is(
    scene: Scene,
) -> None:
    """A qube's own TCP service is out of reach for what runs in the sandbox,
    though TCP listeners are served."""
    shipped(scene)
    await scene.qube("work", echo)
    address = scene.address()
    scene.drop_in("work", address)
    await scene.start()
    # The pretend qube's end of qubes.ConnectTCP would need a TCP socket in this
    # sandbox.
    with trio.fail_after(60):
        async with await connect(address) as stream:
            assert await stream.receive_some(1) == b""
    await scene.logged("failed with exit code 125")


def test_systemd_takes_every_line_of_the_units(tmp_path: Path) -> None:
    """systemd ignores what it does not know with a warning, which for a sandbox
    is as bad as an error."""
    for unit in SERVICES:
        text = (
            unit.read_text().replace("/usr/bin/qrexec-activate", "/bin/true")
            + SYSTEM.read_text()
        )
        (tmp_path / unit.name).write_text(text)
    said = subprocess.run(
        [
            "systemd-analyze",
            "verify",
            "--man=no",
            *(str(tmp_path / unit.name) for unit in SERVICES),
        ],
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert [line for line in said.splitlines() if str(tmp_path) in line] == []


@pytest.mark.parametrize(
    "instance",
    [
        "qrexec-connect-tcp@5432.socket",
        "qrexec-connect-tcp-bind@2049-127.0.1.1.socket",
        "qrexec-connect-unix@notes.socket",
    ],
)
async def test_a_path_that_a_drop_in_opens_is_for_its_own_user(
    scene: Scene, instance: str
) -> None:
    # A folder of its own, which is made for this unit alone.
    name = instance.partition("@")[0]
    path = scene.machine.runtime / name / "work.sock"
    assert not path.parent.exists()
    scene.drop_in("work", str(path), unit=instance)
    await scene.start(instance)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
