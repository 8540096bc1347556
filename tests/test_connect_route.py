"""qvm-connect-route, over a pretend qubesd: a route and its line of policy, both
or neither, whatever fails at whatever moment."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pretend_qubesadmin import (
    ROOT,
    App,
    genuine_qrexec,
    load,
    pretend_qrexec,
    pretend_qubesadmin,
)

FEATURE = "vm-config.connect-tcp-1234-gitweb"
VALUE = "tcp 1234 gitweb 127.0.0.1:1234"
RULE = "qubes.ConnectTCP +1234 work gitweb ask default_target=gitweb"
#: As long as a slow machine may take.
PATIENCE = 120


@pytest.fixture
def app(tmp_path: Path) -> App:
    app = App(tmp_path)
    uuid = "c9024a97-9b15-46cc-8341-00000000000"
    app.make("dom0", klass="AdminVM", uuid=uuid + "0")
    app.make("work", default_dispvm="dvm", uuid=uuid + "1")
    app.make("gitweb", uuid=uuid + "2")
    app.make("vault", uuid=uuid + "3")
    app.make("dvm", template_for_dispvms=True, tags=["web"], uuid=uuid + "4")
    (app.policy / "90-default.policy").write_text("* * @anyvm @anyvm deny\n")
    return app


#: qrexec's own parser of policy beside a pretend one, where it is there.
HAS_QREXEC = find_spec("qrexec") is not None
PARSERS = ["pretend", "genuine"] if HAS_QREXEC else ["pretend"]


@pytest.fixture(params=PARSERS)
def modules(app: App, request: pytest.FixtureRequest) -> dict[str, Any]:
    pretend = request.param == "pretend"
    qrexec = pretend_qrexec(app) if pretend else genuine_qrexec(app)
    return pretend_qubesadmin() | qrexec


@pytest.mark.skipif(not HAS_QREXEC, reason="qrexec is not installed")
def test_all_that_follows_is_tried_with_the_genuine_parser_of_policy() -> None:
    assert len(PARSERS) == 2


Tool = Callable[..., str]


@pytest.fixture
def tool(
    app: App, modules: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> Tool:
    """Run it; gives what it prints, and checks how it ends."""
    main = load("connect_route", modules).main

    def run(line: str, status: int = 0) -> str:
        try:
            ended = main(line.split(), app=app)
        except SystemExit as error:
            ended = error.code
        said = capsys.readouterr()
        assert ended == status, said
        return said.err if status else said.out

    return run


def ours(app: App) -> Path:
    return app.policy / "31-qvm-connect-route.policy"


def policy(app: App) -> list[str]:
    """The rules in the file that the tool writes."""
    if not ours(app).exists():
        return []
    lines = ours(app).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def state(app: App) -> dict[str, str]:
    """All that is there: features, and files of policy."""
    paths = [*app.policy.iterdir(), *app.folder.glob("qubes/*/features/*")]
    return {str(path): path.read_text() for path in paths}


# ----------------------------------------------------------------- add and remove


def test_a_route_and_its_policy_come_and_go_together(
    app: App, tool: Tool
) -> None:
    before = state(app)
    said = tool("add work tcp 1234 gitweb")
    assert app.features("work") == {FEATURE: VALUE}
    assert policy(app) == [RULE]
    for part in (FEATURE, VALUE, str(ours(app)), RULE):
        assert part in said
    assert "policy says: ask, by 31-qvm-connect-route.policy:5" in said
    said = tool("remove work tcp 1234 gitweb")
    for part in (FEATURE, VALUE, str(ours(app)), RULE):
        assert part in said
    assert state(app) == before


def test_the_file_of_policy_has_the_rights_that_such_files_have(
    app: App, tool: Tool
) -> None:
    tool("add work tcp 1234 gitweb")
    assert ours(app).stat().st_mode & 0o777 == 0o664


def test_what_is_there_already_is_said_and_left(app: App, tool: Tool) -> None:
    tool("add work tcp 1234 gitweb")
    before = state(app)
    for line in (
        "add work tcp 1234 gitweb",
        "add work tcp 1234 gitweb 127.0.0.1:1234",
        "add work tcp 1234 gitweb localhost --ask",
    ):
        assert "there already" in tool(line)
        assert state(app) == before


def test_of_two_that_belong_together_the_missing_one_is_added(
    app: App, tool: Tool
) -> None:
    # By hand, under a name of one's own.
    app.set("work", "vm-config.connect-x", "tcp 1234 gitweb")
    tool("add work tcp 1234 gitweb")
    assert list(app.features("work")) == ["vm-config.connect-x"]
    assert policy(app) == [RULE]
    del app.domains["work"].features["vm-config.connect-x"]
    tool("add work tcp 1234 gitweb")
    assert app.features("work") == {FEATURE: VALUE}
    assert policy(app) == [RULE]


def test_dry_run_says_the_same_and_does_nothing(app: App, tool: Tool) -> None:
    before = state(app)
    would = tool("add work tcp 1234 gitweb --dry-run")
    assert state(app) == before
    did = tool("add work tcp 1234 gitweb")
    lines = re.findall(r"^    .*", would, re.MULTILINE)
    assert len(lines) == 2
    assert re.findall(r"^    .*", did, re.MULTILINE) == lines
    before = state(app)
    would = tool("remove work tcp 1234 -n")
    assert state(app) == before
    assert FEATURE in would
    assert RULE in would


def test_what_policy_does_can_be_changed_and_is_else_kept(
    app: App, tool: Tool
) -> None:
    tool("add work tcp 1234 gitweb --allow")
    allowed = "qubes.ConnectTCP +1234 work gitweb allow"
    assert policy(app) == [allowed]
    tool("add work tcp 1234 gitweb 127.0.0.2")
    assert policy(app) == [allowed]
    said = tool("add work tcp 1234 gitweb --ask")
    assert policy(app) == [RULE]
    assert f"- {ours(app)}: {allowed}" in said


def test_addresses_of_one_call_share_a_rule(app: App, tool: Tool) -> None:
    tool("add work tcp 1234 gitweb 127.0.0.1 127.0.0.2 %t/git")
    tool("add work tcp 1234 gitweb [::1]:80")
    assert policy(app) == [RULE]
    tool("remove work tcp 1234 gitweb 127.0.0.2:1234")
    assert app.features("work") == {
        FEATURE: "tcp 1234 gitweb 127.0.0.1:1234 %t/git",
        f"{FEATURE}-2": "tcp 1234 gitweb [::1]:80",
    }
    assert policy(app) == [RULE]
    assert "no such address" in tool("remove work tcp 1234 gitweb @x", 1)
    tool("remove work tcp 1234")
    assert not app.features("work")
    assert not policy(app)


def test_an_address_is_for_one_target(app: App, tool: Tool) -> None:
    tool("add work tcp 1234 gitweb 127.0.0.1:80")
    before = state(app)
    said = tool("add work tcp 1234 vault 127.0.0.1:80", 1)
    assert "127.0.0.1:80 of work is for gitweb" in said
    assert state(app) == before


def test_other_lines_of_a_feature_stay_as_they_are(
    app: App, tool: Tool
) -> None:
    name = "vm-config.connect-mine"
    app.set("work", name, "# git; tcp 1234  gitweb;unix  x vault;nonsense")
    tool("remove work tcp 1234")
    assert app.features("work") == {name: "# git; unix  x vault; nonsense"}


def test_a_route_that_two_features_give_goes_from_both(
    app: App, tool: Tool
) -> None:
    for name in "ab":
        app.set("work", f"vm-config.connect-{name}", "tcp 1234 gitweb")
    tool("remove work tcp 1234")
    assert app.features("work") == {}


def test_which_of_several_is_asked(app: App, tool: Tool) -> None:
    tool("add work tcp 1234 gitweb")
    tool("add work tcp 1234 vault 127.0.0.2")
    before = state(app)
    said = tool("remove work tcp 1234", 1)
    assert "tcp 1234 gitweb; tcp 1234 vault" in said
    assert "or --all" in tool("remove work", 1)
    assert state(app) == before
    tool("remove work --all")
    assert app.features("work") == {}
    assert policy(app) == []


def test_what_belongs_to_no_qube_any_more_can_be_removed(
    app: App, tool: Tool
) -> None:
    tool("add work tcp 1234 gitweb")
    (app.folder / "qubes/work").rename(app.folder / "gone")
    assert "no such qube" in tool("list")
    tool("remove work tcp 1234")
    assert policy(app) == []
    assert "no qube work" in tool("remove work tcp 1234", 1)


# ---------------------------------------------------- what a person wrote is his


PERSONS = """\
# work: tcp 1234 vault, as I want it
qubes.ConnectTCP +1234 work vault allow

