"""What the packages say of themselves agrees, wherever it is written down."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qrexec_activate.loopback import policy

ROOT = Path(__file__).resolve().parent.parent
VERSION = (ROOT / "version").read_text().strip()


def test_the_changelog_is_of_this_version() -> None:
    assert (
        (ROOT / "debian/changelog")
        .read_text()
        .startswith(f"qrexec-activate ({VERSION}) ")
    )


def test_both_kinds_of_packages_need_what_the_python_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # The one that has another name there.
    needed = {
        re.split("[><=]", name)[0].replace("systemd-python", "systemd")
        for name in project["dependencies"]
    }
    control = (ROOT / "debian/control").read_text()
    depends = control.split("\nPackage: qrexec-activate\n")[1].split(
        "\nRecommends:"
    )[0]
    assert {
        name.removeprefix("python3-")
        for name in re.findall(r"python3-\w+", depends)
    } == needed
    # Fedora's generators read the metadata themselves; to build, it takes the
    # same.
    spec = (ROOT / "rpm_spec/qrexec-activate.spec.in").read_text()
    assert (
        set(re.findall(r"^BuildRequires: +python3-(\w+)", spec, re.MULTILINE))
        - {"devel"}
        == needed
    )


def test_both_kinds_of_packages_recommend_the_qrexec_that_hands_over() -> None:
    assert (
        "Recommends: qubes-core-qrexec (>= 4.2.19)"
        in (ROOT / "debian/control").read_text()
    )
    spec = (ROOT / "rpm_spec/qrexec-activate.spec.in").read_text()
    assert re.search(
        r"^Recommends: +qubes-core-qrexec-vm >= 4\.2\.19$", spec, re.MULTILINE
    )


def test_example_policies_are_policies() -> None:
    for path in (ROOT / "examples/policy.d").iterdir():
        rules = policy.parse(path.read_text())
        assert rules, path


def test_qubes_builder_finds_what_it_builds() -> None:
    text = (ROOT / ".qubesbuilder").read_text()
    assert (ROOT / "debian/control").exists()
    for spec in re.findall(r"- (rpm_spec/\S+)", text):
        assert (ROOT / f"{spec}.in").exists()


@pytest.mark.skipif(
    shutil.which("shellcheck") is None,
    reason="shellcheck is not installed: tools/setup check",
)
def test_shellcheck_finds_nothing_in_what_runs_at_an_upgrade() -> None:
    scripts = [ROOT / "packaging/managers", *(ROOT / "debian").glob("*.p*")]
    assert len(scripts) == 4
    subprocess.run(["shellcheck", *scripts], check=True)


def test_uninstall_leaves_nothing_of_what_was_installed(tmp_path: Path) -> None:
    mine = tmp_path / "etc/qubes-rpc/my.Rpc"
    mine.parent.mkdir(parents=True)
    mine.write_text("")

    def make(*targets: str) -> None:
        # The pure Python part is pip's, and needs a network.
        argv = [
            "make",
            *targets,
            f"DESTDIR={tmp_path}",
            f"PYTHON={sys.executable}",
        ]
        subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)

    make("install-client-data", "install-service")
    page = tmp_path / "usr/share/man/man8/qubes.ConnectUnix.8"
    assert VERSION in page.read_text().splitlines()[0]
    assert (
        tmp_path / "usr/lib/systemd/user/qrexec-connect-tcp@.socket"
    ).exists()
    assert os.access(tmp_path / "etc/qubes-rpc/qubes.ConnectTCPBind", os.X_OK)
    make("uninstall")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [mine]


def test_the_service_side_is_installed_without_python(tmp_path: Path) -> None:
    nothing = f"PYTHON={tmp_path}/no-python"
    argv = ["make", "install-service", f"DESTDIR={tmp_path}", nothing]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "etc/qubes-rpc/qubes.ConnectUnix").exists()


def test_no_preset_disables_what_an_administrator_has_enabled() -> None:
    spec = (ROOT / "rpm_spec/qrexec-activate.spec.in").read_text()
    assert not re.search("^%systemd(_user)?_post ", spec, re.MULTILINE)
    assert not re.search("^[^#]*preset", spec, re.MULTILINE)
    assert not list(ROOT.glob("packaging/*.preset"))
