"""SECURITY.md: each promise names the tests that an attacker would have
written, and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises() -> list[str]:
    text = (ROOT / "SECURITY.md").read_text()
    section = text.partition("\n## What it promises\n")[2].partition("\n## ")[0]
    return re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]


def test_every_promise_names_a_test() -> None:
    assert len(promises()) >= 7
    for promise in promises():
        assert TESTS.search(promise), promise


def test_every_named_test_is_there() -> None:
    named = TESTS.findall((ROOT / "SECURITY.md").read_text())
    for path, name in named:
        source = (ROOT / path).read_text()
        assert re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), name
