"""A private systemd user manager, with pretend qubes beside it.

The demo and the tests run the real units under the real systemd, and nothing
here touches the units, the bus or the environment of the person who starts
them. Whatever a machine starts or makes is gone when its `with` block ends,
also after Ctrl-C and SIGTERM: processes, folders and cgroups.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from ..errors import ActivateError
from .install import write_client
from .qubesdb import put, write_programs

__all__ = ["Machine", "MachineError", "find_units", "start_journald"]

#: Loading a user manager and its bus takes about 0.3 s; a busy machine may need
#: far longer.
START_TIMEOUT = 30.0
#: The units' TimeoutStopSec is 5 s; past that systemd kills, and past this so
#: does the machine.
STOP_TIMEOUT = 8.0
#: Unix socket paths hold 107 bytes, and the longest ones are made some levels
#: down in a machine's folder.
LONGEST_FOLDER = 40

#: The stock units that a user manager cannot do without.
STOCK_UNITS = (
    "basic.target",
    "default.target",
    "exit.target",
    "paths.target",
    "shutdown.target",
    "sockets.target",
    "systemd-exit.service",
    "timers.target",
)
INSTALLED_UNITS = Path("/usr/lib/systemd/user")
INSTALLED_COMMAND = "/usr/bin/qrexec-activate"
INSTALLED_GENERATOR = "/usr/libexec/qrexec-activate/from-dom0"
BOOTED = Path("/run/systemd/system")
JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
BOOTED_MARK = ".made-by-qrexec-activate"

BUS_SOCKET = """\
[Socket]
ListenStream=%t/bus
"""
BUS_SERVICE = """\
[Unit]
Requires=dbus.socket

[Service]
Type=notify
ExecStart={command}
StandardOutput=append:{log}
StandardError=append:{log}
"""
# No <servicedir>: nothing that is installed on this machine is started by a
# message on this bus.
BUS_CONFIG = """\
<busconfig>
  <type>session</type>
  <listen>unix:path={address}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow send_destination="*"/>
    <allow receive_sender="*"/>
    <allow own="*"/>
  </policy>
