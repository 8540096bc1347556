"""The packages, and whether this machine can try them."""

from __future__ import annotations

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
def first_debs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The packages of version 0.1.0."""
    folder = tmp_path_factory.mktemp("first")
    export_first_release(folder)
    return build(folder, tmp_path_factory.mktemp("first-debs"))
