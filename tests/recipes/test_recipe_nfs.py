"""NFS: the server tells two client qubes apart by their source addresses; one
may write, the other may read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from recipe import Recipe, listens, require, until, which

NEEDS_ROOT = "nfs-ganesha opens files by handle"


def test_rights_by_qube(tmp_path: Path) -> None:
    require("nfs", "ganesha.nfsd", "nfs-cp", "nfs-ls", root=NEEDS_ROOT)
    files = tmp_path / "files"
    files.mkdir()
    (tmp_path / "recovery").mkdir()
    Path("/var/run/ganesha").mkdir(exist_ok=True)
    with Recipe("nfs", substitutes={"/srv/files": str(files)}) as recipe:
        server, work, media = recipe["nfs"], recipe["work"], recipe["media"]
        config = server.etc / "ganesha" / "ganesha.conf"
        text = config.read_text()
        # What it notes for its next start belongs into the test's own folder.
        here = (
            f"Graceless = true;\n    RecoveryBackend = fs;\n    RecoveryRoot"
            f" = {tmp_path}/recovery;"
        )
        assert "Graceless = true;" in text
        config.write_text(text.replace("Graceless = true;", here))
        log = tmp_path / "log"
        argv = [
            which("ganesha.nfsd"),
            "-F",
            "-f",
            config,
            "-L",
            log,
            "-p",
            tmp_path / "pid",
        ]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as ganesha:
            recipe.callback(ganesha.kill)
            until(
                "the server answers or ends",
                lambda: (
                    listens((server.host, 2049)) or ganesha.poll() is not None
                ),
            )
            until(
                "the server is ready",
                lambda: "NFS SERVER INITIALIZED" in log.read_text(),
            )
            if "No export entries" in log.read_text():
                pytest.skip(
                    f"recipe nfs: files in {tmp_path} cannot be opened by"
                    f" handle"
                )
            (work.machine.home / "letter").write_text("from work\n")
            said = recipe.follow("Reach it")
            assert any(
                "letter" in listing
                for command, listing in said.items()
                if command.startswith("nfs-ls")
            )
            assert (media.machine.home / "letter").read_text() == "from work\n"
            refused = media.run(
                "nfs-cp letter"
                " 'nfs://127.0.0.1/files/mine?version=4&nfsport=2049' 2>&1",
                check=False,
            )
            assert "NFS4ERR_ROFS" in refused
            assert [path.name for path in files.iterdir()] == ["letter"]
            ganesha.kill()


def test_a_qube_cannot_take_the_address_of_another() -> None:
    with Recipe("nfs") as recipe:
        call = [
            recipe["media"].machine.client,
            "nfs",
            "qubes.ConnectTCPBind+2049-127.0.1.1",
        ]
        refused = subprocess.run(
            call, input=b"", capture_output=True, check=False
        )
        assert (refused.returncode, refused.stderr) == (
            126,
            b"Request refused\n",
        )
