"""What any file declares is shown: routes that are masked, not loadable or
written in a way of one's own, under the names that a person gave them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import Desk, listens

from qrexec_activate.loopback.machine import Machine


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


SERVICE = "qrexec-connect-tcp.service"


def route(desk: Desk, *lines: str) -> Path:
    """Write a drop-in to the qube gitweb, and start it if that can be."""
    path = desk.drop_in(
        desk.tcp,
        "gitweb",
        "[Socket]",
        f"ListenStream=127.0.0.1:{desk.port}",
        "FileDescriptorName=gitweb",
        *lines,
    )
    desk.start(desk.tcp, check=False)
    return path


# ------------------------------------------------------------- dead, and shown


def mask_socket(desk: Desk) -> None:
    route(desk)
    desk.machine.systemctl("mask", "--now", desk.tcp)


def mask_socket_again(desk: Desk) -> None:
    """As after a new login: nothing that was loaded before is known."""
    mask_socket(desk)
    desk.machine.systemctl("daemon-reload")


def mask_template(desk: Desk) -> None:
    desk.machine.systemctl("mask", "qrexec-connect-tcp@.socket")
    route(desk)


def mask_service(desk: Desk) -> None:
    route(desk)
    desk.machine.systemctl("stop", desk.tcp)
    desk.machine.systemctl("mask", SERVICE)
    desk.machine.systemctl("daemon-reload")


def break_service(desk: Desk) -> None:
    desk.drop_in(SERVICE, "mine", "[Service]", "ExecStart=", "ExecStart=/bin/x")
    route(desk)


def hide_service(desk: Desk) -> None:
    desk.machine.write_unit(SERVICE, "[Service]\nExecStart=/bin/cat\n")
    route(desk)


def empty_service(desk: Desk) -> None:
    """A service that systemd cannot load."""
    desk.machine.write_unit(SERVICE, "[Service]\n")
    route(desk)


def accept(desk: Desk) -> None:
    route(desk, "Accept=yes")


def another_service(desk: Desk) -> None:
    route(desk, "Service=nosuch.service")


def remove_units(desk: Desk) -> None:
    """Where the package is gone, its units are, and a person's files stay."""
    route(desk)
    vendor = desk.machine.directory / "units"
    away = desk.machine.directory / "away"
    away.mkdir()
    for path in vendor.glob("qrexec-connect-tcp*"):
        path.rename(away / path.name)
    desk.machine.systemctl("stop", desk.tcp)
    desk.machine.systemctl("daemon-reload")


DEAD: list[tuple[Callable[[Desk], None], str, str]] = [
    (mask_socket, "masked", "is masked; systemctl --user unmask qrexec"),
    (mask_socket_again, "masked", "is masked; systemctl --user unmask qrexec"),
    (mask_template, "not loadable", "is masked"),
    (mask_service, "refused", f"{SERVICE} is masked"),
    (break_service, "refused", f"{SERVICE} does not run qrexec-activate serve"),
    (hide_service, "refused", f"{SERVICE} does not run qrexec-activate serve"),
    (empty_service, "refused", f"systemd cannot load {SERVICE}"),
    (accept, "not loadable", "gitweb.conf:4 sets Accept=yes"),
    (another_service, "refused", "nosuch.service is not installed: write it"),
    (
        remove_units,
        "not loadable",
        "is not installed: install the package qrexec-activate",
    ),
]


@pytest.mark.parametrize(
    ("kill", "state", "reason"), DEAD, ids=[one[0].__name__ for one in DEAD]
)
def test_a_dead_route_is_shown_with_its_qube_and_the_reason(
    desk: Desk, kill: Callable[[Desk], None], state: str, reason: str
) -> None:
    try:
        kill(desk)
        (found,) = desk.json("list")
        assert found["listener"] == f"127.0.0.1:{desk.port}"
        assert found["target"] == "gitweb"
        assert found["call"] == f"qubes.ConnectTCP+{desk.port}"
        assert reason in found["refused"]
        table = desk.run("list").splitlines()
        assert state in table[1]
        assert "gitweb" in table[1]
        (shown,) = desk.json("status")["routes"]
        assert shown["refused"] == found["refused"]
        steps = [
            step
            for step in desk.json("check", code=2)["steps"]
            if step["level"] == "error"
        ]
        assert any(f":{desk.port}" in step["text"] for step in steps), steps
    finally:
        away = desk.machine.directory / "away"
        for path in away.iterdir() if away.exists() else ():
            path.rename(desk.machine.directory / "units" / path.name)
        shutil.rmtree(away, ignore_errors=True)


