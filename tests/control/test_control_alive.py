"""status, logs, disconnect and check --try: what is alive on the routes, and
what became of it, with a real journal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import secrets
import select
import signal
import socket
import socketserver
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from desk import PATIENCE, Desk
from jeepney import (
    DBusAddress,
    HeaderFields,
    message_bus,
    new_method_call,
    new_method_return,
)
from jeepney.io.blocking import open_dbus_connection
from scenario import measured
from schema import problems

from qrexec_activate.loopback.machine import Machine, start_journald

RPC_FOLDER = Path(__file__).resolve().parents[2] / "rpc"


class Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while data := self.request.recv(65536):
                self.request.sendall(data)


@pytest.fixture(scope="module")
def journal_machine() -> Iterator[Machine]:
    with (
        start_journald(),
        Machine(journal=True, environment=measured()) as machine,
    ):
        yield machine


@pytest.fixture
def desk(journal_machine: Machine) -> Iterator[Desk]:
    """A desk with a route to the qube work, in which a service echoes."""
    desk = Desk(journal_machine)
    desk.machine.add_qube("work")
    with socketserver.ThreadingTCPServer(
        (desk.machine.address("work"), desk.port), Echo
    ) as server:
        server.daemon_threads = True
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        thread.start()
        try:
            desk.run("add", "tcp", str(desk.port), "work")
            yield desk
        finally:
            server.shutdown()
            thread.join()
            desk.leave()


def until(what: str, condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def connection(desk: Desk, said: bytes = b"hello") -> Iterator[socket.socket]:
    """An open connection through which something has come back."""
    with socket.create_connection(
        ("127.0.0.1", desk.port), timeout=PATIENCE
    ) as sock:
        sock.sendall(said)
        received = b""
        while len(received) < len(said):
            received += sock.recv(65536)
        yield sock


def logged(desk: Desk, *words: str, lines: int = 1) -> str:
    def look() -> str:
        printed = desk.try_("logs", *words).stdout
        return printed if printed.count("\n") >= lines else ""

    return str(until(f"{lines} records of {words}", look))


def no_times(text: str) -> str:
    """Text without what differs from run to run: ids, ports, processes and
    times."""
    text = re.sub(r"\b[0-9a-f]+-[0-9]+\b(?=:| )", "ID", text)
    text = re.sub(r'"id": "[^"]*"', '"id": "ID"', text)
    text = re.sub(r'"(pid|peer_pid|began|age|when)": [0-9.]+', r'"\1": 1', text)
    text = re.sub(r"\(pid [0-9]+\)|pid [0-9]+", "(pid 1)", text)
    text = re.sub(r"127\.0\.0\.1:(?!12345)[0-9]+", "127.0.0.1:50000", text)
    text = re.sub(r"(set up in|lasted) [0-9.]+ s", r"\1 1 s", text)
    return re.sub(r"\b[0-9]+ s( |$)", r"1 s\1", text, flags=re.MULTILINE)


def test_an_open_connection_is_shown_with_its_peer_and_its_bytes(
    desk: Desk,
) -> None:
    with connection(desk):
        pass
    logged(desk, "work")
    with connection(desk):
        status = desk.json("status")
        (found,) = status["connections"]
        assert (found["state"], found["relay"], found["target"]) == (
            "open",
            "hand-over",
            "work",
        )
        assert (found["bytes_to_qube"], found["bytes_from_qube"]) == (5, 5)
        assert (found["peer_pid"], found["peer_name"]) == (
            os.getpid(),
            Path("/proc/self/comm").read_text().strip(),
        )
        assert 0 <= found["age"] < PATIENCE
        (route,) = status["routes"]
        assert (route["open"], route["waiting"], route["last"]["outcome"]) == (
            1,
            0,
            "client-exited",
        )
        (daemon,) = [one for one in status["daemons"] if one["pid"]]
        assert (daemon["unit"], daemon["active"]) == (
            "qrexec-connect-tcp.service",
            "active",
        )
        # The status line of the daemon may be half a second old.
        printed = re.sub(
            r"^qrexec-connect-(tcp|unix|tcp-bind)\.service: .*\n",
            "",
            desk.run("status"),
            flags=re.MULTILINE,
        )
        comm = Path("/proc/self/comm").read_text().strip()
        desk.is_golden("status.txt", printed.replace(comm, "client"), no_times)


def test_a_connection_that_outlived_its_daemon_is_shown_and_can_be_ended(
    desk: Desk,
) -> None:
    with connection(desk) as sock:
        desk.machine.systemctl("stop", desk.labelled("work"))
        (found,) = desk.json("status", "work")["connections"]
        assert found["state"] == "open"
        printed = desk.run("disconnect", found["id"])
        assert printed.startswith(f"Ended {found['id']}: 127.0.0.1:")
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    assert desk.json("status")["connections"] == []


def test_a_route_is_disconnected_and_takes_new_connections(desk: Desk) -> None:
    with connection(desk), connection(desk):
        assert desk.run("disconnect", "work").count("Ended") == 2
        assert "has no open connection" in desk.fails(
            "disconnect", "work", code=2
        )
        assert "neither an open connection nor a route" in desk.fails(
            "disconnect", "nobody", code=2
        )
    with connection(desk), connection(desk):
        shown = desk.run("disconnect", "--all", "--dry-run")
        assert shown.count("Would end") == 2
        ended = desk.run("disconnect", "--all")
        assert shown.replace("Would end", "Ended") == ended


@pytest.fixture
def shop(desk: Desk) -> str:
    """The file of a route that has a label of its own, which is the only one of
    its argument, instead of the one that was there."""
    desk.run("remove", "work")
    desk.run("add", "tcp", str(desk.port), "work", "--label", "shop")
    (route,) = desk.json("list")
    return str(route["file"])


def test_whatever_names_a_route_disconnects_it(desk: Desk, shop: str) -> None:
    port = f"{desk.port}"
    with connection(desk):
        for word in ("shop", port, f"{port}:shop", shop, desk.labelled("shop")):
            shown = desk.run("disconnect", "--dry-run", word)
            assert shown.count("Would end") == 1, word
        both = desk.run("disconnect", "--dry-run", "shop", port)
        assert both.count("Would end") == 1
        # It goes on to the qube that it has reached, whatever its route does.
        desk.run("retarget", "shop", "vault")
        for word in ("shop", "vault", "work"):
            assert "Would end" in desk.run("disconnect", "--dry-run", word)
        desk.run("remove", "shop")
        for word in ("shop", port, "work"):
            assert "Would end" in desk.run("disconnect", "--dry-run", word)
        assert desk.run("disconnect", "shop").count("Ended") == 1


def test_a_label_of_a_route_that_is_no_more_is_found_in_the_log(
    desk: Desk, shop: str
) -> None:
    with connection(desk):
        pass
    said = logged(desk, "shop").splitlines()[-1]
    desk.run("remove", "shop")
    for word in ("shop", shop):
        assert desk.run("logs", word).splitlines()[-1] == said


def test_what_a_daemon_said_is_not_shown_of_one_that_has_ended(
    desk: Desk,
) -> None:
    with connection(desk):
        assert "listener served" in desk.run("status")
    desk.machine.systemctl("stop", "qrexec-connect-tcp.service")
    assert "listener served" not in desk.run("status", "work")
    (one,) = desk.json("status", "work")["daemons"]
    assert (one["pid"], one["status"]) == (None, None)


def test_the_log_says_that_a_person_ended_it_and_no_failure_is_counted(
    desk: Desk,
) -> None:
    def failed() -> str:
        daemons = desk.json("status")["daemons"]
        (status,) = [one["status"] for one in daemons if one["pid"]]
        return str(status)

    with connection(desk) as sock:
        (found,) = desk.json("status", "work")["connections"]
        assert " 0 failed" in failed()
        desk.run("disconnect", "work")
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1) == b""
    said = logged(desk, found["id"])
    assert "ended by a person, with qrexec-activate disconnect" in said
    until("it is counted", lambda: "1 ended well" in failed())
    assert " 0 failed" in failed()


def test_no_decoy_hides_a_connection(desk: Desk) -> None:
    with connection(desk):
        (found,) = desk.json("status")["connections"]
    # The oldest of a name is the decoy: it is there before the connection.
    number = int(found["id"].rpartition("-")[2]) + 1
    name = f"{found['id'].rpartition('-')[0]}-{number}"
    decoy = {
        "CONNECTION": name,
        "LISTENER": found["listener"],
        "UNIT": found["unit"],
    }
    # Any program of the same user's manager.
    desk.machine.run(
        [
            *("systemd-run", "--user", "--quiet", "--unit=decoy"),
            *(f"-EQREXEC_ACTIVATE_{key}={decoy[key]}" for key in decoy),
            *("tail", "-f", "/dev/null"),
        ]
    )
    try:
        with connection(desk) as sock:
            (found,) = desk.json("status")["connections"]
            assert (found["id"], found["target"]) == (name, "work")
            assert desk.run("disconnect", "work").count("Ended") == 1
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert desk.machine.systemctl("is-active", "decoy") == "active\n"
    finally:
        desk.machine.systemctl("stop", "decoy")


def test_one_that_waits_for_an_answer_is_shown_as_waiting(desk: Desk) -> None:
    (desk.machine.loopback / "policy").write_text(
        "* * client work ask default_target=work\n"
    )
    (desk.machine.loopback / "answer").unlink(missing_ok=True)
    with socket.create_connection(("127.0.0.1", desk.port)):
        found = until(
            "it waits",
            lambda: [
                one
                for one in desk.json("status")["connections"]
                if one["state"] == "waiting"
            ],
        )
        assert found[0]["target"] == "work"
        assert desk.json("status")["routes"][0]["waiting"] == 1
        desk.run("disconnect", found[0]["id"])


def test_spliced_connections_are_shown_as_well(desk: Desk) -> None:
    desk.scene.options(RELAY="splice")
    desk.machine.systemctl("daemon-reload")
    with connection(desk):
        (found,) = desk.json("status")["connections"]
        assert (
            found["state"],
            found["relay"],
            found["bytes_to_qube"],
            found["peer_pid"],
        ) == (
            "open",
            "splice",
            5,
            os.getpid(),
        )


def test_the_peer_of_a_unix_socket_is_shown(desk: Desk) -> None:
    rpc = desk.machine.loopback / "qubes" / "work" / "rpc" / "qubes.ConnectUnix"
    rpc.write_text("#!/bin/sh\nexec cat\n")
    rpc.chmod(0o755)
    desk.run("add", "unix", "notes", "work")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(str(desk.machine.runtime / "qrexec" / "notes"))
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"
        (found,) = desk.json("status", "notes")["connections"]
        assert (found["peer_pid"], found["bytes_to_qube"]) == (
            os.getpid(),
            None,
        )


def test_the_log_has_one_line_for_each_connection(desk: Desk) -> None:
    for _ in range(3):
        with connection(desk):
            pass
    printed = logged(desk, desk.labelled("work"), lines=3)
    lines = printed.splitlines()
    assert len(lines) == 3
    for line in lines:
        route = (
            rf"127.0.0.1:\d+ on 127.0.0.1:{desk.port} → work"
            rf" qubes.ConnectTCP\+{desk.port}"
        )
        assert re.match(
            rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d \S+: {route}: ended", line
        )
    assert desk.run("logs", "-n", "1", desk.labelled("work")) == f"{lines[2]}\n"
    # However a person names it.
    (route,) = desk.json("list")
    for word in (str(desk.port), route["file"], route["listener"], "work"):
        assert desk.run("logs", word).splitlines()[-1] == lines[2], word
    assert "serving 127.0.0.1" in desk.run(
        "logs", "--everything", "--since", "-10min"
    )


def test_what_the_log_cannot_show_is_an_error(desk: Desk) -> None:
    with connection(desk):
        pass
    logged(desk, desk.labelled("work"))
    assert "'nobody' is no route" in desk.fails("logs", "nobody", code=2)
    assert "'nobody' is no route" in desk.fails(
        "logs", "-n1", "work", "nobody", code=2
    )
    assert "banana" in desk.fails("logs", "--since", "banana", code=1)
    assert "banana" in desk.fails("logs", "--until", "banana", code=1)
    early = desk.try_("logs", "work", "--until", "2001-01-01")
    assert (early.returncode, early.stdout) == (0, "")
    assert early.stderr == "The journal has nothing of that\n"


def test_a_route_that_is_no_more_is_found_in_the_log(desk: Desk) -> None:
    for _ in range(2):
        with connection(desk):
            pass
    unit = desk.labelled("work")
    newest = logged(desk, unit, lines=2).splitlines()[1]
    first = json.loads(desk.run("logs", unit, "--json").splitlines()[0])
    (route,) = desk.json("list")
    file = route["file"]
    # Only further back than what is shown is anything of the first.
    assert desk.run("logs", "-n1", "work", first["id"]) == f"{newest}\n"
    desk.run("remove", "work")
    for word in (
        f"{desk.port}",
        f"{desk.port}:work",
        unit,
        first["listener"],
        file,
    ):
        assert desk.run("logs", word).splitlines()[-1] == newest, word


def test_a_journal_that_is_closed_to_the_user_is_an_error(
    desk: Desk, tmp_path: Path
) -> None:
    journalctl = tmp_path / "journalctl"
    # As systemd 252 says it, with exit code 0.
    journalctl.write_text(
        "#!/bin/sh\necho 'Hint: You are currently not seeing messages from"
        " other users and the system.' >&2\n"
    )
    journalctl.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert "the system's journal is closed to you" in desk.fails(
        "logs", "--system", environment=path
    )
    assert desk.run("logs", environment=path) == ""


def test_the_log_as_json_is_an_object_a_line(desk: Desk) -> None:
    for _ in range(2):
        with connection(desk):
            pass
    logged(desk, desk.labelled("work"), lines=2)
    printed = desk.run("logs", desk.labelled("work"), "--json").splitlines()
    first, second = map(json.loads, printed)
    assert problems(first, "logs") == []
    everything = desk.run("logs", "--everything", "--json").splitlines()
    for line in everything:
        assert problems(json.loads(line), "logs") == []
    assert first["when"] <= second["when"]
    assert first["id"] != second["id"]
    assert (first["target"], first["outcome"], first["failed"]) == (
        "work",
        "client-exited",
        False,
    )
    assert (first["bytes_to_qube"], first["bytes_from_qube"]) == (5, 5)


def test_what_a_qube_has_its_end_say_is_no_record(
    desk: Desk, tmp_path: Path
) -> None:
    client = tmp_path / "qrexec-client-vm"
    client.write_text(
        f"#!/bin/sh\n"
        f"echo '<4>forged: 127.0.0.1:1 on 127.0.0.1:{desk.port} → work' >&2\n"
        f'exec {desk.machine.client} "$@"\n'
    )
    client.chmod(0o755)
    desk.scene.options(CLIENT=str(client))
    # As it is where the program's own name is that.
    desk.machine.write_drop_in(
        "qrexec-connect-tcp.service",
        "identifier",
        "[Service]\nSyslogIdentifier=qrexec-activate\n",
    )
    desk.machine.systemctl("daemon-reload")
    with connection(desk):
        pass
    logged(desk, desk.labelled("work"))
    said = subprocess.run(
        ["journalctl", "--output=cat", f"_UID={os.getuid()}", "-n", "200"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "forged" in said
    assert "forged" not in desk.run("logs", "--everything")


#: Says something, also with fields of its own choice and an escape.
TALKER = """\
import socket
from systemd import journal
print("spoken\\x1b[2J", flush=True)
journal.send("forged", CONNECTION_ID="1", QREXEC_TARGET="work", UNIT="x.socket")
socket.socket(fileno=3).accept()[0].recv(1)
"""


def test_the_log_of_a_name_is_that_of_its_program(desk: Desk) -> None:
    program = desk.machine.home / "talker.py"
    program.write_text(TALKER)
    name = f"talk-{secrets.token_hex(4)}"
    path = desk.machine.runtime / "qubes.ConnectUnix" / name
    words = ("publish", name, "--exec", f"{sys.executable} {program}")
    desk.run(*words, "--idle", "1min")
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            # What systemd says of it, too. It lives until the journal has seen
            # whose the lines are.
            for word in ("spoken\\x1b[2J\n", "forged\n", "Started"):
                until(
                    f"it has {word!r}",
                    lambda word=word: word in desk.run("logs", name),
                )
            client.sendall(b"x")
            client.settimeout(PATIENCE)
            assert client.recv(1) == b""
        assert "\x1b" not in desk.run("logs", name)
        lines = desk.run("logs", name, "--json").splitlines()
        for line in lines:
            assert problems(json.loads(line), "logs") == []
        (forged,) = (
            one for one in map(json.loads, lines) if one["message"] == "forged"
        )
        assert forged["daemon"] == f"qrexec-program-{name}.service"
        assert (forged["id"], forged["target"], forged["unit"]) == (None,) * 3
        # As is what the journal has of a program that ended too soon for it to
        # see which unit that was of.
        tag = f"qrexec-program-{name}"
        identifier = desk.machine.property(f"{tag}.service", "SyslogIdentifier")
        assert identifier == tag
        desk.machine.run(["systemd-cat", f"--identifier={tag}", "echo", "late"])
        until("it is there", lambda: "late\n" in desk.run("logs", name))
        for other in ("work", "nobody"):
            assert "one by one" in desk.fails("logs", name, other, code=2)
        assert desk.run("logs", "-n1", name).count("\n") == 1
    finally:
        desk.run("unpublish", name)
    # Nor is it taken for what became of a connection.
    assert "forged" not in desk.run("logs", "--everything")


#: Fails where it is told to.
FAILING = """\
import socket, sys
with socket.socket(fileno=3).accept()[0] as client:
    line = client.recv(100)
    client.sendall(line)
