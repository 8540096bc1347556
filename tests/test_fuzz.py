"""Hostile input: everything in fuzz/corpus, a short run of each target, and of
the RPC services. See `make fuzz`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

FUZZ = Path(__file__).resolve().parent.parent / "fuzz"
sys.path.insert(0, str(FUZZ))

from targets import CORPUS, TARGETS  # noqa: E402

import rpc  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Of each target, and of each RPC service; `make fuzz` runs a million, and
#: 100,000.
CASES = 2000
RPC_CASES = 1500


def harness() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("fuzz_run", str(FUZZ / "run"))
    spec = importlib.util.spec_from_loader("fuzz_run", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize("target", TARGETS)
def test_what_was_found_before_stays_mended(target: str) -> None:
    cases = sorted((CORPUS / target).iterdir())
    assert cases
    for case in cases:
        TARGETS[target](case.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
def test_random_input_does_no_harm(target: str) -> None:
    run = harness()
    known = run.corpus(target)
    rng = run.random.Random(20)
    for _ in range(CASES):
        # Not by run.fuzz(): the one that fails is to be seen here.
        TARGETS[target](run.mutated(rng.choice(known), known, rng))


def test_a_target_that_finds_something_keeps_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stumbles(data: bytes) -> None:
        assert b"\xff" not in data

    run = harness()
    monkeypatch.setitem(run.TARGETS, "name", stumbles)
    monkeypatch.setattr(run, "CORPUS", tmp_path)
    assert run.fuzz("name", 1000, 1) > 0
    (kept,) = (tmp_path / "name").iterdir()
    assert b"\xff" in kept.read_bytes()
    assert "AssertionError" in capsys.readouterr().err


@pytest.fixture(scope="module")
def laboratory() -> Iterator[tuple[Path, Path]]:
    if shutil.which("cc") is None:
        pytest.skip("the tracer has to be compiled")
    with rpc.laboratory() as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("service", rpc.SERVICES)
def test_no_argument_reaches_a_command_line_unvalidated(
    laboratory: tuple[Path, Path], service: str
) -> None:
    rng = rpc.random.Random(service)
    happened = {
        rpc.check(service, rpc.random_argument(service, rng), *laboratory)
        for _ in range(RPC_CASES)
    }
    assert happened == {"ran", "refused"}


LOG = "timeout 5 logger -t qubes.ConnectUnix -p daemon.info --"


@pytest.mark.parametrize(
    ("line", "argument"),
    [
        ('socat - "UNIX-CONNECT:$1"', "../../etc"),
        ('logger "$1"', "-f/etc/passwd"),
        (f'{LOG} "$1"', "-f/etc/passwd"),
        (f'{LOG} "unknown caller: refused: $1"', "a\nb"),
        (f'{LOG} "unknown caller: refused: $1"', "/" * 500),
        (f'{LOG} "unknown caller: could not connect to $1"', "a b"),
        (f'{LOG} "unknown caller: refused"; ls', "a b"),
        (f'ls; {LOG} "unknown caller: refused"', "a b"),
        (":", "a b"),
    ],
)
def test_the_tracer_sees_what_is_run(
    laboratory: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    argument: str,
) -> None:
    """A service that trusts its argument is found out, and so is one that runs
    what it need not, or logs what it should not."""
    careless = tmp_path / "qubes.ConnectUnix"
    careless.write_text(f"#!/bin/sh\n{line}\nexit 2\n")
    careless.chmod(0o755)
    monkeypatch.setattr(rpc, "RPC", tmp_path)
    with pytest.raises(AssertionError, match="ran b"):
        rpc.check("qubes.ConnectUnix", argument.encode(), *laboratory)


def test_a_refusal_that_is_logged_as_it_should_be_is_fine(
    laboratory: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    careful = tmp_path / "qubes.ConnectUnix"
    careful.write_text(
        f'#!/bin/sh\n{LOG} "unknown caller: refused: no"\nexit 2\n'
    )
    careful.chmod(0o755)
    monkeypatch.setattr(rpc, "RPC", tmp_path)
    assert rpc.check("qubes.ConnectUnix", b"a b", *laboratory) == "refused"
