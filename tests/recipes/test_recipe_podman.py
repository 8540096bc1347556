"""Podman: forwarder and service in containers without a network, by sockets of
every kind that systemd passes in."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from recipe import PATIENCE, ROOT, Recipe, require

from qrexec_activate.loopback.install import write_client

CACHE = (
    Path(os.environ.get("QREXEC_ACTIVATE_CACHE", "/var/cache/qrexec-activate"))
    / "recipes"
    / "podman"
)
NEEDS_ROOT = "the root file system of its containers belongs to root"
KINDS = ["tcp4", "tcp6", "unix", "abstract", "vsock"]
MEBIBYTES = 64
ROUNDS = 4
#: Podman in a machine that may itself be a container: cgroups of its own, and
#: no limit above those it has.
PODMAN = """\
#!/bin/sh
if [ "$1" = inside ]; then
    shift 2
    umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup
    exec /usr/bin/podman --cgroup-manager=cgroupfs --root={top}/root --runroot={top}/runroot run --cgroups=disabled \\
        --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 --ulimit memlock=65536:65536 "$@"
fi
exec unshare --mount "$0" inside "$@"
"""


def free_port() -> int:
    """Free on 127.0.0.1 and ::1, of which all qubes here have the latter in
    common."""
    while True:
        port = random.randint(10_000, 30_000)
        with (
            contextlib.suppress(OSError),
            socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
            ),
        ):
            return port


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Of a short name: Podman takes no longer one than 50 characters."""
    with tempfile.TemporaryDirectory(prefix="podman-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Iterator[Recipe]:
    require("podman", "podman", "crun", str(CACHE), root=NEEDS_ROOT)
    podman = folder / "podman"
    podman.write_text(PODMAN.format(top=folder))
    podman.chmod(0o755)
    probe = [
        podman,
        "run",
        "--rm",
        "--network=none",
        "--read-only",
        "--rootfs",
        CACHE,
        "/bin/true",
    ]
    result = subprocess.run(
        probe, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if result.returncode:
        pytest.skip(
            f"recipe podman: containers do not start here:"
            f" {result.stderr.strip().splitlines()[-1:]}"
        )
    with Recipe(
        "podman",
        substitutes={
            "/usr/bin/podman": str(podman),
            "/srv/containers/qrexec": str(CACHE),
        },
    ) as recipe:
        for qube in recipe.qubes.values():
            port = free_port()
            for path in qube.machine.unit_dir.glob("*.s*"):
                text = (
                    path.read_text()
                    .replace(":7777", f":{port}")
                    .replace("=@echo", f"=@echo-{port}")
                )
                # Two containers of one name exclude each other, and here both
                # qubes share one Podman.
                path.write_text(text.replace("--name=", f"--name={port}-"))
            qube.environment["PORT"] = str(port)
            qube.as_root = functools.partial(make_system, qube.name)
        give_qrexec(recipe)
        recipe.follow("")
        recipe.follow("The service")
        recipe.follow("The forwarder")
        yield recipe
        for qube in recipe.qubes.values():
            qube.run(
                "systemctl --user stop connect-echo.socket"
                " connect-echo.service echo.socket echo.service",
                check=False,
            )


def make_system(qube: str, command: str) -> str:
    """What root types is what tools/recipes-setup did, which takes a minute;
    the service needs less of it."""
    setup = (ROOT / "tools" / "recipes-setup").read_text()
    (packages,) = re.findall(r'\[podman\]="(python3-[^"]*)"', setup)
    forwarder = packages.removesuffix(" socat").split(" ")
    wanted = {"work": forwarder, "echo": ["python3"]}[qube]
    (release,) = re.findall(r"\[podman\]=(bookworm) ", setup)
    assert command == (
        f"debootstrap --variant=minbase --include={','.join(wanted)}"
        f" {release} /srv/containers/qrexec"
    )
    return ""


def give_qrexec(recipe: Recipe) -> None:
    """In the place of qrexec-client-vm the container gets the loopback, and in
    that of the forwarder's package this source, where the package has it."""
    work = recipe["work"]
    top = work.machine.directory
    client = top / "qrexec-client-vm-for-python3"
    write_client(str(client), str(work.machine.loopback), "/usr/bin/python3")
    script = top / "qrexec-activate"
    script.write_text(
        "#!/usr/bin/python3 -s\nimport sys\nfrom qrexec_activate.__main__ import"
        " main\nsys.exit(main())\n"
    )
    script.chmod(0o755)
    # The loopback's own: its qubes, and this source.
    folders = [top, recipe["echo"].machine.directory, ROOT]
    unit = work.machine.unit_dir / "connect-echo.service"
    text = unit.read_text()
    for written, here in {
        "--volume=/usr/bin/qrexec-client-vm:": f"--volume={client}:",
        "--volume=/run/qubes:/run/qubes --volume=/dev/xen:/dev/xen": " ".join(
            f"--volume={folder}:{folder}" for folder in folders
        ),
        "--volume=/usr/bin/qrexec-activate:": f"--volume={script}:",
        "--volume=/usr/lib/python3/dist-packages/qrexec_activate:": (
            f"--volume={ROOT}/qrexec_activate:"
        ),
    }.items():
        assert text.count(written) == 1, written
        text = text.replace(written, here)
    unit.write_text(text)


def connect(recipe: Recipe, qube: str, kind: str) -> socket.socket:
    """A connection to one of the five addresses of the unit in a qube."""
    place = recipe[qube]
    port = int(place.environment["PORT"])
    path = (
        place.machine.runtime
        / ("qrexec" if qube == "work" else "qubes.ConnectUnix")
        / "echo"
    )
    family, address = {
        "tcp4": (socket.AF_INET, (place.host, port)),
        "tcp6": (socket.AF_INET6, ("::1", port)),
        "unix": (socket.AF_UNIX, str(path)),
        "abstract": (socket.AF_UNIX, f"\0echo-{port}"),
        "vsock": (socket.AF_VSOCK, (1, port)),
    }[kind]
    sock = socket.socket(family)
    sock.settimeout(5 if kind == "vsock" else PATIENCE)
    try:
        sock.connect(address)
    except OSError as error:
        sock.close()
        if kind == "vsock":
            pytest.skip(
                f"recipe podman: the kernel gives this machine no vsock to"
                f" itself: {error}"
            )
        raise
    sock.settimeout(PATIENCE)
    return sock


def exchange(sock: socket.socket, data: bytes) -> bytes:
    with sock:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while chunk := sock.recv(1 << 16):
            answer += chunk
    return answer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("qube", ["echo", "work"])
def test_every_kind_of_socket(recipe: Recipe, qube: str, kind: str) -> None:
    assert (
        exchange(connect(recipe, qube, kind), b"all the way") == b"all the way"
    )


def test_processes_outside_of_the_container_hinder_nothing(
    recipe: Recipe,
) -> None:
    """Its control group has them all, as 0."""
    assert exchange(connect(recipe, "work", "tcp4"), b"all") == b"all"
    assert "serving" in recipe["work"].log
    assert "unwatched" not in recipe["work"].log


def test_containers_have_no_network_and_write_nothing(recipe: Recipe) -> None:
    exchange(connect(recipe, "work", "unix"), b"start")
    for program in (b"/echo/echo.py", b"/usr/bin/qrexec-activate\0serve"):
        found = inside_containers(program)
        assert found
        assert all(interfaces(pid) == {"lo"} for pid in found)
        assert all("ro" in root_options(pid) for pid in found)


def test_nothing_is_between(recipe: Recipe) -> None:
    """The service in the container accepts from the very socket that systemd
    opened: its bytes go through nothing that those of a program outside do not
    go through."""
    exchange(connect(recipe, "echo", "unix"), b"start")
    path = recipe["echo"].machine.runtime / "qubes.ConnectUnix" / "echo"
    (inode,) = {
        words[6]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if (words := line.split())[3] == "00010000" and words[7:] == [str(path)]
    }
    (pid,) = inside_containers(b"/echo/echo.py")
    held = {
        os.readlink(link)
        for link in Path(f"/proc/{pid}/fd").iterdir()
        if link.is_symlink()
    }
    assert f"socket:[{inode}]" in held


def inside_containers(program: bytes) -> list[int]:
    """The first processes of containers that run a program."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_first = (place / "status").read_text().partition("NSpid:")[
                2
            ].splitlines()[0].split()[1:] == ["1"]
            if is_first and program in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def interfaces(pid: int) -> set[str]:
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return {line.split(":")[0].strip() for line in lines}


def root_options(pid: int) -> list[str]:
    (options,) = (
        fields[5].split(",")
        for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
        if (fields := line.split())[4] == "/"
    )
    return options


def throughput(connect: Callable[[], socket.socket]) -> float:
    """MiB/s there and back, of bytes that are all counted."""
    code = (
        "import socket, sys\nsock = socket.socket(fileno=0)\nwant ="
        " int(sys.argv[1]) << 20\n"
        "buffer = bytearray(1 << 18)\nwhile want > 0 and (n :="
        " sock.recv_into(buffer)): want -= n\nsys.exit(want)"
    )
    with connect() as sock:
        # A time limit would make the socket non-blocking for the reader, too.
        sock.settimeout(None)
        reader = subprocess.Popen(
            [sys.executable, "-c", code, str(MEBIBYTES)], stdin=sock
        )
        block = bytes(1 << 18)
        begin = time.monotonic()
        for _ in range(MEBIBYTES * 4):
            sock.sendall(block)
        assert reader.wait(PATIENCE) == 0
        return MEBIBYTES / (time.monotonic() - begin)


def test_throughput_with_and_without_the_container(
    recipe: Recipe, record_property: Callable[[str, object], None]
) -> None:
    """The same bytes through the container, and through the same program
    outside: both are reported, not judged, each the best of some that take
    turns, after one of each that does not count."""
    path = recipe["echo"].machine.directory / "outside"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        code = recipe["echo"].machine.config / "echo" / "echo.py"
        start = f"exec 3<&0; LISTEN_FDS=1 exec /usr/bin/python3 {code}"
        with subprocess.Popen(
            ["/bin/sh", "-c", start], stdin=listener
        ) as outside:
            try:
                ways: dict[str, Callable[[], socket.socket]] = {
                    "inside": lambda: connect(recipe, "echo", "unix"),
                    "outside": lambda: connected(str(path)),
                }
                rounds = [
                    {name: throughput(way) for name, way in ways.items()}
                    for _ in range(ROUNDS)
                ]
                results = {
                    name: max(found[name] for found in rounds[1:])
                    for name in ways
                }
            finally:
                outside.kill()
    for name, rate in results.items():
        record_property(f"MiB/s {name}", round(rate))
    print(
        "echo by unix socket, MiB/s there and back:",
        {name: round(rate) for name, rate in results.items()},
    )


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE)
    if code := sock.connect_ex(path):
        raise OSError(code, errno.errorcode[code])
    return sock