sys.exit(line == b"fail")
"""


def call_name(desk: Desk, name: str, said: bytes) -> None:
    """What qrexec does when another qube calls it."""
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen(
            [str(RPC_FOLDER / "qubes.ConnectUnix"), name],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
            env={**desk.machine.environment, "QREXEC_REMOTE_DOMAIN": "work"},
        )
        theirs.close()
        ours.settimeout(PATIENCE)
        with contextlib.suppress(ConnectionError):
            ours.sendall(said)
            ours.shutdown(socket.SHUT_WR)
            while ours.recv(100):
                pass
        process.wait(PATIENCE)


def test_calls_and_failures_are_counted(desk: Desk) -> None:
    program = desk.machine.home / "failing.py"
    program.write_text(FAILING)
    name = f"count-{secrets.token_hex(4)}"

    def counted(at: int = 0) -> list[int | None]:
        keys = ("calls", "calls_failed", "program_failed")
        one = desk.json("published")[at]
        return [one[key] for key in keys]

    desk.run("publish", name, "--exec", f"{sys.executable} {program}")
    try:
        assert counted() == [0, 0, 0]
        for said in (b"well", b"fail", b"well"):
            call_name(desk, name, said)
        until("all are counted", lambda: counted() == [3, 0, 1])
        desk.machine.systemctl("stop", f"qrexec-publish-{name}.socket")
        call_name(desk, name, b"well")
        until("it is counted", lambda: counted() == [4, 1, 1])
        said = desk.run("published")
        assert "4, 1 failed" in said
        assert "failed 1 time\n" not in said
        assert ", failed 1 time " in said
    finally:
        desk.run("unpublish", name)


def test_who_has_no_unit_has_no_log_here(desk: Desk) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        path = desk.machine.home / "by-hand.sock"
        listener.bind(str(path))
        listener.listen()
        desk.run("publish", "by-hand", "--unix", str(path))
        assert "which no unit makes" in desk.fails("logs", "by-hand", code=2)
        desk.run("unpublish", "by-hand")


@contextlib.contextmanager
def going_on(
    desk: Desk, *arguments: str
) -> Iterator[tuple[IO[str], Callable[[], str]]]:
    """What a command shows that goes on until Ctrl-C; and how to press that,
    which ends it well and returns what it shows last."""
    with subprocess.Popen(
        desk.argv(*arguments),
        env=desk.machine.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        shown = process.stdout
        assert shown is not None

        def end() -> str:
            process.send_signal(signal.SIGINT)
            rest = shown.read()
            assert process.wait(PATIENCE) == 0
            return rest

        try:
            yield shown, end
        finally:
            process.kill()


def test_the_log_is_followed(desk: Desk) -> None:
    with connection(desk):
        pass
    unit = desk.labelled("work")
    logged(desk, unit)
    with going_on(desk, "logs", "-f", unit) as (shown, end):
        assert "work" in shown.readline()
        with connection(desk):
            pass
        assert "work" in shown.readline()
        assert end() == ""


def test_watching_into_a_pipe_goes_on_until_ctrl_c(desk: Desk) -> None:
    watch = ("status", "--watch", "--interval", "0.3")
    with going_on(desk, *watch) as (shown, end):
        for line in ("LISTENER", "LISTENER"):
            while not (shows := shown.readline()).startswith(line):
                assert shows, "it has ended"
        assert "Aborted" not in end()


def test_watching_takes_the_screen_shows_what_comes_and_gives_it_back(
    desk: Desk,
) -> None:
    pid, fd = pty.fork()
    if not pid:
        os.execve(
            sys.executable,
            desk.argv("status", "--watch", "--interval", "0.3"),
            {**desk.machine.environment, "TERM": "xterm", "LC_ALL": "C.UTF-8"},
        )
    shown = b""

    def see(words: str) -> bool:
        nonlocal shown
        while select.select([fd], [], [], 0)[0]:
            shown += os.read(fd, 65536)
        return words.encode() in shown

    try:
        termios.tcsetwinsize(fd, (24, 100))
        until("the screen is there", lambda: see("No connection is open"))
        assert shown.startswith(b"\x1b[?1049h")
        before, shown = shown, b""
        with connection(desk):
            until("the connection is shown", lambda: see("1 open, 0 waiting"))
            os.write(fd, b"/nosuch\r")
            until("it is filtered out", lambda: see("0 shown"))
        os.write(fd, b"q")
        with contextlib.suppress(OSError):
            until("the screen is given back", lambda: see("\x1b[?1049l"))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert "Traceback" not in (before + shown).decode()
    finally:
        os.close(fd)


def test_trying_a_route_makes_one_connection(desk: Desk) -> None:
    (desk.machine.loopback / "policy").write_text(
        "qubes.ConnectUnix * client work deny\n* * client work allow\n"
    )
    desk.run("add", "unix", "notes", "work")
    # Nobody is asked who is not at a terminal, and then nothing is called.
    for words in (("check", "--try"), ("check", "--try", "--json")):
        asked = desk.try_(*words)
        assert "Connect to 2 routes?" in asked.stderr
        assert "Nobody answers" in asked.stderr
        assert asked.returncode == 0
        assert "All is well" in asked.stdout or '"ok"' in asked.stdout
    assert desk.json("status")["routes"][0]["last"] is None
    steps = desk.json("check", "--try", "--yes", code=2)["steps"]
    tried = {
        step["text"].partition(" ")[0]: step["level"]
        for step in steps
        if step["area"] == "try"
    }
    assert tried == {
        f"127.0.0.1:{desk.port}": "ok",
        f"{desk.machine.runtime}/qrexec/notes": "error",
    }
    until(
        "the refusal is logged",
        lambda: "exit code 126" in desk.run("logs", "qubes.ConnectUnix+notes"),
    )


def test_a_target_that_was_refused_is_pointed_out(desk: Desk) -> None:
    (desk.machine.loopback / "policy").write_text("* * client work deny\n")
    with (
        socket.create_connection(("127.0.0.1", desk.port)) as sock,
        contextlib.suppress(ConnectionResetError),
    ):
        assert sock.recv(1) == b""
    until(
        "the refusal is logged",
        lambda: "exit code 126" in desk.run("logs", desk.labelled("work")),
    )
    (step,) = [
        one
        for one in desk.json("check", code=2)["steps"]
        if one["level"] == "error"
    ]
    assert "failed with exit code 126: refused" in step["text"]
    assert step["mend"] is None
    assert f"qrexec-activate policy 127.0.0.1:{desk.port}" in step["advice"]


@contextlib.contextmanager
def pretended_desktop(desk: Desk) -> Iterator[list[tuple[Any, ...]]]:
    """Whoever shows notifications; yields what it was asked to show."""
    shown: list[tuple[Any, ...]] = []
    bus = desk.machine.environment["DBUS_SESSION_BUS_ADDRESS"]
    with open_dbus_connection(bus) as connection:
        name = "org.freedesktop.Notifications"
        connection.send_and_get_reply(message_bus.RequestName(name))

        def serve() -> None:
            # Ends with the connection.
            with contextlib.suppress(OSError, ValueError):
                while True:
                    asked = connection.receive()
                    if asked.header.fields.get(HeaderFields.member) == "Notify":
                        shown.append(asked.body)
                        connection.send(new_method_return(asked, "u", (1,)))
                    elif asked.header.fields.get(HeaderFields.member) == "Stop":
                        return

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield shown
        finally:
            address = DBusAddress("/", name, name)
            with open_dbus_connection(bus) as other:
                other.send(new_method_call(address, "Stop"))
            thread.join()


def test_a_refusal_and_a_wait_reach_the_person(desk: Desk) -> None:
    policy = desk.machine.loopback / "policy"
    policy.write_text("* * client work deny\n")

    def refused() -> None:
        with (
            socket.create_connection(("127.0.0.1", desk.port)) as sock,
            contextlib.suppress(ConnectionResetError),
        ):
            assert sock.recv(1) == b""

    with (
        pretended_desktop(desk) as shown,
        subprocess.Popen(
            desk.argv("notify"), env=desk.machine.environment
        ) as process,
    ):
        try:
            # It says nothing when it has begun to listen.
            until("it is shown", lambda: refused() or shown)
            program, _, _, summary, body, actions, _, _ = shown[0]
            assert (program, summary, actions) == (
                "qrexec-activate",
                "work: refused",
                [],
            )
            address = f"127.0.0.1:{desk.port}"
            assert body == (
                f"A connection to {address} was refused by dom0's policy, or"
                " the qube cannot take it. See: qrexec-activate policy"
                f" {address}"
            )
            # One per route and minute.
            refused()
            assert len(shown) == 1
            desk.machine.add_qube("gitweb")
            (desk.machine.loopback / "answer").unlink(missing_ok=True)
            desk.run("add", "tcp", str(desk.port), "gitweb")
            policy.write_text("* * client gitweb ask default_target=gitweb\n")
            with socket.create_connection(("127.0.0.2", desk.port)):
                until("the wait is shown", lambda: len(shown) > 1)
            assert shown[1][3] == "gitweb: waiting"
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


def test_a_route_that_is_named_is_shown_as_a_way(
    desk: Desk, tmp_path: Path
) -> None:
    with connection(desk):
        printed = desk.run("status", "work")
        comm = Path("/proc/self/comm").read_text().strip()
        assert f"✓ program  {comm} (pid {os.getpid()})" in printed
        assert "✓ service" in printed
        assert desk.run("status", "--svg", str(tmp_path / "map.svg")) == ""
    drawing = (tmp_path / "map.svg").read_text()
    assert drawing.count("<rect") == 6
    assert f"127.0.0.1:{desk.port}" in drawing
