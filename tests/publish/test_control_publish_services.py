"""publish --exec: programs that run only while other qubes use them, under a
real user manager."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pwd
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from desk import PATIENCE, Desk, free_port

from qrexec_activate.errors import ActivateError
from qrexec_activate.loopback.machine import Machine, start_journald
from qrexec_activate.publish import change
from qrexec_activate.publish.services import Service
from qrexec_activate.systemd.systemctl import Systemctl

#: A program that takes its socket from systemd, and answers each line with its
#: own name and that line.
ACTIVATED = """\
import os, socket, sys, threading
def serve(connection):
    with connection, connection.makefile("rwb") as file:
        for line in file:
            file.write(sys.argv[1].encode() + b" heard " + line)
            file.flush()
listener = socket.socket(fileno=3)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""
#: The same, but it listens by itself, and only a while after its start.
BY_ITSELF = ACTIVATED.replace(
    "listener = socket.socket(fileno=3)",
    """import time
time.sleep(0.3)
where = sys.argv[2]
if where.startswith("/"):
    listener = socket.socket(socket.AF_UNIX)
    if os.path.exists(where): os.unlink(where)
    listener.bind(where)
else:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(where)))
listener.listen()""",
)


NO_CADDY = {"CADDY_ADMIN": "127.0.0.1:1"}


class Caddy(http.server.BaseHTTPRequestHandler):
    """As much of Caddy's admin API as is used; examples/ and their tests have
    the real one."""

    routes: list[Any]
    #: What it answers to browsers, which it hears where its admin API is.
    status = 200
    #: Called before a route is taken out, which is not done if it says why.
    deletes: Callable[[], str]

    def do_GET(self) -> None:
        if self.path == "/":
            assert self.headers["Host"] == "notes.localhost"
            self.answer(self.status)
            return
        listens = f"tcp/:{self.server.server_address[1]}"
        server = {"listen": [listens], "routes": self.routes}
        self.answer(200, {"main": server})

    def do_PUT(self) -> None:
        self.routes.insert(
            0, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        )
        self.answer(200)

    def do_POST(self) -> None:
        self.routes.extend(
            json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        )
        self.answer(200)

    def do_DELETE(self) -> None:
        if error := type(self).deletes():
            self.answer(500, {"error": error})
            return
        self.routes[:] = [
            route
            for route in self.routes
            if route["@id"] != self.path.removeprefix("/id/")
        ]
        self.answer(200)

    def answer(self, status: int, said: Any = None) -> None:
        self.send_response(status)
        self.end_headers()
        if said is not None:
            self.wfile.write(json.dumps(said).encode())

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    try:
        yield desk
    finally:
        if names := [one["name"] for one in desk.json("published")]:
            desk.run("unpublish", *names)
        desk.leave()


def program(desk: Desk, text: str, *words: str) -> str:
    path = (
        desk.machine.home / f"program{'-alone' if text is BY_ITSELF else ''}.py"
    )
    path.write_text(text)
    return " ".join([sys.executable, str(path), *words])


def address(desk: Desk, name: str) -> str:
    return str(desk.machine.runtime / "qubes.ConnectUnix" / name)


