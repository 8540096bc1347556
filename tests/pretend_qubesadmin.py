"""qubesadmin and qrexec's policy, as far as qvm-connect-route uses them, over a
folder: qubes, their features and policy are files there.

What qubesd refuses is refused here, and it can be told to fail or to wait. As a
program, `FOLDER WORD...`, it runs the tool.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from qrexec_activate.loopback import policy  # noqa: E402

PACKAGE = "qrexec_activate_dom0"


class QubesException(Exception):
    """A problem that qubesd reports."""


class Parser(argparse.ArgumentParser):
    """What the parser of the qvm- tools adds: the app, and an error without a
    usage."""

    def __init__(self, version: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_argument("--verbose", "-v", action="count")
        self.add_argument("--quiet", "-q", action="count")
        self.add_argument("--version", action="version", version=version or "-")

    def parse_args(self, *args: Any, app: Any = None, **kwargs: Any) -> Any:
        options = super().parse_args(*args, **kwargs)
        options.app = app
        return options

    def error_runtime(self, message: object, exit_code: int = 1) -> None:
        self.exit(exit_code, f"{self.prog}: error: {message}\n")


class Features:
    """The features of a qube, a file each."""

    def __init__(self, folder: Path, faults: Path) -> None:
        self._folder = folder
        self._faults = faults

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name for path in self._folder.iterdir()))

    def __getitem__(self, name: str) -> str:
        try:
            return (self._folder / name).read_text()
        except FileNotFoundError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: str) -> None:
        self._fault("set")
        if not re.fullmatch(r"[a-zA-Z0-9_.-]+", name):
            raise QubesException("feature name contains illegal characters")
        if not re.fullmatch(r"[\x20-\x7E]*", value):
            raise QubesException(f"{name} value contains illegal characters")
        (self._folder / name).write_text(value)
        # As qubesd does: it is set when the extension complains.
        short = name.removeprefix("vm-config.")
        if short != name and (len(short) > 52 or not short[0].isalpha()):
            raise QubesException("VM config name must not exceed 52 bytes")
        self._fault("set-done")

    def __delitem__(self, name: str) -> None:
        self._fault("delete")
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            raise KeyError(name) from None
        self._fault("delete-done")

    def _fault(self, moment: str) -> None:
        """Fail once, where a file of that name is, or wait for it to go."""
        fault = self._faults / moment
        if fault.exists() and fault.read_text() == "wait":
            fault.with_suffix(".reached").touch()
            while fault.exists():
                time.sleep(0.01)
        elif fault.exists():
            words = fault.read_text()
            if not words.startswith("always"):
                fault.unlink()
            raise QubesException(words)


class Qube:
    def __init__(self, app: App, name: str) -> None:
        folder = app.folder / "qubes" / name
        about = json.loads((folder / "about").read_text())
        self.name = name
        self.klass = about.pop("klass", "AppVM")
        self.tags = about.pop("tags", [])
        self.default_dispvm = about.pop("default_dispvm", None)
        for key, value in about.items():
            setattr(self, key, value)
        self.features = Features(folder / "features", app.folder / "faults")


class Domains:
    def __init__(self, app: App) -> None:
        self._app = app

    def _names(self) -> list[str]:
        folder = self._app.folder / "qubes"
        return sorted(path.name for path in folder.iterdir())

    def __iter__(self) -> Iterator[Qube]:
        return (Qube(self._app, name) for name in self._names())

    def __contains__(self, name: str) -> bool:
        return name in self._names()

    def __getitem__(self, name: str) -> Qube:
        if name not in self:
            raise KeyError(name)
        return Qube(self._app, name)

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except KeyError:
            return default


class App:
    """qubesd; a folder for each qube, beside policy.d."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = folder / "policy.d"
        for name in ("qubes", "policy.d", "faults", "run"):
            (folder / name).mkdir(exist_ok=True)
        self.domains = Domains(self)

    def make(self, name: str, **about: Any) -> None:
        folder = self.folder / "qubes" / name
        (folder / "features").mkdir(parents=True)
        (folder / "about").write_text(json.dumps(about))

    def features(self, name: str) -> dict[str, str]:
        folder = self.folder / "qubes" / name / "features"
        return {path.name: path.read_text() for path in folder.iterdir()}

    def set(self, name: str, feature: str, value: str) -> None:
        (self.folder / "qubes" / name / "features" / feature).write_text(value)


