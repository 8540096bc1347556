"""The packages as files: what they hold, that two builds are one, and what
lintian and rpmlint say."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from container import ROOT, SUITES, WANTED, Container
from debs import build

VERSION = (ROOT / "version").read_text().strip()

pytestmark = pytest.mark.skipif(
    not WANTED, reason="make check-installed does this"
)


def output(*argv: str | Path) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{argv}:\n{done.stdout}{done.stderr}"
    return done.stdout


def files_of_deb(deb: Path) -> set[str]:
    lines = output("dpkg-deb", "--contents", deb).splitlines()
    return {line.split()[5][1:] for line in lines if not line.startswith("d")}


def client_of(debs: list[Path]) -> Path:
    """The package of the client side, among all."""
    return next(deb for deb in debs if deb.name.startswith("qrexec-activate_"))


def test_two_builds_are_one(
    tree: Path, debs: list[Path], tmp_path: Path
) -> None:
    def hashes(folder: Path) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir()
            # These say when and where it was built.
            if path.suffix not in (".buildinfo", ".changes")
        }

    build(tree, tmp_path)
    built = hashes(tmp_path)
    assert [
        sum(name.endswith(end) for name in built)
        for end in (".deb", ".dsc", ".orig.tar.gz", ".debian.tar.xz")
    ] == [3, 1, 1, 1]
    assert built == hashes(debs[0].parent)


def test_the_source_is_ours_and_debians_apart(
    debs: list[Path], tmp_path: Path
) -> None:
    (source,) = debs[0].parent.glob("*.orig.tar.gz")
    names = output("tar", "--list", "--file", source).splitlines()
    assert all(name.startswith(f"qrexec-activate-{VERSION}/") for name in names)
    assert not [name for name in names if name.split("/")[1] == "debian"]
    (dsc,) = debs[0].parent.glob("*.dsc")
    # It fails where the parts do not fit, or there is a patch.
    output(
        "dpkg-source",
        "--extract",
        "--require-strong-checksums",
        "--no-check",
        dsc,
        tmp_path / "x",
    )
    assert (tmp_path / "x/debian/source/format").read_text() == "3.0 (quilt)\n"
    assert not (tmp_path / "x/debian/patches").exists()


def test_lintian_finds_nothing(debs: list[Path]) -> None:
    changes = next(debs[0].parent.glob("*.changes"))
    said = output(
        "lintian",
        "--allow-root",
        "--fail-on=error,warning",
        # An older lintian does not know the policy of a newer Debian.
        "--suppress-tags=newer-standards-version",
        "--info",
        changes,
    )
    assert not re.findall("^[EW]:.*", said, re.MULTILINE)


@pytest.mark.parametrize(
    "suite", [suite for suite in SUITES if suite != "bookworm"]
)
def test_the_lintian_of_a_newer_debian_finds_nothing(
    suite: str, possible: None, debs: list[Path], tmp_path: Path
) -> None:
    container = Container(suite, tmp_path)
    container.install([], "lintian")
    container.put(list(debs[0].parent.iterdir()))
    said = container.do(
        "lintian --allow-root --fail-on=error,warning --info /root/*.changes"
    )
    assert not re.findall("^[EW]:.*", said, re.MULTILINE)


@pytest.mark.parametrize("suite", SUITES)
def test_what_debian_runs_to_test_a_package_passes(
    suite: str, possible: None, debs: list[Path], tmp_path: Path
) -> None:
    folder = ROOT / "debian/tests"
    ours = {deb.name.split("_")[0]: deb for deb in debs}
    tests = (folder / "control").read_text().split("\n\n")
    assert len(tests) == len(list(folder.iterdir())) - 1
    for text in tests:
        words = dict(re.findall(r"^(\w+): *(.*)$", text, re.MULTILINE))
        name = words["Tests"]
        # What it says that it needs, and no other package of ours.
        needed = words["Depends"].split(", ")
        container = Container(suite, tmp_path / name)
        container.install(
            [ours[package] for package in needed if package in ours],
            *(package for package in needed if package not in ours),
        )
        container.put([folder / name])
        script = f"AUTOPKGTEST_TMP=$(mktemp -d) sh /root/{name}"
        if "isolation-container" not in words["Restrictions"]:
            container.do(script)
            continue
        container.prepare()
        container.boot(read_only=False)
        try:
            container.run("sh", "-c", script)
        finally:
            container.shut_down()


def test_the_service_side_needs_no_python(debs: list[Path]) -> None:
    services = next(
        deb for deb in debs if deb.name.startswith("qrexec-activate-services")
    )
    assert output("dpkg-deb", "--field", services, "Depends").strip() == "socat"
    assert not [path for path in files_of_deb(services) if "python" in path]


def test_the_client_side_has_nothing_of_the_service_side(
    debs: list[Path], tmp_path: Path
) -> None:
    assert not [
        path for path in files_of_deb(client_of(debs)) if "publish" in path
    ]
    output("dpkg-deb", "--extract", client_of(debs), tmp_path)
    packages = tmp_path / "usr/lib/python3/dist-packages"

    def said(*words: str) -> str:
        done = subprocess.run(
            ["/usr/bin/python3", "-m", "qrexec_activate", *words],
            env={"PYTHONPATH": str(packages), "LC_ALL": "C.UTF-8"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout + done.stderr

    help_ = said("--help")
    assert "\n  add " in help_
    assert "publish" not in help_
    assert "comes with the package qrexec-activate-publish" in said("publish")


def test_nothing_is_taken_for_the_real_qrexec(debs: list[Path]) -> None:
    for deb in debs:
        for path in files_of_deb(deb):
            assert "qrexec-client-vm" not in path
            if "loopback" in path:
                assert path.startswith(
                    "/usr/lib/python3/dist-packages/qrexec_activate/"
                )


def test_the_launcher_starts_at_once(debs: list[Path], tmp_path: Path) -> None:
    output("dpkg-deb", "--extract", client_of(debs), tmp_path)
    launcher = (tmp_path / "usr/bin/qrexec-activate").read_text()
    assert launcher.startswith("#! /usr/bin/python3 -s\n")
    assert "from qrexec_activate.__main__ import main" in launcher
    assert "pkg_resources" not in launcher


def comparable(paths: set[str]) -> set[str]:
    """Paths as both kinds of packages have them: what each kind puts elsewhere
    by its own rules is put together."""
    found = set()
    for path in paths:
        path = re.sub(
            r"/usr/lib/python3[^/]*/(dist|site)-packages", "/python", path
        )
        path = path.replace("/zsh/site-functions/", "/zsh/vendor-completions/")
        path = re.sub(r"(/usr/share/man/.*)\.gz$", r"\1", path)
        if re.search(
            r"\.dist-info/|/(changelog|NEWS)[^/]*gz$|/copyright$|/usr/share/licenses/|__pycache__",
            path,
        ):
            continue
        found.add(path)
    return found


def rpm_of(rpms: Path, name: str) -> Path:
    (rpm,) = [
        path
        for path in rpms.glob("*.noarch.rpm")
        if re.match(rf"{name}-\d", path.name)
    ]
    return rpm


def test_rpms_hold_what_debs_hold(debs: list[Path], rpms: Path) -> None:
    for deb in debs:
        rpm = rpm_of(rpms, deb.name.split("_")[0])
        lines = output(
            "rpm", "--query", "--package", "--list", "--verbose", rpm
        ).splitlines()
        in_rpm = {
            line.partition(" -> ")[0].split()[-1]
            for line in lines
            if not line.startswith("d")
        }
        assert comparable(in_rpm) == comparable(files_of_deb(deb))


def test_rpmlint_finds_nothing_that_is_not_explained(rpms: Path) -> None:
    # It takes the sources of two packages for those of one with two specs.
    sources = list(rpms.glob("*.src.rpm"))
    binaries = {*rpms.glob("*.rpm"), *rpms.glob("*.spec")}.difference(sources)
    assert len(sources) == len(list((ROOT / "rpm_spec").glob("*.spec.in")))
    for paths in (binaries, *([source] for source in sources)):
        said = output(
            "rpmlint", "--config", ROOT / "packaging/rpmlint.toml", *paths
        )
        assert " 0 errors, 0 warnings" in said, said


def test_dom0_gets_its_policy_its_tool_and_tests_that_its_runner_finds(
    rpms: Path, tmp_path: Path
) -> None:
    rpm = rpm_of(rpms, "qrexec-activate-dom0")
    files = output(
        "rpm",
        "--query",
        "--package",
        "--queryformat",
        "[%{FILEMODES:perms} %{FILEUSERNAME} %{FILEGROUPNAME} %{FILEFLAGS:fflags} %{FILENAMES}\n]",
        rpm,
    )
    policy = "/etc/qubes/policy.d/90-qrexec-activate.policy"
    assert f"-rw-rw-r-- root qubes cn {policy}\n" in files
    assert "/30-qrexec-activate.policy\n" in files
    unpack = f"rpm2cpio {shlex.quote(str(rpm))} | cpio --extract --make-directories --quiet"
    subprocess.run(["sh", "-ec", unpack], cwd=tmp_path, check=True)
    (site,) = tmp_path.glob("usr/lib/python3*/site-packages")
    entries = {
        entry.group: entry
        for found in importlib.metadata.distributions(path=[str(site)])
        for entry in found.entry_points
    }
    assert set(entries) == {"qubes.tests.extra.for_template", "console_scripts"}
    tests = entries["qubes.tests.extra.for_template"]
    assert (site / tests.module / "__init__.py").exists()
    tool = entries["console_scripts"]
    assert os.access(tmp_path / "usr/bin" / tool.name, os.X_OK)
    # What are links in the sources are files, and all that it needs of ours.
    assert not [path for path in site.rglob("*") if path.is_symlink()]
    folder = site / tool.module.partition(".")[0]
    for path in (ROOT / "dom0" / folder.name).rglob("*.py"):
        assert (site / path.relative_to(ROOT / "dom0")).is_file()


def test_by_hand_as_by_packages_with_make_and_python_alone(
    possible: None, tree: Path, debs: list[Path], tmp_path: Path
) -> None:
    container = Container("bookworm", tmp_path)
    container.install([], "make", "python3")
    container.put_tree(tree, "root/source")
    make = "touch /root/mark; cd /root/source && make --no-print-directory"

    def added() -> set[str]:
        """Files that came since `make` began."""
        found = container.do(
            "cd /; find etc usr -cnewer /root/mark ! -type d -printf '/%p\\n'"
        )
        return {path for path in found.split() if "/__pycache__/" not in path}

    # It says what it runs with, and that is enough.
    said = container.do(f"{make} install-client 2>&1 || true")
    lacks = re.search("lacks what .*: install (.*)", said)
    assert lacks is not None, said
    assert not [path for path in added() if "qrexec" in path]
    container.install([], *lacks[1].split())
    assert "No module named pip" in container.do("python3 -m pip 2>&1 || true")
    container.do(f"{make} install-client install-services")
    ours = {path for deb in debs for path in files_of_deb(deb)}
    # systemd-sysusers adds to these, and the container writes one.
    account = r"/etc/(\.pwd\.lock|resolv\.conf|(g?shadow|group|passwd)-?)"
    assert comparable(ours) == {
        path for path in comparable(added()) if not re.fullmatch(account, path)
    }
    assert container.do("qrexec-activate --version").split()[1] == VERSION
    container.do(f"{make} uninstall")
    assert "qrexec-activate" not in container.do("ls /usr/bin /usr/libexec")
    left = container.do(
        "find /etc /usr ! -type d '(' -path '*qrexec*' -o -name 'qubes.*' ')'"
    )
    assert left == ""
