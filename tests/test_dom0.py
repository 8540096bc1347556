"""The package for dom0: its integration tests, run in a pretend one; and its
policy."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import unittest
from collections.abc import Callable
from unittest import mock

import pytest
from pretend_dom0 import PACKAGE, modules
from scenario import free_port

from qrexec_activate.loopback import policy

TEMPLATE = "debian-13"


def list_tests() -> Callable[[], tuple[type[unittest.TestCase], ...]]:
    """What the entry point names, loaded as dom0's test runner does it."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    ((_, value),) = project["entry-points"][
        "qubes.tests.extra.for_template"
    ].items()
    module, name = value.split(":")
    with (
        mock.patch.dict(sys.modules, modules()),
        mock.patch.object(sys, "path", [str(PACKAGE), *sys.path]),
    ):
        return getattr(importlib.import_module(module), name)


CASES = {
    f"{case.__name__}::{name}": (case, name)
    for case in list_tests()()
    for name in unittest.defaultTestLoader.getTestCaseNames(case)
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_integration_tests_pass_in_a_pretend_dom0(
    case: tuple[type[unittest.TestCase], str],
) -> None:
    base, name = case
    # A class for each template is what the runner makes.
    attributes = {"template": TEMPLATE, "port": free_port()}
    test = type(f"{base.__name__}_{TEMPLATE}", (base,), attributes)(name)
    result = unittest.TestResult()
    test.run(result)
    problems = [*result.errors, *result.failures, *result.skipped]
    assert not problems, "\n".join(text for _, text in problems)
    assert result.testsRun == 1


# ----------------------------------------------------------------------- policy

(POLICY,) = PACKAGE.glob("*.policy")
EXAMPLE = PACKAGE.parent / "examples/policy.d/30-qrexec-activate.policy"
QUBES = ("client", "work", "gitweb", "vault", "nfs", "dvm")

Reader = Callable[[str, str, str], str]


def by_loopback(text: str, call: str, target: str) -> str:
    service, argument = call.split("+")
    decision = policy.decide(
        policy.parse(text),
        service,
        argument,
        "client",
        target,
        QUBES.__contains__,
    )
    if decision.action != "refuse":
        return decision.action
    return "denied" if " denies it" in decision.reason else decision.reason


def by_qrexec(text: str, call: str, target: str) -> str:
    parser = pytest.importorskip(
        "qrexec.policy.parser", reason="qrexec's own parser is not installed"
    )
    domains = {
        name: {
            "tags": [],
            "type": "AppVM",
            "default_dispvm": "dvm",
            "template_for_dispvms": name == "dvm",
            "power_state": "Running",
            "uuid": f"c9024a97-9b15-46cc-8341-{number:012}",
        }
        for number, name in enumerate(QUBES, 1)
    }
    service, argument = call.split("+")
    request = parser.Request(
        service,
        f"+{argument}",
        "client",
        target,
        system_info={"domains": domains},
    )
    try:
        resolution = parser.StringPolicy(policy={"__main__": text}).evaluate(
            request
        )
    except parser.AccessDenied as error:
        denied = str(error).startswith("denied by policy")
        return "denied" if denied else str(error)
    return "ask" if isinstance(resolution, parser.AskResolution) else "allow"


readers = pytest.mark.parametrize("read", [by_loopback, by_qrexec])


@readers
def test_the_policy_denies_what_comes_with_these_packages(read: Reader) -> None:
    text = POLICY.read_text()
    for target in ("work", "@default", "@dispvm", "@dispvm:dvm"):
        for call in (
            "qubes.ConnectUnix+keys",
            "qubes.ConnectTCPBind+80-127.0.1.1",
        ):
            assert read(text, call, target) == "denied"


@readers
def test_the_policy_leaves_the_services_of_qubes_alone(read: Reader) -> None:
    rest = "* * @anyvm @anyvm ask default_target=work\n"
    for call in ("qubes.ConnectTCP+80", "qubes.Filecopy+"):
        assert read(POLICY.read_text() + rest, call, "work") == "ask"


def test_the_policy_comes_after_all_that_a_person_or_salt_writes() -> None:
    salt = (PACKAGE.parent / "salt/qrexec-activate/policy.sls").read_text()
    (written,) = re.findall(r"[^/\s]+\.policy", salt)
    # Files count in the order of their names, of which qrexec takes no others.
    names = [written, EXAMPLE.name, "30-user.policy", "50-config.policy"]
    assert all(name < POLICY.name for name in names)
    assert re.fullmatch(r"[a-z0-9_.-]+\.policy", POLICY.name)


@readers
def test_the_example_allows_what_it_says_and_no_more(read: Reader) -> None:
    later = "qubes.ConnectTCP +80 client work allow\n"
    text = EXAMPLE.read_text() + later + POLICY.read_text()
    assert read(text, "qubes.ConnectTCP+80", "work") == "allow"
    assert read(text, "qubes.ConnectTCP+1234", "gitweb") == "allow"
    assert read(text, "qubes.ConnectTCP+1234", "work") == "ask"
    assert read(text, "qubes.ConnectTCPBind+2049-127.0.1.1", "nfs") == "allow"
    assert read(text, "qubes.ConnectTCPBind+2049-127.0.1.2", "nfs") == "denied"
    assert read(text, "qubes.ConnectUnix+gpg-agent-ssh", "vault") == "denied"


# ------------------------------------------------------------ qvm-connect-route


def test_the_manual_page_of_the_tool_knows_all_its_options() -> None:
    page = (PACKAGE / "qvm-connect-route.1").read_text().replace("\\-", "-")
    source = PACKAGE / "qrexec_activate_dom0/connect_route.py"
    parser = source.read_text().split("def _parser()")[1].split("# -----")[0]
    options = re.findall(r'"(--[a-z-]+|-[a-z])"', parser)
    assert len(options) > 5
    for option in options:
        assert re.search(rf"[ (]{option}\b", page), option
    for name in re.findall(r"/etc/qubes/policy\.d/(\S+)", page):
        assert f'"{name}"' in source.with_name("policyfile.py").read_text()


@pytest.mark.skipif(
    shutil.which("groff") is None,
    reason="groff is not installed: tools/packages-setup",
)
def test_the_manual_page_of_the_tool_is_without_a_warning() -> None:
    page = PACKAGE / "qvm-connect-route.1"
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", page],
        capture_output=True,
        check=True,
    )
    assert not done.stderr


def test_what_the_tool_shares_with_the_qubes_is_the_same_file() -> None:
    package = PACKAGE / "qrexec_activate_dom0"
    links = [path for path in package.rglob("*.py") if path.is_symlink()]
    assert len(links) > 5
    for path in links:
        assert PACKAGE.parent / "qrexec_activate" in path.resolve().parents


def test_the_wheel_has_all_packages_of_the_tool() -> None:
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())
    folders = {
        ".".join(path.parent.relative_to(PACKAGE).parts)
        for path in PACKAGE.rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == folders


def test_policy_of_the_tool_comes_after_a_persons_and_before_what_denies() -> (
    None
):
    source = PACKAGE / "qrexec_activate_dom0/policyfile.py"
    (name,) = re.findall(r'^NAME = "(.*)"$', source.read_text(), re.MULTILINE)
    assert "30-user.policy" < name < "50-config.policy" < POLICY.name
