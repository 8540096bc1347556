"""The RPMs in a tree of their own: dnf finds what they need in a repository of
stand-ins, and rpm installs, upgrades and removes them with their scripts.

The tree is a Debian, which has what the scripts call; in systemctl's place
stands one that writes down what it is asked. What Fedora's own macros and
generators add is not there.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from container import ROOT, WANTED, base_tree

pytestmark = pytest.mark.skipif(
    not WANTED, reason="make check-installed does this"
)

#: What Fedora 43 and Qubes OS 4.3 have, and in which version; and files of
#: theirs that are required by their names.
STAND_INS = {
    "bash": ("5.3.0", "/bin/sh"),
    "dbus": ("1.16.0", ""),
    "python3": ("3.14.0", "/usr/bin/python3"),
    "python3-qubesadmin": ("4.3.40", ""),
    "qubes-core-agent-qrexec": ("4.3.40", ""),
    "qubes-core-dom0-linux": ("4.3.20", ""),
    "qubes-core-qrexec-dom0": ("4.3.15", ""),
    "qubes-core-qrexec-vm": ("4.3.15", ""),
    "qubes-mgmt-salt": ("4.2.3", ""),
    "qubes-mgmt-salt-dom0": ("4.2.3", ""),
    "socat": ("1.8.0.3", ""),
    "systemd": ("258", ""),
    "util-linux": ("2.41.1", ""),
}

#: A user's manager runs, and has a daemon of ours.
SYSTEMCTL = """#!/bin/sh
case "$*" in
    *list-units*) echo "user@1000.service loaded active running" ;;
    *ExecStart*)
        echo Id=qrexec-connect-tcp.service
        echo "ExecStart={ argv[]=/usr/bin/qrexec-activate serve x ;"
        echo
        ;;
    *MainPID*) echo 4194305 ;;
    *TriggeredBy*) echo qrexec-connect-tcp@1234.socket ;;
    *) echo "$*" >>/asked ;;
esac
"""
MANAGERS = ("--system --quiet", "--user --machine=1000@.host --quiet")
OURS = tuple(f"qrexec-activate{part}" for part in ("-publish", "-services", ""))
VERSION = (ROOT / "version").read_text().strip()


def run(*argv: str | Path, check: bool = True) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=300
    )
    said = done.stdout + done.stderr
    assert not check or done.returncode == 0, f"{argv}:\n{said}"
    return said


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    spec = (
        "Name: stand-ins\nVersion: 1\nRelease: 1\nSummary: None\n"
        "License: None\nBuildArch: noarch\n%description\nNone\n"
    )
    for name, (version, path) in STAND_INS.items():
        provides = f"Provides: {path}\n" if path else ""
        spec += (
            f"%package -n {name}\nVersion: {version}\nSummary: {name}\n"
            f"{provides}%description -n {name}\nNone\n%files -n {name}\n"
        )
    (folder / "stand-ins.spec").write_text(spec)
    top = f"_topdir {folder}"
    run("rpmbuild", "-bb", "--define", top, folder / "stand-ins.spec")
    return folder / "RPMS/noarch"


class Machine:
    """A root that rpm and dnf work on, and a repository for them."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._folder = folder
        self._upper = folder / "upper"
        self.repository = folder / "repository"
        for path in (
            self.root,
            folder / "work",
            self.repository,
            self._upper / "run/systemd/system",
            self._upper / "usr/bin",
        ):
            path.mkdir(parents=True)
        (self._upper / "usr/bin/systemctl").write_text(SYSTEMCTL)
        (self._upper / "usr/bin/systemctl").chmod(0o755)
        (folder / "dnf.conf").write_text("[main]\n")
        self._lower = base_tree("bookworm")

    def run(self, *argv: str | Path, check: bool = True) -> str:
        # In a namespace, with which the mount goes.
        mount = (
            f"mount -t overlay overlay -o lowerdir={self._lower},"
            f"upperdir={self._upper},workdir={self._folder / 'work'} {self.root}"
        )
        script = f'{mount}; exec "$@"'
        return run(
            "unshare", "-m", "sh", "-ec", script, "sh", *argv, check=check
        )

    def offer(self, *folders: Path) -> None:
        for folder in folders:
            for path in folder.glob("*.noarch.rpm"):
                (self.repository / path.name).write_bytes(path.read_bytes())
        run("createrepo_c", "--quiet", self.repository)

    def dnf(self, *words: str, check: bool = True) -> str:
        common = (
            f"--installroot={self.root}",
            f"--repofrompath=ours,{self.repository}",
            "--repo=ours",
            "--releasever=43",
            f"--config={self._folder / 'dnf.conf'}",
            "--noplugins",
            "--assumeyes",
            "--nogpgcheck",
            "--setopt=reposdir=/dev/null",
            "--setopt=module_platform_id=platform:f43",
            # Whatever the clock says of how old the repository is.
            "--refresh",
            f"--setopt=cachedir={self._folder / 'cache'}",
            f"--setopt=logdir={self._folder}",
        )
        return self.run("dnf", *common, *words, check=check)

    def rpm(self, *words: str | Path, check: bool = True) -> str:
        return self.run("rpm", f"--root={self.root}", *words, check=check)

    def ours(self) -> set[str]:
        """What of ours is installed, and its version."""
        names = self.rpm("-qa", "--queryformat", "%{NAME} %{VERSION}\n")
        return {line for line in names.splitlines() if "activate" in line}

    def read(self, path: str) -> str:
        return (self._upper / path).read_text()

    def asked(self) -> list[str]:
        """What systemctl was asked since the last time."""
        path = self._upper / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def left(self) -> set[str]:
        """Which of our files are there."""
        return {
            str(path.relative_to(self._upper))
            for path in self._upper.rglob("*")
            # A removal in an overlay is a device.
            if not path.is_char_device()
            and re.search("qrexec|qubes", path.name)
        }


