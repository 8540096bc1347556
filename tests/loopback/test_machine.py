"""The units under a real user manager, and the private machine that runs it:
alone, complete, and gone afterwards."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from scenario import free_port

from qrexec_activate.loopback.machine import (
    Machine,
    MachineError,
    start_journald,
)

TREE = Path(__file__).resolve().parents[2]
KINDS = ("tcp", "unix", "tcp-bind")
# Daemons under coverage hand their figures over by these.
COVERAGE = {
    name: value
    for name, value in os.environ.items()
    if name.startswith("COVERAGE_")
}
WHO = "#!/bin/sh\necho {qube}\n"


def machine(
    command: list[str] | None = None, *, journal: bool = False
) -> Machine:
    return Machine(command, environment=COVERAGE, journal=journal)


@contextmanager
def journal() -> Iterator[None]:
    """A journal, without which what the manager itself says cannot be seen."""
    try:
        keeper = start_journald()
        keeper.__enter__()
    except MachineError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        keeper.__exit__(None, None, None)


def add_instance(m: Machine, qube: str, port: int) -> str:
    """A pretend qube that answers with its name, and an instance with a
    listener for it; not started."""
    rpc = m.add_qube(qube) / "rpc" / "qubes.ConnectTCP"
    rpc.write_text(WHO.format(qube=qube))
    rpc.chmod(0o755)
    unit = f"qrexec-connect-tcp@{port}.socket"
    m.write_drop_in(
        unit,
        qube,
        f"[Socket]\nListenStream=127.0.0.1:{port}\nFileDescriptorName={qube}\n",
    )
    m.systemctl("daemon-reload")
    return unit


def ask(port: int) -> str:
    """What the qube behind this port says."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as sock,
        sock.makefile() as file,
    ):
        return file.read().strip()


def said_by(m: Machine) -> str:
    """What the manager wrote to the journal."""
    subprocess.run(["journalctl", "--sync"], check=False, capture_output=True)
    return m.run(
        ["journalctl", "--no-pager", "-o", "cat", f"_PID={m.pid}"]
    ).stdout


def failed_units(m: Machine) -> str:
    return m.systemctl(
        "list-units", "--failed", "--no-legend", "--plain"
    ).strip()


