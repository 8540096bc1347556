"""Split GPG: gpg in `work` signs and decrypts with a key that it cannot read,
by the agent's restricted socket."""

from __future__ import annotations

from pathlib import Path

from gnupg import NEW_KEY, find_sockets, homes
from recipe import Recipe, require


def test_sign_and_decrypt(tmp_path: Path) -> None:
    require("split-gpg", "gpg", "gpg-agent", "gpgconf")
    with Recipe(
        "split-gpg",
        environment=homes(tmp_path),
        substitutes={"~/.gnupg": "$GNUPGHOME"},
    ) as recipe:
        vault, work = recipe["vault"], recipe["work"]
        vault.vendor_units(
            "gpg-agent.socket", "gpg-agent-extra.socket", "gpg-agent.service"
        )
        for qube in (vault, work):
            find_sockets(recipe, qube)
        recipe.follow("The agent")
        vault.run("systemctl --user start gpg-agent.socket")
        vault.run(f"{NEW_KEY} 'Me <me@vault>' future-default default never")
        recipe.follow("The qube that uses it")
        work.run(
            "gpg --batch --import",
            input=vault.run("gpg --armor --export me@vault"),
        )
        said = recipe.follow("Use it")
        assert "Me <me@vault>" in said["gpg --list-secret-keys"]

        home = work.machine.home
        (home / "letter").write_text("for my eyes only\n")
        trust = "gpg --batch --yes --trust-model always --local-user me@vault"
        work.run(f"{trust} --detach-sign letter")
        assert "Good signature" in work.run(
            f"{trust} --verify letter.sig letter 2>&1"
        )
        work.run(f"{trust} --recipient me@vault --encrypt letter")
        assert work.run(f"{trust} --decrypt letter.gpg") == "for my eyes only\n"

        # The restricted socket uses the key, and does not give it away; nor was
        # there ever a copy.
        assert (
            work.run(
                f"{trust} --pinentry-mode loopback --passphrase ''"
                f" --export-secret-keys me",
                check=False,
            )
            == ""
        )
        assert (
            list(
                Path(work.environment["GNUPGHOME"]).glob("private-keys-v1.d/*")
            )
            == []
        )

        # Nor does gpg start an agent in work where it reaches none.
        work.run(
            "systemctl --user stop qrexec-connect-unix@gpg-agent-extra.socket"
        )
        assert "no gpg-agent running" in work.run(
            "gpg --batch --list-secret-keys 2>&1", check=False
        )
