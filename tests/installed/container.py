"""Debian in a container: the packages installed by apt, systemd as PID 1, and
the stand-in qrexec.

A tree is made by debootstrap once and kept in CACHE; each run works on an
overlay of it, which goes with the namespace that it is mounted in. In there,
/usr/bin/qrexec-client-vm is the stand-in for qrexec, and /var/lib/pretend holds
the pretend qubes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import pytest

#: `yes`: do it, and fail where it cannot be done. `if-possible`: skip there.
#: Not set: skip all of it.
WANTED = os.environ.get("CHECK_INSTALLED", "")
ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).resolve().parent / "inside"
CACHE = Path(
    os.environ.get("QREXEC_ACTIVATE_CACHE", "/var/cache/qrexec-activate")
)
MIRROR = "http://deb.debian.org/debian"
#: Which Debians are tried.
SUITES = os.environ.get("CHECK_SUITES", "bookworm trixie").split()
#: What is there before the packages; all else they have to bring along.
BASE = "systemd,systemd-sysv,libpam-systemd,dbus"

BOOT_TIMEOUT = 300.0
STOP_TIMEOUT = 120.0

#: Two users, both lingering: the manager of each runs from boot on.
USERS = {"user": 1000, "other": 1001}

#: Qube, and where it listens, in the network that all pretend qubes share.
SERVERS = [
    ("gitweb", ["127.77.0.1", 1234]),
    ("work", ["127.77.0.2", 1234]),
    ("web", ["127.77.0.3", 80]),
    ("mail", ["127.77.0.4", 1234]),
    ("nfs", ["127.0.0.1", 2049]),
    (
        "vault",
        "/var/lib/pretend/qubes/vault/run/qubes.ConnectUnix/gpg-agent-ssh",
    ),
    ("archive", "/var/lib/pretend/qubes/archive/rpc/my.Rpc"),
]
POLICY = """\
qubes.ConnectTCP * client @anyvm allow
qubes.ConnectUnix +gpg-agent-ssh client @default allow target=vault
qubes.ConnectTCPBind +2049-127.0.1.1 client nfs allow
my.Rpc +backup client archive allow
"""
AGENT_UNIT = """\
[Service]
ExecStart=/usr/bin/python3 /var/lib/pretend/agent.py
PrivateNetwork=yes