def processes_of(directory: str) -> list[str]:
    """Every process with this folder among its arguments or in its
    environment."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (proc / "cmdline").read_bytes()
            environment = (proc / "environ").read_bytes()
        except OSError:
            continue
        if directory.encode() in arguments + environment:
            found.append(f"{proc.name}: {arguments!r}")
    return found


def cgroups_of(name: str) -> list[Path]:
    return list(Path("/sys/fs/cgroup").glob(f"**/*{name}*"))


def left_by(directory: Path) -> list[object]:
    """What is left of a machine: processes, folders, cgroups. A scope's cgroup
    goes a moment after its processes."""
    deadline = time.monotonic() + 5
    while True:
        left: list[object] = [
            *processes_of(str(directory)),
            *cgroups_of(directory.name),
        ]
        if directory.exists():
            left.append(directory)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


# -- the machine ---------------------------------------------------------------


def test_units_and_environment_of_the_person_are_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "systemd" / "user" / "qrexec-connect-tcp@1234.socket.d"
    own.mkdir(parents=True)
    (own / "private.conf").write_text(
        "[Socket]\nListenStream=127.0.0.1:1234\nFileDescriptorName=private\n"
    )
    (own.parent / "qrexec-connect-tcp.service").write_text(
        "[Service]\nExecStart=/bin/false\n"
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SYSTEMD_UNIT_PATH", str(own.parent))
    monkeypatch.setenv("QREXEC_ACTIVATE_RELAY", "of the person")

    with machine() as m:
        assert m.property("qrexec-connect-tcp@1234.socket", "DropInPaths") == ""
        assert m.property(
            "qrexec-connect-tcp.service", "FragmentPath"
        ).startswith(str(m.directory))
        assert "QREXEC_ACTIVATE_RELAY" not in m.systemctl("show-environment")
        shown = m.systemctl("list-unit-files", "--no-legend", "--plain")
        assert {
            line.split()[0]
            for line in shown.splitlines()
            if line.startswith("qrexec-")
        } == {
            f"qrexec-connect-{kind}{rest}"
            for kind in KINDS
            for rest in (".service", "@.socket", "-quiesce.target")
        }


def test_enable_writes_into_the_machine_only() -> None:
    with machine() as m:
        m.systemctl("enable", "qrexec-connect-unix@notes.socket")
        assert (
            m.unit_dir
            / "sockets.target.wants"
            / "qrexec-connect-unix@notes.socket"
        ).is_symlink()


def test_a_command_that_fails_says_what_systemd_said() -> None:
    with (
        machine() as m,
        pytest.raises(
            MachineError,
            match=r"systemctl --user start no-such\.socket: .*not found",
        ),
    ):
        m.systemctl("start", "no-such.socket")


def test_two_machines_side_by_side() -> None:
    ports = free_port(), free_port()
    with machine() as one, machine() as two:
        for m, qube, port in (
            (one, "gitweb", ports[0]),
            (two, "work", ports[1]),
        ):
            m.systemctl("start", add_instance(m, qube, port))
        assert [ask(port) for port in ports] == ["gitweb", "work"]
        one.systemctl("stop", "qrexec-connect-tcp.service")
        assert (
            two.property("qrexec-connect-tcp.service", "ActiveState")
            == "active"
        )
    assert not left_by(one.directory)
    assert not left_by(two.directory)


def test_a_service_runs_as_the_command_says(tmp_path: Path) -> None:
    script = tmp_path / "odd name $HOME %h"
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" >'{tmp_path}/said'\n")
    script.chmod(0o755)
    with machine([str(script), 'a "b" $HOME %h \\']) as m:
        m.systemctl("start", "qrexec-connect-tcp.service", check=False)
    assert (tmp_path / "said").read_text().splitlines() == [
        *(
            'a "b" $HOME %h \\',
            "serve",
            "qubes.ConnectTCP",
            "--unit",
            "qrexec-connect-tcp.service",
        )
    ]


HOLDER = """
import socket, sys, time
sys.path[:0] = {tests!r}
from test_machine import add_instance, machine
with machine() as m:
    unit = add_instance(m, "work", {port})
    (m.loopback / "qubes" / "work" / "rpc" / "qubes.ConnectTCP").write_text("#!/bin/sh\\necho here; exec sleep 1000\\n")
    m.systemctl("start", unit)
    sock = socket.create_connection(("127.0.0.1", {port}), timeout=30)
    assert sock.recv(5) == b"here\\n"
    print(m.directory, flush=True)
    {then}
