"""Split SSH: `work` lists, signs and logs in with keys that are in `vault`
only, held by either agent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gnupg import NEW_KEY, find_sockets, homes
from recipe import Qube, Recipe, require, sshd


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Recipe]:
    require(
        "split-ssh",
        "ssh-agent",
        "ssh-add",
        "ssh-keygen",
        "ssh",
        "sshd",
        "gpg",
        "gpg-agent",
    )
    with Recipe(
        "split-ssh",
        environment=homes(tmp_path),
        substitutes={"~/.gnupg": "$GNUPGHOME"},
    ) as recipe:
        yield recipe


def check_signature(work: Qube, public: str) -> None:
    """`work` has no key of its own, signs all the same, and the signature
    holds."""
    home = work.machine.home
    (home / "key.pub").write_text(public)
    (home / "allowed").write_text(f"me {public}")
    (home / "letter").write_text("signed in vault\n")
    work.run("ssh-keygen -q -Y sign -f key.pub -n file letter")
    said = work.run(
        "ssh-keygen -Y verify -f allowed -I me -n file -s letter.sig < letter"
    )
    assert 'Good "file" signature for me' in said


def check_login(work: Qube, public: str, folder: Path) -> None:
    authorized = folder / "authorized_keys"
    authorized.write_text(public)
    with sshd(folder / "host", authorized) as words:
        assert work.run(
            f"ssh -F none {words} echo logged in as '$(id -un)'"
        ).startswith("logged in as ")
        # Only the agent in vault can do that.
        assert (
            work.run(
                f"SSH_AUTH_SOCK= ssh -F none {words} echo logged in",
                check=False,
            )
            == ""
        )
    private = [
        path
        for path in work.machine.home.rglob("*")
        if path.is_file() and b"PRIVATE" in path.read_bytes()
    ]
    assert private == []


def test_openssh_agent(recipe: Recipe, tmp_path: Path) -> None:
    vault, work = recipe["vault"], recipe["work"]
    vault.run(
        "mkdir -m 0700 ~/.ssh && ssh-keygen -q -t ed25519 -N '' -C"
        " key-in-vault -f ~/.ssh/id_ed25519"
    )
    vault.environment["SSH_AUTH_SOCK"] = (
        f"{vault.machine.runtime}/qubes.ConnectUnix/ssh-agent"
    )
    said = recipe.follow("OpenSSH's agent")
    assert "key-in-vault (ED25519)" in said["ssh-add -l"]
    public = (vault.machine.home / ".ssh" / "id_ed25519.pub").read_text()
    check_signature(work, public)
    check_login(work, public, tmp_path)


def test_gpg_agent(recipe: Recipe, tmp_path: Path) -> None:
    vault, work = recipe["vault"], recipe["work"]
    vault.vendor_units(
        "gpg-agent.socket", "gpg-agent-ssh.socket", "gpg-agent.service"
    )
    vault.run(
        "systemctl --user daemon-reload && systemctl --user start"
        " gpg-agent.socket"
    )
    find_sockets(recipe, vault)
    vault.run(f"{NEW_KEY} 'Key in vault <key@vault>' ed25519 auth never")
    said = recipe.follow("gpg-agent")
    assert "(ED25519)" in said["ssh-add -l"]
    public = vault.run("gpg --export-ssh-key key@vault")
    check_signature(work, public)
    check_login(work, public, tmp_path)