@contextlib.contextmanager
def connected(desk: Desk, name: str) -> Iterator[Callable[[str], str]]:
    """What a program answers to a line, for as long as one stays connected."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(address(desk, name))
        with client.makefile("rwb") as file:

            def ask(line: str) -> str:
                file.write(f"{line}\n".encode())
                file.flush()
                return file.readline().decode().strip()

            yield ask


def ask(desk: Desk, name: str, line: str = "me") -> str:
    with connected(desk, name) as ask:
        return ask(line)


def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.05)


def only(desk: Desk) -> Any:
    (one,) = desk.json("published")
    return one


def units(desk: Desk) -> set[str]:
    return {file for file in desk.files() if "qrexec-p" in file}


def test_a_program_is_started_by_the_first_connection(desk: Desk) -> None:
    said = desk.run(
        "publish", "notes", "--exec", program(desk, ACTIVATED, "notes")
    )
    assert "qubes.ConnectUnix +notes CLIENT-QUBE" in said
    one = only(desk)
    assert (one["name"], one["alive"], one["state"], one["memory"]) == (
        "notes",
        True,
        "idle",
        0,
    )
    assert ask(desk, "notes") == "notes heard me"
    one = only(desk)
    assert one["state"] == "running"
    assert one["memory"] is None or one["memory"] > 0
    assert Path(address(desk, "notes")).stat().st_mode & 0o777 == 0o600


# Six times, since systemd by itself takes five starts in ten seconds for too
# many.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "times"), [("socket", 6), ("port", 2), ("unix", 2)]
)
def test_a_program_is_ended_when_it_is_idle(
    desk: Desk, kind: str, times: int
) -> None:
    where = {
        "socket": "",
        "port": str(free_port()),
        "unix": str(desk.machine.directory / "wiki"),
    }[kind]
    command = program(desk, BY_ITSELF if where else ACTIVATED, "wiki", where)
    desk.run(
        "publish",
        "wiki",
        "--exec",
        command,
        *([f"--{kind}", where] if where else []),
        "--idle",
        "1s",
    )
    for _ in range(times):
        assert only(desk)["state"] == "idle"
        # Connected meanwhile: a look may take longer than it may be idle.
        with connected(desk, "wiki") as say:
            assert say("me") == "wiki heard me"
            assert desk.scene.state("qrexec-program-wiki.service") == "active"
        until(
            "it ends",
            lambda: (
                desk.scene.state("qrexec-program-wiki.service") == "inactive"
            ),
        )
        until("the way there ends", lambda: only(desk)["state"] == "idle")
    assert desk.failed() == ""


def test_a_connection_that_is_open_keeps_a_program_running(desk: Desk) -> None:
    desk.run(
        "publish",
        "wiki",
        "--exec",
        program(desk, ACTIVATED, "wiki"),
        "--idle",
        "1s",
    )
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address(desk, "wiki"))
        client.settimeout(PATIENCE)
        with client.makefile("rwb") as file:
            for _ in range(3):
                file.write(b"me\n")
                file.flush()
                assert file.readline() == b"wiki heard me\n"
                time.sleep(1.2)
            assert desk.scene.state("qrexec-program-wiki.service") == "active"
    until(
        "it ends",
        lambda: desk.scene.state("qrexec-program-wiki.service") == "inactive",
    )


HOSTILE = [
    "two words",
    '"',
    "'",
    "\\",
    "\\x41",
    "%h %%",
    "$HOME ${HOME} $$",
    ";",
    "| cat",
    "@-:+!",
    "#",
    "é",
    "-e",
    "",
]


def test_no_word_of_a_command_means_anything_else_on_its_way(
    desk: Desk,
) -> None:
    path = desk.machine.home / "words of a program"
    path.write_text(
        f"#!{sys.executable}\nimport json, socket, sys\nlistener ="
        f" socket.socket(fileno=3)\n"
        "with listener.accept()[0] as connection:\n"
        "    connection.sendall(json.dumps(sys.argv[1:]).encode() + b'\\n')\n"
    )
    path.chmod(0o755)
    desk.run("publish", "words", "--exec", shlex.join([str(path), *HOSTILE]))
    assert json.loads(ask(desk, "words")) == HOSTILE


def test_unpublish_undoes_all_of_it(desk: Desk) -> None:
    before = desk.files()
    port = str(free_port())
    desk.run(
        "publish",
        "wiki",
        "--exec",
        program(desk, BY_ITSELF, "wiki", port),
        "--port",
        port,
    )
    assert ask(desk, "wiki") == "wiki heard me"
    assert (
        len(units(desk)) == 4
    )  # three units, and the link that enables the socket; beside a timer
    said = desk.run("unpublish", "wiki")
    assert said.count("Removed: ") == 4
    assert desk.files() == before
    assert desk.json("published") == []
    assert not os.path.lexists(address(desk, "wiki"))
    for unit in ("qrexec-publish-wiki.service", "qrexec-program-wiki.service"):
        assert desk.scene.state(unit) == "inactive"


def test_many_at_once_for_a_trial(desk: Desk) -> None:
    desk.run(
        "publish",
        "trial",
        "--exec",
        program(desk, ACTIVATED, "{name}"),
        "--count",
        "5",
    )
    assert [one["name"] for one in desk.json("published")] == [
        f"trial-{number}" for number in range(1, 6)
    ]
    assert ask(desk, "trial-3") == "trial-3 heard me"
    states = {one["name"]: one["state"] for one in desk.json("published")}
    assert [name for name, state in states.items() if state != "idle"] == [
        "trial-3"
    ]
    table = desk.run("published")
    assert "MEMORY" in table.upper()


def test_failing_midway_undoes_what_was_done(desk: Desk) -> None:
    before = desk.files()
    folder = Path(address(desk, "trial-2")).parent
    folder.mkdir(exist_ok=True)
    # A folder in the place of the second socket: systemd cannot open that one.
    Path(address(desk, "trial-2"), "inside").mkdir(parents=True)
    try:
        desk.fails(
            "publish",
            "trial",
            "--exec",
            program(desk, ACTIVATED, "x"),
            "--count",
            "3",
        )
    finally:
        shutil.rmtree(address(desk, "trial-2"))
    assert desk.files() == before
    assert desk.json("published") == []


def test_a_dry_run_changes_nothing(desk: Desk) -> None:
    before = desk.files()
    said = desk.run(
        "publish", "notes", "--exec", "/bin/cat", "--port", "8000", "--dry-run"
    )
    assert "--exit-idle-time=5min --connections-max=2048 127.0.0.1:8000" in said
    assert "StopWhenUnneeded=yes" in said
    assert desk.files() == before


def test_a_dry_run_shows_what_root_would_do(desk: Desk) -> None:
    words = (
        "publish",
        "notes",
        "--exec",
        "/bin/cat",
        "--user",
        "qa-notes",
        "--idle",
        "1min",
        "--dry-run",
    )
    said = desk.run(*words, environment={"SUDO_USER": "daemon"})
    for line in (
        "# /etc/systemd/system/qrexec-publish-notes.socket",
        "ListenStream=%t/qubes.ConnectUnix/notes",
        "User=qa-notes",
        "ProtectSystem=strict",
        "$ systemctl enable --now qrexec-publish-notes.socket",
    ):
        assert line in said.splitlines()
    assert "\n$ useradd --system --user-group" in said
    assert not Path("/etc/systemd/system/qrexec-publish-notes.socket").exists()
    with pytest.raises(KeyError):
        pwd.getpwnam("qa-notes")


def test_what_makes_no_sense_is_refused(desk: Desk) -> None:
    assert "no program" in desk.fails(
        "publish", "x", "--exec", "/no/such/program", code=2
    )
    assert "one of --port and --unix" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--port", "1", "--unix", "/x"
    )
    assert "--database needs --user" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--database"
    )
    assert "--native needs --user" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--native"
    )
    assert "are for --exec" in desk.fails(
        "publish", "x", "--unix", "/x", "--native"
    )
    assert "goes by who connects" in desk.fails(
        *("publish", "x", "--exec", "/bin/cat", "--native", "--database"),
        *("--user", "qa-x", "--dry-run"),
        environment={"SUDO_USER": "daemon"},
    )
    assert "no name of a host" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--domain", "a b"
    )
    assert "a path begins with /" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--unix", "/x,exec=sh"
    )
    assert "one line" in desk.fails(
        "publish", "x", "--exec", "/bin/cat\n[Install]"
    )
    assert "--user 'Root'" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--user", "Root"
    )
    assert "Linux user daemon already" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--user", "daemon"
    )
    assert "no time span" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--port", "1", "--idle", "soon"
    )
    assert "are for --exec" in desk.fails(
        "publish", "x", "--unix", "/x", "--domain", "x.localhost"
    )
    assert "{name}" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--unix", "/x", "--count", "2"
    )
    desk.run("publish", "x", "--exec", "/bin/cat")
    assert "keeps its user" in desk.fails(
        "publish", "x", "--exec", "/bin/cat", "--user", "qa-x", "--dry-run"
    )


def test_check_goes_the_whole_way(desk: Desk) -> None:
    desk.run("publish", "good", "--exec", program(desk, ACTIVATED, "good"))
    desk.run("publish", "bad", "--exec", "/bin/false")
    result = desk.try_("published", "--check")
    assert result.returncode == 1
    problems = [
        line
        for line in result.stdout.splitlines()
        if line.startswith(("good:", "bad:"))
    ]
    assert len(problems) == 1, result
    assert problems[0].startswith("bad: its program does not stay"), result
    assert problems[0].endswith("status qrexec-publish-bad.service")
    assert ask(desk, "good") == "good heard me"


def few_starts(desk: Desk) -> None:
    """A busy machine may never start a program 200 times within 10 s."""
    for unit in ("publish-bad", "program-bad"):
        desk.drop_in(
            f"qrexec-{unit}.service",
            "few.conf",
            *("[Unit]", "StartLimitBurst=5", "StartLimitIntervalSec=10min"),
        )
    desk.drop_in(
        "qrexec-publish-bad.socket",
        "few.conf",
        *("[Socket]", "TriggerLimitBurst=5", "TriggerLimitIntervalSec=10min"),
    )
    desk.machine.systemctl("daemon-reload")


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--port", "9")])
def test_a_program_that_ends_at_once_ends_the_connection_too(
    desk: Desk, words: tuple[str, ...]
) -> None:
    desk.run("publish", "bad", "--exec", "/bin/false", "--idle", "1min", *words)
    few_starts(desk)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(address(desk, "bad"))
        # By the proxy, which ends with its program, or by systemd, which closes
        # the socket for a while.
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    until("it is over", lambda: only(desk)["state"] == "failed")
    result = desk.try_("published", "--check")
    assert result.returncode == 1
    assert "\nbad: " in result.stdout


def test_each_act_is_in_the_journal(desk: Desk) -> None:
    name = f"audited-{secrets.token_hex(4)}"

    def acts() -> list[str]:
        journalctl = [
            "journalctl",
            "--quiet",
            "--output=cat",
            f"QREXEC_NAME={name}",
        ]
        return subprocess.run(
            journalctl, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    with start_journald():
        desk.run("publish", name, "--exec", "/bin/cat one")
        desk.run("unpublish", name)
        desk.fails(
            "publish",
            name,
            "--exec",
            "/bin/cat",
            "--domain",
            "x",
            environment=NO_CADDY,
        )
        until("all is in the journal", lambda: len(acts()) >= 3)
        published, unpublished, failed = acts()
    assert published == f"published {name}: /bin/cat one"
    assert unpublished == f"unpublished {name}"
    assert failed.startswith(
        f"publishing {name}: /bin/cat, x in Caddy failed: Caddy's admin API"
        f" at 127.0.0.1:1 does not"
    )


@pytest.mark.slow
def test_a_name_in_caddy_comes_and_goes(desk: Desk) -> None:
    routes: list[Any] = [{"@id": "other"}]
    states = []
    errors = []

    def deletes() -> str:
        unit = "qrexec-domain-notes.service"
        states.append(desk.machine.systemctl("is-active", unit, check=False))
        return errors.pop() if errors else ""

    handler = type(
        "Routes",
        (Caddy,),
        {"routes": routes, "deletes": staticmethod(deletes)},
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            caddy = {"CADDY_ADMIN": f"127.0.0.1:{server.server_address[1]}"}
            words = (
                "publish",
                "notes",
                "--exec",
                program(desk, ACTIVATED, "notes"),
                "--domain",
                "notes.localhost",
            )
            desk.run(*words, environment=caddy)
            assert [route["@id"] for route in routes] == [
                "qrexec-publish-notes.socket",
                "other",
            ]
            assert routes[0]["handle"][0]["upstreams"] == [
                {"dial": f"unix/{address(desk, 'notes')}"}
            ]
            assert only(desk)["domain"] == "notes.localhost"

            def checked() -> str:
                return desk.try_(
                    "published", "--check", environment=caddy
                ).stdout

            for status in (400, 404):
                handler.status = status
                assert "\nnotes: " not in checked()
            for status in (502,):
                handler.status = status
                assert (
                    f"\nnotes: notes.localhost answers {status} through Caddy:"
                    " qrexec-activate logs notes\n" in checked()
                )
            routes.clear()
            mend = ("publish", "notes", "--domain", "notes.localhost")
            said = desk.try_("published", "--check", environment=caddy).stdout
            assert (
                f"Caddy has lost notes.localhost: qrexec-activate"
                f" {' '.join(mend)}" in said
            )
            for _ in range(2):
                desk.run(*mend, environment=caddy)
                assert [route["@id"] for route in routes] == [
                    "qrexec-publish-notes.socket"
                ]
            assert "was not published" in desk.fails(
                "publish", "notes", "--domain", "x.localhost", environment=caddy
            )
            routes.append({"@id": "other"})
            desk.run("unpublish", "notes", environment=caddy)
            assert [route["@id"] for route in routes] == ["other"]
            # What puts it back has ended by then.
            assert [state.strip() for state in states] == ["inactive"]
            # It is said where it is not done, and no error where it was.
            desk.run(*words, environment=caddy)
            errors.append("listening: in use")
            said = desk.try_("unpublish", "notes", environment=caddy).stderr
            assert "notes.socket: {'error': 'listening: in use'}; if" in said
            assert len(routes) == 2
            desk.run(*words, environment=caddy)
            errors.append("unknown object ID 'x'")
            said = desk.try_("unpublish", "notes", environment=caddy).stderr
            assert "Caddy" not in said
            desk.run(*words, environment=caddy)
        finally:
            server.shutdown()
            thread.join()
    # Without a Caddy, it still can be taken away, but not published.
    assert (
        "by hand"
        in desk.try_("unpublish", "notes", environment=NO_CADDY).stderr
    )
    before = desk.files()
    assert "Caddy's admin API" in desk.fails(*words, environment=NO_CADDY)
    assert desk.files() == before
    assert desk.json("published") == []


#: Ends after each line that it answers; by itself, or as a crash does.
ONCE = """\
import os, socket, sys
with socket.socket(fileno=3).accept()[0] as connection:
    with connection.makefile("rwb") as file:
        line = file.readline()
        if line == b"crash\\n": os.abort()
        file.write(b"heard " + line)
