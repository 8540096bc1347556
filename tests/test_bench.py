"""The bench runs, stops what it started, and its tables say what its figures
say. No figure is asserted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from bench import plot, stack
from bench.measures import AT_ONCE, BUSY, COMMANDS, STREAMS
from bench.report import Figures, markdown, targets
from bench.rivals import RIVALS, build

ROOT = Path(__file__).resolve().parents[1]
MACHINE = {
    "date": "today",
    "CPU": "one",
    "kernel": "Linux 6.1 x86_64",
    "Python": "3.11",
    "systemd": "252",
}


def table_rows(text: str) -> dict[str, list[str]]:
    """Every line of every table, by its first cell."""
    lines = [
        line.strip("| ").split(" | ")
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    return {
        line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines
    }


def made_up_results() -> list[dict[str, object]]:
    """Two rounds in which the n-th rival takes n times as long, and brings a
    n-th of the bytes."""
    results: list[dict[str, object]] = []
    for turn in range(2):
        for n, rival in enumerate(RIVALS, 1):
            where = {"rival": rival, "round": turn}
            slow = n * (1 + turn)
            for beside in ("", BUSY):
                results.append(
                    {
                        "measure": f"first-byte{beside}",
                        "p50": slow * 1e6,
                        "p99": slow * 2e6,
                        **where,
                    }
                )
                for at_once in AT_ONCE:
                    results.append(
                        {
                            "measure": f"connections-{at_once}{beside}",
                            "per_second": 1000 / slow,
                            "p99": 1e6,
                            **where,
                        }
                    )
            for name in STREAMS:
                more = {"mib_per_second": 1000 / slow, "cpu_per_gib": 0.0}
                results.append(
                    {"measure": f"throughput-{name}", **more, **where}
                )
            results.append({"measure": "cold", "p50": 13e7, **where})
        for measure, took in (
            ("import-trio", 1e8),
            ("import-click", 1e8),
            ("help", 12e7),
            ("list-100", 2e8),
            *(
                (f"{name}-2000", 16e8 + 1e8 * n)
                for n, name in enumerate(COMMANDS)
            ),
        ):
            results.append(
                {
                    "measure": measure,
                    "rival": "python3",
                    "round": turn,
                    "p50": took,
                    "own": 0.5,
                    "systemd": 1 + turn,
                }
            )
    for rival in RIVALS:
        for count in (0, 1000):
            results.append(
                {
                    "measure": "memory",
                    "rival": rival,
                    "open": count,
                    "rss": 20480,
                    "uss": 10240 + 9 * count,
                }
            )
    for count in (1, 1001):
        result = {
            "measure": "listeners",
            "rival": "hand-over",
            "listeners": count,
            "rss": 20480,
            "uss": 2 * count,
            "start": 1e8 + 1e6 * count,
        }
        results.append(result)
    return results


def test_targets_are_judged_by_the_ratios_of_each_round() -> None:
    judged = {
        one.what: (
            None if one.value is None else round(one.value, 3),
            one.reached,
        )
        for one in targets(Figures(made_up_results()))
    }
    assert judged["first byte, hand-over / limit"] == (2.0, False)
    assert judged["connections/s, 16 at once, hand-over / limit"] == (
        0.5,
        False,
    )
    assert judged["beside a busy core: first byte, hand-over / limit"] == (
        2.0,
        False,
    )
    # The second rival against the fourth.
    assert judged[
        "beside a busy core: connections/s, 64 at once, hand-over / socat"
    ] == (2.0, True)
    assert judged["throughput both ways, splice / socat"] == (1.333, False)
    assert judged["CPU per GiB in the daemon, hand-over: none"] == (0.0, True)
    assert judged["memory per open connection"] == (9.0, False)
    assert judged["memory per listener"] == (2.0, True)
    assert judged["memory without a connection"] == (20.0, True)
    assert judged["cold first byte / import trio"] == (1.3, False)
    assert judged["`--help` / import click"] == (1.2, True)
    assert judged["`list` with 100 routes"] == (0.2, True)
    assert judged["`list` with 2,000 routes"] == (1.6, False)
    assert judged["`remove` with 2,000 routes"] == (2.0, True)


def test_what_was_not_measured_is_not_judged() -> None:
    assert {one.reached for one in targets(Figures([]))} == {None}
    assert "not measured" in markdown(Figures([]), MACHINE)


def test_tables_hold_every_measure_of_every_rival() -> None:
    figures = Figures(made_up_results())
    rows = table_rows(markdown(figures, MACHINE))
    for title in (
        "first byte, p50",
        "first byte, p99",
        *(f"connections/s, {n} at once" for n in AT_ONCE),
        "beside a busy core: first byte, p50",
        *(f"beside a busy core: connections/s, {n} at once" for n in AT_ONCE),
    ):
        assert len(rows[title]) == len(RIVALS)
    for title, *_ in STREAMS.values():
        assert rows[f"MiB/s {title}"][1:3] == [
            "375 (0.50) ±33%",
            "250 (0.33) ±33%",
        ]
        assert len(rows[f"CPU s per GiB {title}"]) == len(RIVALS)
    assert len(rows["1,000 connections"]) == len(RIVALS)
    assert rows["1"][-1] == "101 ms"
    assert rows["1,001"][-1] == "1101 ms"
    assert rows["per listener"][:2] == ["", "2.0 KiB"]
    assert rows["`list`"] == [
        "0.20 s (0.50, 1.50)",
        "1.60 s (0.50, 1.50)",
    ]
    assert rows["`remove`"] == ["-", "2.00 s (0.50, 1.50)"]
    for target in targets(figures):
        assert rows[target.what][-1] == (
            "reached" if target.reached else "**not reached**"
        )


def test_a_rival_that_gives_no_answer_is_named() -> None:
    text = markdown(
        Figures(
            [
                {
                    "measure": "start",
                    "rival": "splice",
                    "error": "no answer: timed out",
                }
            ]
        ),
        MACHINE,
    )
    assert "- start, splice: no answer: timed out" in text


def test_the_plot_is_an_image_of_every_bar() -> None:
    image = ElementTree.fromstring(
        plot.svg(Figures(made_up_results()), MACHINE)
    )
    bars = [
        one
        for one in image.iter("{http://www.w3.org/2000/svg}rect")
        if one.get("rx")
    ]
    assert len(bars) == len(RIVALS) * len(plot.PANELS)


@pytest.mark.parametrize("linked", [True, False])
def test_a_qube_of_a_stack_echoes_as_long_as_the_bench_runs(
    tmp_path: Path, linked: bool
) -> None:
    services, configs = (
        tmp_path / "qubes" / "work" / name
        for name in ("qubes-rpc", "rpc-config")
    )
    services.mkdir(parents=True)
    configs.mkdir()
    service = services / "qubes.ConnectTCP+7"
    with stack.serving(tmp_path, "work", linked=linked):
        if linked:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(service.readlink()))
                client.sendall(b"x")
                assert client.recv(2) == b"x"
            assert (configs / service.name).exists()
        else:
            said = subprocess.run(
                [service], input=b"x", capture_output=True, check=True
            )
            assert said.stdout == b"x"
    assert not [*services.iterdir(), *configs.iterdir()]


def test_a_service_that_a_stack_has_already_stays(tmp_path: Path) -> None:
    services = tmp_path / "qubes" / "work" / "qubes-rpc"
    services.mkdir(parents=True)
    service = services / "qubes.ConnectTCP+7"
    service.write_text("mine")
    for linked in (True, False):
        with (
            pytest.raises(FileExistsError),
            stack.serving(tmp_path, "work", linked=linked),
        ):
            pass
    assert service.read_text() == "mine"
    with (
        pytest.raises(SystemExit, match="no qube gitweb"),
        stack.serving(tmp_path, "gitweb", linked=True),
    ):
        pass


def test_who_serves_all_at_once_and_seldom_is_counted_too(
    tmp_path: Path,
) -> None:
    load = build(tmp_path, Path("/bin/true")).load
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    batch = [listener.accept()[0]]
                    # Longer than the load is told to count.
                    time.sleep(0.2)
                    while select.select([listener], [], [], 0)[0]:
                        batch.append(listener.accept()[0])
                    for client in batch:
                        with client:
                            client.sendall(client.recv(1))
                            client.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        port = str(listener.getsockname()[1])
        said = subprocess.run(
            [load, "rate", "127.0.0.1", port, "4", "0.02"],
            capture_output=True,
            check=True,
        )
        # What accept() sleeps in ends with this, not with close().
        listener.shutdown(socket.SHUT_RDWR)
    counted = json.loads(said.stdout)
    assert counted["served"] >= 4
    assert counted["seconds"] >= 0.02


@pytest.mark.slow
def test_a_quick_run_measures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    only = (
        "limit",
        "hand-over",
        "first-byte",
        "connections",
        "busy",
        "throughput",
        "memory",
        "commands",
    )
    argv = [
        sys.executable,
        "-m",
        "bench",
        "--quick",
        "--output",
        str(tmp_path / "kept"),
    ]
    argv += [word for name in only for word in ("--only", name)]
    # What it compiles lies there and nowhere else, so that what it leaves
    # behind can be told from another run's.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        argv,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    kept = json.loads((tmp_path / "kept" / "results.json").read_text())
    assert {one["rival"] for one in kept["results"]} == {
        "limit",
        "hand-over",
        "python3",
    }
    measured = {one["measure"] for one in kept["results"]}
    assert measured == {
        "first-byte",
        *(f"connections-{at_once}" for at_once in AT_ONCE),
        f"first-byte{BUSY}",
        *(f"connections-{at_once}{BUSY}" for at_once in AT_ONCE),
        *(f"throughput-{name}" for name in STREAMS),
        "memory",
        *("import-click", "help"),
        *(f"{name}-{count}" for name in COMMANDS for count in (10, 100)),
    }
    rows = table_rows((tmp_path / "kept" / "results.md").read_text())
    assert done.stdout == (tmp_path / "kept" / "results.md").read_text()

    for at_once in AT_ONCE:
        theirs, ours = (
            {
                one["round"]: one["per_second"]
                for one in kept["results"]
                if (one["measure"], one["rival"])
                == (f"connections-{at_once}", rival)
            }
            for rival in ("limit", "hand-over")
        )
        cells = rows[f"connections/s, {at_once} at once"]
        middle = f"{statistics.median(theirs.values()):,.0f}"
        assert cells[0].partition(" ")[0] == middle
        found = re.match(r"([\d,]+) \(([\d.]+)\)", cells[1])
        assert found
        assert found[1] == f"{statistics.median(ours.values()):,.0f}"
        ratio = statistics.median(ours[one] / theirs[one] for one in theirs)
        assert float(found[2]) == pytest.approx(ratio, abs=0.01)
    for target in kept["targets"]:
        assert (
            rows[target["what"]][-1]
            == {
                True: "reached",
                False: "**not reached**",
                None: "not measured",
            }[target["reached"]]
        )
    ElementTree.parse(tmp_path / "kept" / "results.svg")

    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    running = [one.info["exe"] or "" for one in psutil.process_iter(["exe"])]
    assert [path for path in running if path.startswith(str(tmp_path))] == []


def test_idle_and_running_services_are_measured() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "bench.idle", "--count", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = table_rows(result.stdout)
    assert len(rows) == 4
    assert all(
        cell.endswith(" MiB") for row in list(rows.values())[1:] for cell in row
    )


def test_what_a_login_waits_for_is_measured() -> None:
    result = subprocess.run(
        [
            *(sys.executable, "-m", "bench.login"),
            *("--routes", "3", "--rounds", "1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = result.stdout.splitlines()
    assert len(rows) == 4
    assert rows[2].startswith("| CPU time | ")
