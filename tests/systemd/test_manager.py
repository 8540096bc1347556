"""What a real systemd answers, when a unit's file is believed, and how the bus is
found."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qrexec_activate.errors import ManagerError
from qrexec_activate.loopback.machine import Machine
from qrexec_activate.routing.claim import Refusal, Route
from qrexec_activate.routing.routes import claims
from qrexec_activate.systemd import manager as manager_module
from qrexec_activate.systemd.manager import runs_in_user_manager
from qrexec_activate.systemd.units import LoadedUnit, Manager, open_manager

UNIT = "qrexec-connect-tcp@1234.socket"
DAEMON = "qrexec-connect-tcp.service"

# ------------------------------------------------------- when a file is trusted


def touch_after(path: Path, other: Path) -> int:
    """Touch a file, or a link, later than another, but for what it says itself
    (its mtime, as `cp -p` sets it); returns when, in µs."""
    while path.lstat().st_ctime_ns <= other.lstat().st_ctime_ns:
        os.utime(path, (1, 1), follow_symlinks=False)
    return path.lstat().st_ctime_ns // 1000


def trusted(path: Path, loaded_at: int, since: float = 0) -> bool:
    file = manager_module._Reader(loaded_at).read(str(path), since)
    assert (file.text is None) is bool(file.problem)
    return not file.problem


@pytest.mark.parametrize("newest", ["link", "file"])
def test_whichever_was_touched_last_of_a_link_and_its_file_counts(
    tmp_path: Path, newest: str
) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("[Socket]\n")
    link.symlink_to(file)
    if newest == "link":
        touched = touch_after(link, file)
    else:
        touched = touch_after(file, link)
    # In the very moment, systemd may have read it before that.
    assert not trusted(link, touched)
    assert trusted(link, touched + 1)
    assert not trusted(link, 0, touched)
    assert trusted(link, 0, touched + 1)


def test_a_time_that_was_given_to_a_file_does_not_count(tmp_path: Path) -> None:
    """As tar and `cp -p` do, also one that is yet to come."""
    file = tmp_path / "file"
    file.write_text("[Socket]\n")
    later = time.time() + 86400
    os.utime(file, (later, later))
    assert trusted(file, file.stat().st_ctime_ns // 1000 + 1)


def test_a_file_from_before_the_clock_was_set_back_is_to_be_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No daemon-reload mends that until this time has come."""
    file = tmp_path / "file"
    file.write_text("[Socket]\n")
    now = file.stat().st_ctime_ns // 1000
    monkeypatch.setattr(time, "time", lambda: now / 1e6 - 3600)
    found = manager_module._Reader(now - 1).read(str(file), 0)
    assert (found.text, found.problem) == (
        None,
        "is of a time that is yet to come (touch it)",
    )


# -------------------------------------------------------------- finding the bus


