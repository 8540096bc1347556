"""Whatever happens to add and remove: the files and sockets are those that the
routes need, no more and no less."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import PATIENCE, Desk, free_port, listens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrexec_activate.loopback.machine import Machine

#: How often add and remove are killed. More find nothing else, and take 0.4 s
#: each.
KILLS = 8


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def needed(
    desk: Desk, routes: set[tuple[int, str]]
) -> tuple[set[str], set[str]]:
    """The files and the active sockets that these routes, each a port and a
    target, need."""
    units = {desk.labelled(target, port): target for port, target in routes}
    files = {f"{unit}.d/{target}.conf" for unit, target in units.items()}
    return files | {f"sockets.target.wants/{unit}" for unit in units}, set(
        units
    )


def is_settled(
    desk: Desk, routes: set[tuple[int, str]], *, after_a_kill: bool = False
) -> None:
    """Hold what there is against what these routes need. After a kill, a link
    may be left that enables a unit without any address, and so does nothing,
    and a folder without any file."""
    files, sockets = needed(desk, routes)
    folders = {
        folder
        for folder in desk.folders()
        if not after_a_kill
        or any(desk.machine.unit_dir.joinpath(folder).iterdir())
    }
    left = {
        link
        for link in desk.files() - files
        if after_a_kill
        and link.startswith("sockets.target.wants/")
        and f"{Path(link).name}.d" not in folders
    }
    assert desk.files() - left == files
    assert desk.active() == sockets
    assert folders == {f"{unit}.d" for unit in sockets}
    assert desk.failed() == ""
    listed = desk.json("list")
    assert {(int(one["argument"]), one["target"]) for one in listed} == routes
    assert len({one["listener"] for one in listed}) == len(routes)
    for one in listed:
        assert (one["listens"], one["refused"]) == (True, None)


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["add", "remove"]),
        st.integers(0, 1),
        st.sampled_from(["gitweb", "work", "vault"]),
    ),
    min_size=4,
    max_size=8,
)


@pytest.mark.slow
def test_any_sequence_leaves_just_what_the_remaining_routes_need(
    desk: Desk,
) -> None:
    ports = [desk.port, free_port()]

    @settings(
        max_examples=5,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_STEPS)
    def sequence(steps: list[tuple[str, int, str]]) -> None:
        desk.tidy()
        routes: set[tuple[int, str]] = set()
        for verb, index, target in steps:
            route = (ports[index], target)
            result = desk.try_(verb, "tcp", str(route[0]), target)
            assert (result.returncode == 0) is (
                verb == "add" or route in routes
            ), result.stderr
            routes = routes | {route} if verb == "add" else routes - {route}
        is_settled(desk, routes)

    sequence()


def killed(desk: Desk, after: float, *words: str) -> bool:
    """Start a command and kill it after so many seconds; whether it had not
    ended before."""
    with subprocess.Popen(
        desk.argv(*words),
        env=desk.machine.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            return True
    return False


def is_back(address: tuple[str, int]) -> None:
    """The neighbour goes on, once systemd has done what it was told last."""
    deadline = time.monotonic() + PATIENCE
    while not listens(address):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def duration(desk: Desk, *words: str) -> float:
    began = time.monotonic()
    desk.run(*words)
    return time.monotonic() - began


def routes_on_disk(desk: Desk) -> set[str]:
    """The routes that the next login would have: the address is in a file, and
    its unit is enabled."""
    found = set()
    for path in desk.machine.unit_dir.glob("*.socket.d/*.conf"):
        text = path.read_text()
        unit = path.parent.name.removesuffix(".d")
        assert text.startswith("[Socket]\nListenStream=")
        assert text.endswith(f"\nFileDescriptorName={path.stem}\n")
        assert f"sockets.target.wants/{unit}" in desk.files()
        found.add(path.stem)
    return found


def test_a_kill_in_the_middle_leaves_the_old_state_or_the_new(
    desk: Desk,
) -> None:
    port = str(desk.port)
    whole = duration(desk, "add", "tcp", port, "work")
    for _ in range(KILLS // 2):
        killed(
            desk, random.uniform(0.3, 1.1) * whole, "add", "tcp", port, "gitweb"
        )
        assert routes_on_disk(desk) in ({"work"}, {"work", "gitweb"})
        is_back(("127.0.0.1", desk.port))
        # Whoever runs it again gets what they wanted, whatever was left.
        desk.run("add", "tcp", port, "gitweb")
        is_settled(
            desk,
            {(desk.port, "work"), (desk.port, "gitweb")},
            after_a_kill=True,
        )
        killed(
            desk,
            random.uniform(0.3, 1.1) * whole,
            "remove",
            "tcp",
            port,
            "gitweb",
        )
        assert routes_on_disk(desk) in ({"work"}, {"work", "gitweb"})
        desk.try_("remove", "tcp", port, "gitweb")
        is_settled(desk, {(desk.port, "work")}, after_a_kill=True)


def test_a_kill_at_the_first_and_the_last_route_of_an_instance_does_no_harm(
    desk: Desk,
) -> None:
    port = str(desk.port)
    whole = duration(desk, "add", "tcp", port, "work")
    for _ in range(KILLS // 2):
        killed(
            desk,
            random.uniform(0.3, 1.1) * whole,
            "remove",
            "tcp",
            port,
            "work",
        )
        assert routes_on_disk(desk) in (set(), {"work"})
        desk.try_("remove", "tcp", port, "work")
        assert desk.routes() == {}
        assert desk.active() == set()
        killed(
            desk, random.uniform(0.3, 1.1) * whole, "add", "tcp", port, "work"
        )
        assert routes_on_disk(desk) in (set(), {"work"})
        desk.run("add", "tcp", port, "work")
        is_settled(desk, {(desk.port, "work")}, after_a_kill=True)


def test_ctrl_c_leaves_the_old_state_or_the_new(desk: Desk) -> None:
    port = str(desk.port)
    whole = duration(desk, "add", "tcp", port, "work")
    # What measures coverage has a traceback of its own where it is interrupted.
    environment = {
        key: value
        for key, value in desk.machine.environment.items()
        if not key.startswith("COVERAGE_")
    }
    for _ in range(5):
        with subprocess.Popen(
            desk.argv("add", "tcp", port, "gitweb"),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            time.sleep(random.uniform(0.3, 1.1) * whole)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=PATIENCE)
        assert "Traceback" not in said
        routes = (
            {"work", "gitweb"} if "gitweb" in routes_on_disk(desk) else {"work"}
        )
        is_settled(desk, {(desk.port, target) for target in routes})
        desk.try_("remove", "tcp", port, "gitweb")


def test_several_runs_at_once_take_turns(desk: Desk) -> None:
    targets = [f"qube{number}" for number in range(6)]

    def at_once(verb: str) -> None:
        processes = [
            subprocess.Popen(
                desk.argv(verb, "tcp", str(desk.port), target),
                env=desk.machine.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for target in targets
        ]
        for process in processes:
            _, said = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, said

    at_once("add")
    is_settled(desk, {(desk.port, target) for target in targets})
    at_once("remove")
    is_settled(desk, set())
