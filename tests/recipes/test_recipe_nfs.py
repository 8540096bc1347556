"""NFS, in a booted Debian without a network: the server tells two client qubes
apart by their source addresses; one may write, the other may read."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import SERVICE_QUBE, Container
from recipe import Qube, Recipe, require, until

#: The server opens files by handle, which an overlay does not give. What the
#: kernel has of NFS is stood in for: it is no part of what is tried here, and
#: few machines for tests have it. To unmount takes it a while.
MORE = """
mount -t tmpfs none {top}/root/srv
printf '#!/bin/sh\\necho "$@" >/seen/mount\\nexec mount -t tmpfs none "$2"\\n' >{top}/root/usr/sbin/mount.nfs4
printf '#!/bin/sh\\n[ "$1" != /mnt ] || sleep 3\\nexec umount -i "$@"\\n' >{top}/root/usr/sbin/umount.tmpfs
chmod 755 {top}/root/usr/sbin/mount.nfs4 {top}/root/usr/sbin/umount.tmpfs
mkdir -p {top}/root/etc/systemd/system/user@1000.service.d
cat >{top}/root/etc/systemd/system/user@1000.service.d/look.conf <<'END'
[Service]
ExecStop=+/bin/sh -c 'grep " /mnt tmpfs " /proc/mounts >/seen/stop'
END
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the booted system leaves things in."""
    return tmp_path_factory.mktemp("seen")


@pytest.fixture(scope="module")
def booted(
    tmp_path_factory: pytest.TempPathFactory, seen: Path
) -> Iterator[Container]:
    require("nfs", "nfs-cp", "nfs-ls")
    with Container(
        "nfs",
        "nfs",
        tmp_path_factory.mktemp("nfs"),
        SERVICE_QUBE + MORE,
        system="services",
        binds=("/dev/autofs", f"{seen}:/seen"),
    ) as container:
        yield container


@pytest.fixture(scope="module")
def recipe(booted: Container) -> Iterator[Recipe]:
    # The user of a qube, whoever runs this.
    user = {"nfsport=2049": "nfsport=2049&uid=1000&gid=1000"}
    with Recipe("nfs", substitutes=user) as recipe:
        # It is the system of work, too, as far as root has to do there.
        recipe["nfs"].as_root = recipe["work"].as_root = booted.run
        booted.answer_calls(recipe["nfs"])
        recipe.follow("")
        log = "cat /var/log/ganesha/ganesha.log"
        until(
            "the server has started twice, at boot and now",
            lambda: booted.run(log).count("NFS SERVER INITIALIZED") == 2,
        )
        (recipe["work"].machine.home / "letter").write_text("from work\n")
        said = recipe.follow("Reach it")
        assert any(
            "letter" in listing
            for command, listing in said.items()
            if command.startswith("nfs-ls")
        )
        yield recipe


def copy(qube: Qube, one: str, other: str) -> str:
    """What nfs-cp says of it."""
    url = "nfs://127.0.0.1/files/{}?version=4&nfsport=2049"
    words = [
        url.format(word.removeprefix(":")) if word.startswith(":") else word
        for word in (one, other)
    ]
    return qube.run(f"nfs-cp '{words[0]}' '{words[1]}' 2>&1", check=False)


def test_rights_by_qube(booted: Container, recipe: Recipe) -> None:
    work, media = recipe["work"], recipe["media"]
    assert (media.machine.home / "letter").read_text() == "from work\n"
    # That a qube may write is said for work alone.
    copy(work, "letter", ":another")
    assert "NFS4ERR_ROFS" in copy(media, "letter", ":mine")
    assert booted.run("ls /srv/files").split() == ["another", "letter"]


def test_a_qube_cannot_take_the_address_of_another(recipe: Recipe) -> None:
    for caller, address in (("media", "127.0.1.1"), ("work", "127.0.1.2")):
        refused = subprocess.run(
            [
                recipe[caller].machine.client,
                "nfs",
                f"qubes.ConnectTCPBind+2049-{address}",
            ],
            input=b"",
            capture_output=True,
            check=False,
        )
        assert (refused.returncode, refused.stderr) == (
            126,
            b"Request refused\n",
        )


def test_shutdown_with_a_mounted_export(
    booted: Container, recipe: Recipe, seen: Path
) -> None:
    """It is unmounted before that which leads to the server is gone. It ends
    the system, and so comes last."""
    recipe.follow("Mount it")
    assert not (seen / "mount").exists()
    booted.run("ls /mnt")
    source, place, *_, options = (seen / "mount").read_text().split()
    assert (source, place) == ("127.0.0.1:/files", "/mnt")
    assert {"port=2049", "soft"} <= set(options.split(","))
    booted.run("systemctl poweroff")
    until("the system ends", lambda: booted.process.poll() is not None)
    assert (seen / "stop").read_text() == ""
