"""The Salt formula, applied with salt-call to its own example pillar: in an app
qube, a template and dom0."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from container import CACHE, ROOT, WANTED

from qrexec_activate.loopback import policy

pytestmark = pytest.mark.skipif(
    not WANTED, reason="make check-installed does this"
)

FORMULA = ROOT / "salt"
EXAMPLE = FORMULA / "qrexec-activate/pillar.example"


class Minion:
    """A qube as Salt sees it: a name, a kind, and the pillar."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.policies = folder / "policy.d"
        self.user = getpass.getuser()
        for name in ("pillar", "conf", "root", "policy.d"):
            (folder / name).mkdir()
        (folder / "pillar/top.sls").write_text(
            "base:\n  '*': [qrexec-activate, kind]\n"
        )
        self.pillar(EXAMPLE.read_text())
        roots = {
            "file_roots": {"base": [str(FORMULA)]},
            "pillar_roots": {"base": [str(folder / "pillar")]},
        }
        conf = {
            "file_client": "local",
            "root_dir": str(folder / "root"),
            "log_level": "error",
            **roots,
        }
        (folder / "conf/minion").write_text(json.dumps(conf))

    def pillar(self, text: str) -> None:
        """The pillar of the example, for a home and a policy folder in
        scratch."""
        places = (
            f"  user: {self.user}\n  home: {self.home}\n  policy_dir:"
            f" {self.policies}\n"
        )
        (self.folder / "pillar/qrexec-activate.sls").write_text(
            text.replace(
                "\nqrexec-activate:\n", f"\nqrexec-activate:\n{places}"
            )
        )

    def call(
        self, name: str, kind: str, *arguments: str, check: bool = True
    ) -> Any:
        (self.folder / "pillar/kind.sls").write_text(
            f"qubes: {{type: {kind}}}\n"
        )
        command = [
            CACHE / "salt/bin/salt-call",
            "--local",
            "--out=json",
            f"--config-dir={self.folder / 'conf'}",
        ]
        done = subprocess.run(
            [*command, f"--id={name}", "--retcode-passthrough", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder),
                "LC_ALL": "C.UTF-8",
            },
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return json.loads(done.stdout)["local"]

    def apply(self, name: str, kind: str) -> dict[str, Any]:
        """Apply the formula; what was changed."""
        results = self.call(name, kind, "state.apply", "qrexec-activate")
        return {
            key: value["changes"]
            for key, value in results.items()
            if value["changes"]
        }

    def try_to_apply(self, name: str, kind: str) -> None:
        """Apply the formula as far as it goes."""
        self.call(name, kind, "state.apply", "qrexec-activate", check=False)

    def units(self) -> dict[str, str]:
        """What a user's manager finds: drop-ins and their text, links and where
        they lead."""
        top = self.home / ".config/systemd/user"
        return {
            str(path.relative_to(top)): os.readlink(path)
            if path.is_symlink()
            else path.read_text()
            for path in sorted(top.glob("**/*"))
            if path.is_symlink() or path.is_file()
        }


@pytest.fixture
def minion(tmp_path: Path) -> Minion:
    return Minion(tmp_path)


def test_an_app_qube_gets_its_drop_ins_enabled(minion: Minion) -> None:
    assert minion.apply("work", "app")
    link = "/usr/lib/systemd/user/qrexec-connect-"
    assert minion.units() == {
        "qrexec-connect-tcp@1234.socket.d/gitweb.conf": (
            "[Socket]\nListenStream=127.0.0.1:1234\nFileDescriptorName=gitweb\n"
        ),
        "qrexec-connect-tcp@8118.socket.d/proxy.conf": (
            "[Socket]\nListenStream=127.0.0.1:8118\nFileDescriptorName=@dispvm\\x3aproxy-dvm\n"
        ),
        "qrexec-connect-tcp-bind@2049-127.0.1.1.socket.d/nfs.conf": (
            "[Socket]\nListenStream=127.0.0.1:2049\nFileDescriptorName=nfs\n"
        ),
        "qrexec-connect-unix@gpg-agent-ssh.socket.d/keys.conf": (
            "[Socket]\nListenStream=%t/qrexec/gpg-agent-ssh\nFileDescriptorName=@default\n"
        ),
        "sockets.target.wants/qrexec-connect-tcp@1234.socket": f"{link}tcp@.socket",
        "sockets.target.wants/qrexec-connect-tcp@8118.socket": f"{link}tcp@.socket",
        "sockets.target.wants/qrexec-connect-tcp-bind@2049-127.0.1.1.socket": f"{link}tcp-bind@.socket",
        "sockets.target.wants/qrexec-connect-unix@gpg-agent-ssh.socket": f"{link}unix@.socket",
    }


def test_what_is_right_is_not_touched(minion: Minion) -> None:
    minion.apply("work", "app")
    assert minion.apply("work", "app") == {}


def test_thirty_routes_are_there_at_once(minion: Minion) -> None:
    routes = "".join(
        f"    r{number}:\n      client: work\n      listen: 127.0.7.{number}:80\n"
        "      rpc: qubes.ConnectTCP\n      argument: 80\n"
        f"      target: qube{number}\n"
        for number in range(1, 31)
    )
    minion.pillar(f"\nqrexec-activate:\n  routes:\n{routes}")
    minion.apply("work", "app")
    assert len(minion.units()) == 31
    assert minion.apply("work", "app") == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="Salt has to be root for that")
