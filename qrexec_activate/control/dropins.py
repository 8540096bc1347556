"""Unit files changed so that nobody ever sees a half of one, and nothing is
lost that a person wrote.

A change is one rename. Whoever is killed before it has changed nothing, whoever
is killed after it has changed all; what may be left is a file that systemd does
not read, and the next change removes it. Two runs at once take turns.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from ..errors import ActivateError
from ..routing.unitfile import assignments
from ..systemd.unitdirs import own_folder

__all__ = [
    "create_file",
    "file_shown",
    "is_idle",
    "locked",
    "remove_file",
    "remove_files",
    "replace_file",
    "with_lines",
    "without_lines",
    "write_files",
]

#: Names of what is not yet, or no longer, a unit file. systemd does not read
#: names that begin with a dot.
UNFINISHED = ".qrexec-activate-"
#: Another run holds the lock for as long as systemd takes to start a socket,
#: which is a fraction of a second.
LOCK_TIMEOUT = 60.0
LOCK = ".qrexec-activate.lock"
SYSTEM_LOCK = Path("/run", LOCK)

_PHYSICAL_LINE = re.compile("([^\n\r\0]*)(\r\n|\n\r|[\n\r\0]|$)")
_WHITESPACE = " \t\n\r"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let nobody else change unit files in this folder; makes it if need be,
    and tidies up after a run that died.

    The lock is on a file that only its user can open: whoever can open a file,
    or a folder, can hold its lock for ever.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(
            _lock_of(folder),
            os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW,
            0o600,
        )
    except OSError as error:
        raise ActivateError(_cannot("open", folder, error)) from error
    try:
        deadline = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ActivateError(
                        f"another qrexec-activate has been changing {folder}"
                        f" for {LOCK_TIMEOUT:.0f} s;"
                        " see what it waits for, or end it"
                    ) from None
                time.sleep(0.02)
        _tidy(folder)
        yield
    finally:
        os.close(lock)


def _lock_of(folder: Path) -> Path:
    """Where the lock of a folder lies: among what ends with the session or the
    boot; without a session, in the folder itself."""
    if folder == own_folder(user=False):
        return SYSTEM_LOCK
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime if os.path.isdir(runtime) else folder, LOCK)


def _tidy(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for path in [
            *folder.glob(f"{UNFINISHED}*"),
            *folder.glob(f"*.d/{UNFINISHED}*"),
        ]:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def file_shown(path: Path | str, text: str | None) -> str:
    """A file that is to have this text, or to go, as --dry-run shows it."""
    return f"# {path}: removed" if text is None else f"# {path}\n{text}"


def create_file(path: Path, text: str) -> None:
    """Make a new file, and its folder if need be, in one step; never overwrites
    one."""
    write_files({path: text}, {})


def replace_file(path: Path, text: str) -> None:
    """Give a file another text, in one step; a symbolic link stays one."""
    write_files({}, {path: text})


def remove_file(path: Path) -> None:
    """Remove a file, and its folder of drop-ins where it was the last one."""
    remove_files([path])


def write_files(new: Mapping[Path, str], changed: Mapping[Path, str]) -> None:
    """Make and change many files, each in one step, and none before all are
    safely on the disk: a disk takes as long for that as for one."""
    path = Path()
    try:
        with contextlib.ExitStack() as stack:
            moves: list[tuple[Callable[[Path, Path], None], Path, Path]] = []
            for path, text in new.items():
                if path.parent.is_dir():
                    name = stack.enter_context(
                        _written(path.parent, text, 0o644)
                    )
                    moves.append((os.link, Path(name), path))
                else:
                    folder = stack.enter_context(_folder_of(path, text))
                    moves.append((os.rename, folder, path.parent))
            for path, text in changed.items():
                real = path.resolve(strict=True)
                mode = stat.S_IMODE(real.stat().st_mode)
                name = stack.enter_context(_written(real.parent, text, mode))
                moves.append((os.rename, Path(name), real))
            for _, unfinished, _ in moves:
                _sync(*unfinished.glob("*"), unfinished)
            for move, unfinished, path in moves:
                move(unfinished, path)
            _sync(*{path.parent for _, _, path in moves})
    except OSError as error:
        raise ActivateError(_cannot("write", path, error)) from error


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files, and folders of drop-ins where they were the last ones."""
    path = Path()
    touched = set()
    try:
        for path in paths:
            path.unlink(missing_ok=True)
            if path.parent.name.endswith(".d"):
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
            touched.add(
                path.parent if path.parent.is_dir() else path.parent.parent
            )
        _sync(*(folder for folder in touched if folder.is_dir()))
    except OSError as error:
        raise ActivateError(_cannot("remove", path, error)) from error


