"""What the daemon says: lines for people, fields for programs, a status, and a
sign of life for the watchdog."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from scenario import (
    SERVICE,
    Scene,
    ask,
    connect,
    echo,
    echoes,
    is_reset,
    measured,
    until,
    written,
)

from qrexec_activate.loopback.machine import Machine, start_journald


async def test_each_connection_leaves_one_line_that_tells_it_all(
    scene: Scene,
) -> None:
    address = await scene.route(echo)
    assert await ask(address, b"hello") == "hello"
    (line,) = await scene.logged("ended,")
    for words in (
        "127.0.0.1:",
        f"on {written(address)} → work qubes.ConnectTCP+{scene.port}: ended,"
        f" set up in ",
        " lasted ",
        "5 B to the qube, 5 B from it",
    ):
        assert words in line


async def test_every_listener_is_announced_with_the_file_that_opened_it(
    scene: Scene,
) -> None:
    good, bad = scene.address(), scene.address()
    await scene.qube("work")
    path = scene.drop_in("work", good)
    scene.drop_in("worse", bad, "-x")
    await scene.start()
    await ask(good)
    (line,) = scene.lines("serving")
    assert (
        line == f"serving {written(good)} → work qubes.ConnectTCP+{scene.port}"
        f" ({path})"
    )
    await scene.refusal(bad)


async def test_the_status_counts_what_is_open_and_what_became_of_the_rest(
    scene: Scene,
) -> None:
    def status() -> str:
        return scene.machine.property(SERVICE, "StatusText")

    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        await until(
            "one is open",
            lambda: "1 connection open; 0 ended well, 0 failed" in status(),
        )
    scene.faults("refuse=1")
    assert await is_reset(address)
    await until(
        "all have ended",
        lambda: "0 connections open; 1 ended well, 1 failed" in status(),
    )
    assert status().startswith("1 listener served, 0 refused; ")
    scene.faults()
    scene.policy("* * client * ask default_target=work")
    async with await connect(address):
        await until("one waits", lambda: "1 waiting for an answer" in status())


async def test_the_watchdog_leaves_a_daemon_alone_that_lives(
    scene: Scene,
) -> None:
    scene.write("watchdog", "[Service]", "WatchdogSec=1s", unit=SERVICE)
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        pid = scene.pid()
        await trio.sleep(2.5)
        assert scene.pid() == pid
        assert await echoes(stream)


async def test_the_watchdog_replaces_a_daemon_that_hangs_and_connections_notice_nothing(
    scene: Scene,
) -> None:
    scene.write("watchdog", "[Service]", "WatchdogSec=1s", unit=SERVICE)
    address = await scene.route(echo)
    async with await connect(address) as stream:
        assert await echoes(stream)
        pid = scene.pid()
        os.kill(pid, signal.SIGSTOP)
        async with await connect(address) as second:
            await until(
                "another daemon runs", lambda: scene.pid() not in (0, pid)
            )
            assert await echoes(second)
        assert await echoes(stream)


# --------------------------------------------------------------- a real journal


def journal_problem() -> str:
    """Why no journal can be read here; empty if one can."""
    return (
        ""
        if os.geteuid() == 0
        else "only root can start a systemd-journald and read all of its"
        " journal"
    )


@pytest.fixture(scope="module")
def journaled_machine() -> Iterator[Machine]:
    with (
        start_journald(),
        Machine(environment=measured(), journal=True) as machine,
    ):
        yield machine


@pytest.fixture
async def journaled(journaled_machine: Machine, nursery: trio.Nursery) -> Any:
    scene = Scene(journaled_machine, nursery)
    yield scene
    scene.clean_up()


def records(*matches: str) -> list[dict[str, Any]]:
    subprocess.run(["journalctl", "--sync"], check=False, capture_output=True)
    said = subprocess.run(
        ["journalctl", "--output=json", "--all", "--no-pager", *matches],
        check=False,
        capture_output=True,
        text=True,
    ).stdout
    return [json.loads(line) for line in said.splitlines()]


@pytest.mark.skipif(bool(journal_problem()), reason=journal_problem() or "no")
async def test_the_journal_has_fields_for_every_connection_and_listener(
    journaled: Scene,
) -> None:
    scene = journaled
    qube = f"journal-{scene.port}"
    address = await scene.route(echo, qube)
    assert await ask(address, b"hello") == "hello"
    ended = (f"QREXEC_TARGET={qube}", "OUTCOME=client-exited")
    await until("the record of the connection", lambda: records(*ended))
    (record,) = records(*ended)
    assert record["QREXEC_SERVICE"] == f"qubes.ConnectTCP+{scene.port}"
    assert record["UNIT"] == scene.unit
    assert record["LISTENER"] == written(address)
    assert record["PEER"].startswith("127.0.0.1:")
    assert record["EXIT_CODE"] == "0"
    assert record["ESTABLISHED"] == "1"
    assert record["TRIES"] == "1"
    assert record["BYTES_TO_QUBE"] == record["BYTES_FROM_QUBE"] == "5"
    assert 0 < int(record["SETUP_USEC"]) <= int(record["DURATION_USEC"])
    assert record["PRIORITY"] == "6"
    assert record["SYSLOG_IDENTIFIER"] == "qrexec-activate"
    assert record["CONNECTION_ID"] in record["MESSAGE"]
    (serving,) = [
        one
        for one in records(f"QREXEC_TARGET={qube}")
        if one["MESSAGE"].startswith("serving")
    ]
    assert serving["FILE"].endswith(f"{scene.unit}.d/{qube}.conf")


@pytest.mark.skipif(bool(journal_problem()), reason=journal_problem() or "no")
async def test_the_journal_has_the_exit_code_of_a_refusal_as_a_warning(
    journaled: Scene,
) -> None:
    scene = journaled
    qube = f"refused-{scene.port}"
    address = await scene.route(echo, qube)
    scene.faults("refuse=1")
    assert await is_reset(address)
    refused = (f"QREXEC_TARGET={qube}", "EXIT_CODE=126")
    await until("the record of the refusal", lambda: records(*refused))
    (record,) = records(*refused)
    assert record["PRIORITY"] == "4"
    assert record["ESTABLISHED"] == "0"
    assert "SETUP_USEC" not in record
    assert "BYTES_TO_QUBE" not in record


@pytest.mark.skipif(bool(journal_problem()), reason=journal_problem() or "no")
async def test_the_journal_has_the_listeners_that_are_refused_as_errors(
    journaled: Scene,
) -> None:
    scene = journaled
    address = scene.address()
    path = scene.drop_in("bad", address, "-x")
    await scene.start()
    assert await is_reset(address)
    refused = (f"UNIT={scene.unit}", "PRIORITY=3")
    await until("the record of the refusal", lambda: records(*refused))
    (record,) = records(*refused)
    assert record["FILE"] == str(path)
    assert record["LISTENER"] == written(address)
    assert "CONNECTION_ID" not in record
