"""The API of Podman in another qube: it starts with the first call, and answers
Podman itself and who speaks Docker's."""

from __future__ import annotations

import json
import subprocess

from recipe import Recipe, require

NEEDS_ROOT = "this machine's Podman belongs to root"


def test_podman_and_docker() -> None:
    require("container-api", "podman", "curl", root=NEEDS_ROOT)
    with Recipe("container-api") as recipe:
        engine, work = recipe["engine"], recipe["work"]
        engine.vendor_units("podman.socket", "podman.service")
        recipe.follow("The engine")
        said = recipe.follow("Command it")
        here = subprocess.run(
            ["podman", "version", "--format", "{{.Client.Version}}"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        by_podman, by_docker = (text for text in said.values() if text)
        assert by_podman.strip() == here
        assert json.loads(by_docker)["Version"] == here
        for name in ("CONTAINER_HOST", "DOCKER_HOST"):
            assert work.environment[name] == (
                f"unix://{work.machine.runtime}/qrexec/podman"
            )
        calls = (work.machine.loopback / "calls").read_text()
        assert calls.count('"resolved": "engine"') >= 2
