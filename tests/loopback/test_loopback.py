"""The loopback qrexec-client-vm, as a real process: what a caller sees of it is
what it sees of the real one."""

from __future__ import annotations

import fcntl
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pretend import (
    PATIENCE,
    Pretend,
    bound_unix_socket,
    digest,
    echo,
    late_reply,
    random_bytes,
    read_all,
    tcp_pair,
    wait_until,
)

import qrexec_activate
from qrexec_activate.loopback.install import InstallError, write_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def pretend(tmp_path: Path) -> Iterator[Pretend]:
    pretend = Pretend(tmp_path)
    with pretend.resources:
        yield pretend


# -- scripts


def test_a_call_runs_the_script_of_its_target_and_of_no_other(
    pretend: Pretend,
) -> None:
    pretend.script("test.Who", "echo work")
    pretend.script("test.Who", "echo gitweb", qube="gitweb")
    assert pretend.run("work", "test.Who").stdout == b"work\n"
    assert pretend.run("gitweb", "test.Who").stdout == b"gitweb\n"


def test_a_script_sees_its_argument_its_caller_and_its_own_home(
    pretend: Pretend,
) -> None:
    names = "$1|$#|$QREXEC_SERVICE_ARGUMENT|$QREXEC_SERVICE_FULL_NAME|$QREXEC_REMOTE_DOMAIN"
    pretend.script("test.Env", f'echo "{names}|$PWD|$HOME|$XDG_RUNTIME_DIR"')
    home, run = pretend.qube() / "home", pretend.qube() / "run"
    places = f"{home}|{home}|{run}\n"
    assert (
        pretend.run("work", "test.Env+a-1").stdout.decode()
        == f"a-1|1|a-1|test.Env+a-1|client|{places}"
    )
    pretend.write("name", "desk\n")
    assert (
        pretend.run("work", "test.Env").stdout.decode()
        == f"|0||test.Env+|desk|{places}"
    )
    assert run.stat().st_mode & 0o777 == 0o700


def test_an_empty_argument_is_set_and_empty(pretend: Pretend) -> None:
    pretend.script("test.Set", 'echo "${QREXEC_SERVICE_ARGUMENT-unset}|$#"')
    assert pretend.run("work", "test.Set").stdout == b"|0\n"
    assert pretend.run("work", "test.Set+").stdout == b"|0\n"


def test_nothing_of_the_callers_environment_reaches_a_script(
    pretend: Pretend,
) -> None:
    pretend.script("test.Env", "env")
    printed = pretend.run(
        "work", "test.Env", env={"SECRET": "1", "LISTEN_FDS": "3"}
    ).stdout.decode()
    assert "SECRET" not in printed
    assert "LISTEN_FDS" not in printed
    assert "QREXEC_LOOPBACK" not in printed


def test_a_script_for_one_argument_wins(pretend: Pretend) -> None:
    pretend.script("test.Echo", "echo any")
    pretend.script("test.Echo+x", "echo only x")
    assert pretend.run("work", "test.Echo+x").stdout == b"only x\n"
    assert pretend.run("work", "test.Echo+y").stdout == b"any\n"


@pytest.mark.parametrize(
    ("text", "code"),
    [("exit 0", 0), ("exit 7", 7), ("exit 126", 126), ("kill -TERM $$", 143)],
)
def test_the_exit_code_is_the_services_own(
    pretend: Pretend, text: str, code: int
) -> None:
    pretend.script("test.Exit", text)
    assert pretend.run("work", "test.Exit").returncode == code
    assert pretend.log("exit")[-1]["code"] == code


def test_what_a_script_says_on_stderr_reaches_the_clients(
    pretend: Pretend,
) -> None:
    pretend.script("test.Complain", "echo 'no disk' >&2; exit 3")
    done = pretend.run("work", "test.Complain")
    assert (done.returncode, done.stderr) == (3, b"no disk\n")


def test_a_script_that_reads_nothing_loses_none_of_its_output(
    pretend: Pretend,
) -> None:
    pretend.script("test.Deaf", "head -c 300000 /dev/zero")
    call = pretend.call("work", "test.Deaf")
    assert call.converse(random_bytes(4)) == bytes(300000)
    assert call.wait() == 0


def test_a_broken_pipe_ends_a_service_as_it_would_in_its_qube(
    pretend: Pretend,
) -> None:
    pretend.script("test.Pipe", "yes | head -n 1")
    done = pretend.run("work", "test.Pipe")
    assert (done.stdout, done.stderr) == (b"y\n", b"")


