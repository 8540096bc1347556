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


def changelog(form: str) -> str:
    return subprocess.run(
        [ROOT / "tools/changelog", form],
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_changelog_is_of_this_version() -> None:
    rel = (ROOT / "rel").read_text().strip()
    assert changelog("debian").startswith(f"qrexec-activate ({VERSION}-{rel}) ")


def test_one_changelog_is_the_source_of_all() -> None:
    # tools/changelog --write
    assert (ROOT / "debian/changelog").read_text() == changelog("debian")
    assert (ROOT / "debian/NEWS").read_text() == changelog("news")
    items = re.sub(
        r"^(#.*|- )|\n  |\s",
        "",
        (ROOT / "CHANGELOG.md").read_text().split("\n## ", 1)[1],
        flags=re.MULTILINE,
    )
    assert "qrexec-activate-publish" in changelog("news")
    for form, mark in ("debian", r"  \* "), ("rpm", "- "):
        # All of it and nothing else, in whatever lines.
        text = re.sub(
            rf"^(\S.*unstable.*|  \[.*|\* .*| -- .*|{mark})|\s",
            "",
            changelog(form),
            flags=re.MULTILINE,
        )
        assert text.replace("%%", "%") == items.split(")", 1)[1]


def test_what_names_a_public_place_names_one_placeholder() -> None:
    # Whoever publishes it finds all of them by that name.
    host = "qrexec-activate.invalid"
    for name in (
        "debian/control",
        "debian/upstream/metadata",
        "debian/watch",
        *(str(path) for path in ROOT.glob("rpm_spec/*")),
    ):
        text = (ROOT / name).read_text()
        found = re.findall(r"(?:https?://|@)(\w[\w.-]*\.\w+)", text)
        assert set(found) == {host}, name
    assert host in (ROOT / "debian/README.source").read_text()


def test_files_of_a_package_that_was_parted_move_with_it() -> None:
    control = (ROOT / "debian/control").read_text()
    publish = control.split("\nPackage: qrexec-activate-publish\n")[1]
    publish = publish.split("\nPackage: ")[0]
    for field in ("Breaks", "Replaces"):
        assert f"\n{field}: qrexec-activate (<< 0.2.0)\n" in publish
    spec = (ROOT / "rpm_spec/qrexec-activate.spec.in").read_text()
    publish = spec.split("\n%package publish\n")[1].split("\n%description")[0]
    assert "\nConflicts:      %{name} < 0.2.0" in publish


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
        - {"devel", "hypothesis", "pytest"}
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
    host, vm = text.split("vm:\n")
    assert host.startswith("host:\n  rpm:\n    build:\n")
    assert "    - debian\n" in vm
    assert (ROOT / "debian/control").exists()
    specs = re.findall(r"- (rpm_spec/\S+)", text)
    assert [name for name in specs if name in host] == [
        name for name in specs if "dom0" in name
    ]
    assert {ROOT / f"{spec}.in" for spec in specs} == set(
        ROOT.glob("rpm_spec/*")
    )


@pytest.mark.parametrize(
    "spec", [*ROOT.glob("rpm_spec/*")], ids=lambda path: path.name
)
def test_qubes_builder_can_fill_in_what_a_spec_leaves_open(spec: Path) -> None:
    text = spec.read_text()
    for line in (
        "Version:        @VERSION@",
        "Release:        @REL@%{?dist}",
        "Group:          Qubes",
        "%changelog\n@CHANGELOG@",
    ):
        assert f"\n{line}\n" in text
    assert set(re.findall(r"@\w+@", text)) == {
        "@VERSION@",
        "@REL@",
        "@CHANGELOG@",
    }
    assert re.search(r"^Vendor: +\S", text, re.MULTILINE)
    assert re.fullmatch(r"\d+(\.\d+)+\n", (ROOT / "version").read_text())
    assert re.fullmatch(r"\d+\n", (ROOT / "rel").read_text())
    # Its archive, and the folder in there, have the name of the source.
    (archive,) = re.findall(r"^Source0: +(\S+)$", text, re.MULTILINE)
    name = spec.name.removesuffix(".spec.in")
    assert (
        archive.replace("%{name}", name) == "qrexec-activate-%{version}.tar.gz"
    )


def test_qubes_ci_builds_for_dom0_and_for_qubes() -> None:
    text, _, jobs = (
        (ROOT / ".gitlab-ci.yml").read_text().partition("\n# The rest")
    )
    entry = (
        r"- file: /(r4\.\d)/gitlab-(\w+)\.yml\n"
        r"  project: QubesOS/qubes-continuous-integration\n"
    )
    assert re.fullmatch(f"include:\n({entry})+", text)
    found = re.findall(entry, text)
    releases = {release for release, _ in found}
    assert set(found) == {
        (release, part)
        for release in releases
        for part in ("base", "host", "vm")
    }
    # What it calls is there.
    targets = re.findall(r"^  - make (\S+)$", jobs, re.MULTILINE)
    assert targets
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in targets)


