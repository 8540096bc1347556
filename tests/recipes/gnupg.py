"""A GnuPG of each qube's own, whose gpg finds the sockets that systemd opens in
the qube's runtime folder."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

from recipe import Qube, Recipe

#: A key without a passphrase: nobody is there to type one.
NEW_KEY = "gpg --batch --pinentry-mode loopback --passphrase '' --quick-gen-key"


def homes(folder: Path) -> Callable[[str], Mapping[str, str]]:
    """A GNUPGHOME for each qube: gpg's usual one would be shared, as it goes by
    the user, not by the qube."""

    def environment(qube: str) -> Mapping[str, str]:
        home = folder / f"gnupg-{qube}"
        home.mkdir(mode=0o700)
        return {"GNUPGHOME": str(home)}

    return environment


def find_sockets(recipe: Recipe, qube: Qube) -> None:
    """gpg looks in /run/user/UID, which is one for all qubes here; a file there
    says where the socket is instead."""
    path = Path(qube.run("gpgconf --list-dirs agent-socket").strip())
    recipe.callback(
        subprocess.run,
        [
            "gpgconf",
            "--homedir",
            qube.environment["GNUPGHOME"],
            "--remove-socketdir",
        ],
    )
    qube.run("gpgconf --create-socketdir", check=False)
    path.write_text(
        f"%Assuan%\nsocket={qube.machine.runtime}/gnupg/S.gpg-agent\n"
    )