def test_a_user_bus_that_is_nowhere_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("DBUS_SESSION_BUS_ADDRESS", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with (
        pytest.raises(ManagerError, match="log in as this user"),
        open_manager(user=True),
    ):
        pass
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    with (
        pytest.raises(
            ManagerError, match="DBUS_SESSION_BUS_ADDRESS is not set"
        ),
        open_manager(user=True),
    ):
        pass


@pytest.mark.parametrize(
    "address",
    [
        "unix:path=/nonexistent/bus",
        "nonsense",
        "tcp:host=x,port=1",
        "unix:",
        ";",
        "unix:path",
    ],
)
def test_a_bus_address_that_leads_nowhere_is_an_error(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", address)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
    for user, word in ((True, "user"), (False, "system")):
        with pytest.raises(ManagerError) as caught, open_manager(user=user):
            pass
        assert str(caught.value).startswith(
            f"cannot reach systemd over the {word} bus, {address}: "
        )
        assert len(str(caught.value).splitlines()) == 1


def test_a_bus_that_lets_in_and_never_answers_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """systemd's own private socket is such a one."""
    monkeypatch.setattr(manager_module, "REPLY_TIMEOUT", 0.2)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0test-manager-{os.getpid()}")
        server.listen()

        def admit() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n")
                while connection.recv(100):
                    pass

        thread = threading.Thread(target=admit)
        thread.start()
        monkeypatch.setenv(
            "DBUS_SYSTEM_BUS_ADDRESS",
            f"unix:abstract=test-manager-{os.getpid()}",
        )
        with (
            pytest.raises(ManagerError, match="did not answer"),
            open_manager(user=False),
        ):
            pass
        thread.join()


def test_the_bus_beside_the_users_manager_comes_before_another_session_bus(
    monkeypatch: pytest.MonkeyPatch,
    systemd: Manager,
    machine: Machine,
    tmp_path: Path,
) -> None:
    odd = tmp_path / "a,b;c=d%e"
    odd.symlink_to(machine.runtime)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(odd))
    monkeypatch.setenv("DBUS_SESSION_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    with open_manager(user=True) as manager:
        assert manager.manager_properties("Version")[0]


def test_only_a_user_manager_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANAGERPID", "1")
    assert runs_in_user_manager()
    monkeypatch.delenv("MANAGERPID")
    assert not runs_in_user_manager()


def test_specifiers_are_those_of_the_manager(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert Manager(ours, user=False).specifiers() == {
            "t": "/run",
            "h": "/root",
            "u": "root",
            "U": "0",
        }
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
        monkeypatch.setenv("HOME", "/home/x")
        monkeypatch.setattr(os, "getuid", lambda: 0)
        assert Manager(ours, user=True).specifiers() == {
            "t": "/run/user/7",
            "h": "/home/x",
            "u": "root",
            "U": "0",
        }
        monkeypatch.setattr(os, "getuid", lambda: 987654321)
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        monkeypatch.delenv("HOME")
        assert Manager(ours, user=True).specifiers() == {
            "u": "987654321",
            "U": "987654321",
        }


# ----------------------------------------------------------------- the real one


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.fixture
def systemd(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Manager]:
    for name in ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "HOME"):
        monkeypatch.setenv(name, machine.environment[name])
    with open_manager(user=True) as manager:
        yield manager


@pytest.fixture
def instance(machine: Machine) -> Iterator[str]:
    """A unit with two drop-ins, gone afterwards."""
    name = "qrexec-connect-tcp@4321.socket"
    machine.write_drop_in(
        name,
        "gitweb",
        f"[Socket]\nListenStream=@{machine.directory}/g\nFileDescriptorName=gitweb\n",
    )
    machine.write_drop_in(
        name,
        "work",
        f"[Socket]\nListenStream=@{machine.directory}/w\nFileDescriptorName=work\n",
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("start", name)
    yield name
    machine.systemctl("stop", name)
    for path in (machine.unit_dir / f"{name}.d").iterdir():
        path.unlink()
    (machine.unit_dir / f"{name}.d").rmdir()
    machine.systemctl("daemon-reload")


def problems(manager: Manager, name: str) -> dict[str, str]:
    """What is wrong with each file, by the last part of its path."""
    (unit,) = manager.socket_units([name])
    for file in unit.files:
        assert (file.text is None) is bool(file.problem)
    return {os.path.basename(file.path): file.problem for file in unit.files}


def targets(manager: Manager, name: str) -> list[str]:
    (unit,) = manager.socket_units([name])
    found = claims("qubes.ConnectTCP", unit, manager.specifiers())
    return [
        claim.target if isinstance(claim, Route) else "refused"
        for claim in found
    ]


def later(path: Path) -> None:
    """Make sure that a file counts as newer: the kernel dates files by a clock
    that ticks some 100 times a second."""
    time.sleep(0.03)
    path.touch()


def test_a_unit_comes_with_its_listeners_and_its_files_in_the_order_applied(
    systemd: Manager, instance: str
) -> None:
    assert instance in systemd.trigger_units(DAEMON)
    (unit,) = systemd.socket_units([instance], only_active=True)
    assert [address[-2:] for _, address in unit.listen] == ["/g", "/w"]
    assert [os.path.basename(file.path) for file in unit.files] == [
        "qrexec-connect-tcp@.socket",
        "gitweb.conf",
        "work.conf",
    ]
    assert unit.fd_name == "work"
    assert not unit.problem
    assert "FileDescriptorName=gitweb" in (unit.files[1].text or "")
    assert targets(systemd, instance) == ["gitweb", "work"]
    assert systemd.list_units(instance, "nothing*") == [
        LoadedUnit(instance, "loaded", "active", "listening")
    ]


def test_serve_and_the_commands_are_told_the_same(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    other = "qrexec-connect-tcp@4322.socket"
    with manager_module.Manager.open(user=True) as plain:
        assert plain.trigger_units(DAEMON) == systemd.trigger_units(DAEMON)
        for names in ([instance], [instance, other, "nothing.service"]):
            for only_active in (True, False):
                told = plain.socket_units(names, only_active=only_active)
                assert told == systemd.socket_units(
                    names, only_active=only_active
                )
                assert told[0].name == instance


def test_units_that_do_not_listen_are_left_out_where_only_active_ones_are_wanted(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    machine.systemctl("stop", instance)
    assert systemd.socket_units([instance], only_active=True) == []
    assert [unit.name for unit in systemd.socket_units([instance])] == [
        instance
    ]


def test_a_daemon_that_systemd_does_not_know_has_no_units(
    systemd: Manager,
) -> None:
    assert systemd.trigger_units("nothing-here.service") == []
    with pytest.raises(ManagerError, match="does not know"):
        systemd.trigger_units("no unit name")
    assert systemd.stop_timeout(DAEMON) == 5
    assert not systemd.is_stopping(DAEMON)
    systemd.reset_start_limit(DAEMON)
    systemd.reset_start_limit("nothing-here.service")


def test_a_changed_file_is_not_trusted_and_the_others_are(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    path = machine.write_drop_in(
        instance,
        "work",
        "[Socket]\nListenStream=@x\nFileDescriptorName=vault\n",
    )
    later(path)
    assert problems(systemd, instance) == {
        "qrexec-connect-tcp@.socket": "",
        "gitweb.conf": "",
        "work.conf": "was changed after systemd read it",
    }
    (unit,) = systemd.socket_units([instance])
    assert "FileDescriptorName=vault" in (unit.files[2].now or "")
    assert targets(systemd, instance) == ["gitweb", "refused"]
    machine.systemctl("daemon-reload")
    assert not any(problems(systemd, instance).values())


def test_what_systemctl_set_property_wrote_is_no_change_of_listeners(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    """From then on systemd 252 asks for a daemon-reload, and has that file last
    until then; 257 does not, and has it where its name belongs."""
    machine.systemctl("set-property", instance, "CPUWeight=50")
    (row,) = systemd.unit_properties([instance], "Unit", ["DropInPaths"])
    (written,) = [path for path in row["DropInPaths"] if ".control/" in path]
    try:
        assert not any(problems(systemd, instance).values())
        assert targets(systemd, instance) == ["gitweb", "work"]
        # By hand, anything can be in there.
        with open(written, "a") as file:
            file.write("[Socket]\nFileDescriptorName=work\n")
        later(Path(written))
        assert (
            problems(systemd, instance)[os.path.basename(written)]
            == "was changed after systemd read it"
        )
    finally:
        os.unlink(written)


def test_a_deleted_file_is_not_trusted_and_the_others_are(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    (machine.unit_dir / f"{instance}.d" / "gitweb.conf").unlink()
    assert problems(systemd, instance)["gitweb.conf"] == "is gone"
    assert targets(systemd, instance) == ["refused", "work"]


def test_a_file_replaced_by_an_older_one_beside_a_changed_one_is_not_trusted(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    folder = machine.unit_dir / f"{instance}.d"
    old = machine.home / "old.conf"
    old.write_text("[Socket]\nListenStream=@x\nFileDescriptorName=vault\n")
    os.utime(old, (1, 1))
    time.sleep(0.03)
    old.rename(folder / "gitweb.conf")
    later(folder / "work.conf")
    assert (
        problems(systemd, instance)["gitweb.conf"]
        == "was changed after systemd read it"
    )


def test_a_file_replaced_by_an_older_one_is_not_trusted_though_systemd_sees_no_change(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    old = machine.home / "old.conf"
    path = machine.unit_dir / f"{instance}.d" / "gitweb.conf"
    old.write_text(path.read_text().replace("gitweb", "vault"))
    os.utime(old, (1, 1))
    time.sleep(0.03)
    old.rename(path)
    assert machine.property(instance, "NeedDaemonReload") == "no"
    assert targets(systemd, instance) == ["refused", "work"]
    machine.systemctl("daemon-reload")
    assert targets(systemd, instance) == ["vault", "work"]


def test_a_new_drop_in_does_not_count_before_a_daemon_reload(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    path = machine.write_drop_in(
        instance, "aaa", "[Socket]\nListenStream=@x\nFileDescriptorName=vault\n"
    )
    later(path)
    assert machine.property(instance, "NeedDaemonReload") == "yes"
    assert "aaa.conf" not in problems(systemd, instance)
    assert targets(systemd, instance) == ["gitweb", "work"]


def test_a_unit_that_was_loaded_on_demand_is_trusted_without_a_daemon_reload(
    systemd: Manager, machine: Machine
) -> None:
    name = "on-demand@1.socket"
    path = machine.write_unit(
        "on-demand@.socket",
        "[Socket]\nListenStream=@x\nFileDescriptorName=work\n",
    )
    later(path)
    assert problems(systemd, name) == {"on-demand@.socket": ""}
    path.unlink()


def test_links_to_nothing_folders_masks_and_fifos_do_not_stop_the_daemon(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    folder = machine.unit_dir / f"{instance}.d"
    (folder / "a-folder.conf").mkdir()
    (folder / "a-mask.conf").symlink_to("/dev/null")
    (folder / "a-nothing.conf").symlink_to("nothing")
    (folder / "a-fifo.conf").write_text("")
    machine.systemctl("daemon-reload")
    (folder / "a-fifo.conf").unlink()
    os.mkfifo(folder / "a-fifo.conf")
    try:
        found = problems(systemd, instance)
        assert (
            found["a-nothing.conf"]
            == "is a symbolic link to nothing (remove it)"
        )
        assert found["a-folder.conf"] == found["a-mask.conf"] == ""
        assert found["a-fifo.conf"] == "was changed after systemd read it"
        assert targets(systemd, instance) == ["gitweb", "work"]
    finally:
        (folder / "a-folder.conf").rmdir()
        # systemd itself would wait for somebody to write there.
        (folder / "a-fifo.conf").unlink()


def test_a_file_that_cannot_be_read_is_not_trusted(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    path = machine.unit_dir / f"{instance}.d" / "gitweb.conf"
    path.unlink()
    path.symlink_to(path)
    assert problems(systemd, instance)["gitweb.conf"] == (
        "cannot be read (Too many levels of symbolic links; mend or remove it)"
    )
    path.unlink()
    path.write_text("")


def test_a_unit_with_a_broken_fragment_serves_nothing(
    systemd: Manager, machine: Machine
) -> None:
    name = "broken@1.socket"
    path = machine.write_unit(
        "broken@.socket",
        "[Socket]\nListenStream=@x\nFileDescriptorName=work\n[Socket\n",
    )
    machine.write_drop_in(
        name, "override", "[Socket]\nFileDescriptorName=vault\n"
    )
    machine.systemctl("daemon-reload")
    (unit,) = systemd.socket_units([name])
    (claim,) = claims("my.Rpc", unit, systemd.specifiers())
    assert isinstance(claim, Refusal)
    assert "systemd could not load it (LoadState=error)" in claim.reason
    path.unlink()


def test_drop_ins_of_the_template_and_of_all_sockets_come_in_the_order_of_their_names(
    systemd: Manager, machine: Machine, instance: str
) -> None:
    made = [
        machine.write_drop_in(
            "qrexec-connect-tcp@.socket", "hhh", "[Socket]\nListenFIFO=/x\n"
        ),
        machine.write_drop_in("socket", "a", "[Socket]\nMark=0\n"),
        machine.write_drop_in(
            "qrexec-connect-.socket",
            "zzz",
            "[Socket]\nFileDescriptorName=vault\n",
        ),
    ]
    machine.systemctl("daemon-reload")
    try:
        assert list(problems(systemd, instance)) == [
            *(
                "qrexec-connect-tcp@.socket",
                "a.conf",
                "gitweb.conf",
                "hhh.conf",
                "work.conf",
                "zzz.conf",
            )
        ]
        assert targets(systemd, instance) == ["vault", "refused", "vault"]
    finally:
        for path in made:
            path.unlink()


def test_a_transient_unit_has_a_fragment_like_any_other(
    systemd: Manager, machine: Machine
) -> None:
    machine.run(
        [
            *(
                "systemd-run",
                "--user",
                "--unit=passing",
                "--socket-property=ListenStream=@passing-by",
            ),
            *("--socket-property=FileDescriptorName=work", "true"),
        ]
    )
    try:
        (unit,) = systemd.socket_units(["passing.socket"])
        assert not unit.problem
        (claim,) = claims("my.Rpc", unit, systemd.specifiers())
        assert isinstance(claim, Route)
        assert claim.target == "work"
    finally:
        machine.systemctl("stop", "passing.socket")


def test_properties_of_several_units_come_in_order(
    systemd: Manager, instance: str
) -> None:
    found = systemd.unit_properties(
        [DAEMON, instance], "Unit", ["Id", "ActiveState", "NoSuchProperty"]
    )
    assert found == [
        {"Id": DAEMON, "ActiveState": "inactive", "NoSuchProperty": None},
        {"Id": instance, "ActiveState": "active", "NoSuchProperty": None},
    ]


def test_systemd_says_when_it_last_loaded_units(
    systemd: Manager, machine: Machine
) -> None:
    (first,) = systemd.manager_properties("UnitsLoadTimestamp")
    machine.systemctl("daemon-reload")
    (second,) = systemd.manager_properties("UnitsLoadTimestamp")
    assert 0 < first < second <= time.time_ns() // 1000


def test_three_hundred_instances_are_told_at_once(
    systemd: Manager, machine: Machine
) -> None:
    made = [
        machine.write_drop_in(
            f"many@{number}.socket",
            "a",
            f"[Socket]\nListenStream=@m{number}\nFileDescriptorName=q{number}\n",
        )
        for number in range(300)
    ]
    template = machine.write_unit("many@.socket", "[Socket]\nNoDelay=yes\n")
    machine.systemctl("daemon-reload")
    names = [f"many@{number}.socket" for number in range(300)]
    units = systemd.socket_units(names)
    assert [unit.name for unit in units] == names
    for number, unit in enumerate(units):
        (claim,) = claims("my.Rpc", unit, systemd.specifiers())
        assert isinstance(claim, Route)
        assert (claim.address, claim.target) == (f"@m{number}", f"q{number}")
    for path in made:
        path.unlink()
        path.parent.rmdir()
    template.unlink()
    machine.systemctl("daemon-reload")
