"""What makes commands quick: they import little, and ask systemd about all
routes at once. The bench takes times."""

from __future__ import annotations

import cProfile
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from desk import Desk

from qrexec_activate.control import check_routes, check_units
from qrexec_activate.control import survey as survey_module
from qrexec_activate.control.checks import walk
from qrexec_activate.control.select import written
from qrexec_activate.control.steps import ran
from qrexec_activate.control.survey import survey
from qrexec_activate.loopback.machine import Machine
from qrexec_activate.routing.unitfile import SourceFile
from qrexec_activate.systemd import unitdirs
from qrexec_activate.systemd.units import Manager

IMPORTED_BY = """
import sys
from qrexec_activate.__main__ import main
sys.argv = ["qrexec-activate", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code
print("imported", *sys.modules)
"""


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def modules_of(desk: Desk, *words: str) -> list[str]:
    """All that a command imports."""
    environment = {
        key: value
        for key, value in desk.machine.environment.items()
        if not key.startswith("COVERAGE_")
    }
    argv = [sys.executable, "-c", IMPORTED_BY, *words]
    output = subprocess.run(
        argv, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    return output.rpartition("imported ")[2].split()


def imported_by(desk: Desk, *words: str) -> set[str]:
    """The packages and, of this one, the modules that a command imports;
    without those of the standard library."""
    # What a virtual environment's own start brings is not the command's doing.
    before = subprocess.check_output(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], text=True
    ).split()
    others = (
        name
        for name in modules_of(desk, *words)
        if name not in before
        and name.partition(".")[0] not in sys.stdlib_module_names
    )
    return {
        name if name.startswith("qrexec_activate.") else name.partition(".")[0]
        for name in others
    }


def test_help_imports_little_but_click(desk: Desk) -> None:
    own = {"__main__", "cli", "errors", "printable"}
    own |= {"control", "control.options", "control.terminal"}
    assert imported_by(desk, "--help") == {
        "click",
        "qrexec_activate",
        *(f"qrexec_activate.{name}" for name in own),
    }


def test_help_waits_for_no_slow_part_of_the_standard_library(
    desk: Desk,
) -> None:
    needed = subprocess.check_output(
        [sys.executable, "-c", "import sys, click; print(*sys.modules)"],
        text=True,
    ).split()
    slow = {"asyncio", "dataclasses", "json", "pathlib", "subprocess"}
    assert not slow & ({*modules_of(desk, "--help")} - {*needed})


def test_help_looks_for_no_garbage(desk: Desk) -> None:
    code = IMPORTED_BY.replace(
        'print("imported", *sys.modules)',
        'print("collected", gc.get_stats()[0]["collections"] - before)',
    )
    code = f"import gc; before = gc.get_stats()[0]['collections']{code}"
    output = subprocess.check_output(
        [sys.executable, "-c", code, "--help"],
        env=desk.machine.environment,
        text=True,
    )
    assert int(output.rpartition("collected ")[2]) < 5


def test_list_imports_neither_the_daemon_nor_what_draws_tables(
    desk: Desk,
) -> None:
    desk.drop_in(
        "qrexec-connect-tcp@1234.socket",
        "work",
        "[Socket]",
        "FileDescriptorName=work",
    )
    desk.machine.systemctl("daemon-reload")
    imported = imported_by(desk, "list")
    assert {"click", "jeepney"} <= imported
    assert not imported & {
        "trio",
        "psutil",
        "systemd",
        "qrexec_activate.forward.daemon",
        "qrexec_activate.forward.connection",
    }


