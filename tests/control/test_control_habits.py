"""What people type by habit, or by mistake: it works, or the answer helps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk import PATIENCE, Desk

from qrexec_activate.loopback.machine import Machine


@pytest.fixture
def desk(shared_machine: Machine) -> Iterator[Desk]:
    desk = Desk(shared_machine)
    yield desk
    desk.leave()


def test_a_misspelt_command_is_guessed(desk: Desk) -> None:
    assert "'statsu' (did you mean status?)" in desk.fails("statsu", code=2)
    assert "did you mean" not in desk.fails("zzzzzz", code=2)


def test_a_misspelt_kind_is_guessed(desk: Desk) -> None:
    said = desk.fails("add", "tpc", str(desk.port), "work", code=2)
    assert "(did you mean tcp?)" in said


def test_udp_is_explained(desk: Desk) -> None:
    said = desk.fails("add", "udp", "53", "sys-net", code=2)
    assert "UDP cannot be carried" in said


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_serve_has_help(desk: Desk, option: str) -> None:
    said = desk.run("serve", option)
    assert said.startswith("Usage: qrexec-activate serve")
    # The example can be pasted.
    assert " --fdname=work \\\n" in said


def test_adding_again_says_once_what_is_so(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "work")
    again = desk.try_("add", "tcp", str(desk.port), "work")
    assert again.returncode == 0
    assert "reaches work already" in again.stderr
    assert "now reaches" not in again.stdout


def test_what_cannot_be_added_leaves_no_folder(tmp_path: Path) -> None:
    """As with sudo, which gives root no systemd of its own."""
    for words in (
        ["add", "tcp", "1234", "work"],
        ["remove", "work"],
        ["edit", "work"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "qrexec_activate", *words],
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 1
        assert "cannot reach" in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_only_a_socket_can_be_published(desk: Desk) -> None:
    said = desk.fails("publish", "x", "--unix", "/etc/passwd", code=2)
    assert "/etc/passwd is no socket" in said
    assert desk.json("published") == []


def test_a_program_whose_socket_has_failed_is_no_idle_one(desk: Desk) -> None:
    name = f"wiki-{desk.port}"
    desk.run("publish", name, "--exec", "/bin/cat", "--idle", "5min")
    (well,) = desk.json("published")
    assert well["state"] == "idle"
    assert well["file"] == str(desk.machine.unit_dir / well["unit"])
    desk.machine.systemctl("stop", well["unit"])
    socket = desk.machine.runtime / "qubes.ConnectUnix" / name
    socket.mkdir(parents=True)
    try:
        desk.machine.systemctl("start", well["unit"], check=False)
        (failed,) = desk.json("published")
        assert failed["state"] == "failed"
    finally:
        socket.rmdir()
        desk.run("unpublish", name)


# -------------------------------------------------------------- completion


def completed(desk: Desk, shell: str, line: str, folder: Path) -> set[str]:
    """What a shell makes of TAB at the end of this line; "PATHS" stands for its
    own completion of paths."""
    command = folder / "qrexec-activate"
    command.write_text(
        f'#!/bin/sh\nexec {sys.executable} -m qrexec_activate "$@"\n'
    )
    command.chmod(0o755)
    script = folder / f"_{shell}"
    script.write_text(desk.run("completion", shell))
    programs = {
        "bash": [
            "bash",
            "-c",
            'compopt() { echo PATHS; }; . "$1"; COMP_LINE=$2 COMP_POINT=${#2};'
            ' _qrexec_activate_completion qrexec-activate; printf "%s\\n" "${COMPREPLY[@]}"',
        ],
        "zsh": [
            "zsh",
            "-fc",
            # What zsh would show, without a terminal to show it on.
            "compdef() { : }; _path_files() { echo PATHS };"
            " _describe() { print -rl ${(P)3} };"
            " compadd() { print -rl ${(P)5} };"
            ' . "$1"; words=("${(@z)2}"); [[ $2 = *" " ]] && words+=("");'
            " CURRENT=${#words}; _qrexec_activate_completion",
        ],
        "fish": [
            "fish",
            "--no-config",
            "-c",
            'source $argv[1]; complete -C "$argv[2]"',
        ],
    }
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: tools/setup check")
    words = programs[shell]
    done = subprocess.run(
        [*words, *(["sh"] if shell != "fish" else []), script, line],
        env={
            **desk.machine.environment,
            "PATH": f"{folder}:{os.environ['PATH']}",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stderr == ""
    found = {line.split("\t")[0] for line in done.stdout.splitlines()}
    if shell == "zsh":
        # The description comes after the first colon that is not escaped.
        found = {
            re.sub(r"(?<!\\):.*", "", one).replace("\\:", ":") for one in found
        }
    return found - {""}


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_kinds_addresses_labels_and_paths(
    desk: Desk, shell: str, tmp_path: Path
) -> None:
    port = desk.port
    desk.run("add-rpc", "my-rpc", "my.Rpc")
    for number, label in ((1, "gitweb"), (2, "office")):
        unit = f"qrexec-connect-tcp@{port}:{label}.socket"
        desk.drop_in(
            unit,
            label,
            "[Socket]",
            f"ListenStream=127.0.0.{number}:{port}",
            f"FileDescriptorName={label}-qube",
        )
        desk.start(unit)

    def complete(line: str) -> set[str]:
        return completed(desk, shell, f"qrexec-activate {line}", tmp_path)

    assert complete("add ") == {"tcp", "unix", "tcp-bind", "my-rpc"}
    assert complete("add my") == {"my-rpc"}
    assert complete("remove 127.0.0.") == {
        f"127.0.0.1:{port}",
        f"127.0.0.2:{port}",
    }
    assert complete("status off") == {"office", "office-qube"}
    (tmp_path / "socket").touch()
    paths = complete(f"list {tmp_path}/so")
    assert paths in ({"PATHS"}, {f"{tmp_path}/socket"})
    paths = complete(f"publish x --unix {tmp_path}/so")
    assert paths in ({"PATHS"}, {f"{tmp_path}/socket"})


def test_bash_completes_what_follows_a_colon(
    desk: Desk, tmp_path: Path
) -> None:
    """bash takes only what follows it for the word."""
    desk.run("add", "tcp", str(desk.port), "work")
    line = f"qrexec-activate list 127.0.0.1:{str(desk.port)[:2]}"
    assert completed(desk, "bash", line, tmp_path) == {str(desk.port)}


# --------------------------------------------------------------- other habits


def test_help_is_a_command_too(desk: Desk) -> None:
    assert desk.run("help", "add") == desk.run("add", "--help")
    assert desk.run("help") == desk.run("--help")
    assert "(did you mean status?)" in desk.fails("help", "statsu", code=2)


def test_an_rpc_is_removed_when_nothing_uses_it(desk: Desk) -> None:
    desk.run("add-rpc", "my-rpc", "my.Rpc")
    made = desk.files()
    assert made
    desk.run("add", "my-rpc", "backup", "archive")
    said = desk.fails("remove-rpc", "my-rpc", code=2)
    unit = "my-rpc@backup:archive.socket"
    assert f"qrexec-activate remove {unit} first" in said
    desk.run("remove", unit)
    shown = desk.run("remove-rpc", "my-rpc", "--dry-run")
    assert shown.count(": removed\n") == len(made)
    assert desk.files() == made
    assert desk.run("remove-rpc", "my-rpc").count("Removed: ") == len(made)
    assert desk.files() == set()
    assert "there are no units of" in desk.fails("remove-rpc", "my-rpc", code=2)
    assert "ships with" in desk.fails("remove-rpc", "tcp", code=2)


def test_disconnecting_all_has_to_be_said(desk: Desk) -> None:
    desk.run("add", "tcp", str(desk.port), "work")
    assert "or else say --all" in desk.fails("disconnect", code=2)
    assert "or else say --all" in desk.fails(
        "disconnect", "work", "--all", code=2
    )
    none = desk.try_("disconnect", "--all")
    assert (none.returncode, none.stderr) == (
        0,
        "No connection of your own is open\n",
    )