def test_a_route_whose_file_is_gone_is_no_listening_one(desk: Desk) -> None:
    path = desk.machine.runtime / "notes"
    desk.run("add", "unix", "notes", "vault", "--listen", str(path))
    path.unlink()
    (found,) = desk.json("list")
    assert "the file of the socket was removed" in found["refused"]
    desk.machine.systemctl("restart", found["unit"])
    (found,) = desk.json("list")
    assert found["refused"] is None


# ----------------------------------------------------- names as a person writes


@pytest.mark.parametrize("name", ["é", 'a"b', "o'ne", "back\\slash"])
def test_a_path_is_shown_found_and_removed_as_it_was_written(
    desk: Desk, name: str
) -> None:
    path = str(desk.machine.home / f"{name}.sock")
    written = path.replace("\\", "\\\\") if "\\" in path else path
    desk.drop_in(
        "qrexec-connect-unix@notes.socket",
        "vault",
        "[Socket]",
        f"ListenStream={written}",
        "FileDescriptorName=vault",
    )
    desk.start("qrexec-connect-unix@notes.socket")
    (found,) = desk.json("list")
    assert (found["target"], found["listens"], found["refused"]) == (
        "vault",
        True,
        None,
    )
    assert found["listener"] == written
    (shown,) = desk.json("status", written)["routes"]
    assert shown["listener"] == written
    assert "listening" in desk.run("list")
    desk.run("remove", written)
    assert desk.json("list") == []
    assert not listens(written)
    assert not any(one.endswith(".conf") for one in desk.files())


def test_a_path_that_is_not_ascii_can_be_added(desk: Desk) -> None:
    path = str(desk.machine.home / "é.sock")
    for _ in range(2):
        words = ("add", "unix", "notes", "vault", "--listen", path)
        assert "closes it at each daemon-reload" in desk.try_(*words).stderr
    assert listens(path)
    assert desk.routes() == {path: "vault"}
    assert len([one for one in desk.files() if one.endswith(".conf")]) == 1
    desk.run("remove", "vault")
    assert desk.routes() == {}


def test_a_path_that_systemd_loses_is_told_with_the_cause(desk: Desk) -> None:
    """systemd 252 closes what it has to show with a backslash at each
    daemon-reload, and goes on to call the unit active."""
    path = str(desk.machine.home / "é.sock")
    desk.run("add", "unix", "notes", "vault", "--listen", path)
    desk.machine.systemctl("daemon-reload")
    said = desk.try_("check").stdout
    assert ("each daemon-reload closes" in said) is not listens(path)


