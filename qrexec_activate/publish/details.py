"""What a program is given, and how much it may use: options of publish that are
directives of its unit, each checked so that it can be no other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageProblem
from .room import is_hidden
from .services import quoted

__all__ = ["MEMORY", "TASKS", "details"]

#: Of the qube's memory, so that no program can take it from all others.
MEMORY = "50%"
TASKS = 512

_MEMORY = re.compile(r"[1-9][0-9]*[KMGT]?|[1-9][0-9]?%", re.ASCII)
_CPU = re.compile(r"[1-9][0-9]*%", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
#: Names that systemd takes as they are, also where it looks for patterns.
_PLAIN_PATH = re.compile(r"(/[A-Za-z0-9_.@+=-]+)+", re.ASCII)


def details(
    *,
    memory: str,
    tasks: int,
    cpu: str | None,
    env: tuple[str, ...],
    env_file: str | None,
    credential: tuple[str, ...],
    working_directory: str | None,
    user: str | None,
) -> Iterator[str]:
    """Yield directives; raises UsageProblem."""
    if not _MEMORY.fullmatch(memory):
        raise UsageProblem(
            f"--memory {memory!r}: write it like 500M, 2G, or 25% of the qube's"
        )
    yield f"MemoryMax={memory}"
    yield f"TasksMax={tasks}"
    if cpu is not None:
        if not _CPU.fullmatch(cpu):
            raise UsageProblem(
                f"--cpu {cpu!r}: write it like 50%, of one processor"
            )
        yield f"CPUQuota={cpu}"
    for one in env:
        key, equals, value = one.partition("=")
        if not equals or not _VARIABLE.fullmatch(key):
            raise UsageProblem(f"--env {one!r}: write it like LANG=C.UTF-8")
        if not value.isprintable():
            raise UsageProblem(
                f"--env {key}: its value must be one line of printable"
                f" characters"
            )
        yield f"Environment={quoted(one)}"
    if env_file is not None:
        yield f"EnvironmentFile={_there('--env-file', env_file)}"
    if credential and not user:
        raise UsageProblem(
            "--credential needs --user: systemd as a user's own does not pass"
            " them on everywhere (252: an empty folder); such a program can"
            " read the file itself"
        )
    for one in credential:
        path = _there("--credential", one)
        yield f"LoadCredential={path.name}:{path}"
    if working_directory is not None:
        path = _there("--working-directory", working_directory)
        if user and is_hidden(path):
            raise UsageProblem(
                f"--working-directory: with --user, the program does not see"
                f" {path}"
            )
        yield f"WorkingDirectory={path}"


def _there(option: str, name: str) -> Path:
    path = Path(os.path.abspath(name))
    if not path.exists():
        raise UsageProblem(f"{option}: {path} is not there")
    if not _PLAIN_PATH.fullmatch(str(path)):
        raise UsageProblem(
            f"{option}: {path}: a path is of A-Z a-z 0-9 _ . @ + = -"
        )
    return path
