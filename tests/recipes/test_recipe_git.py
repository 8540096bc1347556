"""git: 100 MiB are pushed, cloned, added to and fetched, by git's daemon, by
ssh and by HTTP; gitweb shows them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe import Qube, Recipe, forwards_nothing, require

MEBIBYTES = 100
#: Seconds for what moves them, on a busy machine.
LONG = 600
AUTHOR = ["-c", "user.name=Me", "-c", "user.email=me@work"]
QUICKLY = [
    "-c",
    "core.compression=0",
    "-c",
    "core.bigFileThreshold=1m",
    "-c",
    "user.name=Me",
    "-c",
    "user.email=me@work",
]
PROGRAMS = (
    "git",
    "curl",
    "ssh",
    "ssh-keygen",
    "sshd",
    "lighttpd",
    "/usr/share/gitweb/index.cgi",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of 100 MiB that do not compress, with one commit."""
    require("git", *PROGRAMS)
    folder = tmp_path_factory.mktemp("source")
    for number in range(MEBIBYTES // 10):
        (folder / f"file{number}").write_bytes(os.urandom(10 << 20))
    for command in ("init -q -b main", "add --all", "commit -q -m Lots"):
        subprocess.run(
            ["git", *QUICKLY, *command.split()], cwd=folder, check=True
        )
    return folder


@pytest.fixture
def recipe(source: Path) -> Iterator[Recipe]:
    with Recipe("git") as recipe:
        code, work = recipe["code"], recipe["work"]
        work.environment["GIT_SSH_COMMAND"] = f"ssh {code.let_in(work)}"
        recipe.follow("")
        yield recipe


def exchange(work: Qube, clone: str, source: Path) -> None:
    """Push 100 MiB, clone them, and push back what the first then fetches."""
    quickly = " ".join(QUICKLY)
    url = work.run(f"git -C {clone} remote get-url origin").strip()
    work.run(f"git {quickly} -C {source} push -q {url} main", timeout=LONG)
    # git itself looks whether every object is what its name, a hash of all that
    # is in it, says.
    work.run(
        f"git clone -q --no-checkout -b main {url} {clone}-again", timeout=LONG
    )
    pushed = work.run(f"git -C {source} rev-parse HEAD")
    assert work.run(f"git -C {clone}-again rev-parse HEAD") == pushed
    assert "size-pack: 100.0" in work.run(
        f"git -C {clone}-again count-objects -vH"
    )
    work.run(
        f"cd {clone}-again && git {quickly} commit -q --allow-empty -m 'And"
        f" more' && git push -q origin main",
        timeout=LONG,
    )
    work.run(f"git -C {clone} fetch -q origin", timeout=LONG)
    new = work.run(f"git -C {clone}-again rev-parse HEAD")
    assert work.run(f"git -C {clone} rev-parse origin/main") == new != pushed


WAYS = {
    "git's daemon": "by-daemon",
    "ssh": "by-ssh",
    "HTTP, with gitweb": "by-http",
}


@pytest.mark.limit(1800)
@pytest.mark.parametrize("section", WAYS)
def test_push_clone_and_fetch(
    recipe: Recipe, source: Path, section: str
) -> None:
    clone = WAYS[section]
    said = recipe.follow(section)
    if clone == "by-ssh":
        command = recipe["work"].environment["GIT_SSH_COMMAND"]
        forwards_nothing(recipe["work"], command.removeprefix("ssh "))
    exchange(recipe["work"], clone, source)
    if clone == "by-http":
        page = next(
            text for command, text in said.items() if command.startswith("curl")
        )
        assert "Repositories in code" in page
        assert "project.git" in page
        summary = recipe["work"].run(
            "curl -sSf 'http://127.0.0.1:1234/?p=project.git;a=shortlog;h=main'"
        )
        assert "Lots" in summary
        assert "And more" in summary
