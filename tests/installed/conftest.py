"""The packages, and whether this machine can try them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from container import give_up, why_impossible
from debs import UPGRADE, build, export, export_first_release


@pytest.fixture(scope="session")
def possible() -> None:
    if problem := why_impossible():
        give_up(problem)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    export(folder)
    return folder


@pytest.fixture(scope="session")
def debs(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tree, tmp_path_factory.mktemp("debs"))


@pytest.fixture(scope="session")
def newer_debs(
    tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    return build(tree, tmp_path_factory.mktemp("newer"), UPGRADE)


@pytest.fixture(scope="session")
def first_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of version 0.1.0."""
    folder = tmp_path_factory.mktemp("first")
    export_first_release(folder)
    return folder


@pytest.fixture(scope="session")
def first_debs(
    first_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    return build(first_tree, tmp_path_factory.mktemp("first-debs"))


def build_rpms(tree: Path, folder: Path) -> Path:
    subprocess.run([tree / "tools/build-rpm", folder], check=True, timeout=600)
    return folder


@pytest.fixture(scope="session")
def rpms(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_rpms(tree, tmp_path_factory.mktemp("rpms"))


@pytest.fixture(scope="session")
def first_rpms(
    first_tree: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The RPMs of version 0.1.0."""
    return build_rpms(first_tree, tmp_path_factory.mktemp("first-rpms"))