@pytest.mark.parametrize(
    ("look", "most"),
    [(lambda: survey(user=True), 4.5), (lambda: walk("user"), 5.5)],
    ids=["list", "check"],
)
def test_many_routes_take_no_more_conversations_than_few(
    look: Callable[[], object],
    most: float,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    ask = Manager._ask

    def counted(manager: Manager, requests: Sequence[Any]) -> Any:
        asked.append(len(requests))
        return ask(manager, requests)

    monkeypatch.setattr(Manager, "_ask", counted)

    def conversations(routes: int) -> tuple[int, int]:
        some_routes(desk, monkeypatch, routes)
        assert len(survey(user=True).entries) == routes
        asked.clear()
        look()
        return len(asked), sum(asked)

    few, many = conversations(3), conversations(100)
    assert many[0] == few[0]
    assert (many[1] - few[1]) / 97 < most, "questions about one route"


def test_check_asks_by_one_connection_and_lists_a_folder_twice(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    some_routes(desk, monkeypatch)
    greeted: list[bool] = []
    hello = Manager.hello

    def counted(manager: Manager) -> None:
        greeted.append(manager.user)
        hello(manager)

    listed: list[str] = []
    names_in = unitdirs.names_in

    def looked(folder: str) -> list[str]:
        listed.append(folder)
        return names_in(folder)

    monkeypatch.setattr(Manager, "hello", counted)
    monkeypatch.setattr(unitdirs, "names_in", looked)
    walk("user")
    assert greeted == [True]
    folders = Counter(one for one in listed if one.endswith(".socket.d"))
    assert len(folders) == 5
    # Once for routes, and once for what is published.
    assert set(folders.values()) == {2}


def test_check_looks_above_a_socket_only_where_others_may_write_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "socket"
    looked: list[Path] = []
    look = Path.stat

    def counted(folder: Path) -> os.stat_result:
        looked.append(folder)
        return look(folder)

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o600)
        monkeypatch.setattr(Path, "stat", counted)
        assert check_routes._open_path(str(path)) == ""
        assert looked == []
        os.chmod(path, 0o666)
        check_routes._open_path(str(path))
        assert looked == [*path.parents]


def test_what_systemd_has_read_is_not_read_again_to_change_a_route(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = some_routes(desk, monkeypatch)
    read: list[str] = []
    read_file = survey_module.read_file

    def counted(path: str) -> SourceFile:
        read.append(path)
        return read_file(path)

    monkeypatch.setattr(survey_module, "read_file", counted)
    now = survey(user=True)
    assert written(now) == now.entries
    assert not set(read) & {*map(str, files)}

    files[0].write_text(files[0].read_text().replace("work", "vault"))
    now = survey(user=True)
    changed, *others = written(now)
    assert (changed.target, now.entries[0].target) == ("vault", "vault")
    assert others == now.entries[1:]
    assert set(read) & {*map(str, files)} == {str(files[0])}


def some_routes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, count: int = 5
) -> list[Path]:
    """Routes that listen; the files that open them."""
    for key, value in desk.machine.environment.items():
        monkeypatch.setenv(key, value)
    units = [f"qrexec-connect-unix@r{number}.socket" for number in range(count)]
    files = [
        desk.drop_in(
            unit,
            "work",
            "[Socket]",
            f"ListenStream=%t/qrexec/{unit}",
            "FileDescriptorName=work",
        )
        for unit in units
    ]
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("start", *units)
    return files


def test_a_route_more_costs_few_calls(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 routes are to take 1.5 s at most: what Python does for one is
    counted, as a clock tells of the machine."""
    for key, value in desk.machine.environment.items():
        monkeypatch.setenv(key, value)

    def calls(routes: range) -> int:
        for number in routes:
            desk.drop_in(
                f"qrexec-connect-unix@r{number}.socket",
                "work",
                "[Socket]",
                f"ListenStream=%t/qrexec/r{number}",
                "FileDescriptorName=work",
            )
        desk.machine.systemctl("daemon-reload")
        profile = cProfile.Profile()
        profile.enable()
        found = survey(user=True).entries
        profile.disable()
        assert len(found) == routes.stop
        return sum(row.callcount for row in profile.getstats())

    few = calls(range(10))
    assert (calls(range(10, 110)) - few) / 100 < 1_700


def test_check_has_systemd_read_again_only_what_is_not_known(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in desk.machine.environment.items():
        monkeypatch.setenv(key, value)
    asked: list[str] = []

    def kept(words: list[str]) -> subprocess.CompletedProcess[str] | None:
        asked.extend(word for word in words if word.endswith(".socket"))
        return ran(words)

    monkeypatch.setattr(check_units, "ran", kept)

    def route(name: str, *lines: str, target: str = "work") -> str:
        unit = f"qrexec-connect-unix@{name}.socket"
        listen = f"ListenStream=%t/qrexec/{name}"
        named = f"FileDescriptorName={target}"
        desk.drop_in(unit, "work", "[Socket]", listen, named, *lines)
        return unit

    plain = [route(f"r{number:02}", "# mine") for number in range(30)]
    others = [
        route("mode", "SocketMode=0600"),
        route("no-listener", "ListenStream="),
        route("no-name", target="a:b"),
        route("no-port", "ListenStream=127.0.0.1:99999"),
        route("typo", "FileDescriptorNam=gitweb"),
    ]
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("start", *plain, *others, check=False)
    steps, _ = walk("user")

    assert set(asked) == {*others}
    said = " ".join(step.text for step in steps if step.area == "units")
    assert "no-port.socket.d/work.conf:4" in said
    assert "typo.socket.d/work.conf:4" in said

    asked.clear()
    for unit in others:
        desk.machine.systemctl("stop", unit, check=False)
        shutil.rmtree(desk.machine.unit_dir / f"{unit}.d")
    desk.machine.systemctl("daemon-reload")
    desk.machine.systemctl("reset-failed")
    steps, _ = walk("user")
    assert asked == [plain[0]]
    said = " ".join(step.text for step in steps if step.area == "units")
    assert "systemd understands every line of 31 files" in said

    monkeypatch.setattr(check_units, "ran", lambda words: None)
    steps, _ = walk("user")
    assert not any("understands" in step.text for step in steps)
