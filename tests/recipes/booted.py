"""A qube whose system is a real Debian, booted in a container: for what only a
whole system does."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pytest
from recipe import EXAMPLES, PATIENCE, ROOT, Qube, require, until

from qrexec_activate.loopback import rpc_config

CACHE = (
    Path(os.environ.get("QREXEC_ACTIVATE_CACHE", "/var/cache/qrexec-activate"))
    / "recipes"
)
#: A container in a machine that may itself be one: cgroups of its own, which no
#: other container's systemd takes for its own, and all that it writes is gone
#: afterwards.
BOOT = """
set -e
mount -t tmpfs none {top}
mkdir {top}/upper {top}/work {top}/root
mount -t overlay overlay -o lowerdir={cache},upperdir={top}/upper,workdir={top}/work {top}/root
cp -r {files}/. {top}/root/etc/
{more}
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
mkdir /sys/fs/cgroup/{name}
echo $$ >/sys/fs/cgroup/{name}/cgroup.procs
SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 SYSTEMD_SECCOMP=0 exec systemd-nspawn --quiet -D {top}/root --machine={name} --register=no \
    --keep-unit --private-network --kill-signal=SIGRTMIN+3 --console=pipe {binds} --boot
"""
LEAVE = """
umount -R /sys/fs/cgroup
mount -t cgroup2 none /sys/fs/cgroup
find /sys/fs/cgroup/{name} -depth -type d -delete
"""
#: What the package for service qubes and Qubes bring: the RPC services, and the
#: user that they run as.
SERVICE_QUBE = f"""
mkdir -p {{top}}/root/etc/qubes-rpc {{top}}/root/etc/qubes/rpc-config {{top}}/root/var/lib/systemd/linger
cp {ROOT}/rpc/qubes.* {{top}}/root/etc/qubes-rpc/
cp {ROOT}/rpc/rpc-config/* {{top}}/root/etc/qubes/rpc-config/
chroot {{top}}/root useradd --create-home --uid 1000 --shell /bin/sh user
tr -d - </proc/sys/kernel/random/uuid >{{top}}/root/etc/machine-id
touch {{top}}/root/var/lib/systemd/linger/user
"""
AS_USER = (
    "runuser -u user -- env HOME=/home/user XDG_RUNTIME_DIR=/run/user/1000"
    " DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1000/bus"
)
#: What qrexec-agent does: it runs the service as the user of the qube, or the
#: one that its rpc-config names. In the caller's own manager, as the loopback
#: runs confined in the daemon there.
CALL = """\
#!/bin/sh
export XDG_RUNTIME_DIR={run} DBUS_SESSION_BUS_ADDRESS=unix:path={run}/bus
exec systemd-run --user --quiet --collect --wait --pipe --unit=qrexec-call-$$ \\
    nsenter --target={leader} --all {as_user} /etc/qubes-rpc/{service} "$@"
"""


class Container:
    """The booted system of a recipe's qube, with the files that go to its /etc;
    `more` is shell, with `{top}/root`. Its `system` is that of the recipe,
    unless named."""

    def __init__(
        self,
        recipe: str,
        qube: str,
        folder: Path,
        more: str = "",
        *,
        system: str = "",
        binds: Iterable[str] = (),
    ) -> None:
        cache = CACHE / (system or recipe)
        require(
            recipe,
            "systemd-nspawn",
            "nsenter",
            "socat",
            str(cache),
            root="it boots a system in a container",
        )
        self.recipe, self.qube = recipe, qube
        self.name = f"qa-{secrets.token_hex(4)}"
        files = EXAMPLES / recipe / qube / "etc"
        more = more.format(top=folder)
        script = BOOT.format(
            top=folder,
            cache=cache,
            files=files,
            name=self.name,
            more=more,
            binds=" ".join(f"--bind={path}" for path in binds),
        )
        self.log = folder.with_suffix(".log").open("wb")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        self.leader = 0

    def __enter__(self) -> Self:
        try:
            self.wait()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait(self) -> None:
        until(
            "the container boots",
            lambda: self.process.poll() is not None or self.find_leader(),
        )
        if self.process.poll() is not None:
            said = (
                Path(self.log.name)
                .read_text(errors="replace")
                .strip()
                .splitlines()[-1:]
            )
            pytest.skip(
                f"recipe {self.recipe}: no container boots here: {said}"
            )
        until(
            "systemd runs in it",
            lambda: (
                self.run("systemctl is-system-running", check=False).split()[:1]
                in (["running"], ["degraded"])
            ),
        )

    def find_leader(self) -> int:
        """The container's first process; systemd-nspawn has other children on
        its way there."""
        children = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)],
            capture_output=True,
            text=True,
            check=False,
        )
        for pid in children.stdout.split():
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{pid}/status").read_text()
                if (
                    status.partition("NSpid:")[2].splitlines()[0].split()[1:]
                    == ["1"]
                    and "Name:\tsystemd\n" in status
                ):
                    self.leader = int(pid)
        return self.leader

    def run(
        self, command: str, *, check: bool = True, patience: float = PATIENCE
    ) -> str:
        argv = [
            "nsenter",
            f"--target={self.leader}",
            "--all",
            "/bin/sh",
            "-c",
            command,
        ]
        result = subprocess.run(
            argv, capture_output=True, text=True, timeout=patience, check=False
        )
        if check and result.returncode != 0:
            journal = self.run("journalctl --boot --lines=60", check=False)
            pytest.fail(f"{self.qube}# {command}: {result.stderr}\n{journal}")
        return result.stdout

    def answer_calls(self, qube: Qube) -> None:
        """Let the RPC services of this system answer what other qubes call."""
        qube.add_log("qrexec-call-.service")
        for service in self.run("ls /etc/qubes-rpc").split():
            config = self.run(
                f"cat /etc/qubes/rpc-config/{service}", check=False
            )
            user = rpc_config.parse(config).force_user
            script = qube.rpc / service
            script.write_text(
                CALL.format(
                    run=qube.machine.runtime,
                    leader=self.leader,
                    as_user=f"runuser -u {user} --" if user else AS_USER,
                    service=service,
                )
            )
            script.chmod(0o755)

    def close(self) -> None:
        if self.leader and self.process.poll() is None:
            # As halt -p: its first process ends all others.
            subprocess.run(
                ["kill", "-s", "RTMIN+4", str(self.leader)], check=False
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()
        subprocess.run(
            ["unshare", "--mount", "sh", "-c", LEAVE.format(name=self.name)],
            stderr=self.log,
            check=False,
        )
        self.log.close()
