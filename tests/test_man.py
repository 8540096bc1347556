"""The manual pages: complete, without a warning, and with the words of
--help."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from qrexec_activate.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    "qrexec-activate-serve.8",
    "qrexec-activate.1",
    "qrexec-connect@.socket.5",
    "qubes.ConnectTCPBind.8",
    "qubes.ConnectUnix.8",
]


def page_of(name: str) -> str:
    """Where a command is described."""
    if not name:
        return "qrexec-activate.1"
    section = 8 if name == "serve" else 1
    return f"qrexec-activate-{name}.{section}"


with click.Context(cli) as _ctx:
    PAGES = sorted({*PAGES, *map(page_of, cli.list_commands(_ctx))})
#: No line of an option is broken.
WIDTH = "4000"

# One without roff is a machine for something else; `make check-installed`
# brings it.
needs_man = pytest.mark.skipif(
    shutil.which("groff") is None,
    reason="groff is not installed: tools/packages-setup",
)


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("man")
    # With the Python that runs this, so that the words are those of the same
    # version of click.
    subprocess.run([sys.executable, ROOT / "tools/man", folder], check=True)
    return folder


def rendered(page: Path) -> str:
    done = subprocess.run(
        [
            "groff",
            "-man",
            "-Tutf8",
            "-Kutf8",
            "-ww",
            "-rHY=0",
            f"-rLL={WIDTH}n",
            "-P-cbou",
            page,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "", page
    return (
        " ".join(done.stdout.split())
        .replace("\N{HYPHEN}", "-")
        .replace("\N{MINUS SIGN}", "-")
    )


def test_every_page_is_there(pages: Path) -> None:
    assert sorted(path.name for path in pages.iterdir()) == PAGES


@needs_man
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_shown_without_a_warning(pages: Path, name: str) -> None:
    text = rendered(pages / name)
    for heading in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "SEE ALSO"):
        assert heading in text


@pytest.mark.skipif(
    shutil.which("mandoc") is None,
    reason="mandoc is not installed: tools/packages-setup",
)
@pytest.mark.parametrize("name", PAGES)
def test_mandoc_has_nothing_to_say(pages: Path, name: str) -> None:
    subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", pages / name], check=True
    )


def every_option() -> Iterator[tuple[str, str, str, str]]:
    """Page, command, option and what --help says of it."""
    with click.Context(
        cli, info_name="qrexec-activate", **cli.context_settings
    ) as group:
        for name in ("", *cli.list_commands(group)):
            command = cli.get_command(group, name) if name else cli
            assert command is not None
            settings = command.context_settings
            with click.Context(
                command,
                info_name=name,
                parent=group if name else None,
                **settings,
            ) as ctx:
                for parameter in command.get_params(ctx):
                    if record := parameter.get_help_record(ctx):
                        yield (
                            page_of(name),
                            name,
                            record[0],
                            " ".join(record[1].split()),
                        )


@needs_man
def test_the_pages_have_every_option_in_the_words_of_help(pages: Path) -> None:
    texts = {
        page: rendered(pages / page)
        for page in {option[0] for option in every_option()}
    }
    missing = [
        option
        for option in every_option()
        if f"{option[2]} {option[3]}" not in texts[option[0]]
    ]
    assert not missing


@needs_man
def test_the_pages_name_only_pages_that_exist(pages: Path) -> None:
    ours = {re.sub(r"\.(\d)$", r"(\1)", name) for name in PAGES}
    for name in PAGES:
        for named in re.findall(
            r"\b(?:qrexec-(?:activate|connect)|qubes\.Connect)\S*?\(\d\)",
            rendered(pages / name),
        ):
            assert named in ours