"""


@pytest.mark.slow
@pytest.mark.parametrize("line", ["me", "crash"])
def test_no_number_of_requests_ends_a_service_for_good(
    desk: Desk, line: str
) -> None:
    desk.run("publish", "once", "--exec", program(desk, ONCE))
    for _ in range(30):
        assert ask(desk, "once", line) == (
            "" if line == "crash" else "heard me"
        )
    assert ask(desk, "once") == "heard me"
    assert only(desk)["problem"] is None


@pytest.mark.slow
def test_a_program_that_only_ends_gets_a_pause(desk: Desk) -> None:
    desk.run("publish", "bad", "--exec", "/bin/false")
    unit = "qrexec-publish-bad.service"
    assert desk.machine.property(unit, "StartLimitBurst") == "200"
    few_starts(desk)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(address(desk, "bad"))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
    seen: list[Any] = []
    until(
        "it has failed",
        lambda: seen.append(only(desk)) or seen[-1]["state"] == "failed",
    )
    one = seen[-1]
    assert (one["state"], one["alive"]) == ("failed", False)
    assert "its program ended 200 times within 10 s" in one["problem"]
    assert (
        "systemctl --user status qrexec-publish-bad.service" in one["problem"]
    )
    # By itself, as its timer says.
    until("its socket is there again", lambda: only(desk)["alive"])
    assert only(desk)["problem"] is None


@pytest.mark.parametrize("idle", [(), ("--idle", "1min")])
def test_the_mend_that_is_named_works_while_a_program_runs(
    desk: Desk, idle: tuple[str, ...]
) -> None:
    desk.run(
        "publish", "notes", "--exec", program(desk, ACTIVATED, "notes"), *idle
    )
    assert ask(desk, "notes") == "notes heard me"
    os.unlink(address(desk, "notes"))
    mend = only(desk)["problem"].partition(": ")[2]
    assert mend == "systemctl --user restart qrexec-publish-notes.socket"
    desk.machine.run(mend.split())
    assert only(desk)["problem"] is None
    assert ask(desk, "notes") == "notes heard me"


def test_four_hundred_connections_at_once_through_the_proxy(desk: Desk) -> None:
    desk.run(
        *("publish", "many", "--exec", program(desk, ACTIVATED, "many")),
        *("--idle", "1min"),
    )
    with contextlib.ExitStack() as stack:
        files = []
        for _ in range(400):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(PATIENCE)
            client.connect(address(desk, "many"))
            files.append(stack.enter_context(client.makefile("rwb")))
        for file in files:
            file.write(b"me\n")
            file.flush()
            assert file.readline() == b"many heard me\n"


def test_a_check_leaves_all_as_it_was(desk: Desk) -> None:
    for name in ("slept", "idled", "ran"):
        desk.run(
            *("publish", name, "--exec", program(desk, ACTIVATED, name)),
            *(("--idle", "1min") if name == "idled" else ()),
        )
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(address(desk, "ran"))
        with client.makefile("rwb") as file:
            file.write(b"me\n")
            file.flush()
            assert file.readline() == b"ran heard me\n"
            desk.try_("published", "--check")
            until(
                "what was started has ended",
                lambda: (
                    {
                        one["name"]: one["state"]
                        for one in desk.json("published")
                    }
                    == {"slept": "idle", "idled": "idle", "ran": "running"}
                ),
            )
            # Whose connection it was, has it still.
            file.write(b"me\n")
            file.flush()
            assert file.readline() == b"ran heard me\n"


@contextlib.contextmanager
def admin_api(
    answer: Callable[[socket.socket], None],
) -> Iterator[dict[str, str]]:
    """What listens where Caddy's admin API should, and answers so."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = server.accept()[0]
                    threading.Thread(
                        target=answer_one, args=(connection,), daemon=True
                    ).start()

        def answer_one(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                connection.recv(65536)
                answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield {"CADDY_ADMIN": f"127.0.0.1:{server.getsockname()[1]}"}
        server.shutdown(socket.SHUT_RDWR)


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    while True:
        connection.sendall(b" " * 65536)


def slow(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n[")
    while True:
        connection.sendall(b" ")
        time.sleep(1)


def saying(text: str) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(
        b"HTTP/1.1 200 OK\r\n\r\n" + text.encode()
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (endless, "its answer has no end"),
        (slow, "does not answer: "),
        (saying("[" * 100_000), "does not answer"),
        (saying("[1]"), "makes no sense"),
        (saying('{"x": 1}'), "makes no sense"),
        (saying("\x1b]0;x\x07"), "does not answer"),
        (saying('"\\u001b]0;x\\u0007"'), "makes no sense: \\x1b]0;x\\x07"),
    ],
    ids=["endless", "slow", "deep", "list", "flat", "no-json", "escape"],
)
def test_a_false_admin_api_leaves_nothing_behind(
    desk: Desk, answer: Callable[[socket.socket], None], words: str
) -> None:
    before = desk.files()
    with admin_api(answer) as false:
        said = desk.fails(
            *("publish", "x", "--exec", "/bin/cat", "--domain", "x.localhost"),
            environment=false,
        )
    assert words in said
    assert "\x1b" not in said
    assert desk.files() == before
    assert desk.json("published") == []


def test_unpublish_looks_at_all_names_before_it_takes_any(desk: Desk) -> None:
    for name in ("one", "other"):
        desk.run("publish", name, "--exec", "/bin/cat")
    assert "'nosuch' is not published" in desk.fails(
        "unpublish", "one", "nosuch", "other", code=2
    )
    assert len(desk.json("published")) == 2


def test_what_is_left_of_a_service_can_be_taken_away(desk: Desk) -> None:
    before = desk.files()
    desk.run("publish", "notes", "--exec", "/bin/cat", "--idle", "1min")
    (desk.machine.unit_dir / "qrexec-publish-notes.socket").unlink()
    desk.run("unpublish", "notes")
    assert desk.files() == before
    assert "qrexec-publish-notes.socket" not in desk.active()


def test_drop_ins_go_with_a_service(desk: Desk) -> None:
    before = desk.files()
    desk.run("publish", "notes", "--exec", "/bin/cat")
    desk.drop_in("qrexec-publish-notes.service", "more.conf", "[Service]")
    assert "more.conf" in desk.run("unpublish", "notes")
    assert desk.files() == before
    desk.drop_in("qrexec-publish-notes.service", "more.conf", "[Service]")
    assert "remove it first" in desk.fails(
        "publish", "notes", "--exec", "/bin/cat", code=2
    )


def test_what_is_longer_than_systemd_takes_is_refused(desk: Desk) -> None:
    room = 107 - len(address(desk, "x")) + 1
    assert "too long" in desk.fails(
        "publish", "x" * (room + 1), "--exec", "/bin/cat", code=2
    )
    desk.run("publish", "x" * room, "--exec", "/bin/cat", "--idle", "1min")


def test_each_of_many_has_a_port_of_its_own(desk: Desk) -> None:
    assert "{port}" in desk.fails(
        *("publish", "x", "--exec", "/bin/cat", "--port", "9000"),
        *("--count", "2"),
        code=2,
    )


GIVEN = """\
import json, os, socket
listener = socket.socket(fileno=3)
with listener.accept()[0] as connection:
    connection.recv(100)
    found = {name: os.environ[name] for name in ("ONE", "TWO", "THREE")}
    found["cwd"] = os.getcwd()
    connection.sendall(json.dumps(found).encode() + b"\\n")
"""


def test_what_a_program_is_given_it_gets(desk: Desk) -> None:
    home = desk.machine.home
    (home / "variables").write_text("THREE=3\n")
    odd = """a "b" 'c' \\ \\x41 %h %% $HOME ${HOME} $$ ; #é"""
    desk.run(
        *("publish", "given", "--exec", program(desk, GIVEN)),
        *("--env", f"ONE={odd}", "--env", "TWO="),
        *("--env-file", "variables"),
        *("--working-directory", "/usr/lib"),
        *("--memory", "300M", "--tasks", "20", "--cpu", "50%"),
    )
    assert json.loads(ask(desk, "given")) == {
        "ONE": odd,
        "TWO": "",
        "THREE": "3",
        "cwd": "/usr/lib",
    }
    unit = "qrexec-publish-given.service"
    for name, value in {
        "MemoryMax": str(300 << 20),
        "TasksMax": "20",
        "CPUQuotaPerSecUSec": "500ms",
    }.items():
        assert desk.machine.property(unit, name) == value


def test_every_program_has_limits(desk: Desk) -> None:
    desk.run("publish", "notes", "--exec", "/bin/cat", "--idle", "1min")
    unit = "qrexec-program-notes.service"
    assert desk.machine.property(unit, "MemoryMax") != "infinity"
    assert desk.machine.property(unit, "TasksMax") == "512"


@pytest.mark.parametrize(
    "words",
    [
        ("--memory", "much"),
        ("--memory", "1G\nUser=root"),
        ("--cpu", "all"),
        ("--tasks", "0"),
        ("--env", "=x"),
        ("--env", "A=x\nB=y"),
        ("--env-file", "/no/such"),
        ("--credential", "/etc/passwd"),
        ("--working-directory", "/no/such"),
    ],
)
def test_what_a_program_cannot_be_given_is_refused(
    desk: Desk, words: tuple[str, str]
) -> None:
    result = desk.try_("publish", "x", "--exec", "/bin/cat", *words)
    assert result.returncode == 2
    assert words[0] in result.stderr
    assert desk.json("published") == []


def said_again(desk: Desk, *words: str) -> str:
    return desk.run("publish", "wiki", "--exec", *words)


def test_the_same_again_changes_nothing(desk: Desk) -> None:
    words = (program(desk, ACTIVATED, "wiki"), "--idle", "1min")
    said_again(desk, *words)
    assert ask(desk, "wiki") == "wiki heard me"
    before = desk.files()
    pid = desk.machine.property("qrexec-program-wiki.service", "MainPID")
    assert said_again(desk, *words) == (
        "wiki is published so already: nothing changed\n"
    )
    assert desk.files() == before
    assert (
        desk.machine.property("qrexec-program-wiki.service", "MainPID") == pid
    )


#: What keeps the socket open, and what does not.
SHAPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "socket": (ACTIVATED, ()),
    "idle": (ACTIVATED, ("--idle", "1min")),
    "port": (BY_ITSELF, ("--port",)),
}


@pytest.mark.parametrize(
    ("before", "after"),
    [("socket", "idle"), ("idle", "port"), ("port", "socket")],
)
def test_other_words_change_what_is_there(
    desk: Desk, before: str, after: str
) -> None:
    def words(shape: str, answer: str) -> list[str]:
        text, options = SHAPES[shape]
        port = str(free_port()) if options == ("--port",) else ""
        return [
            program(desk, text, answer, port),
            *options,
            *[port][: len(port)],
        ]

    said_again(desk, *words(before, "old"))
    assert ask(desk, "wiki") == "old heard me"
    unit = "qrexec-publish-wiki.socket"
    inode = os.stat(address(desk, "wiki")).st_ino
    said = said_again(desk, *words(after, "new"), "--memory", "300M")
    assert "Changed: " in said
    assert os.stat(address(desk, "wiki")).st_ino == inode
    assert desk.scene.state(unit) == "active"
    assert ask(desk, "wiki") == "new heard me"
    assert only(desk)["problem"] is None
    desk.run("unpublish", "wiki")
    assert not units(desk)
    assert desk.failed() == ""


def test_whoever_is_connected_keeps_the_old_program(desk: Desk) -> None:
    said_again(desk, program(desk, ACTIVATED, "old"))
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(address(desk, "wiki"))
        with client.makefile("rwb") as file:

            def heard() -> bytes:
                file.write(b"me\n")
                file.flush()
                return file.readline()

            assert heard() == b"old heard me\n"

            def say_again() -> None:
                said_again(desk, program(desk, ACTIVATED, "new"))
                done.set()

            thread = threading.Thread(target=say_again)
            thread.start()
            text = desk.machine.unit_dir / "qrexec-publish-wiki.service"
            until("it is written", lambda: " new" in text.read_text())
            for _ in range(10):
                assert heard() == b"old heard me\n"
    assert done.wait(PATIENCE)
    thread.join()
    assert ask(desk, "wiki") == "new heard me"


def test_who_connects_as_a_program_ends_waits_for_the_next(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_again(desk, program(desk, ACTIVATED, "wiki"))
    assert ask(desk, "wiki") == "wiki heard me"
    pid = desk.machine.property("qrexec-publish-wiki.service", "MainPID")
    for name, value in desk.machine.environment.items():
        monkeypatch.setenv(name, value)
    looks: list[str] = []
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE)
    really_used = change._is_used

    def is_used(service: Service) -> bool:
        stat = Path("/proc", pid, "stat").read_text()
        looks.append(stat.rpartition(")")[2].split()[0])
        if len(looks) == 2:
            client.connect(address(desk, "wiki"))
            client.sendall(b"me\n")
        return really_used(service)

    monkeypatch.setattr(change, "_is_used", is_used)
    unit = "qrexec-publish-wiki.service"
    until(
        "nobody is connected any more",
        lambda: change.end_unused(Service("wiki"), [unit]) or len(looks) > 1,
    )
    # It stands still, so that it takes nothing after that look.
    assert looks[1] == "T"
    with client, client.makefile("rb") as file:
        assert file.readline() == b"wiki heard me\n"
    assert desk.machine.property(unit, "MainPID") != pid


def test_a_stop_that_systemd_cancels_is_tried_again(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_again(desk, program(desk, ACTIVATED, "wiki"))
    assert ask(desk, "wiki") == "wiki heard me"
    unit = "qrexec-publish-wiki.service"
    pid = desk.machine.property(unit, "MainPID")
    for name, value in desk.machine.environment.items():
        monkeypatch.setenv(name, value)
    really_run = Systemctl.run
    canceled: list[str] = []

    def run(systemctl: Systemctl, *words: str, check: bool = True) -> object:
        if words == ("stop", unit) and not canceled:
            canceled.append(unit)
            raise ActivateError(f"Job for {unit} canceled.")
        return really_run(systemctl, *words, check=check)

    monkeypatch.setattr(Systemctl, "run", run)
    until(
        "it is told to end",
        lambda: change.end_unused(Service("wiki"), [unit]) or canceled,
    )
    # As it was: it stands still no more.
    assert desk.machine.property(unit, "MainPID") == pid
    assert ask(desk, "wiki") == "wiki heard me"
    until("it ends", lambda: change.end_unused(Service("wiki"), [unit]))
    assert desk.machine.property(unit, "MainPID") == "0"


@pytest.mark.parametrize("kind", ["--idle", "--port"])
def test_who_connects_as_a_proxy_ends_waits_for_the_next_program(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    value = str(free_port()) if kind == "--port" else "1min"
    text = BY_ITSELF if kind == "--port" else ACTIVATED
    said_again(desk, program(desk, text, "wiki", value), kind, value)
    assert ask(desk, "wiki") == "wiki heard me"
    main, behind = "qrexec-publish-wiki.service", "qrexec-program-wiki.service"
    pid = desk.machine.property(behind, "MainPID")
    for name, given in desk.machine.environment.items():
        monkeypatch.setenv(name, given)
    really_run = Systemctl.run
    waiting: list[socket.socket] = []

    def run(systemctl: Systemctl, *words: str, check: bool = True) -> object:
        if words[0] == "stop" or words[1] == "--signal=SIGTERM":
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(PATIENCE)
            client.connect(address(desk, "wiki"))
            client.sendall(b"me\n")
            waiting.append(client)
        return really_run(systemctl, *words, check=check)

    monkeypatch.setattr(Systemctl, "run", run)
    until(
        "nobody is connected any more",
        lambda: change.end_unused(Service("wiki"), [main, behind]),
    )
    assert waiting
    for client in waiting:
        with client, client.makefile("rb") as file:
            assert file.readline() == b"wiki heard me\n"
    assert desk.machine.property(behind, "MainPID") != pid


def test_a_dry_run_shows_what_differs(desk: Desk) -> None:
    said_again(desk, "/bin/cat")
    file = desk.machine.unit_dir / "qrexec-publish-wiki.service"
    before = file.read_text()
    said = said_again(desk, "/bin/cat", "--memory", "300M", "--dry-run")
    changed = [
        line
        for line in said.splitlines()
        if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))
    ]
    assert changed == ["-MemoryMax=50%", "+MemoryMax=300M"]
    assert f"--- {file}" in said
    assert "$ systemctl --user daemon-reload" in said
    assert file.read_text() == before


def contents(desk: Desk) -> dict[str, str]:
    return {
        name: (desk.machine.unit_dir / name).read_text() for name in units(desk)
    }


def test_a_change_that_fails_changes_nothing(desk: Desk) -> None:
    words = (program(desk, ACTIVATED, "old"),)
    said_again(desk, *words)
    before = contents(desk)
    said = desk.fails(
        *("publish", "wiki", "--exec", program(desk, ACTIVATED, "new")),
        *("--idle", "1min", "--domain", "wiki.localhost"),
        environment=NO_CADDY,
    )
    assert "Caddy's admin API" in said
    assert contents(desk) == before
    assert ask(desk, "wiki") == "old heard me"
    said_again(desk, *words)


def test_more_of_many_are_added_to_those_that_are_there(desk: Desk) -> None:
    words = ("publish", "trial", "--exec", program(desk, ACTIVATED, "{name}"))
    desk.run(*words, "--count", "2")
    said = desk.run(*words, "--count", "3")
    assert said.count("nothing changed") == 2
    assert [one["name"] for one in desk.json("published")] == [
        f"trial-{number}" for number in range(1, 4)
    ]
    assert ask(desk, "trial-3") == "trial-3 heard me"