"""


@pytest.mark.parametrize(
    ("then", "number", "code"),
    [
        ("pass", None, 0),
        ("raise SystemExit(7)", None, 7),
        ("time.sleep(1000)", signal.SIGTERM, 128 + signal.SIGTERM),
        ("time.sleep(1000)", signal.SIGHUP, 128 + signal.SIGHUP),
        ("time.sleep(1000)", signal.SIGINT, -signal.SIGINT),
    ],
)
def test_nothing_is_left_behind(
    then: str, number: signal.Signals | None, code: int
) -> None:
    """Not even the processes of an open connection, which the units leave alone
    when a daemon stops."""
    text = HOLDER.format(
        tests=[str(folder) for folder in Path(__file__).parents[:2]],
        port=free_port(),
        then=then,
    )
    # Whoever runs the tests may ignore them, as nohup does.
    heed = ["env", "--default-signal=HUP,INT,TERM"]
    with subprocess.Popen(
        [*heed, sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TREE,
    ) as holder:
        assert holder.stdout is not None
        line = holder.stdout.readline().strip()
        directory = Path(line)
        if number is not None:
            holder.send_signal(number)
        _, errors = holder.communicate(timeout=60)
    assert line, errors
    assert holder.returncode == code, errors
    assert not left_by(directory)


# -- the units -----------------------------------------------------------------


def test_systemd_finds_nothing_wrong_with_the_units() -> None:
    with machine() as m:
        units = []
        for kind in KINDS:
            m.write_drop_in(
                f"qrexec-connect-{kind}@1.socket",
                "work",
                "[Socket]\nListenStream=%t/x-%p\n",
            )
            units += [
                f"qrexec-connect-{kind}{rest}"
                for rest in ("@1.socket", ".service", "-quiesce.target")
            ]
        # The man pages need not be installed here.
        result = m.run(
            ["systemd-analyze", "--user", "verify", "--man=no", *units]
        )
        assert result.stdout + result.stderr == ""


@pytest.mark.parametrize(
    "path",
    sorted(
        path for path in (TREE / "units").iterdir() if path.suffix != ".conf"
    ),
    ids=lambda path: path.name,
)
def test_each_unit_names_its_documentation(path: Path) -> None:
    assert "\nDocumentation=" in path.read_text()


def test_unix_sockets_are_for_their_owner_alone() -> None:
    with machine() as m:
        unit = "qrexec-connect-unix@notes.socket"
        m.write_drop_in(
            unit,
            "vault",
            "[Socket]\nListenStream=%t/folder/notes\nFileDescriptorName=vault\n",
        )
        m.systemctl("enable", "--now", unit)
        assert (m.runtime / "folder").stat().st_mode & 0o777 == 0o700
        assert (m.runtime / "folder" / "notes").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["tcp", "tcp-bind"])
def test_tcp_sockets_send_at_once_and_notice_vanished_peers(kind: str) -> None:
    with machine() as m:
        shown = m.systemctl(
            "show",
            "-p",
            "NoDelay",
            "-p",
            "KeepAlive",
            f"qrexec-connect-{kind}@1.socket",
        )
        assert set(shown.split()) == {"NoDelay=yes", "KeepAlive=yes"}


@pytest.mark.slow
def test_sixty_changes_in_ten_seconds_leave_nothing_failed() -> None:
    """Instances come and go in any order while an untouched one is asked all
    the time.

    As fast as systemd does it: in 2 s on an idle machine, and on a busy one in
    as long as it takes.
    """
    ports = [free_port() for _ in range(4)]
    qubes = [f"qube{number}" for number in range(len(ports))]
    wrong: list[str] = []
    asked = itertools.count()
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            try:
                answer = ask(ports[0])
            except OSError as error:
                answer = repr(error)
            next(asked)
            if answer != qubes[0]:
                wrong.append(answer)

    with journal(), machine() as m:
        units = [
            add_instance(m, qube, port)
            for qube, port in zip(qubes, ports, strict=True)
        ]
        m.systemctl("enable", "--now", units[0])
        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            changes = [
                *(
                    ["enable", "--now"],
                    ["restart"],
                    ["disable", "--now"],
                    ["start"],
                    ["restart"],
                    ["stop"],
                ),
            ]
            for number in range(60):
                # Each instance goes through all the changes, at a different
                # point of them than the others.
                unit = units[1 + number % 3]
                try:
                    m.systemctl(
                        *changes[
                            (number // 3 + 2 * (number % 3)) % len(changes)
                        ],
                        unit,
                    )
                except MachineError as error:
                    pytest.fail(f"{error}\n{said_by(m)[-3000:]}")
            for unit, port, qube in zip(units, ports, qubes, strict=True):
                m.systemctl("start", unit)
                assert ask(port) == qube
        finally:
            over.set()
            for thread in threads:
                thread.join()
        said = said_by(m)
        assert failed_units(m) == ""
        assert not wrong
        assert next(asked) > 10
        assert "Listening on" in said
        assert not re.search(r"cycle|refusing|repeated too quickly", said)


def test_a_stopped_instance_closes_its_port_and_no_other() -> None:
    ports = free_port(), free_port()
    with machine() as m:
        units = [
            add_instance(m, qube, port)
            for qube, port in zip(("gitweb", "work"), ports, strict=True)
        ]
        m.systemctl("start", *units)
        assert ask(ports[0]) == "gitweb"
        m.systemctl("stop", units[0])
        with pytest.raises(ConnectionRefusedError):
            ask(ports[0])
        assert ask(ports[1]) == "work"


def test_a_daemon_that_cannot_start_ends_up_failed_after_a_few_starts() -> None:
    port = free_port()
    with machine(["/bin/false"]) as m:
        unit = add_instance(m, "work", port)
        m.systemctl("start", unit)
        # It waits in the socket, so that every start is followed by another.
        with (
            socket.create_connection(("127.0.0.1", port), timeout=120) as sock,
            pytest.raises(ConnectionResetError),
        ):
            sock.recv(1)
        # Some 80 starts of 0.25 s: within a minute.
        assert int(m.property("qrexec-connect-tcp.service", "NRestarts")) <= 80
        assert (
            m.property("qrexec-connect-tcp.service", "ActiveState") == "failed"
        )
        assert m.property(unit, "Result") == "service-start-limit-hit"


# -- the demo ------------------------------------------------------------------


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """One whose path leaves room for those of sockets, as tmp_path does not."""
    with tempfile.TemporaryDirectory(prefix="qd-") as folder:
        yield Path(folder)


def run_demo(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qrexec_activate", "demo"]
    env = {**os.environ, **environment}
    return subprocess.run(
        command,
        cwd=TREE,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_demo_tells_the_qubes_apart(short_folder: Path) -> None:
    result = run_demo(TMPDIR=str(short_folder))
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(
        r"http://127\.0\.0\.1:\d+/ +This is gitweb\.", result.stdout
    )
    assert re.search(r"http://127\.0\.0\.2:\d+/ +This is work\.", result.stdout)
    assert re.search(r"unix socket \S+ +This is vault\.", result.stdout)
    assert re.search(
        r"\$ qvm-features client vm-config\.connect-web 'tcp (\d+) work"
        r" 127\.0\.0\.3:\1'\n"
        r"  http://127\.0\.0\.3:\1/ +This is work\.\n"
        r"\$ qvm-features --unset client vm-config\.connect-web\n"
        r"  http://127\.0\.0\.3:\1/ +closed\n",
        result.stdout,
    )
    logged = result.stdout.partition("What the daemons logged:")[2]
    for qube in ("gitweb", "work", "vault"):
        assert re.search(rf"→ {qube} .*ended", logged)
    assert not list(short_folder.iterdir())


def test_the_demo_goes_where_ports_are_free() -> None:
    try:
        taken = socket.create_server(("127.0.0.2", 1234))
    except OSError:
        taken = socket.socket()
    with taken:
        result = run_demo()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Port 1234 is taken on this machine, so this uses " in result.stdout


def test_a_service_comes_with_a_package_of_its_own() -> None:
    from qrexec_activate.loopback import machine as module

    with pytest.raises(MachineError, match="install qrexec-activate-services"):
        module._find_rpc("none.Such")


def test_an_installed_package_brings_its_units(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from qrexec_activate.loopback import machine as module

    monkeypatch.setattr(
        module,
        "__file__",
        str(
            tmp_path / "site-packages" / "qrexec_activate" / "loopback" / "x.py"
        ),
    )
    monkeypatch.setattr(module, "INSTALLED_UNITS", tmp_path)
    with pytest.raises(MachineError, match="install the package again"):
        module.find_units()
    (tmp_path / "qrexec-connect-tcp@.socket").touch()
    assert module.find_units() == tmp_path