def test_root_follows_no_link_of_a_user(minion: Minion) -> None:
    forbidden = minion.folder / "cron.d"
    forbidden.mkdir(mode=0o755)
    own = minion.home / ".config/systemd/user"
    own.mkdir(parents=True)
    (own / "qrexec-connect-tcp@1234.socket.d").symlink_to(forbidden)
    # pytest keeps its folders to itself.
    for path in [minion.folder, *minion.folder.parents]:
        if Path(tempfile.gettempdir()) in path.parents:
            path.chmod(0o755)
    subprocess.run(["chown", "-R", "daemon", minion.home], check=True)
    minion.user = "daemon"
    minion.pillar(EXAMPLE.read_text())
    minion.try_to_apply("work", "app")
    assert not list(forbidden.iterdir())
    other = own / "qrexec-connect-tcp@8118.socket.d/proxy.conf"
    assert other.owner() == "daemon"


def test_a_route_that_is_absent_goes(minion: Minion) -> None:
    minion.apply("work", "app")
    minion.pillar(
        EXAMPLE.read_text().replace(
            "target: nfs\n", "target: nfs\n      absent: true\n"
        )
    )
    minion.apply("work", "app")
    assert not [name for name in minion.units() if "2049" in name]
    assert len(minion.units()) == 6


def test_other_qubes_get_nothing(minion: Minion) -> None:
    assert minion.apply("personal", "app") == {}


def route(name: str, client: str, address: str, target: str) -> str:
    return (
        f"    {name}: {{client: {client}, listen: '{address}',"
        f" rpc: qubes.ConnectTCP, argument: 1234, target: {target}}}\n"
    )


def test_each_qube_gets_its_own_routes_of_its_own_pillar(
    minion: Minion,
) -> None:
    common = route("wiki", "work", "127.0.0.2:1234", "library")
    common += route("news", "personal", "127.0.0.2:1234", "papers")
    minion.pillar(f"\nqrexec-activate:\n  routes:\n{common}")
    # One name and one address in both pillars; and what is another's in each.
    pillars = {
        "work": route("server", "work", "127.0.0.1:1234", "gitweb")
        + route("strange", "personal", "127.0.0.3:1234", "vault"),
        "personal": route("server", "personal", "127.0.0.1:1234", "mail"),
    }
    top = "base:\n  '*': [qrexec-activate, kind]\n"
    for name, routes in pillars.items():
        top += f"  {name}: [{name}]\n"
        home = minion.folder / name
        (minion.folder / f"pillar/{name}.sls").write_text(
            f"qrexec-activate:\n  home: {home}\n  routes:\n{routes}"
        )
    (minion.folder / "pillar/top.sls").write_text(top)

    def found(name: str) -> dict[str, str]:
        minion.home = minion.folder / name
        return minion.units()

    folder = "qrexec-connect-tcp@1234.socket.d"
    link = "/usr/lib/systemd/user/qrexec-connect-tcp@.socket"
    enabled = {"sockets.target.wants/qrexec-connect-tcp@1234.socket": link}
    text = "[Socket]\nListenStream=127.0.0.{}:1234\nFileDescriptorName={}\n"
    for name in pillars:
        minion.apply(name, "app")
    assert found("work") == enabled | {
        f"{folder}/server.conf": text.format(1, "gitweb"),
        f"{folder}/wiki.conf": text.format(2, "library"),
    }
    assert found("personal") == enabled | {
        f"{folder}/server.conf": text.format(1, "mail"),
        f"{folder}/news.conf": text.format(2, "papers"),
    }


def test_dom0_gets_a_policy_that_allows_these_calls_only(
    minion: Minion,
) -> None:
    minion.apply("dom0", "admin")
    text = (minion.policies / "31-qrexec-activate.policy").read_text()
    assert text.splitlines()[1:] == [
        "qubes.ConnectTCP +1234 work gitweb allow",
        "qubes.ConnectUnix +gpg-agent-ssh work @default allow target=vault",
        "qubes.ConnectTCPBind +2049-127.0.1.1 work nfs allow",
        "qubes.ConnectTCP +8118 work @dispvm:proxy-dvm ask",
    ]
    policy.parse(text)


def test_a_template_gets_its_packages(minion: Minion) -> None:
    # Shown, and not applied: the package manager is that of the machine that
    # runs the tests.
    states = minion.call(
        "debian-13", "template", "state.show_sls", "qrexec-activate"
    )
    (packages,) = [state["pkg"] for state in states.values() if "pkg" in state]
    assert {"pkgs": ["qrexec-activate", "qrexec-activate-services"]} in packages
    assert "installed" in packages


def test_what_dom0_gets_is_enabled_by_its_two_top_files(minion: Minion) -> None:
    dom0 = minion.folder / "dom0"
    subprocess.run(
        ["make", "install-dom0-salt", f"DESTDIR={dom0}"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    formula = dom0 / "srv/formulas/base/qrexec-activate-formula"
    pillar = dom0 / "srv/pillar/base"
    # `qubesctl top.enable qrexec-activate`, and once more with pillar=true.
    for folder, top in (
        ("salt", formula / "qrexec-activate/init.top"),
        ("pillar", pillar / "qrexec-activate/init.top"),
    ):
        (dom0 / folder).mkdir()
        (dom0 / folder / "top.sls").write_text(top.read_text())
    conf = json.loads((minion.folder / "conf/minion").read_text())
    roots = {
        "file_roots": {"base": [str(dom0 / "salt"), str(formula)]},
        "pillar_roots": {"base": [str(dom0 / "pillar"), str(pillar)]},
    }
    (minion.folder / "conf/minion").write_text(json.dumps({**conf, **roots}))

    # As it comes, it has no routes.
    minion.call("work", "app", "state.highstate")
    assert minion.units() == {}
    (pillar / "qrexec-activate/init.sls").write_text(
        (minion.folder / "pillar/qrexec-activate.sls").read_text()
    )
    minion.call("work", "app", "state.highstate")
    assert len(minion.units()) == 8
    again = minion.call("work", "app", "state.highstate")
    assert not [one for one in again.values() if one["changes"]]