# work: tcp 80 gitweb
qubes.ConnectTCP +80 vault gitweb allow
## Written by hand
qubes.ConnectTCP +1234 work gitweb allow user=root
"""


def test_no_line_of_a_person_goes(app: App, tool: Tool) -> None:
    user = app.policy / "30-user.policy"
    user.write_text("qubes.ConnectTCP +1234 work gitweb deny\n")
    ours(app).write_text(PERSONS)
    tool("add work tcp 1234 gitweb")
    tool("add work tcp 80 gitweb")
    text = ours(app).read_text()
    assert text.startswith(PERSONS.replace("# work: tcp 80 gitweb\n", ""))
    tool("remove work --all")
    left = PERSONS.replace("# work: tcp 80 gitweb\n", "")
    assert ours(app).read_text() == left
    assert user.read_text() == "qubes.ConnectTCP +1234 work gitweb deny\n"


def test_a_rule_that_a_person_made_allow_goes_with_its_route(
    app: App, tool: Tool
) -> None:
    tool("add work tcp 1234 gitweb")
    text = ours(app).read_text()
    changed = "qubes.ConnectTCP\t+1234 work  gitweb allow notify=yes"
    ours(app).write_text(text.replace(RULE, changed))
    assert "there already" in tool("add work tcp 1234 gitweb")
    tool("remove work tcp 1234")
    assert policy(app) == []


def test_a_file_without_an_end_of_line_is_not_mangled(
    app: App, tool: Tool
) -> None:
    ours(app).write_text("qubes.Gpg * work vault ask")
    tool("add work tcp 1234 gitweb")
    assert policy(app) == ["qubes.Gpg * work vault ask", RULE]


def test_who_is_not_allowed_to_be_called_is_said(app: App, tool: Tool) -> None:
    user = app.policy / "30-user.policy"
    user.write_text("\nqubes.ConnectTCP * work @anyvm deny\n")
    said = tool("add work tcp 1234 gitweb --allow")
    assert "policy says: deny, by 30-user.policy:2" in said
    assert "Warning" in said
    assert "Warning" not in tool("add vault tcp 1234 gitweb --allow")


# ------------------------------------------------------------------------ targets


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        (
            "unix gpg @default --allow --target vault",
            "qubes.ConnectUnix +gpg work @default allow target=vault",
        ),
        (
            "unix gpg @default --target vault",
            "qubes.ConnectUnix +gpg work @default ask default_target=vault",
        ),
        ("unix gpg @default", "qubes.ConnectUnix +gpg work @default ask"),
        ("tcp 80 @dispvm", "qubes.ConnectTCP +80 work @dispvm ask"),
        (
            "tcp 80 @dispvm:dvm --allow",
            "qubes.ConnectTCP +80 work @dispvm:dvm allow",
        ),
        (
            "tcp-bind 2049-fd00++7 vault --allow",
            "qubes.ConnectTCPBind +2049-fd00++7 work vault allow",
        ),
    ],
)
def test_targets_are_those_of_the_policy_language(
    app: App, tool: Tool, line: str, rule: str
) -> None:
    said = tool(f"add work {line}")
    action = rule.split()[4]
    assert policy(app) == [rule]
    assert f"policy says: {action}, by 31-" in said
    ((name, value),) = app.features("work").items()
    assert re.fullmatch(r"vm-config\.[a-z][a-zA-Z0-9_.-]{0,51}", name)
    assert value.startswith(" ".join(line.split()[:3]))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nosuch tcp 80 gitweb", "there is no qube nosuch"),
        ("work tcp 80 nosuch", "there is no qube nosuch"),
        ("work tcp 80 @dispvm:nosuch", "there is no qube nosuch"),
        ("work tcp 80 @dispvm:gitweb", "no template for disposables"),
        ("gitweb tcp 80 @dispvm", "no default_dispvm"),
        ("work tcp 80 work", "cannot call itself"),
        ("dom0 tcp 80 gitweb", "dom0"),
        ("work tcp 80 dom0", "dom0"),
        ("work tcp 80 @default --allow", "--target"),
        ("work tcp 80 gitweb --target vault", "@default only"),
        ("work unix x @default --target nosuch", "there is no qube nosuch"),
        ("work tcp 80 gitweb --source web", "@tag:"),
        ("work tcp 80 gitweb --source @tag:web", "no tag web"),
        ("work tcp 0 gitweb", "no port"),
        ("work tcp 80 git;web", "';'"),
        ("work tcp 80 gitweb 1.2.3.4:99999", "no port"),
        ("work tcp 80 gitweb /tmp/\u00e9", "ASCII"),
        ("work udp 80 gitweb", "no kind"),
        ("work #tcp 80 gitweb", "'#'"),
        ("@default tcp 80 gitweb", "no qube"),
        ("work unix " + "x" * 1000 + " gitweb /" + "y" * 200, "too long"),
    ],
)
def test_what_would_reach_nobody_is_refused(
    app: App, tool: Tool, line: str, problem: str
) -> None:
    before = state(app)
    assert problem in tool(f"add {line}", 1)
    assert state(app) == before


def test_disposables_are_known_to_policy_by_a_tag(app: App, tool: Tool) -> None:
    assert "--source @tag:" in tool("add dvm tcp 80 gitweb")
    said = tool("add dvm tcp 80 gitweb --source @tag:web")
    assert "Note:" not in said
    assert policy(app) == [
        "qubes.ConnectTCP +80 @tag:web gitweb ask default_target=gitweb"
    ]
    assert "policy says: ask" in said
    tool("remove dvm tcp 80")
    assert policy(app) == []


def test_names_of_features_are_short_and_differ(app: App, tool: Tool) -> None:
    target = "q" * 31
    app.make(target, uuid="c9024a97-9b15-46cc-8341-000000000009")
    for number in range(1, 12):
        tool(f"add work unix {'n' * 100} {target} %t/{number}")
    assert len(app.features("work")) == 11
    assert all(len(name) <= 62 for name in app.features("work"))


# --------------------------------------------------------------------------- list


def test_list_shows_routes_and_where_they_disagree(
    app: App, tool: Tool
) -> None:
    assert tool("list") == "dom0 gives no routes.\n"
    tool("add work tcp 1234 gitweb --allow")
    tool("add vault unix x gitweb")
    assert "!" not in tool("list")
    app.set("gitweb", "vm-config.connect-a", "tcp 81 vault")
    (feature,) = app.features("vault")
    del app.domains["vault"].features[feature]
    said = tool("list")
    lines = [line.split() for line in said.splitlines()]
    assert lines[0] == [
        "QUBE",
        "KIND",
        "ARGUMENT",
        "TARGET",
        "ADDRESS",
        "POLICY",
    ]
    row = ["work", *VALUE.split(), "allow,", "by"]
    assert row in [line[:7] for line in lines]
    notes = [line for line in said.splitlines() if line.startswith("! ")]
    assert len(notes) == 2
    # What is printed mends it.
    (add,) = re.findall(r"qvm-connect-route (add .*?) would", notes[0])
    (remove,) = re.findall(r"qvm-connect-route (remove .*?) takes", notes[1])
    tool(add)
    tool(remove)
    assert "!" not in tool("list")
    assert "work" not in tool("list gitweb")
    assert "there is no qube nosuch" in tool("list nosuch", 1)


def test_another_line_of_policy_will_do(app: App, tool: Tool) -> None:
    user = app.policy / "30-user.policy"
    user.write_text("qubes.ConnectTCP * work gitweb allow\n")
    app.set("work", "vm-config.connect-a", "tcp 81 gitweb")
    said = tool("list")
    assert "allow, by 30-user.policy:1" in said
    assert "!" not in said


def test_a_policy_that_is_broken_denies_and_is_not_touched(
    app: App, tool: Tool
) -> None:
    tool("add work tcp 1234 gitweb")
    (app.policy / "50-x.policy").write_text("nonsense\n")
    before = state(app)
    for line in ("add work tcp 80 gitweb", "remove work tcp 1234"):
        said = tool(line, 1)
        assert "nothing was changed" in said
        assert "50-x.policy" in said
        assert state(app) == before
    assert "deny, as it is broken" in tool("list")


BY_THEMSELVES = load(
    "connect_route",
    pretend_qubesadmin() | pretend_qrexec(SimpleNamespace(policy=Path("/"))),
)


@given(
    st.text(max_size=60)
    | st.lists(
        st.sampled_from(
            ["tcp", "unix", "80", "gitweb", "@default", ";", "%t/x", "\x1b[2J"]
        )
    ).map(" ".join)
)
def test_what_others_write_is_never_printed_raw(value: str) -> None:
    module = BY_THEMSELVES
    names = ("vm-config.connect-\x1bx", "vm-config.connect-y")
    qube = SimpleNamespace(features=dict.fromkeys(names, value))
    there = module._routes(module._values(qube))
    decisions = mock.Mock(of=lambda call: SimpleNamespace(denies=True))
    lines: list[str] = []
    with mock.patch("builtins.print", lines.append):
        module._show(list(module._rows("work", there, "", decisions, True)))
    assert all(line.isprintable() for line in lines)


# ------------------------------------------------------------- both, or neither


def test_what_fails_is_undone(app: App, tool: Tool) -> None:
    tool("add work unix x vault")
    for moment in ("set", "set-done"):
        before = state(app)
        (app.folder / "faults" / moment).write_text("qubesd is\x1b[2J away")
        said = tool("add work tcp 1234 gitweb", 1)
        assert r"qubesd is\x1b[2J away" in said
        assert state(app) == before
    for moment in ("delete", "delete-done"):
        before = state(app)
        (app.folder / "faults" / moment).write_text("qubesd is away")
        assert "qubesd is away" in tool("remove work unix x", 1)
        assert state(app) == before


def test_what_cannot_be_undone_is_told(app: App, tool: Tool) -> None:
    (app.folder / "faults/set-done").write_text("always away")
    (app.folder / "faults/delete").write_text("always away")
    said = tool("add work tcp 1234 gitweb", 1)
    assert f"qvm-features --unset work {FEATURE}" in said
    assert policy(app) == []


@pytest.mark.parametrize("call", ["write", "fsync", "link", "rename"])
def test_a_disk_that_is_full_changes_nothing(
    app: App, tool: Tool, call: str
) -> None:
    for qube in ("work", "gitweb"):
        tool(f"add {qube} unix x vault")
    before = state(app)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    patch = {
        "write": mock.patch("tempfile.mkstemp", side_effect=full),
        "fsync": mock.patch("os.fsync", side_effect=full),
        "link": mock.patch("os.link", side_effect=full),
        "rename": mock.patch("pathlib.Path.rename", side_effect=full),
    }[call]
    for line in ("add work tcp 1234 gitweb", "remove work unix x"):
        with patch:
            said = tool(line, 1)
        assert os.strerror(errno.ENOSPC) in said
        assert state(app) == before


def test_no_file_is_seen_that_qrexec_would_choke_on(
    app: App, tool: Tool
) -> None:
    seen = set()
    replace = os.rename

    def look(*args: Any) -> None:
        seen.update(path.name for path in app.policy.iterdir())
        replace(*args)

    with mock.patch("os.rename", look), mock.patch("pathlib.Path.rename", look):
        tool("add work tcp 1234 gitweb")
        tool("add work tcp 80 gitweb")
    # qrexec takes files that begin with a dot for none, and has no others
    # whose names it refuses.
    assert any(name.startswith(".31-") for name in seen)
    for name in seen:
        assert re.fullmatch(r"[a-z0-9_.-]+\.policy|\.31-.*", name), name


def test_a_link_is_not_followed(app: App, tool: Tool) -> None:
    other = app.folder / "other"
    other.write_text("qubes.Gpg * work vault ask\n")
    ours(app).symlink_to(other)
    assert "mend it by hand" in tool("add work tcp 1234 gitweb", 1)
    assert ours(app).is_symlink()
    assert app.features("work") == {}


# ------------------------------------------------------- as a process of its own


def start(app: App, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            ROOT / "tests/pretend_qubesadmin.py",
            app.folder,
            *words,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def await_file(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)


@pytest.fixture
def waiting(app: App) -> Iterator[subprocess.Popen[str]]:
    """A run that waits for qubesd, which has done what it was asked."""
    (app.folder / "faults/set-done").write_text("wait")
    process = start(app, "add", "work", "tcp", "1234", "gitweb")
    with process:
        try:
            await_file(app.folder / "faults/set-done.reached")
            yield process
        finally:
            process.kill()


def go_on(app: App) -> None:
    (app.folder / "faults/set-done").unlink()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_in_the_middle_waits_until_it_is_done(
    app: App, waiting: subprocess.Popen[str], number: signal.Signals
) -> None:
    waiting.send_signal(number)
    go_on(app)
    _, err = waiting.communicate(timeout=PATIENCE)
    assert waiting.returncode != 0
    assert "Traceback" not in err
    assert app.features("work") == {FEATURE: VALUE}
    assert policy(app) == [RULE]
    assert {path.name for path in app.policy.iterdir()} == {
        ours(app).name,
        "90-default.policy",
    }


def test_a_kill_in_the_middle_permits_nothing_and_is_mended_by_another_run(
    app: App, waiting: subprocess.Popen[str]
) -> None:
    waiting.kill()
    waiting.communicate(timeout=PATIENCE)
    go_on(app)
    # What is seen of policy is as it was.
    assert policy(app) == []
    assert app.features("work") == {FEATURE: VALUE}
    with start(app, "add", "work", "tcp", "1234", "gitweb") as again:
        _, err = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, err
    assert policy(app) == [RULE]
    # And tidies up.
    assert len(list(app.policy.iterdir())) == 2


def test_two_runs_take_turns_with_each_other_and_with_qrexec(
    app: App, waiting: subprocess.Popen[str]
) -> None:
    lock = os.open(app.policy, os.O_DIRECTORY)
    try:
        # This is the lock of qrexec's own admin API of policy.
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(lock)
    others = [
        start(app, "add", "work", "tcp", str(port), "gitweb")
        for port in (80, 81, 82)
    ]
    for other in others:
        assert other.stderr is not None
        assert other.stderr.readline().startswith("Waiting for another")
    go_on(app)
    for process in (waiting, *others):
        _, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, err
    assert len(policy(app)) == 4
    assert len(app.features("work")) == 4
