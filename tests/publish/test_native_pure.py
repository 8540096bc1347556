"""A name that qrexec itself connects to: its link and its rpc-config, in folders
of a test's own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrexec_activate.control import publications
from qrexec_activate.errors import ActivateError, UsageProblem
from qrexec_activate.publish import native, services
from qrexec_activate.publish.steps import do_all, undo_all

SOCKET = Path("/run/qubes.ConnectUnix/wiki")
FILE = "qubes.ConnectUnix+wiki"


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this machine's folders are, each under its own path; a short one,
    as a socket's address holds no other."""
    monkeypatch.setattr(
        native, "package_version", lambda _path: "qubes-core-qrexec 4.3.5"
    )
    with tempfile.TemporaryDirectory(prefix="qa-", dir="/tmp") as top:
        for module, name in (
            (native, "CONFIG_FOLDERS"),
            (publications, "CONFIG_FOLDERS"),
            (native, "RPC_FOLDERS"),
            (publications, "RPC_FOLDERS"),
        ):
            folders = [f"{top}{folder}" for folder in getattr(module, name)]
            for folder in folders:
                Path(folder).mkdir(parents=True, exist_ok=True)
            monkeypatch.setattr(module, name, tuple(folders))
        yield Path(top)


@pytest.mark.parametrize(
    ("package", "too_old"),
    [
        ("qubes-core-qrexec 4.2.18-1+deb12u1", True),
        ("qubes-core-qrexec 4.2.19-1+deb12u1", False),
        ("qubes-core-qrexec-vm-4.3.5-1.fc43.x86_64", False),
        ("qubes-core-qrexec 1:4.10.0", False),
        ("qubes-core-qrexec-vm-3.99.99-1.fc43.x86_64", True),
        ("", True),
    ],
)
def test_qrexec_is_too_old(package: str, too_old: bool) -> None:
    assert native.is_too_old(package) == too_old


def test_the_config_is_there_before_the_link_and_goes_after_it(
    root: Path,
) -> None:
    config, link = native.native_files("wiki")
    assert (str(config), str(link)) == (
        f"{root}/etc/qubes/rpc-config/{FILE}",
        f"{root}/etc/qubes-rpc/{FILE}",
    )
    steps = native.native_steps("wiki", SOCKET)
    steps[0].do()
    assert config.read_text() == "skip-service-descriptor=true\n"
    assert not os.path.lexists(link)
    steps[1].do()
    assert os.readlink(link) == str(SOCKET)
    undo_all(steps[1:])
    assert config.exists()
    assert not os.path.lexists(link)
    undo_all(steps)
    assert not config.exists()


@pytest.mark.parametrize(
    "folder",
    [
        "run/qubes-rpc",
        "usr/local/etc/qubes-rpc",
        "etc/qubes-rpc",
        "run/qubes/rpc-config",
        "usr/local/etc/qubes/rpc-config",
        "etc/qubes/rpc-config",
    ],
)
def test_what_is_there_is_neither_overwritten_nor_hidden(
    root: Path, folder: str
) -> None:
    native.check_native("wiki")
    (root / folder / FILE).symlink_to("/no/such")
    with pytest.raises(UsageProblem, match="is there already"):
        native.check_native("wiki")


def test_a_link_that_comes_meanwhile_stays(root: Path) -> None:
    config, link = native.native_files("wiki")
    steps = native.native_steps("wiki", SOCKET)
    link.symlink_to("/no/such")
    with pytest.raises(ActivateError):
        do_all(steps)
    assert os.readlink(link) == "/no/such"
    assert not config.exists()
    # Nor is it taken away with what was made before.
    assert native.native_steps("wiki", SOCKET) == []


def test_a_name_that_no_address_holds_is_refused(root: Path) -> None:
    room = 107 - len(str(native.native_files("")[1]))
    native.check_native("x" * room)
    with pytest.raises(UsageProblem, match="too long"):
        native.check_native("x" * (room + 1))


@pytest.mark.parametrize(
    ("text", "is_fine"),
    [
        ("skip-service-descriptor=true\n", True),
        ("# mine\nskip-service-descriptor = true\n", True),
        ("skip-service-descriptor=true# c\nexit-on-client-eof=true", True),
        ("skip-service-descriptor=false\n", False),
        (" skip-service-descriptor=true\n", False),
        ("#skip-service-descriptor=true\n", False),
        (None, False),
    ],
)
def test_a_config_that_lets_a_line_come_first_is_a_problem(
    root: Path, text: str | None, is_fine: bool
) -> None:
    config, link = native.native_files("wiki")
    if text is not None:
        config.write_text(text)

    def problem() -> str:
        return publications.way_problem("wiki", str(link), "")

    assert (problem() == "") == is_fine
    # What wins is what counts.
    (root / "run/qubes/rpc-config" / FILE).write_text("")
    assert "/run/" in problem()


def test_a_link_that_is_gone_is_a_problem_where_there_was_one() -> None:
    unit = "[Socket]\n[X-Publish]\nUser=wiki\n"
    assert publications.way_problem("wiki", "", unit) == ""
    unit += "Native=yes\n"
    assert "without --native" in publications.way_problem("wiki", "", unit)


def test_a_link_whose_end_is_not_there_is_passed_over(root: Path) -> None:
    script = root / "etc/qubes-rpc/qubes.ConnectUnix"
    script.touch()
    link = root / "run/qubes-rpc" / FILE
    link.symlink_to("/no/such")
    assert publications.where_installed(FILE) == ""
    link.unlink()
    link.symlink_to(script)
    assert publications.where_installed(FILE) == str(link)


def test_with_a_database_it_makes_no_sense_wherever_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise UsageProblem("there is no PostgreSQL")

    monkeypatch.setattr(services, "check_database", fails)
    monkeypatch.setenv("SUDO_USER", "daemon")
    service = services.Service(
        "wiki", "/bin/cat", user="qa-wiki", database=True, native=True
    )
    with pytest.raises(UsageProblem, match="goes by who connects"):
        services.check(service)