</busconfig>
"""
LOG_DROP_IN = """\
[Service]
StandardOutput=append:{log}
StandardError=append:{log}
"""


# The pretend qubes are on this machine, and what they run are children of
# qrexec-client-vm, which inherits the sandbox of the units. AF_UNIX is named
# because this holds for units that restrict nothing, too.
QUBES_DROP_IN = """\
[Service]
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6
"""


class MachineError(ActivateError):
    """The private user manager could not be started, or a command in it
    failed."""


class Machine:
    """A context manager: a user manager of its own, this project's units in it,
    and pretend qubes.

    `command` is what the units start in place of /usr/bin/qrexec-activate, by
    default this very package. `environment` is added to that of the manager and
    so of every service. With `journal`, services log to the journal (see
    `start_journald`); without, to the file `daemon_log`. With `qubesdb`, there
    is a QubesDB, and dom0 gives routes by `say`.

    `directory` holds everything: the person's `home` and `unit_dir`, the
    `runtime` folder (%t), and `loopback`, the root of the pretend qubes, whose
    qrexec-client-vm is `client`. `environment` is that of a shell in there.

    Outside this folder it writes in one case only, as root in a bare container,
    where systemd does not run: the folder /run/systemd/system, which a user
    manager insists on, and a cgroup.
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        units: Path | None = None,
        environment: Mapping[str, str] | None = None,
        journal: bool = False,
        qubesdb: bool = False,
    ) -> None:
        self._command = (
            list(command)
            if command is not None
            else [sys.executable, "-m", "qrexec_activate"]
        )
        self._units = units
        self._extra = dict(environment or {})
        self._journal = journal
        self._has_qubesdb = qubesdb
        self._stack = contextlib.ExitStack()
        self._hosts: set[str] = set()
        self._cgroups: list[Path] = []

    def __enter__(self) -> Machine:
        units = self._units or find_units()
        systemd = _program("systemd", "/usr/lib/systemd/systemd")
        bus = _bus_command()
        stack = self._stack
        try:
            stack.enter_context(_exit_on_signals())
            self.directory = stack.enter_context(_short_folder())
            self._name = f"qrexec-activate-{self.directory.name}"
            self._lay_out(units, bus)
            if _system_manager_runs():
                prefix = _scope_prefix(self._name)
            else:
                stack.enter_context(_pretend_booted())
                prefix = _cgroup_prefix(
                    stack.enter_context(_own_cgroups(self._name))
                )
            stack.enter_context(
                self._manager([*prefix, *self._env_argv(), systemd, "--user"])
            )
            self._wait_until_running()
        except BaseException:
            with _undisturbed():
                stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _undisturbed():
            self._stack.close()

    @property
    def pid(self) -> int:
        """The process id of the manager, as in `journalctl _PID=`."""
        return self._process.pid

    # What a test or the demo does with it

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        check: bool = True,
        input: str | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine's environment; the result holds what it
        printed. `MachineError` if it fails."""
        result = subprocess.run(
            [str(word) for word in argv],
            env=self.environment,
            cwd=self.home,
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="backslashreplace",
            timeout=timeout,
            check=False,
        )
        if check and result.returncode:
            said = (result.stderr or result.stdout).strip()
            line = " ".join(str(word) for word in argv)
            raise MachineError(f"{line}: exit code {result.returncode}: {said}")
        return result

    def systemctl(
        self, *args: str, check: bool = True, timeout: float = 60
    ) -> str:
        """What `systemctl --user ARGS` prints on stdout. `MachineError` if it
        fails, unless `check` is false."""
        return self.run(
            ["systemctl", "--user", *args], check=check, timeout=timeout
        ).stdout

    def property(self, unit: str, name: str) -> str:
        """One property of a unit, as `systemctl show --value` prints it."""
        return self.systemctl("show", "--value", "-p", name, unit).strip()

    def write_unit(self, name: str, text: str) -> Path:
        """Write a unit where a person's own units lie; systemd sees it at the
        next daemon-reload."""
        path = self.unit_dir / name
        path.write_text(text)
        return path

    def write_drop_in(self, unit: str, name: str, text: str) -> Path:
        """Write `UNIT.d/NAME.conf` where a person's own drop-ins lie; seen at
        the next daemon-reload."""
        folder = self.unit_dir / f"{unit}.d"
        folder.mkdir(exist_ok=True)
        path = folder / (name if name.endswith(".conf") else f"{name}.conf")
        path.write_text(text)
        return path

    def add_qube(self, name: str) -> Path:
        """Make a pretend qube that runs, with a loopback address of its own in
        its file `address`."""
        qube = self.loopback / "qubes" / name
        for folder in ("rpc", "rpc-config", "home", "run"):
            (qube / folder).mkdir(parents=True)
        (qube / "run").chmod(0o700)
        (qube / "address").write_text(self._free_host() + "\n")
        return qube

    def add_rpc(self, qube: str, service: str) -> None:
        """Give a pretend qube one of this project's RPC services, with its
        rpc-config."""
        scripts, configs = _find_rpc(service)
        top = self.loopback / "qubes" / qube
        shutil.copy(scripts / service, top / "rpc")
        if (configs / service).exists():
            shutil.copy(configs / service, top / "rpc-config")

    def say(self, path: str, value: str | None) -> None:
        """Set a path in QubesDB, as dom0 does, or remove it."""
        put(self.qubesdb, path, value)

    def address(self, name: str) -> str:
        """The loopback address of a pretend qube."""
        return (self.loopback / "qubes" / name / "address").read_text().strip()

    # How it is made

    def _lay_out(self, units: Path, bus: str) -> None:
        top = self.directory
        self.home = top / "home"
        self.config = self.home / ".config"
        self.unit_dir = self.config / "systemd" / "user"
        self.runtime = top / "run"
        self.loopback = top / "loopback"
        self.client = top / "qrexec-client-vm"
        self.daemon_log = top / "daemon.log"
        self.qubesdb = top / "qubesdb"
        self._bus_log = top / "bus.log"
        vendor = top / "units"
        nothing = top / "nothing"
        for folder in (
            self.unit_dir,
            self.runtime / "systemd" / "user",
            self.loopback / "qubes",
            vendor / "default.target.wants",
            vendor / "sockets.target.wants",
            vendor / "service.d",
            nothing,
        ):
            folder.mkdir(parents=True)
        self.runtime.chmod(0o700)
        (self.loopback / "name").write_text("client\n")
        write_client(str(self.client), str(self.loopback), sys.executable)
        for log in (self.daemon_log, self._bus_log):
            log.touch()

        for name in STOCK_UNITS:
            shutil.copy(INSTALLED_UNITS / name, vendor)
        for path in units.glob("qrexec-connect-*"):
            (vendor / path.name).write_text(
                path.read_text().replace(INSTALLED_COMMAND, self.command_line())
            )
        generators = top / "generators"
        if self._has_qubesdb:
            write_programs(top / "bin", self.qubesdb, generators)
            self.say("/default-user", pwd.getpwuid(os.getuid()).pw_name)
            self.say("/name", "client")
            unit = "qrexec-activate-dom0.service"
            folder = units.with_name("units-user")
            text = (
                (folder if folder.exists() else units)
                .joinpath(unit)
                .read_text()
            )
            (vendor / unit).write_text(
                text.replace(
                    INSTALLED_GENERATOR, str(generators / "qrexec-activate")
                )
            )
        bus_config = top / "bus.conf"
        bus_config.write_text(BUS_CONFIG.format(address=self.runtime / "bus"))
        (vendor / "dbus.socket").write_text(BUS_SOCKET)
        (vendor / "dbus.service").write_text(
            BUS_SERVICE.format(command=f"{bus}={bus_config}", log=self._bus_log)
        )
        (vendor / "sockets.target.wants" / "dbus.socket").symlink_to(
            "../dbus.socket"
        )
        (vendor / "default.target.wants" / "dbus.service").symlink_to(
            "../dbus.service"
        )
        (vendor / "service.d" / "qubes.conf").write_text(QUBES_DROP_IN)
        if not self._journal:
            (vendor / "service.d" / "log.conf").write_text(
                LOG_DROP_IN.format(log=self.daemon_log)
            )
            # A drop-in of one unit comes after, and wins over, one of all
            # services.
            (vendor / "dbus.service.d").mkdir()
            (vendor / "dbus.service.d" / "log.conf").write_text(
                LOG_DROP_IN.format(log=self._bus_log)
            )

        self.environment = {
            "PATH": (
                f"{top / 'bin'}:"
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
            ),
            "HOME": str(self.home),
            "SHELL": "/bin/sh",
            "LANG": "C.UTF-8",
            "XDG_RUNTIME_DIR": str(self.runtime),
            "XDG_CONFIG_HOME": str(self.config),
            "XDG_DATA_HOME": str(self.home / ".local" / "share"),
            "XDG_STATE_HOME": str(self.home / ".local" / "state"),
            "XDG_CACHE_HOME": str(self.home / ".cache"),
            "DBUS_SESSION_BUS_ADDRESS": f"unix:path={self.runtime / 'bus'}",
            # Nor is the manager of this machine seen beside the private one.
            "DBUS_SYSTEM_BUS_ADDRESS": f"unix:path={top / 'no-system-bus'}",
            # Only these folders: no unit or drop-in of the person who runs
            # this, or of the machine, is seen.
            "SYSTEMD_UNIT_PATH": ":".join(
                str(folder)
                for folder in (
                    self.config / "systemd" / "user.control",
                    self.runtime / "systemd" / "user.control",
                    self.runtime / "systemd" / "transient",
                    self.unit_dir,
                    self.runtime / "systemd" / "user",
                    self.runtime / "systemd" / "generator",
                    vendor,
                )
            ),
            "SYSTEMD_GENERATOR_PATH": str(
                generators if self._has_qubesdb else nothing
            ),
            "SYSTEMD_ENVIRONMENT_GENERATOR_PATH": str(nothing),
            "SYSTEMD_PAGER": "",
            "QREXEC_ACTIVATE_CLIENT": str(self.client),
            **_package_path(),
            **self._extra,
        }

    def command_line(self) -> str:
        """The command as ExecStart= reads it: quoted, without specifiers and,
        after the first word, variables."""
        program, *args = (
            '"'
            + word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
            + '"'
            for word in self._command
        )
        return " ".join([program, *(word.replace("$", "$$") for word in args)])

    def _env_argv(self) -> list[str]:
        # Without a journal a manager would write on /dev/console, whatever its
        # stderr is.
        log_target = (
            f"SYSTEMD_LOG_TARGET={'journal' if _journald_runs() else 'null'}"
        )
        return [
            "env",
            "-i",
            log_target,
            *(f"{name}={value}" for name, value in self.environment.items()),
        ]

    @contextlib.contextmanager
    def _manager(self, argv: Sequence[str]) -> Iterator[None]:
        with self._bus_log.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C at the terminal is for the one who runs the machine,
                # who then stops it in order.
                start_new_session=True,
            )
        try:
            yield
        finally:
            folders = self._cgroups or self._find_cgroups()
            # A user manager takes SIGTERM as an order to stop its units and
            # exit.
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            # The units leave the processes of open connections alone, so that
            # there may be some.
            _empty_cgroups(folders)

    def _find_cgroups(self) -> list[Path]:
        # Until it enters its own cgroup the process is in that of whoever
        # started this: never to be emptied.
        folders = _cgroup_folders(self._process.pid)
        return [
            folder for folder in folders if folder.name.startswith(self._name)
        ]

    def _wait_until_running(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        ask = [
            *(
                "busctl",
                "--user",
                "get-property",
                "org.freedesktop.systemd1",
                "/org/freedesktop/systemd1",
            ),
            *("org.freedesktop.systemd1.Manager", "SystemState"),
        ]
        while self.run(ask, check=False).stdout.strip() not in (
            's "running"',
            's "degraded"',
        ):
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = (
                    self._bus_log.read_text(errors="backslashreplace")
                    .strip()
                    .splitlines()
                )
                raise MachineError(
                    f"the private user manager did not start, exit code"
                    f" {self._process.poll()}; "
                    f"the journal may say why: journalctl"
                    f" _PID={self._process.pid}"
                    + "".join(f"\n  {line}" for line in said[-8:])
                )
            time.sleep(0.02)
        self._cgroups = self._find_cgroups()

    def _free_host(self) -> str:
        """An address in 127.0.0.0/8 that no other qube has, in this machine and
        most likely in any other."""
        while True:
            parts = (
                random.randint(64, 127),
                random.randint(0, 255),
                random.randint(1, 254),
            )
            host = ".".join(map(str, (127, *parts)))
            if host not in self._hosts:
                self._hosts.add(host)
                return host


def find_units() -> Path:
    """The folder that holds this project's units: that of the source tree, or
    where a package puts them."""
    source = Path(__file__).resolve().parents[2] / "units"
    for folder in (source, INSTALLED_UNITS):
        if (folder / "qrexec-connect-tcp@.socket").exists():
            return folder
    raise MachineError(
        f"no qrexec-connect-tcp@.socket in {source} or {INSTALLED_UNITS}:"
        f" install the package again"
    )


def _find_rpc(service: str) -> tuple[Path, Path]:
    """The folders of RPC services and of their rpc-config: the source tree's,
    or where a package puts them."""
    source = Path(__file__).resolve().parents[2] / "rpc"
    installed = Path("/etc/qubes-rpc")
    if (source / service).exists():
        return source, source / "rpc-config"
    if (installed / service).exists():
        return installed, Path("/etc/qubes/rpc-config")
    raise MachineError(
        f"no {service} in {source} or {installed}:"
        " install qrexec-activate-services"
    )


@contextlib.contextmanager
def start_journald() -> Iterator[None]:
    """While the block runs there is a journal: the one that is there, or, for
    root, that of a journald started here."""
    if _journald_runs():
        yield
        return
    if os.geteuid() != 0:
        raise MachineError(
            "no systemd-journald runs on this machine, and only root can"
            " start one"
        )
    journald = _program("systemd-journald", "/usr/lib/systemd/systemd-journald")
    with contextlib.ExitStack() as stack:
        for path in (
            Path("/run/log/journal"),
            Path("/run/systemd/journal"),
            Path("/dev/log"),
        ):
            if not path.exists() and not path.is_symlink():
                stack.callback(_remove, path)
        process = subprocess.Popen(
            [journald],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.terminate)
        deadline = time.monotonic() + START_TIMEOUT
        while subprocess.run(
            ["journalctl", "--sync"], capture_output=True, check=False
        ).returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                raise MachineError(
                    f"{journald} did not start, exit code {process.poll()}"
                )
            time.sleep(0.02)
        yield


def _journald_runs() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        return sock.connect_ex(str(JOURNAL_SOCKET)) == 0


# The parts that a machine needs


def _program(name: str, path: str) -> str:
    if not os.access(path, os.X_OK):
        raise MachineError(
            f"{name} is not installed ({path} is missing): install the"
            f" package systemd"
        )
    return path


def _bus_command() -> str:
    """A message bus that a unit can start, up to the `=` before its
    configuration file."""
    if path := shutil.which("dbus-daemon"):
        return (
            f"{path} --address=systemd: --nofork --nopidfile"
            f" --systemd-activation --config-file"
        )
    if path := shutil.which("dbus-broker-launch"):
        return f"{path} --scope user --config-file"
    raise MachineError(
        "no message bus is installed: install the package dbus-daemon (or"
        " dbus-broker)"
    )


def _package_path() -> dict[str, str]:
    """How Python finds this very package: by itself where it is installed, else
    by PYTHONPATH."""
    parent = Path(__file__).resolve().parents[2]
    return (
        {}
        if parent.name in ("site-packages", "dist-packages")
        else {"PYTHONPATH": str(parent)}
    )


@contextlib.contextmanager
def _short_folder() -> Iterator[Path]:
    for base in (os.environ.get("TMPDIR", "/tmp"), "/tmp", "/var/tmp"):
        # The pretend qrexec-client-vm is run from there.
        if (
            len(base) <= LONGEST_FOLDER
            and os.path.isdir(base)
            and not os.statvfs(base).f_flag & os.ST_NOEXEC
        ):
            break
    else:
        raise MachineError(
            "no program can be run in /tmp or /var/tmp: set TMPDIR to a short"
            " path where one can"
        )
    folder = Path(tempfile.mkdtemp(prefix="qa-", dir=base))
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(path: Path) -> None:
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    # A user manager keeps a folder of mode 0000, systemd/inaccessible/dir,
    # which only root can remove as it is.
    for top, folders, _ in os.walk(path):
        for name in folders:
            folder = Path(top, name)
            if not folder.is_symlink():
                folder.chmod(0o700)
    shutil.rmtree(path)


@contextlib.contextmanager
def _exit_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind the stack, as Ctrl-C does."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[
        signal.Signals, Callable[[int, FrameType | None], object] | int | None
    ] = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        # A program that has a handler of its own knows what to do.
        if signal.getsignal(number) is signal.SIG_DFL:
            before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A second Ctrl-C or SIGTERM waits until what the first one began, the
    cleaning up, is done."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Where no systemd runs: a bare container, as root


def _system_manager_runs() -> bool:
    # Only the system manager itself makes this socket; a bare container with
    # /run/systemd/system has none.
    return Path("/run/systemd/private").exists()


@contextlib.contextmanager
def _pretend_booted() -> Iterator[None]:
    """/run/systemd/system, which systemd --user looks for, while any machine on
    this computer needs it.

    Every machine holds a shared lock on the folder; the one that goes last
    removes it, if a machine made it.
    """
    if os.geteuid() != 0 and not BOOTED.is_dir():
        raise MachineError(
            "systemd is not running: run this as root, or on a machine that"
            " systemd has booted"
        )
    while True:
        # It may be removed, and made again, by another machine before the lock
        # is had.
        with contextlib.suppress(FileNotFoundError):
            with contextlib.suppress(FileExistsError):
                BOOTED.mkdir(parents=True)
                (BOOTED / BOOTED_MARK).touch()
            lock = os.open(BOOTED, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), os.stat(BOOTED)):
                    break
            os.close(lock)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (BOOTED / BOOTED_MARK).unlink()
            BOOTED.rmdir()
        os.close(lock)


@contextlib.contextmanager
def _own_cgroups(name: str) -> Iterator[list[Path]]:
    """A cgroup of its own, so that machines side by side do not stop each
    other's services."""
    with contextlib.ExitStack() as stack:
        folders = []
        for parent in _cgroup_folders(os.getpid()):
            folder = parent / name
            try:
                folder.mkdir()
            except OSError as error:
                raise MachineError(
                    f"{folder}: {error.strerror}: a user manager needs"
                    f" cgroups that it can write; in a "
                    "container, mount /sys/fs/cgroup writable"
                ) from None
            folders.append(folder)
            stack.callback(_empty_cgroups, [folder])
        if not folders:
            raise MachineError(
                "no cgroups are mounted, and systemd needs them: mount"
                " /sys/fs/cgroup"
            )
        yield folders


