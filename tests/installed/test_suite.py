"""The project's own tests in a booted Debian that is newer, by its Python, its
libraries and its systemd: `make check-trixie`, `make check-sid`; half an hour
each."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
from container import SUITES, WANTED, Container

#: In which Debians.
INSIDE = os.environ.get("CHECK_INSIDE", "").split()

pytestmark = pytest.mark.skipif(
    not (WANTED and INSIDE),
    reason="make check-trixie and make check-sid do this",
)

#: What the tests run beside what Debian calls like the Python package.
PACKAGES = (
    "dbus-user-session fish gcc git groff iproute2 libc6-dev make mandoc"
    " python3-hypothesis python3-pytest python3-pytest-xdist shellcheck socat zsh"
)
LIBRARIES = ("trio", "click", "systemd", "jeepney", "psutil")
#: Which tests: what `make check` runs; those of recipes and packages run on a
#: machine, not in there.
CHOSEN = os.environ.get(
    "CHECK_INSIDE_TESTS",
    "-n 2 -m 'not slow' tests --ignore=tests/recipes --ignore=tests/installed",
)


@pytest.mark.parametrize("suite", INSIDE or SUITES)
def test_the_suite_passes(
    suite: str, possible: None, tree: Path, tmp_path: Path
) -> None:
    container = Container(suite, tmp_path)
    libraries = (f"python3-{name}" for name in LIBRARIES)
    container.install([], *PACKAGES.split(), *libraries)
    container.prepare()
    # The tests bring their own.
    container.do(
        "rm /usr/bin/qrexec-client-vm"
        " /etc/systemd/system/multi-user.target.wants/qubes-qrexec-agent.service;"
        # What installs a Debian writes that, debootstrap does not.
        " echo 127.0.0.1 localhost >>/etc/hosts"
    )
    container.put_tree(tree, "root/source")
    # No Debian has it; it is pure Python.
    spec = importlib.util.find_spec("pytest_trio")
    assert spec is not None
    assert spec.origin is not None
    site = Path(spec.origin).parents[1]
    for path in site.glob("pytest_trio*"):
        shutil.copytree(path, container.upper / "root/more" / path.name)
    container.boot(read_only=False)
    try:
        # Interrupted, it says what it has found until then.
        said = container.run(
            "sh",
            "-ec",
            "cd /root/source; PYTHONPATH=/root/more exec"
            f" timeout --signal=INT 5400 python3 -m pytest -q -rfEs {CHOSEN}",
            timeout=5500,
        )
        # What was skipped, and how many passed: `pytest -rP` shows it.
        print(said)
    finally:
        container.shut_down()
