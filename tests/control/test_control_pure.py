"""What the commands decide without a machine: text and values in, text and
values out."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrexec_activate.control import address as addresses
from qrexec_activate.control.dropins import (
    create_file,
    is_idle,
    locked,
    remove_file,
    remove_files,
    replace_file,
    without_lines,
    write_files,
)
from qrexec_activate.control.kinds import will_refuse
from qrexec_activate.control.netproc import Listening, overlaps
from qrexec_activate.control.policy import (
    THIS_QUBE,
    file_name,
    policy_file,
)
from qrexec_activate.control.rule import policy_line
from qrexec_activate.control.select import select
from qrexec_activate.control.survey import Daemon, Entry, find_daemon, foresee
from qrexec_activate.control.table import lay_out
from qrexec_activate.errors import ActivateError, BadName, UsageProblem
from qrexec_activate.given.kinds import unit_of
from qrexec_activate.routing.address import address_key
from qrexec_activate.routing.claim import Refusal, Route
from qrexec_activate.routing.unitfile import SourceFile, assignments
from qrexec_activate.systemd.unitdirs import own_folder, scan

SPECIFIERS = {"t": "/run/user/1000", "h": "/home/user"}


# ---------------------------------------------------------- which daemon is it?


@pytest.mark.parametrize(
    ("command", "service", "argument"),
    [
        (
            "/usr/bin/qrexec-activate serve qubes.ConnectTCP --unit x.service",
            "qubes.ConnectTCP",
            None,
        ),
        (
            "/opt/bin/qrexec-activate serve --unit x.service --relay splice"
            " my.Rpc",
            "my.Rpc",
            None,
        ),
        (
            "qrexec-activate serve --relay=splice my.Rpc --argument foo",
            "my.Rpc",
            "foo",
        ),
        ("qrexec-activate --debug serve my.Rpc --argument=", "my.Rpc", ""),
        ("/usr/bin/python3 -m qrexec_activate serve my.Rpc", "my.Rpc", None),
        (
            "/usr/bin/env X=1 /usr/bin/qrexec-activate serve my.Rpc",
            "my.Rpc",
            None,
        ),
    ],
)
def test_a_daemon_is_known_by_what_its_service_runs(
    command: str, service: str, argument: str | None
) -> None:
    words = command.split()
    daemon = find_daemon("x.service", [(words[0], words, False)])
    assert daemon is not None
    assert (daemon.service, daemon.argument) == (service, argument)


@pytest.mark.parametrize(
    "command",
    [
        "/bin/cat",
        "/usr/bin/serve my.Rpc",
        "qrexec-activate serve",
        "socat serve x",
    ],
)
def test_other_services_are_no_daemons(command: str) -> None:
    words = command.split()
    assert find_daemon("x.service", [(words[0], words, False)]) is None


# -------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("127.0.0.2", "127.0.0.2:80"),
        ("127.0.0.2:8080", "127.0.0.2:8080"),
        ("localhost:8080", "127.0.0.1:8080"),
        ("::1", "[::1]:80"),
        ("[::1]", "[::1]:80"),
        ("[::1]:8080", "[::1]:8080"),
        ("%t/name", "%t/name"),
        ("/run/x", "/run/x"),
        ("@name", "@name"),
        ("vsock::1234", "vsock::1234"),
    ],
)
def test_an_address_is_understood(text: str, written: str) -> None:
    address = addresses.parse_address(text, 80, SPECIFIERS)
    assert address.written == written
    assert address.key == address_key(address.expanded)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1234",
        "example.org:80",
        "127.0.0.1:0",
        "127.0.0.1:x",
        "%q/x",
        "/a/../b",
        "/a/",
        "/" + "x" * 107,
        "a\nb",
    ],
)
def test_what_is_no_address_is_refused_with_a_way_out(text: str) -> None:
    with pytest.raises(
        UsageProblem, match=r"write|would be|too long|takes neither"
    ):
        addresses.parse_address(text, 80, SPECIFIERS)


def test_who_listens_on_all_addresses_is_in_the_way_of_each() -> None:
    assert overlaps(("ip", "0.0.0.0", 80), ("ip", "127.0.0.1", 80))
    assert overlaps(("ip", "::", 80), ("ip", "127.0.0.1", 80))
    assert not overlaps(("ip", "0.0.0.0", 80), ("ip", "::1", 80))
    assert not overlaps(("ip", "0.0.0.0", 80), ("ip", "127.0.0.1", 81))
    assert not overlaps(("path", "/a", 0), ("path", "/b", 0))


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ("127.9.9.9:80", False),
        ("[::1]:80", False),
        ("0.0.0.0:80", True),
        ("80", True),
        ("10.0.0.1:80", True),
        ("/a", False),
    ],
)
def test_who_can_reach_an_address(text: str, is_open: bool) -> None:
    assert addresses.is_open_to_others(address_key(text)) is is_open


def test_what_the_kernel_does_not_tell_is_not_known() -> None:
    now = Listening({("ip", "0.0.0.0", 80): 1})
    assert now.holds("80") is True
    assert now.holds("127.0.0.1:80") is False
    assert now.holds("127.0.0.1:0") is None
    assert now.holds("vsock::80") is None


def test_a_port_that_needs_privileges_is_told_from_one_that_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bind(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("socket.socket.bind", bind)
    wanted = addresses.parse_address("127.0.0.1:80", None, SPECIFIERS)
    found = addresses.obstacle(wanted, [], Listening({}))
    assert found is not None
    assert found.trouble is addresses.Trouble.PRIVILEGED
    assert "net.ipv4.ip_unprivileged_port_start" in found.words


def test_a_file_that_is_no_socket_is_not_removed_for_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    wanted = addresses.parse_address(f"{tmp_path}/file", None, SPECIFIERS)
    found = addresses.obstacle(wanted, [], Listening({}))
    assert found is not None
    assert "no socket" in found.words


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("kind", "argument", "unit"),
    [
        ("tcp", "80", "qrexec-connect-tcp@80.socket"),
        ("unix", "a+b", r"qrexec-connect-unix@a\x2bb.socket"),
        (
            "tcp-bind",
            "2049-127.0.1.1",
            "qrexec-connect-tcp-bind@2049-127.0.1.1.socket",
        ),
        ("my-rpc", "x", "my-rpc@x.socket"),
        ("my-rpc@.socket", "x", "my-rpc@x.socket"),
    ],
)
def test_a_kind_and_an_argument_make_a_unit(
    kind: str, argument: str, unit: str
) -> None:
    assert unit_of(kind, argument) == unit


@pytest.mark.parametrize(
    ("kind", "argument"),
    [("tcp", ""), ("a@b", "x"), ("a/b", "x"), ("x" * 250, "y")],
)
def test_what_makes_no_unit_is_refused(kind: str, argument: str) -> None:
    with pytest.raises(BadName):
        unit_of(kind, argument)


def test_the_file_of_policy_has_a_name_that_ends_no_other_calls() -> None:
    # qrexec takes these characters; with any other, it denies everything.
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789_.-")
    for qube in ("work", "My-Work_2.x", THIS_QUBE):
        assert set(file_name(qube)) <= allowed
    assert file_name("work") != file_name("gitweb")


@pytest.mark.parametrize(
    ("target", "action", "redirect", "line"),
    [
        ("work", "ask", None, "my.Rpc +x me work ask default_target=work"),
        ("work", "allow", None, "my.Rpc +x me work allow"),
        ("@default", "ask", None, "my.Rpc +x me @default ask"),
        (
            "@default",
            "ask",
            "vault",
            "my.Rpc +x me @default ask default_target=vault",
        ),
        (
            "@default",
            "allow",
            None,
            "my.Rpc +x me @default allow target=TARGET-QUBE",
        ),
        (
            "@default",
            "allow",
            "vault",
            "my.Rpc +x me @default allow target=vault",
        ),
        ("@dispvm", "ask", None, "my.Rpc +x me @dispvm ask"),
        (
            "@dispvm:debian-dvm",
            "allow",
            None,
            "my.Rpc +x me @dispvm:debian-dvm allow",
        ),
        (
            "dom0",
            "ask",
            None,
            "my.Rpc +x me @adminvm ask default_target=@adminvm",
        ),
    ],
)
def test_a_policy_line_is_as_its_route_needs_it(
    target: str, action: str, redirect: str | None, line: str
) -> None:
    assert (
        " ".join(policy_line("my.Rpc", "x", "me", target, action, redirect))
        == line
    )


ENTRY = Entry(
    "127.0.0.1:80",
    "work",
    "my.Rpc",
    "80",
    "my-rpc@80.socket",
    "my-rpc.service",
    "/d/work.conf",
    "enabled",
    "active",
    True,
)


def test_what_routes_call_is_denied_to_every_other_qube() -> None:
    """Unless another route makes the same call to one."""
    other = replace(ENTRY, target="vault")
    elsewhere = replace(ENTRY, target="vault", argument="81")
    refused = replace(ENTRY, target="", argument="82")
    known = [ENTRY, other, elsewhere, refused]

    def lines(*entries: Entry) -> list[str]:
        return [
            " ".join(line.split())
            for line in policy_file(entries, known, "me", "allow", None)
        ]

    assert lines(elsewhere) == [
        "my.Rpc +81 me vault allow",
        "my.Rpc +81 me @anyvm deny",
    ]
    assert lines(ENTRY) == ["my.Rpc +80 me work allow"]
    assert lines(*known) == [
        "my.Rpc +80 me vault allow",
        "my.Rpc +80 me work allow",
        "my.Rpc +81 me vault allow",
        "my.Rpc +80 me @anyvm deny",
        "my.Rpc +81 me @anyvm deny",
    ]
    assert lines(refused) == []


@pytest.mark.parametrize(
    "word",
    [
        "127.0.0.1:80",
        "work",
        "my.Rpc+80",
        "80",
        "my-rpc@80",
        "my-rpc@80.socket",
        "/d/work.conf",
    ],
)
def test_a_route_is_found_by_whatever_a_person_calls_it(word: str) -> None:
    assert select([ENTRY], [word]) == [ENTRY]


def test_a_word_that_means_no_route_is_an_error() -> None:
    with pytest.raises(UsageProblem, match="there is no route 'nope'"):
        select([ENTRY], ["nope"])


# ---------------------------------------------------------------------- files


def test_the_last_word_on_a_listener_is_foreseen() -> None:
    daemon = Daemon("qrexec-connect-tcp.service", "qubes.ConnectTCP", None)
    one = SourceFile(
        "/d/a.conf",
        "[Socket]\nListenStream=127.0.0.1:80\nFileDescriptorName=a\n",
    )
    two = SourceFile("/d/b.conf", "[Socket]\nListenStream=127.0.0.2:80\n")
    claims = foresee(
        daemon,
        "qrexec-connect-tcp@80.socket",
        [SourceFile("/f", "[Socket]\n"), one, two],
        SPECIFIERS,
    )
    assert isinstance(claims[0], Route)
    assert claims[0].target == "a"
    assert isinstance(claims[1], Refusal)


def test_taking_lines_out_leaves_comments_and_neighbours() -> None:
    text = (
        "# mine\n[Socket]\nListenStream=\\\n#"
        " why\n127.0.0.1:80\nListenStream=127.0.0.2:80\n; end\n"
    )
    assert [one.line for one in assignments(text)] == [5, 6]
    assert (
        without_lines(text, {5})
        == "# mine\n[Socket]\n# why\nListenStream=127.0.0.2:80\n; end\n"
    )
    assert (
        without_lines(text, {6})
        == "# mine\n[Socket]\nListenStream=\\\n# why\n127.0.0.1:80\n; end\n"
    )


_LINES = st.lists(
    st.sampled_from(
        [
            "[Socket]",
            "[Unit]",
            "# note",
            "; note",
            "",
            "ListenStream=a",
            "ListenStream=b\\",
            "  go on",
            "Key = v ",
            "junk",
        ]
    ),
    max_size=12,
)


@given(_LINES, st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_taking_lines_out_takes_out_just_those_or_refuses(
    lines: list[str], end: str, data: st.DataObject
) -> None:
    text = end.join(lines)
    items = list(assignments(text))
    doomed = (
        data.draw(st.sets(st.sampled_from([one.line for one in items])))
        if items
        else set()
    )
    try:
        left = without_lines(text, doomed)
    except ActivateError:
        return
    kept = [
        (one.section, one.key, one.value)
        for one in items
        if one.line not in doomed
    ]
    assert [
        (one.section, one.key, one.value) for one in assignments(left)
    ] == kept
    for comment in ("# note", "; note"):
        assert left.count(comment) == text.count(comment)


@pytest.mark.parametrize(
    ("text", "idle"),
    [
        ("", True),
        ("[Socket]\n\n", True),
        ("[Socket]\n# note\n", False),
        ("[Socket]\nSocketMode=0600\n", False),
    ],
)
def test_a_file_that_says_nothing_is_idle(text: str, idle: bool) -> None:
    assert is_idle(text) is idle


def test_of_many_files_none_comes_before_all_are_written(
    tmp_path: Path,
) -> None:
    there = tmp_path / "there.conf"
    there.write_text("old\n")
    fresh = tmp_path / "x.socket.d" / "new.conf"
    beside = tmp_path / "beside.conf"
    with pytest.raises(ActivateError, match="nowhere"):
        write_files(
            {
                fresh: "new\n",
                beside: "new\n",
                tmp_path / "nowhere" / "y.socket.d" / "z.conf": "new\n",
            },
            {there: "new\n"},
        )
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text() == "old\n"
    write_files({fresh: "new\n", beside: "new\n"}, {there: "new\n"})
    for path in (fresh, beside, there):
        assert path.read_text() == "new\n"
    remove_files([fresh, beside])
    assert list(tmp_path.iterdir()) == [there]


@pytest.fixture
def session(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime folder, as a login has one: locks lie there."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("run")))


@pytest.mark.usefixtures("session")
def test_a_file_is_made_changed_and_removed_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.socket.d" / "a.conf"
    with locked(tmp_path):
        create_file(path, "one\n")
        assert path.read_text() == "one\n"
        assert path.stat().st_mode & 0o777 == 0o644
        assert path.parent.stat().st_mode & 0o777 == 0o755
        path.chmod(0o640)
        replace_file(path, "two\n")
        assert path.read_text() == "two\n"
        assert path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(ActivateError, match="cannot write"):
            create_file(path, "three\n")
        remove_file(path)
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_file_kept_elsewhere_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    real = tmp_path / "dotfiles" / "a.conf"
    real.write_text("one\n")
    link = tmp_path / "a.conf"
    link.symlink_to(real)
    replace_file(link, "two\n")
    assert link.is_symlink()
    assert real.read_text() == "two\n"


@pytest.mark.usefixtures("session")
def test_what_a_killed_run_left_is_tidied_away(tmp_path: Path) -> None:
    (tmp_path / ".qrexec-activate-abc").mkdir()
    (tmp_path / ".qrexec-activate-abc" / "a.conf").touch()
    (tmp_path / "x.socket.d").mkdir()
    (tmp_path / "x.socket.d" / ".qrexec-activate-def").touch()
    with locked(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {"x.socket.d"}


def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ActivateError, match="cannot open"),
        locked(tmp_path / "file" / "user"),
    ):
        pass


def test_where_units_lie() -> None:
    assert own_folder(user=False) == Path("/etc/systemd/system")
    assert own_folder(user=True, environment={"HOME": "/home/user"}) == Path(
        "/home/user/.config/systemd/user"
    )
    assert own_folder(user=True, environment={"XDG_CONFIG_HOME": "/c"}) == Path(
        "/c/systemd/user"
    )
    with pytest.raises(ActivateError, match="log in properly"):
        own_folder(user=True, environment={})


def test_what_lies_in_the_search_path_is_found(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (
        mine / "a@1.socket.d",
        mine / "sockets.target.wants",
        theirs / "a@.socket.d",
        theirs / "b-.socket.d",
    ):
        folder.mkdir(parents=True)
    (theirs / "a@.socket").touch()
    (theirs / "a@.socket.d" / "x.conf").touch()
    (theirs / "a@.socket.d" / "y.conf").touch()
    (theirs / "b-.socket.d" / "z.conf").touch()
    (mine / "a@1.socket.d" / "x.conf").touch()
    (mine / "a@2.socket.d").mkdir()
    (mine / "sockets.target.wants" / "c.socket").symlink_to("/nowhere")
    files = scan([str(mine), str(theirs), str(tmp_path / "none")])
    assert files.units("socket") == {"a@1.socket", "c.socket"}
    assert files.drop_ins("a@1.socket") == [
        str(mine / "a@1.socket.d/x.conf"),
        str(theirs / "a@.socket.d/y.conf"),
    ]
    assert files.enabled == {"c.socket": "enabled"}


# ---------------------------------------------------------------------- output


def test_columns_are_two_blanks_apart() -> None:
    assert lay_out(("a", "b"), [["xxx", "y"]], None) == ["A    B", "xxx  y"]


def test_every_command_has_help_with_an_example() -> None:
    from qrexec_activate.cli import cli

    with click.Context(cli) as ctx:
        for name in cli.list_commands(ctx):
            command = cli.get_command(ctx, name)
            assert command is not None
            assert command.help, name
            text = command.get_help(
                click.Context(command, info_name=name, parent=ctx)
            )
            if name not in ("serve", "demo"):
                assert f"$ qrexec-activate {name}" in text, name


def test_help_imports_nothing_that_it_does_not_need() -> None:
    import subprocess

    code = (
        "import sys; from qrexec_activate import cli;"
        " print(sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for heavy in ("trio", "jeepney", "psutil", "systemd"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.1.1", ""),
        ("10.255.0.7", ""),
        ("224.0.0.1", "single host"),
        ("127.255.255.255", "single host"),
        ("127.0.0.0", "single host"),
        ("0.0.0.1", "single host"),
        ("fd00++7", ""),
        ("++1", ""),
        ("1+2+3+4+5+6+7+8", ""),
        ("0+0+0+0+0+0+0+1", "write it ++1"),
        ("0++1", "write it ++1"),
        ("FD00++7", "write it fd00++7"),
        ("1+0+0+2++3", ""),
        ("1+0+0+0+2++3", "write it 1++2+0+0+3"),
        ("++", "single host"),
        ("ff02++1", "single host"),
        ("++ffff+7f00+1", "IPv4"),
        ("++7f00+1", "IPv4"),
    ],
)
def test_what_the_service_will_refuse_is_known(address: str, why: str) -> None:
    argument = f"1-{address}"
    script = Path(__file__).parents[2] / "rpc/qubes.ConnectTCPBind"
    # Whatever it does not refuse, it cannot connect.
    code = subprocess.run(
        ["sh", script, argument], capture_output=True, check=False
    ).returncode
    said = will_refuse("qubes.ConnectTCPBind", argument)
    assert (code == 2, bool(said)) == (bool(why), bool(why)), said
    assert why in said
    assert not will_refuse("my.Bind", argument)