def _cgroup_prefix(folders: Sequence[Path]) -> list[str]:
    """A command that enters the cgroups, then runs the words after it."""
    enter = (
        'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 1; shift;'
        ' done; shift; exec "$@"'
    )
    return [
        "/bin/sh",
        "-c",
        enter,
        "sh",
        *(str(folder) for folder in folders),
        "--",
    ]


def _cgroup_folders(pid: int) -> list[Path]:
    """Where systemd keeps track of a process: cgroup v2, v1's name=systemd
    hierarchy, or both (hybrid)."""
    mounts: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        if kind == "cgroup2":
            mounts[""] = fields.split()[4]
        elif kind == "cgroup" and "name=systemd" in options.split(","):
            mounts["name=systemd"] = fields.split()[4]
    folders = []
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in mounts:
                # systemd as a user manager moves itself into a child of the
                # cgroup that it was given.
                folders.append(
                    Path(mounts[controllers] + path.removesuffix("/init.scope"))
                )
    return folders


def _empty_cgroups(folders: Sequence[Path]) -> None:
    """Kill whatever is left below these cgroups, and remove them."""
    deadline = time.monotonic() + STOP_TIMEOUT
    while pids := {pid for folder in folders for pid in _members(folder)}:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    for folder in folders:
        for child in sorted(folder.glob("**/"), reverse=True):
            with contextlib.suppress(OSError):
                child.rmdir()


def _members(folder: Path) -> Iterator[int]:
    for path in folder.glob("**/cgroup.procs"):
        with contextlib.suppress(OSError):
            yield from (
                int(pid)
                for pid in path.read_text().split()
                if int(pid) != os.getpid()
            )


# Where systemd runs: a scope of its own, delegated by that systemd


def _scope_prefix(name: str) -> list[str]:
    """A command that runs the words after it in a scope of the person's own
    manager."""
    prefix = [
        "systemd-run",
        "--scope",
        "--quiet",
        "--collect",
        "--property=Delegate=yes",
    ]
    prefix.append(f"--unit={name}")
    if os.geteuid() == 0:
        return prefix
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    if not Path(runtime, "systemd", "private").exists():
        raise MachineError(
            f"no user manager runs for you ({runtime}/systemd/private is"
            f" missing): log in as this user, not by "
            "su or sudo, or run 'loginctl enable-linger' once"
        )
    return ["env", f"XDG_RUNTIME_DIR={runtime}", *prefix, "--user"]
