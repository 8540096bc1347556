"""The schema of --json: it sees what differs, and says what docs/json.md
says."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from schema import SCHEMA, problems

STEP = {
    "area": "units",
    "manager": "user",
    "level": "ok",
    "text": "well",
    "mend": None,
    "advice": None,
}
CHECK = {"level": "ok", "steps": [STEP]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"mend": 1}, "check.steps[0].mend is 1, no string or null"),
        ({"level": "fine"}, "check.steps[0].level is 'fine', none of"),
        ({"new": 1}, "check.steps[0]: new is new"),
    ],
)
def test_what_differs_is_seen(
    change: dict[str, Any], problem: str | None
) -> None:
    value = copy.deepcopy(CHECK)
    value["steps"][0].update(change)  # type: ignore[attr-defined]  # it is JSON
    found = problems(value, "check")
    assert len(found) == (problem is not None)
    assert not found or found[0].startswith(str(problem))


def test_what_is_missing_is_seen() -> None:
    assert problems({"level": "ok"}, "check") == ["check: steps is missing"]
    assert problems([], "check") == ["check is [], no object"]
    assert problems({"level": "ok", "steps": [None]}, "check") == [
        "check.steps[0] is None, no object"
    ]


def test_the_text_names_all_that_the_schema_names() -> None:
    text = (Path(__file__).parents[1] / "docs/json.md").read_text()
    told = {
        name
        for cell in re.findall(r"^\| ([\w, ]+) \|", text, flags=re.MULTILINE)
        for name in cell.split(", ")
    } | set(re.findall(r"`(\w+)`, an (?:array|object)", text))
    assert set(_names(SCHEMA["$defs"])) == told


def _names(value: Any) -> Iterator[str]:
    """All names of properties, wherever they are."""
    if isinstance(value, dict):
        yield from value.get("properties", {})
        for inner in value.values():
            yield from _names(inner)