# -- when bytes begin to flow


def test_nothing_is_read_and_nothing_set_until_the_prompt_is_answered(
    pretend: Pretend,
) -> None:
    pretend.write("policy", "test.Echo * client work ask default_target=work\n")
    pretend.script("test.Echo", "cat")
    call = pretend.call("work", "test.Echo")
    call.sock.sendall(b"early")
    wait_until("the call is seen", lambda: pretend.log("call"))
    time.sleep(0.2)
    assert not call.has_begun()
    assert (
        call.given.recv(100, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"early"
    )
    pretend.write("answer", "allow\n")
    call.wait_begun()
    assert call.sock.recv(100) == b"early"
    assert call.converse(b" late") == b" late"
    assert call.wait() == 0


def test_a_denied_prompt_leaves_what_the_client_sent_unread(
    pretend: Pretend,
) -> None:
    pretend.write("policy", "* * @anyvm @anyvm ask\n")
    pretend.write("answer", "deny\n")
    call = pretend.call("work", "test.Echo")
    call.sock.sendall(b"early")
    assert (call.wait(), call.stderr()) == (126, "Request refused\n")
    assert not call.has_begun()
    assert call.given.recv(100) == b"early"


@pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair])
def test_a_call_that_is_refused_never_shows_as_established(
    pretend: Pretend,
    pair: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    call = pretend.call("nowhere", "test.None", pair=pair)
    call.sock.sendall(b"unread")
    assert call.wait() == 126
    assert not call.has_begun()
    assert call.given.recv(100) == b"unread"


@pytest.mark.parametrize(
    ("service", "code"), [("test.None", 127), ("qubes.ConnectTCP+http", 125)]
)
@pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair])
def test_a_missing_service_is_found_out_after_the_target_took_the_call(
    pretend: Pretend,
    service: str,
    code: int,
    pair: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    call = pretend.call("work", service, pair=pair)
    assert call.wait() == code
    assert call.stderr() == ""
    assert call.has_begun()
    # The client sees the clean end of an empty stream.
    assert call.sock.recv(100) == b""


def test_prefix_data_comes_before_what_the_client_sends(
    pretend: Pretend,
) -> None:
    pretend.script("test.Echo", "cat")
    assert (
        pretend.call("work", "test.Echo", "--prefix-data=GET ").converse(b"/")
        == b"GET /"
    )
    assert (
        pretend.call("work", "test.Echo", "-pPUT ").converse(b"/") == b"PUT /"
    )


# -- half-close, both ways


@pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair])
def test_a_reply_long_after_the_clients_half_close_arrives(
    pretend: Pretend, pair: Callable[[], tuple[socket.socket, socket.socket]]
) -> None:
    pretend.script("test.Late", "cat > asked; sleep 1; echo answer; exit 4")
    call = pretend.call("work", "test.Late", pair=pair)
    assert call.converse(b"question") == b"answer\n"
    assert call.wait() == 4
    assert (pretend.qube() / "home" / "asked").read_text() == "question"


def test_a_service_that_ends_its_output_goes_on_reading(
    pretend: Pretend,
) -> None:
    pretend.script("test.Sink", "echo ready; exec 1>&-; cat > got; exit 5")
    call = pretend.call("work", "test.Sink")
    assert read_all(call.sock) == b"ready\n"
    assert call.process.poll() is None
    call.sock.sendall(b"all of it")
    call.sock.shutdown(socket.SHUT_WR)
    assert call.wait() == 5
    assert (pretend.qube() / "home" / "got").read_text() == "all of it"