@pytest.fixture
def machine(possible: None, stand_ins: Path, tmp_path: Path) -> Machine:
    """A root of a test's own, with nothing installed."""
    machine = Machine(tmp_path)
    machine.offer(stand_ins)
    return machine


@pytest.fixture
def ready(machine: Machine, stand_ins: Path) -> Machine:
    """One that has all that ours need."""
    machine.rpm("--install", *stand_ins.glob("*.noarch.rpm"))
    return machine


def test_dnf_finds_all_that_an_upgrade_needs(
    machine: Machine, first_rpms: Path, rpms: Path
) -> None:
    machine.offer(first_rpms)
    machine.dnf("install", "qrexec-activate", "qrexec-activate-services")
    assert "qrexec-activate 0.1.0" in machine.ours()
    assert "\nqrexec-activate:" in machine.read("etc/passwd")
    machine.asked()

    machine.offer(rpms)
    machine.dnf("upgrade")
    # The rest is for a person to choose.
    assert machine.ours() == {
        f"qrexec-activate {VERSION}",
        f"qrexec-activate-services {VERSION}",
    }
    # The old version's stop of its daemons is not asked for, nor its sockets'.
    told = machine.asked()
    for manager in MANAGERS:
        mine = [line for line in told if line.startswith(manager)]
        assert f"{manager} daemon-reload" in mine
        assert mine[-1] == f"{manager} stop -- qrexec-connect-tcp.service"
        assert not [line for line in mine if ".socket" in line]

    machine.dnf("install", "qrexec-activate-publish")
    assert f"qrexec-activate-publish {VERSION}" in machine.ours()
    assert machine.rpm("--verify", *OURS) == ""


def test_files_that_moved_to_another_package_conflict_with_an_old_one(
    ready: Machine, first_rpms: Path, rpms: Path
) -> None:
    # Of publish without the client of its version.
    new = next(rpms.glob("qrexec-activate-publish-*.noarch.rpm"))
    said = run("rpm", "--query", "--package", "--conflicts", new)
    assert said == "qrexec-activate < 0.2.0\n"
    old = next(first_rpms.glob("qrexec-activate-0*.noarch.rpm"))
    ready.rpm("--install", old)
    assert "conflicts with" in ready.rpm(
        "--install", "--test", "--nofiledigest", new, check=False
    )


def test_a_removal_stops_all_and_leaves_nothing(
    ready: Machine, rpms: Path
) -> None:
    paths = [
        path
        for path in rpms.glob("qrexec-activate*.noarch.rpm")
        if "dom0" not in path.name
    ]
    ready.rpm("--install", *paths)
    ready.asked()
    # Once more, as `dnf reinstall` does it.
    ready.rpm("--upgrade", "--replacepkgs", *paths)
    told = ready.asked()
    assert not [line for line in told if ".socket" in line]
    ready.rpm("--erase", *OURS)
    told = ready.asked()
    for manager in MANAGERS:
        sockets = "qrexec-connect-tcp@1234.socket qrexec-connect-tcp.service"
        assert f"{manager} stop -- {sockets}" in told
    assert ready.ours() == set()
    assert ready.left() == set()


def test_dom0_has_all_that_its_packages_need(
    machine: Machine, rpms: Path
) -> None:
    machine.offer(rpms)
    names = ("qrexec-activate-dom0", "qubes-mgmt-salt-dom0-qrexec-activate")
    machine.dnf("install", *names)
    assert machine.ours() == {f"{name} {VERSION}" for name in names}
    machine.dnf("remove", *names)
    assert machine.ours() == set()
    # The folder of policy is another package's.
    assert machine.left() <= {"etc/qubes"}