def test_rpms_need_the_agent_of_the_qube() -> None:
    spec = (ROOT / "rpm_spec/qrexec-activate.spec.in").read_text()
    client, _, services = re.split(r"^%package \w+$", spec, flags=re.MULTILINE)
    for text in (client, services):
        assert "\nRequires:       qubes-core-agent-qrexec\n" in text


def test_the_wheel_of_dom0_is_of_this_version() -> None:
    # setuptools reads no file outside of the folder, but a link within.
    assert (ROOT / "dom0/version").read_text().strip() == VERSION
    assert (ROOT / "dom0/version").is_symlink()


def test_dom0_gets_its_files_where_qubes_has_them(tmp_path: Path) -> None:
    argv = ["make", "install-dom0", "install-dom0-salt", f"DESTDIR={tmp_path}"]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    policies = tmp_path / "etc/qubes/policy.d"
    (written,) = policies.iterdir()
    assert written.stat().st_mode & 0o777 == 0o664
    formula = tmp_path / "srv/formulas/base/qrexec-activate-formula"
    conf = tmp_path / "etc/salt/minion.d/formula-qrexec-activate.conf"
    assert f"    - /{formula.relative_to(tmp_path)}\n" in conf.read_text()
    fields = dict(
        line.split(": ", 1)
        for line in (formula / "FORMULA").read_text().splitlines()
        if ": " in line
    )
    assert fields["version"] == f"'{VERSION}'"
    assert formula.name == fields["name"]
    states = formula / fields["top_level_dir"]
    for name in ("init.sls", "init.top", "map.jinja", "pillar.example"):
        assert (states / name).exists()
    assert (tmp_path / "srv/pillar/base" / states.name / "init.top").exists()


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
        argv = [
            "make",
            *targets,
            f"DESTDIR={tmp_path}",
            f"PYTHON={sys.executable}",
        ]
        subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)

    make("install-client", "install-services")
    page = tmp_path / "usr/share/man/man8/qubes.ConnectUnix.8"
    assert VERSION in page.read_text().splitlines()[0]
    assert (
        tmp_path / "usr/lib/systemd/user/qrexec-connect-tcp@.socket"
    ).exists()
    assert os.access(tmp_path / "etc/qubes-rpc/qubes.ConnectTCPBind", os.X_OK)
    launcher = tmp_path / "usr/bin/qrexec-activate"
    first = launcher.read_text().splitlines()[0]
    # What a user has installed with pip is not for a daemon.
    assert first == f"#!{sys.executable} -s"
    (package,) = tmp_path.glob("usr/lib/python3*/*-packages/qrexec_activate")
    assert (package / "cli.py").exists()
    make("uninstall")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == [mine]


def test_the_service_side_is_installed_without_python(tmp_path: Path) -> None:
    nothing = f"PYTHON={tmp_path}/no-python"
    argv = ["make", "install-services", f"DESTDIR={tmp_path}", nothing]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "etc/qubes-rpc/qubes.ConnectUnix").exists()


def test_no_preset_disables_what_an_administrator_has_enabled() -> None:
    spec = (ROOT / "rpm_spec/qrexec-activate.spec.in").read_text()
    assert not re.search("^%systemd(_user)?_post ", spec, re.MULTILINE)
    assert not re.search("^[^#]*preset", spec, re.MULTILINE)
    assert not list(ROOT.glob("packaging/*.preset"))