@pytest.fixture(params=["user", "systemd"])
def linked(desk: Desk, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of dotfiles into which the user's folder of units is a link, or
    the one above it."""
    dotfiles = desk.machine.directory / "dotfiles"
    folder = desk.machine.unit_dir
    if request.param == "systemd":
        folder = folder.parent
    shutil.copytree(folder, dotfiles, symlinks=True)
    shutil.rmtree(folder)
    folder.symlink_to(dotfiles)
    desk.machine.systemctl("daemon-reload")
    yield dotfiles
    folder.unlink()
    shutil.rmtree(dotfiles)
    desk.machine.unit_dir.mkdir(parents=True)


def once(desk: Desk) -> dict[str, Any]:
    (found,) = desk.json("list")
    assert found["refused"] is None
    assert found["target"] == "gitweb"
    assert found["file"] == str(
        desk.machine.unit_dir / f"{desk.tcp}.d" / "gitweb.conf"
    )
    assert desk.json("check", code=0)["level"] == "ok"
    return dict(found)


def test_drop_ins_in_a_linked_folder_are_shown_once_as_written(
    desk: Desk,
) -> None:
    dotfiles = desk.machine.directory / "dotfiles"
    dotfiles.mkdir()
    try:
        (desk.machine.unit_dir / f"{desk.tcp}.d").symlink_to(dotfiles)
        route(desk)
        once(desk)
        assert (
            "as it was"
            in desk.try_(
                "edit", "gitweb", environment={"EDITOR": "true"}
            ).stderr
        )
        desk.run("remove", "gitweb")
        assert desk.json("list") == []
        assert list(dotfiles.iterdir()) == []
    finally:
        (desk.machine.unit_dir / f"{desk.tcp}.d").unlink(missing_ok=True)
        shutil.rmtree(dotfiles)


def test_routes_below_a_linked_folder_of_units_are_shown_once(
    desk: Desk, linked: Path
) -> None:
    route(desk)
    once(desk)
    desk.run("remove", "gitweb")
    assert desk.json("list") == []
    assert not list(linked.rglob("*.d/*"))


def test_a_linked_file_is_shown_once_and_changed_as_written(
    desk: Desk,
) -> None:
    dotfiles = desk.machine.directory / "dotfiles"
    dotfiles.mkdir()
    try:
        path = route(desk)
        linked = path.rename(dotfiles / "somewhere-else.conf")
        path.symlink_to(linked)
        desk.machine.systemctl("daemon-reload")
        desk.machine.systemctl("restart", desk.tcp)
        once(desk)
        desk.run("retarget", "gitweb", "work")
        assert path.is_symlink()
        assert "=work" in linked.read_text()
        desk.run("remove", "work")
        assert desk.json("list") == []
        assert desk.files() == set()
    finally:
        shutil.rmtree(dotfiles)


# ------------------------------------------------------- edited, and not read


def test_a_route_keeps_its_name_while_systemd_has_not_read_its_file(
    desk: Desk,
) -> None:
    path = route(desk)
    path.write_text(f"{path.read_text()}\n")
    (found,) = desk.json("list")
    assert (found["target"], found["refused"] is None) == ("gitweb", False)
    assert "gitweb" in desk.run("policy")
    assert (
        "as it was"
        in desk.try_("edit", "gitweb", environment={"EDITOR": "true"}).stderr
    )
    desk.run("remove", "gitweb")
    assert desk.json("list") == []
    assert not path.exists()


def test_an_address_that_was_added_to_a_file_is_shown_before_the_reload(
    desk: Desk,
) -> None:
    path = route(desk)
    path.write_text(path.read_text() + f"ListenStream=127.0.0.9:{desk.port}\n")
    found = {one["listener"]: one for one in desk.json("list")}
    new = found[f"127.0.0.9:{desk.port}"]
    assert new["target"] == "gitweb"
    assert "was changed after systemd read it" in new["refused"]


def test_who_changes_a_dead_route_is_not_told_that_it_reaches_anything(
    desk: Desk,
) -> None:
    """It listens on while its daemon is masked."""
    desk.run("add", "tcp", str(desk.port), "gitweb")
    desk.machine.systemctl("mask", SERVICE)
    mend = f"{SERVICE} is masked; systemctl --user unmask {SERVICE}"
    done = desk.try_("retarget", "gitweb", "work")
    assert (done.returncode, "now reaches" in done.stdout) == (0, False)
    assert f"Now it reaches nobody: {mend}" in done.stderr
    assert f"reaches nobody: {mend}" in desk.fails("start", "work", code=1)


@pytest.mark.parametrize(
    ("masked", "named"),
    [
        ("qrexec-connect-tcp@.socket", "qrexec-connect-tcp@.socket"),
        ("INSTANCE", "INSTANCE"),
        (SERVICE, SERVICE),
    ],
)
def test_what_is_masked_is_unmasked_by_what_add_prints(
    desk: Desk, masked: str, named: str
) -> None:
    masked, named = (
        word.replace("INSTANCE", desk.tcp) for word in (masked, named)
    )
    desk.machine.systemctl("mask", masked)
    desk.machine.systemctl("daemon-reload")
    said = desk.fails("add", "tcp", str(desk.port), "gitweb", code=1)
    mend = f"systemctl --user unmask {named}"
    assert f"{named} is masked; {mend}" in said
    desk.machine.systemctl(*mend.split()[2:])
    desk.run("add", "tcp", str(desk.port), "gitweb")


def test_what_makes_a_service_run_something_else_is_found_by_what_add_prints(
    desk: Desk,
) -> None:
    desk.drop_in(SERVICE, "mine", "[Service]", "ExecStart=", "ExecStart=/bin/x")
    desk.machine.systemctl("daemon-reload")
    said = desk.fails("add", "tcp", str(desk.port), "gitweb", code=1)
    assert f"systemctl --user cat {SERVICE} shows which file" in said