@contextlib.contextmanager
def _folder_of(path: Path, text: str) -> Iterator[Path]:
    """A folder with this file in it, which systemd does not read yet; gone at
    the end, unless it was renamed."""
    folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=path.parent.parent))
    try:
        folder.chmod(0o755)
        with _written(folder, text, 0o644) as unfinished:
            os.rename(unfinished, folder / path.name)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _written(folder: Path, text: str, mode: int) -> Iterator[str]:
    """A file that systemd does not read yet; gone at the end, unless it was
    renamed."""
    descriptor, name = tempfile.mkstemp(prefix=UNFINISHED, dir=folder)
    try:
        with open(
            descriptor,
            "w",
            encoding="utf-8",
            errors="surrogateescape",
            newline="",
        ) as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), mode)
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _sync(*paths: Path) -> None:
    """Wait until files, or folders and which names are in them, are on the
    disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _cannot(do: str, path: Path, error: OSError) -> str:
    hint = (
        "; with --system, run it with sudo"
        if isinstance(error, PermissionError)
        else ""
    )
    return f"cannot {do} {path}: {error.strerror}{hint}"


# ---------------------------------------------------------------------- text


def without_lines(text: str, numbers: Collection[int]) -> str:
    """Take assignments out of a unit file's text, by the numbers of the lines
    on which they end.

    A line that goes on over several goes whole; comments in between stay, as
    does everything else. Raises ActivateError where that cannot be done.
    """
    return with_lines(text, numbers, "")


def with_lines(text: str, numbers: Collection[int], instead: str) -> str:
    """As without_lines(), with this assignment in place of the first of
    them."""
    doomed: set[int] = set()
    joined: list[int] = []
    lines = [match[0] for match in _PHYSICAL_LINE.finditer(text)]
    for number, line in enumerate(lines, start=1):
        bare = line.rstrip("\n\r\0")
        if bare.lstrip(_WHITESPACE).startswith(("#", ";")):
            continue
        joined.append(number)
        if (len(bare) - len(bare.rstrip("\\"))) % 2:
            continue
        if number in numbers:
            doomed.update(joined)
        joined = []
    if joined and joined[-1] in numbers:
        doomed.update(joined)
    if instead and doomed:
        first = lines[min(doomed) - 1]
        lines[min(doomed) - 1] = instead + (
            first[len(first.rstrip("\n\r\0")) :] or "\n"
        )
    result = "".join(
        line
        for number, line in enumerate(lines, start=1)
        if number not in doomed or (instead and number == min(doomed))
    )
    expected: list[tuple[str, str, str]] = []
    for one in assignments(text):
        if one.line not in numbers:
            expected.append((one.section, one.key, one.value))
        elif instead and one.line == min(numbers):
            key, _, value = instead.partition("=")
            expected.append((one.section, key, value))
    if [
        (one.section, one.key, one.value) for one in assignments(result)
    ] != expected:
        raise ActivateError(
            "this file is written in a way in which no line can be changed"
            " safely; edit it by hand"
        )
    return result


def is_idle(text: str) -> bool:
    """Whether nothing is left in a unit file that says anything, to systemd or
    to a person."""
    if assignments(text):
        return False
    return not any(
        line.strip() and not line.strip().startswith("[")
        for line in text.splitlines()
    )