[Install]
WantedBy=multi-user.target
"""


class Impossible(Exception):
    """This machine cannot run such a container; the message says what is
    missing."""


def why_impossible() -> str | None:
    """What keeps this machine from running the containers, or None."""
    if os.geteuid() != 0:
        return "only root can boot a container: run it as root, or with sudo"
    for command in ("systemd-nspawn", "debootstrap", "nsenter", "unshare"):
        if shutil.which(command) is None:
            return f"{command} is not installed: run tools/packages-setup"
    tried = subprocess.run(
        ["unshare", "-m", "sh", "-ec", _cgroup_script()],
        capture_output=True,
        text=True,
        check=False,
    )
    return (
        f"no cgroup2 can be mounted: {tried.stderr.strip()}"
        if tried.returncode
        else None
    )


def give_up(problem: str) -> NoReturn:
    """Skip where the packages are tried only if that is possible, else fail."""
    if WANTED == "if-possible":
        pytest.skip(problem)
    pytest.fail(problem)


def _cgroup_script() -> str:
    """What gives a mount namespace a cgroup2 of its own where the machine has
    the hybrid or the old layout."""
    return (
        '[ "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs ] ||'
        " { umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup; }"
    )


def _proxies() -> dict[str, str]:
    return {
        key: value
        for key, value in os.environ.items()
        if key.lower() in ("http_proxy", "https_proxy", "no_proxy")
    }


def base_tree(suite: str) -> Path:
    """A tree of this suite, from the cache or made now."""
    recipe = hashlib.sha256(f"{BASE} {MIRROR}".encode()).hexdigest()[:8]
    tree = CACHE / f"{suite}-{recipe}"
    if not tree.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{suite}.", dir=CACHE))
        try:
            debootstrap = [
                "debootstrap",
                "--variant=minbase",
                f"--include={BASE}",
                suite,
                str(partial),
                MIRROR,
            ]
            made = subprocess.run(
                debootstrap, capture_output=True, text=True, check=False
            )
            if made.returncode:
                give_up(
                    f"debootstrap of {suite} from {MIRROR} failed:"
                    f" {' '.join(made.stdout.split()[-30:])}"
                )
            partial.chmod(0o755)
            partial.rename(tree)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return tree


class Container:
    """A Debian of its own; `folder` is scratch for its overlay."""

    def __init__(self, suite: str, folder: Path) -> None:
        self.suite = suite
        self._lower = base_tree(suite)
        self._archives = CACHE / f"archives-{suite}"
        self._root = folder / "root"
        self.upper = folder / "upper"
        #: The same tree once more: systemd-nspawn --read-only makes the mount
        #: that it is given read-only.
        self._writable = folder / "writable"
        for path in (
            self._root,
            self.upper,
            self._writable,
            folder / "work",
            self._archives / "partial",
        ):
            path.mkdir(parents=True, exist_ok=True)
        self._mount = (
            f"mount -t overlay overlay -o"
            f" lowerdir={self._lower},upperdir={self.upper},workdir={folder / 'work'}"
            f" {self._root}; mount --bind {self._root} {self._writable}"
        )
        self._leader = 0
        self._running = contextlib.ExitStack()
        #: Of its own, so that its systemd takes no other container's, or user
        #: manager's, for its own.
        self._cgroup = f"/sys/fs/cgroup/qa-{secrets.token_hex(4)}"

    # While it is not booted, as a template is that is being made

    def _nspawn(self, *options: str) -> list[str]:
        script = (
            f"{_cgroup_script()}; mkdir -p {self._cgroup};"
            f" echo $$ >{self._cgroup}/cgroup.procs; {self._mount};"
            f" SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec systemd-nspawn " + '"$@"'
        )
        common = [
            "--quiet",
            f"--directory={self._root}",
            "--register=no",
            "--keep-unit",
            "--console=pipe",
        ]
        bind = f"--bind={self._archives}:/var/cache/apt/archives"
        return [
            "unshare",
            "-m",
            "sh",
            "-ec",
            script,
            "sh",
            *common,
            bind,
            *options,
        ]

    def install(self, debs: Sequence[Path], *more: str) -> None:
        """Install packages by apt, with all that they depend on and nothing
        more; and packages of this Debian."""
        self.put(debs)
        names = " ".join([*(f"/root/{deb.name}" for deb in debs), *more])
        install = (
            f"apt-get install --yes --quiet --no-install-recommends {names}"
        )
        environment = {
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
            **_proxies(),
        }
        options = [
            f"--setenv={key}={value}" for key, value in environment.items()
        ]
        # An index of the cached tree may be too old for the mirror.
        keep = "-o Binary::apt-get::APT::Keep-Downloaded-Packages=true"
        self.do(
            f"{install} {keep} ||"
            f" {{ apt-get update --quiet && {install} {keep}; }}",
            *options,
        )

    def do(self, script: str, *options: str) -> str:
        """What a script prints, run by root's shell in there."""
        done = subprocess.run(
            self._nspawn(*options, "sh", "-c", script),
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    def put(self, files: Sequence[Path]) -> None:
        (self.upper / "root").mkdir(exist_ok=True, mode=0o700)
        for file in files:
            shutil.copy(file, self.upper / "root")

    def put_tree(self, tree: Path, place: str) -> None:
        shutil.copytree(tree, self.upper / place, symlinks=True)

    def prepare(self) -> None:
        """Make what a qube has beside the packages: users, the group of qrexec,
        and qrexec itself."""
        pretend = self.upper / "var/lib/pretend"
        for qube, address in SERVERS:
            top = pretend / "qubes" / qube
            for name in ("rpc", "rpc-config", "home", "run"):
                (top / name).mkdir(parents=True)
            if isinstance(address, list) and address[0] != "127.0.0.1":
                (top / "address").write_text(str(address[0]))
            for service in ("qubes.ConnectUnix", "qubes.ConnectTCPBind"):
                (top / "rpc" / service).symlink_to(f"/etc/qubes-rpc/{service}")
                (top / "rpc-config" / service).symlink_to(
                    f"/etc/qubes/rpc-config/{service}"
                )
        # A socket gets the name of the call first, unless this says otherwise.
        (pretend / "qubes/archive/rpc-config/my.Rpc").write_text(
            "skip-service-descriptor=true\n"
        )
        (pretend / "name").write_text("client\n")
        (pretend / "policy").write_text(POLICY)
        (pretend / "servers").write_text(json.dumps(SERVERS))
        for name in ("agent.py", "talk.py"):
            shutil.copy(INSIDE / name, pretend)
        # A copy: qrexec is there also while the package is not.
        shutil.copytree(
            ROOT / "qrexec_activate",
            pretend / "qrexec_activate",
            ignore=shutil.ignore_patterns("__pyc*"),
        )
        (self.upper / "usr/bin").mkdir(parents=True, exist_ok=True)
        shutil.copy(INSIDE / "qrexec-client-vm", self.upper / "usr/bin")
        units = self.upper / "etc/systemd/system"
        (units / "multi-user.target.wants").mkdir(parents=True, exist_ok=True)
        (units / "qubes-qrexec-agent.service").write_text(AGENT_UNIT)
        (
            units / "multi-user.target.wants/qubes-qrexec-agent.service"
        ).symlink_to("../qubes-qrexec-agent.service")
        (self.upper / "rw").mkdir()
        script = (
            "groupadd --system qubes; mkdir -p /var/lib/systemd/linger;"
            " systemd-machine-id-setup;"
        )
        for name, uid in USERS.items():
            script += (
                f" useradd --create-home --uid {uid} --groups qubes --shell"
                f" /bin/sh {name};"
            )
            script += f" touch /var/lib/systemd/linger/{name};"
        subprocess.run(
            self._nspawn("sh", "-ec", script), check=True, capture_output=True
        )

    # While it is booted

    def boot(self, *, read_only: bool) -> None:
        """Boot it, or boot it again; with `read_only`, only what an app qube
        can write is writable."""
        self.shut_down()
        self._running = contextlib.ExitStack()
        self._running.enter_context(self._booted(read_only))

    def shut_down(self) -> None:
        self._running.close()
        script = (
            f"{_cgroup_script()};"
            f" [ ! -e {self._cgroup} ] || find {self._cgroup} -depth -type d -delete"
        )
        subprocess.run(
            ["unshare", "-m", "sh", "-ec", script],
            check=False,
            capture_output=True,
        )

    @contextlib.contextmanager
    def _booted(self, read_only: bool) -> Iterator[None]:
        options = ["--boot", "--private-network", "--kill-signal=SIGRTMIN+3"]
        if read_only:
            options.append("--read-only")
            options += [
                f"--bind={self._writable}{path}:{path}"
                for path in ("/home", "/rw", "/var")
            ]
        with tempfile.TemporaryFile() as console:
            nspawn = subprocess.Popen(
                self._nspawn(*options),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
            try:
                try:
                    self._wait_until_booted(nspawn)
                except AssertionError as error:
                    console.seek(0)
                    raise AssertionError(
                        f"{error}\n{console.read()[-4000:].decode(errors='replace')}"
                    ) from None
                yield
            finally:
                # It passes this on as an order to shut down.
                nspawn.terminate()
                try:
                    nspawn.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    os.kill(self._leader, signal.SIGKILL)
                    nspawn.wait(STOP_TIMEOUT)
                self._leader = 0

    def _wait_until_booted(self, nspawn: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + BOOT_TIMEOUT
        while not (leader := _init_of(nspawn.pid)):
            assert nspawn.poll() is None, (
                f"systemd-nspawn ended with exit code {nspawn.returncode}"
            )
            assert time.monotonic() < deadline, "systemd-nspawn started nothing"
            time.sleep(0.05)
        self._leader = leader
        while self.run(
            "systemctl", "is-system-running", check=False
        ).strip() not in ("running", "degraded"):
            assert time.monotonic() < deadline, (
                "systemd has not come up: "
                + self.run("systemctl", "list-jobs", check=False)
            )
            time.sleep(0.1)
        for user in USERS:
            while self.user_systemctl(
                "is-system-running", user=user, check=False
            ).strip() not in (
                "running",
                "degraded",
            ):
                assert time.monotonic() < deadline, (
                    f"the manager of {user} has not come up"
                )
                time.sleep(0.1)

    def _enter(self, argv: Sequence[str], user: str | None) -> list[str]:
        prefix = ["nsenter", f"--target={self._leader}", "--all"]
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        common = [
            "env",
            "--chdir=/",
            "-i",
            path,
            "LC_ALL=C.UTF-8",
            "DEBIAN_FRONTEND=noninteractive",
            "SYSTEMD_PAGER=",
        ]
        if user is None:
            return [*prefix, *common, "HOME=/root", *argv]
        runtime = f"XDG_RUNTIME_DIR=/run/user/{USERS[user]}"
        home = f"/home/{user}"
        return [
            *prefix,
            *common,
            f"HOME={home}",
            f"USER={user}",
            runtime,
            "runuser",
            "-u",
            user,
            "--",
            *argv,
        ]

    def run(
        self,
        *argv: str,
        user: str | None = None,
        check: bool = True,
        input: str = "",
        timeout: float = 180,
    ) -> str:
        """What a command in there prints, as root or as a user."""
        done = subprocess.run(
            self._enter(argv, user),
            input=input,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, (
            f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done.stdout + (done.stderr if done.returncode else "")

    def user_systemctl(
        self, *arguments: str, user: str = "user", check: bool = True
    ) -> str:
        return self.run(
            "systemctl", "--user", *arguments, user=user, check=check
        )

    def write(self, path: str, text: str, user: str | None = None) -> None:
        """Write a file in there, as root or as a user."""
        self.run(
            "sh",
            "-ec",
            'mkdir -p "${1%/*}"; cat >"$1"',
            "sh",
            path,
            user=user,
            input=text,
        )

    def place(self, path: str) -> Path:
        """Where this machine finds what lies in there."""
        return Path(f"/proc/{self._leader}/root") / path

    def put_while_booted(self, files: Sequence[Path]) -> None:
        for file in files:
            shutil.copy(file, self.place("root"))

    def ask(self, *address: str, user: str = "user", check: bool = True) -> str:
        """The line that a local address greets with."""
        return self.run(
            "python3",
            "/var/lib/pretend/talk.py",
            *address,
            user=user,
            check=check,
        ).strip()

    def talk(self, *address: str, user: str = "user") -> Talk:
        argv = self._enter(
            ["python3", "-u", "/var/lib/pretend/talk.py", *address], user
        )
        return Talk(
            subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
        )


class Talk:
    """A connection that stays open."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._send, self._receive = process.stdin, process.stdout
        self.greeting = self._receive.readline().strip()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *error: object) -> None:
        self._send.close()
        self._receive.close()
        self._process.wait(STOP_TIMEOUT)

    def echo(self, line: str) -> str:
        self._send.write(f"{line}\n")
        self._send.flush()
        return self._receive.readline().strip()


def _init_of(nspawn: int) -> int:
    """The container's PID 1, as this machine sees it; 0 while there is none."""
    for path in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            fields = dict(
                line.partition(":\t")[::2]
                for line in path.read_text().splitlines()
            )
            if fields.get("NSpid", "").split()[1:] == ["1"] and fields[
                "PPid"
            ] == str(nspawn):
                return int(fields["Pid"])
    return 0