def test_on_pipes_the_end_of_the_service_output_closes_stdout(
    pretend: Pretend,
) -> None:
    pretend.script("test.Sink", "echo ready; exec 1>&-; cat > got")
    process = subprocess.Popen(
        [str(pretend.client), "work", "test.Sink"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read() == b"ready\n"
        process.stdin.write(b"all of it")
        process.stdin.close()
        assert process.wait(PATIENCE) == 0
    assert (pretend.qube() / "home" / "got").read_text() == "all of it"


@pytest.mark.parametrize("pair", [socket.socketpair, tcp_pair])
@pytest.mark.parametrize("kind", ["script", "tcp"])
def test_64_mebibytes_go_both_ways_at_once(
    pretend: Pretend,
    kind: str,
    pair: Callable[[], tuple[socket.socket, socket.socket]],
) -> None:
    if kind == "script":
        pretend.script("test.Echo", "exec cat")
    else:
        pretend.link(
            "test.Echo", f"/dev/tcp/127.0.0.1/{pretend.serve_tcp(echo).port}"
        )
        pretend.config("test.Echo", "skip-service-descriptor=true")
    data = random_bytes(64)
    call = pretend.call("work", "test.Echo", pair=pair)
    assert digest(call.converse(data)) == digest(data)
    assert call.wait() == 0


def test_64_mebibytes_go_both_ways_at_once_on_pipes(pretend: Pretend) -> None:
    pretend.script("test.Echo", "exec cat")
    data = random_bytes(64)
    done = pretend.run("work", "test.Echo", data=data)
    assert digest(done.stdout) == digest(data)


def test_an_idle_call_uses_no_processor_time(pretend: Pretend) -> None:
    pretend.script("test.Sink", "cat; sleep 60")
    call = pretend.call("work", "test.Sink")
    call.given.close()
    call.sock.sendall(b"x")
    assert call.sock.recv(1) == b"x"
    call.sock.shutdown(socket.SHUT_WR)

    def ticks() -> int:
        with open(f"/proc/{call.process.pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    before = ticks()
    time.sleep(0.5)
    assert ticks() - before < 10  # of 50


def test_a_client_that_leaves_is_not_noticed_while_the_service_goes_on_sending(
    pretend: Pretend,
) -> None:
    pretend.script(
        "test.Flood",
        "head -c 20000000 /dev/zero && touch sent-it-all; sleep 60",
    )
    call = pretend.call("work", "test.Flood")
    call.wait_begun()
    call.given.close()
    call.sock.close()
    wait_until(
        "the service has sent all, to nobody",
        (pretend.qube() / "home" / "sent-it-all").exists,
    )
    assert call.process.poll() is None


def test_a_reader_that_stops_holds_the_service_back(pretend: Pretend) -> None:
    pretend.script("test.Flood", "head -c 50000000 /dev/zero; touch done")
    call = pretend.call("work", "test.Flood")
    call.wait_begun()
    time.sleep(0.3)
    assert not (pretend.qube() / "home" / "done").exists()
    assert len(call.converse()) == 50_000_000


# -- socket services


def test_connect_tcp_reaches_the_qubes_own_loopback(pretend: Pretend) -> None:
    server = pretend.serve_tcp(
        lambda sock: sock.sendall(b"gitweb"), "127.0.18.7"
    )
    (pretend.qube("gitweb") / "address").write_text("127.0.18.7\n")
    call = pretend.call("gitweb", f"qubes.ConnectTCP+{server.port}")
    assert (call.converse(), call.wait()) == (b"gitweb", 0)
    assert (
        pretend.run("work", f"qubes.ConnectTCP+{server.port}").returncode == 125
    )


def test_connect_tcp_ends_when_the_service_half_closes(
    pretend: Pretend,
) -> None:
    def goodbye(sock: socket.socket) -> bytes:
        sock.sendall(b"bye")
        sock.shutdown(socket.SHUT_WR)
        return read_all(sock)

    server = pretend.serve_tcp(goodbye)
    call = pretend.call("work", f"qubes.ConnectTCP+{server.port}")
    assert read_all(call.sock) == b"bye"
    assert call.wait() == 0
    call.given.close()
    with pytest.raises(BrokenPipeError):
        call.sock.sendall(b"lost")


def test_a_late_reply_of_a_tcp_service_arrives(pretend: Pretend) -> None:
    server = pretend.serve_tcp(late_reply)
    call = pretend.call(
        "work", f"qubes.ConnectTCP+{server.port}", pair=tcp_pair
    )
    assert call.converse(b"question") == b"late: question"
    assert call.wait() == 0


def test_a_socket_service_is_told_who_calls_for_what(pretend: Pretend) -> None:
    server = pretend.serve_unix(pretend.root / "agent", late_reply)
    pretend.link("test.Agent", pretend.root / "agent")
    call = pretend.call("work", "test.Agent+key")
    assert (
        call.converse(b"question") == b"late: test.Agent+key client\0question"
    )
    assert call.wait() == 0
    assert server.results == [b"test.Agent+key client\0question"]


def test_a_socket_service_may_be_the_socket_itself_and_go_without_being_told(
    pretend: Pretend,
) -> None:
    pretend.serve_unix(pretend.qube() / "rpc" / "test.Agent", echo)
    pretend.config(
        "test.Agent", "# a comment\nskip-service-descriptor = true\n"
    )
    assert (
        pretend.call("work", "test.Agent").converse(b"question") == b"question"
    )


def test_a_tcp_service_takes_its_port_from_the_argument_or_its_link(
    pretend: Pretend,
) -> None:
    port = pretend.serve_tcp(echo).port
    pretend.link("test.Host", "/dev/tcp/127.0.0.1")
    pretend.link("test.Fixed", f"/dev/tcp/127.0.0.1/{port}")
    assert (
        pretend.call("work", f"test.Host+{port}").converse()
        == f"test.Host+{port} client\0".encode()
    )
    assert (
        pretend.call("work", "test.Fixed").converse() == b"test.Fixed+ client\0"
    )


def test_a_tcp_service_takes_an_address_and_no_name(pretend: Pretend) -> None:
    port = pretend.serve_tcp(echo).port
    pretend.link("test.Name", f"/dev/tcp/localhost/{port}")
    done = pretend.run("work", "test.Name")
    assert (done.returncode, done.stdout, done.stderr) == (125, b"", b"")


def test_exit_on_client_eof_ends_the_call_at_once(pretend: Pretend) -> None:
    pretend.serve_unix(pretend.root / "agent", late_reply)
    pretend.link("test.Agent", pretend.root / "agent")
    pretend.config("test.Agent", "exit-on-client-eof=true")
    call = pretend.call("work", "test.Agent")
    assert (call.converse(b"question"), call.wait()) == (b"", 0)


@pytest.mark.parametrize("port", ["1", "0", "65536", "http", "08o", ""])
def test_a_port_that_is_closed_or_none_is_125_without_a_word(
    pretend: Pretend, port: str
) -> None:
    done = pretend.run("work", f"qubes.ConnectTCP+{port}")
    assert (done.returncode, done.stderr) == (125, b"")


def test_a_socket_without_a_listener_is_125_without_a_word(
    pretend: Pretend,
) -> None:
    bound_unix_socket(pretend.qube() / "rpc" / "test.Dead").close()
    done = pretend.run("work", "test.Dead")
    assert (done.returncode, done.stderr) == (125, b"")


@pytest.mark.parametrize(
    "config",
    [
        "skip-service-descriptor=1",
        "wait-for-session=True",
        "force-user=root",
        "?",
    ],
)
def test_a_bad_rpc_config_is_125_without_a_word(
    pretend: Pretend, config: str
) -> None:
    pretend.script("test.Echo", "cat")
    pretend.config("test.Echo", config)
    done = pretend.run("work", "test.Echo")
    assert (done.returncode, done.stderr) == (125, b"")


# -- refusals


def refusal(pretend: Pretend, target: str, service: str = "test.Echo") -> str:
    """The reason in the log of a call that must be refused in the words of the
    real one."""
    done = pretend.run(target, service)
    assert (done.returncode, done.stderr) == (126, b"Request refused\n")
    return str(pretend.log("exit")[-1]["reason"])


def test_a_call_to_nobody_to_dom0_to_itself_or_to_a_halted_qube_is_refused(
    pretend: Pretend,
) -> None:
    pretend.script("test.Echo", "cat")
    pretend.add_qube("client")
    assert "@default names no qube" in refusal(pretend, "nowhere")
    assert "@default names no qube" in refusal(pretend, "")
    assert "dom0" in refusal(pretend, "dom0")
    assert "dom0" in refusal(pretend, "@adminvm")
    assert "itself" in refusal(pretend, "client")
    (pretend.qube() / "agent-down").touch()
    assert "agent-down" in refusal(pretend, "work")
    (pretend.qube() / "halted").touch()
    assert "halted" in refusal(pretend, "work")


def test_no_such_service_is_127_without_a_word(pretend: Pretend) -> None:
    done = pretend.run("work", "test.None+x")
    assert (done.returncode, done.stderr) == (127, b"")


@pytest.mark.parametrize(
    "target",
    [
        "wrok",
        "wo/rk",
        "wo rk",
        "..",
        "",
        "@default",
        "$default",
    ],
)
def test_a_misspelt_target_reaches_the_default_one(
    pretend: Pretend, target: str
) -> None:
    pretend.write("policy", "test.Who * client @default allow target=gitweb\n")
    pretend.script("test.Who", "echo gitweb", qube="gitweb")
    assert pretend.run(target, "test.Who").stdout == b"gitweb\n"
    call = pretend.log("call")[-1]
    assert (call["target"], call["policy_target"], call["resolved"]) == (
        target,
        "@default",
        "gitweb",
    )


def test_an_explicit_target_never_matches_a_default_line(
    pretend: Pretend,
) -> None:
    pretend.write("policy", "test.Who * client @default allow target=gitweb\n")
    assert refusal(pretend, "work", "test.Who") == "no policy line matches"


@pytest.mark.parametrize("argument", ["a/b", "a:b", "a b", "a\nb", "a_b"])
def test_characters_that_qrexec_does_not_know_become_underscores(
    pretend: Pretend, argument: str
) -> None:
    pretend.write("policy", "test.Show +a_b client work allow\n")
    pretend.script("test.Show", 'echo "$1"')
    assert pretend.run("work", f"test.Show+{argument}").stdout == b"a_b\n"


def test_underscores_are_counted_by_byte(pretend: Pretend) -> None:
    pretend.script("test.Show", 'echo "$1"')
    assert pretend.run("work", "test.Show+é").stdout == b"__\n"


def test_the_first_policy_line_that_matches_decides(pretend: Pretend) -> None:
    pretend.write(
        "policy",
        """\
# comment
test.Who +secret client  work     deny notify=no
test.Who +       client  work     allow user=root
test.Who *       @anyvm  @dispvm  allow
test.Who *       *       @dispvm:work allow target=gitweb
*        *       other   @anyvm   allow
""",
    )
    for qube in ("work", "gitweb", pretend.add_qube("default-dvm").name):
        pretend.script("test.Who", f"echo {qube}", qube=qube)
    assert (
        refusal(pretend, "work", "test.Who+secret") == "policy line 2 denies it"
    )
    assert pretend.run("work", "test.Who").stdout == b"work\n"
    assert refusal(pretend, "work", "test.Who+x") == "no policy line matches"
    assert pretend.run("@dispvm", "test.Who+x").stdout == b"default-dvm\n"
    assert pretend.run("$dispvm", "test.Who+x").stdout == b"default-dvm\n"
    assert pretend.run("@dispvm:work", "test.Who").stdout == b"gitweb\n"


def test_a_policy_that_cannot_be_read_refuses_everything(
    pretend: Pretend,
) -> None:
    pretend.write("policy", "* * * * allow\nnonsense\n")
    assert "line 2" in refusal(pretend, "work")


def test_the_129th_connection_to_one_qube_is_refused(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    with open(pretend.qube() / "connections", "wb") as places:
        fcntl.lockf(places, fcntl.LOCK_EX, 128)
        assert "128 connections" in refusal(pretend, "work")
        fcntl.lockf(places, fcntl.LOCK_UN, 1)
        assert pretend.run("work", "test.Echo", data=b"x").stdout == b"x"


def test_a_missing_agent_is_told_as_the_real_one_tells_it(
    pretend: Pretend,
) -> None:
    pretend.script("test.Echo", "cat")
    missing = pretend.run("--agent-socket=/nowhere", "work", "test.Echo")
    pretend.write("agent-down", "")
    down = pretend.run("work", "test.Echo")
    for done in (missing, down):
        assert (done.returncode, done.stderr) == (
            1,
            b"connect: No such file or directory\n",
        )


def test_an_argument_of_4000_characters_wedges_the_agent(
    pretend: Pretend,
) -> None:
    pretend.script("test.Echo", "cat")
    call = pretend.call("work", "test.Echo+" + "x" * 4000)
    wait_until("the call is seen", lambda: pretend.log("call"))
    time.sleep(0.2)
    assert call.process.poll() is None
    assert not call.has_begun()


# -- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--x", "work", "s"], "unrecognized option '--x'"),
        (["-x", "work", "s"], "invalid option -- 'x'"),
        (["-vault", "s"], "invalid option -- 'v'"),
        (["--no-filter", "work", "s"], "option '--no-filter' is ambiguous"),
        (["--help=x"], "option '--help' doesn't allow an argument"),
        (["--agent-socket"], "option '--agent-socket' requires an argument"),
        (["-p"], "option requires an argument -- 'p'"),
        (["work"], "usage: "),
        (
            ["work", "s", "/bin/true"],
            "a local program is not supported by the loopback",
        ),
        (
            ["--use-stdin-socket", "work", "s"],
            "--use-stdin-socket passed, but stdin not a socket",
        ),
    ],
)
def test_bad_usage_is_exit_code_2_and_says_so(
    pretend: Pretend, arguments: list[str], message: str
) -> None:
    done = pretend.run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.decode()


def test_options_may_be_short_abbreviated_and_ended(pretend: Pretend) -> None:
    pretend.script("test.Show", "printf 'a\\001\\n'")
    assert (
        pretend.run("-tT", "--buffer-size", "4096", "work", "test.Show").stdout
        == b"a_\n"
    )
    assert (
        pretend.run(
            "--filter-escape-chars-stdo", "--", "work", "test.Show"
        ).stdout
        == b"a_\n"
    )
    assert (
        pretend.run(
            "--no-filter-escape-chars-stdout", "work", "test.Show"
        ).stdout
        == b"a\x01\n"
    )


def test_a_bad_buffer_size_is_named(pretend: Pretend) -> None:
    done = pretend.run("--buffer-size=big", "work", "test.Show")
    assert (done.returncode, done.stderr) == (
        1,
        b"Bad buffer size: does not begin with a number\n",
    )


@pytest.mark.parametrize(
    ("version", "known", "listed"),
    [("4.2.18", False, False), ("4.2.19", True, False), ("4.3.0", True, True)],
)
def test_older_clients_do_not_know_the_stdin_socket(
    pretend: Pretend, version: str, known: bool, listed: bool
) -> None:
    pretend.script("test.Echo", "cat")
    pretend.write("version", version + "\n")
    call = pretend.call("work", "test.Echo")
    call.sock.sendall(b"unread")
    call.sock.shutdown(socket.SHUT_WR)
    assert call.wait() == (0 if known else 2)
    assert call.has_begun() is known
    assert (
        "unrecognized option '--use-stdin-socket'" in call.stderr()
    ) is not known
    helped = pretend.run("--help")
    assert helped.returncode == 0
    assert ("--use-stdin-socket" in helped.stderr.decode()) is listed
    wins = pretend.run("--help", env={"QREXEC_LOOPBACK_VERSION": "4.4.2"})
    assert "--use-stdin-socket" in wins.stderr.decode()


def test_a_datagram_socket_is_no_stdin_socket(pretend: Pretend) -> None:
    call = pretend.call(
        "work",
        "test.Echo",
        pair=lambda: socket.socketpair(type=socket.SOCK_DGRAM),
    )
    assert call.wait() == 2
    assert "not SOCK_STREAM" in call.stderr()


@pytest.mark.parametrize("root", ["", "relative", "/nowhere/at/all"])
def test_a_missing_root_is_explained(pretend: Pretend, root: str) -> None:
    done = pretend.run("work", "test.Echo", env={"QREXEC_LOOPBACK": root})
    assert done.returncode == 1
    assert "QREXEC_LOOPBACK" in done.stderr.decode()


# -- faults


def test_a_lost_call_hangs_before_anything_is_read(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    pretend.write("faults", "[work] lose=1\n")
    lost = pretend.call("work", "test.Echo")
    wait_until("the call is seen", lambda: pretend.log("call"))
    pretend.script("test.Echo", "cat", qube="gitweb")
    assert pretend.run("gitweb", "test.Echo", data=b"x").stdout == b"x"
    assert lost.process.poll() is None
    assert not lost.has_begun()


def test_the_vchan_fails_for_the_first_two_calls_only(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    pretend.write("faults", "vchan-failure=1 first=2\n")
    done = [pretend.run("work", "test.Echo") for _ in range(4)]
    assert [call.returncode for call in done] == [1, 1, 0, 0]
    assert done[0].stderr == b"Data vchan connection failed\n"


def test_too_many_set_ups_at_once_fail(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    pretend.write("faults", "max-setups=3\n")
    with open(pretend.root / "setups", "wb") as places:
        fcntl.lockf(places, fcntl.LOCK_EX, 3)
        assert (
            pretend.run("work", "test.Echo").stderr
            == b"Data vchan connection failed\n"
        )
    assert pretend.run("work", "test.Echo").returncode == 0


def test_calls_may_be_refused_or_ended_at_will(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    pretend.write("faults", "refuse=1\n[gitweb] refuse=0 exit=9 delay=0.05\n")
    assert refusal(pretend, "work") == "fault: refuse"
    assert pretend.run("gitweb", "test.Echo").returncode == 9


def test_a_vchan_that_closes_early_sends_fin_then_exits_255(
    pretend: Pretend,
) -> None:
    pretend.script("test.Flood", "cat /dev/zero")
    pretend.write("faults", "end-early=1 end-early-after=1000\n")
    call = pretend.call("work", "test.Flood")
    assert len(read_all(call.sock)) > 0
    assert call.wait() == 255


def test_a_client_may_die_in_the_middle(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    pretend.write("faults", "die-after=0.05\n")
    call = pretend.call("work", "test.Echo")
    assert call.wait() == -signal.SIGKILL
    assert call.has_begun()


def test_a_faults_file_that_cannot_be_read_is_named(pretend: Pretend) -> None:
    pretend.write("faults", "delay=0\nlose=2\n")
    done = pretend.run("work", "test.Echo")
    assert done.returncode == 1
    assert "faults: line 2: 'lose=2' is out of range" in done.stderr.decode()


# -- the log and the launcher


def test_every_call_is_logged_from_beginning_to_end(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    pretend.write("name", "desk")
    assert pretend.run("work", 'test.Echo+"é').returncode == 0
    call, established, ended = pretend.log()
    assert call == {
        "event": "call",
        "pid": call["pid"],
        "target": "work",
        "policy_target": "work",
        "resolved": "work",
        "service": "test.Echo",
        "argument": "___",
        "source": "desk",
        "decision": "allow",
        "reason": "there is no policy file",
    }
    assert established == {"event": "established", "pid": call["pid"]}
    assert ended == {
        "event": "exit",
        "pid": call["pid"],
        "code": 0,
        "reason": "",
    }


def test_any_target_is_logged_as_json(pretend: Pretend) -> None:
    for target in ('"\\\n\x7f', "é😀", "\udcff"):
        pretend.run(target, "test.Echo")
        assert pretend.log("call")[-1]["target"] == target


def test_calls_at_once_do_not_mix_their_log_lines(pretend: Pretend) -> None:
    pretend.script("test.Echo", "cat")
    calls = [
        pretend.call("work", f"test.Echo+{number}") for number in range(20)
    ]
    for call in calls:
        assert call.converse(b"x") == b"x"
        assert call.wait() == 0
    assert {record["argument"] for record in pretend.log("call")} == {
        str(number) for number in range(20)
    }
    assert len(pretend.log("exit")) == 20


@pytest.mark.parametrize(
    "folder",
    ["/usr/bin", "/bin", "/usr/local/bin", "/usr/lib/qubes", "/etc/qubes-rpc"],
)
def test_the_launcher_is_never_written_where_the_real_one_belongs(
    tmp_path: Path, folder: str
) -> None:
    with pytest.raises(InstallError, match="not installed in"):
        write_client(f"{folder}/qrexec-client-vm", "/tmp", sys.executable)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(InstallError, match="not installed in"):
        write_client(
            f"{tmp_path}/link/qrexec-client-vm", "/tmp", sys.executable
        )


def test_the_launcher_copes_with_spaces_and_length(
    pretend: Pretend, tmp_path: Path
) -> None:
    folder = tmp_path / ('it\'s a long "path" ' + "x" * 130)
    folder.mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    pretend.client = folder / "qrexec-client-vm"
    write_client(str(pretend.client), str(pretend.root), str(python))
    pretend.script("test.Echo", "cat")
    assert pretend.run("work", "test.Echo", data=b"x").stdout == b"x"


def test_relative_paths_are_no_launcher(tmp_path: Path) -> None:
    with pytest.raises(InstallError, match="absolute"):
        write_client("qrexec-client-vm", str(tmp_path), sys.executable)
    with pytest.raises(InstallError, match="absolute"):
        write_client(str(tmp_path / "c"), "relative", sys.executable)


def test_the_client_imports_little() -> None:
    """It is started for every connection, and must start in a few
    milliseconds."""
    package_parent = str(Path(qrexec_activate.__file__).parent.parent)
    code = (
        "import sys; import qrexec_activate.loopback.client_vm;"
        " print(*sys.modules)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-ISc",
            f"import sys; sys.path.insert(0, {package_parent!r}); {code}",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert not {"json", "subprocess", "re", "enum", "typing", "socket"} & set(
        done.stdout.split()
    )