# ------------------------------------------------------------------- of qrexec


class AccessDenied(Exception):
    pass


class Request:
    def __init__(
        self, service: str, argument: str, source: str, target: str, **info: Any
    ) -> None:
        assert argument.startswith("+")
        self.words = (service, argument[1:], source, target)
        self.tags = info["system_info"]["domains"][source]["tags"]


def read(path: Path, text: str) -> Iterator[Any]:
    """The rules of a file; sources may be tags."""
    tags = re.findall(r"^(?!#).* (@tag:\S+)", text, re.MULTILINE)
    try:
        rules = policy.parse(re.sub(r"@tag:\S+", "@anyvm", text))
    except policy.PolicyError as error:
        raise AccessDenied(f"{path}: {error}") from None
    for rule in rules:
        line = text.split("\n")[rule.line - 1]
        (tag,) = [tag for tag in tags if f" {tag} " in line] or [""]
        action = type(rule.action.capitalize(), (), {})()
        yield types.SimpleNamespace(
            filepath=path, lineno=rule.line, rule=rule, tag=tag, action=action
        )


class FilePolicy:
    folder: Path

    def __init__(self) -> None:
        self._rules = [
            rule
            for path in sorted(self.folder.glob("*.policy"))
            if not path.name.startswith(".")
            for rule in read(path, path.read_text())
        ]

    def find_matching_rule(self, request: Request) -> Any:
        for one in self._rules:
            wanted = one.tag.removeprefix("@tag:")
            if one.rule.matches(*request.words) and (
                not wanted or wanted in request.tags
            ):
                return one
        raise AccessDenied("no matching rule found")


def validate(*, policy_path: Path, overrides: dict[Path, str | None]) -> None:
    for path in policy_path.glob("*.policy"):
        assert "!" not in path.name
        if path not in overrides and not path.name.startswith("."):
            list(read(path, path.read_text()))
    for path, text in overrides.items():
        list(read(path, text or ""))


def pretend_qubesadmin() -> dict[str, types.ModuleType]:
    found = _modules("qubesadmin", "qubesadmin.exc", "qubesadmin.tools")
    vars(found["qubesadmin.exc"])["QubesException"] = QubesException
    vars(found["qubesadmin.tools"])["QubesArgumentParser"] = Parser
    return found


def pretend_qrexec(app: App) -> dict[str, types.ModuleType]:
    found = _modules(
        "qrexec", "qrexec.exc", "qrexec.policy", "qrexec.policy.parser"
    )
    vars(found["qrexec"])["POLICYPATH"] = app.policy
    vars(found["qrexec.exc"])["AccessDenied"] = AccessDenied
    vars(found["qrexec.policy.parser"]).update(
        ValidateParser=validate,
        FilePolicy=type("FilePolicy", (FilePolicy,), {"folder": app.policy}),
        Request=Request,
    )
    return found


def genuine_qrexec(app: App) -> dict[str, types.ModuleType]:
    """The one that is installed, with the folder for its policy."""
    parser: Any = importlib.import_module("qrexec.policy.parser")
    qrexec: Any = sys.modules["qrexec"]
    qrexec.POLICYPATH = parser.POLICYPATH = app.policy
    parser.RUNTIME_POLICY_PATH = app.folder / "run"
    # Before 4.3 it was bound as the class was made.
    defaults = parser.FilePolicy.__init__.__kwdefaults__
    if defaults["policy_path"] is not None:
        defaults["policy_path"] = app.policy
    return {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "qrexec"
    }


def _modules(*names: str) -> dict[str, types.ModuleType]:
    found = {name: types.ModuleType(name) for name in names}
    for name, module in found.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(found[parent], own, module)
    return found


def load(name: str, modules: dict[str, types.ModuleType]) -> Any:
    """A module of the package for dom0, over these."""
    mine = {key: None for key in sys.modules if key.startswith(PACKAGE)}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(sys, "path", [str(ROOT / "dom0"), *sys.path]),
    ):
        for key in mine:
            del sys.modules[key]
        return importlib.import_module(f"{PACKAGE}.{name}")


if __name__ == "__main__":
    the_app = App(Path(sys.argv[1]))
    tool = load("connect_route", pretend_qubesadmin() | pretend_qrexec(the_app))
    sys.exit(tool.main(sys.argv[2:], app=the_app))
