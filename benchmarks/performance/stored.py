"""Results of all sections in one file, each section on its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.performance.section import Section, headline

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "performance.json"
WORK = ROOT / "build" / "performance"
"""For logs, and for what a run that was stopped need not do again."""

SMOKE = WORK / "smoke.json"
"""Results of ``smoke``, which are no one's."""


def load(path: Path) -> dict[str, Any]:
    """What is stored; without a file, nothing."""
    if not path.is_file():
        return {"sections": {}}
    result: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return result


def merged(
    stored: Mapping[str, Any],
    name: str,
    entry: Mapping[str, Any],
    sections: Mapping[str, Section],
) -> dict[str, Any]:
    """The stored results with one section's replaced, and the single numbers of all of them on top.

    Args:
        stored: What `load` returned.
        name: The section.
        entry: Its ``size``, ``machine``, ``seconds`` and ``result``.
        sections: All sections.
    """
    entries = {**stored["sections"], name: dict(entry)}
    ordered = {key: entries[key] for key in [*sections, *(entries.keys() - sections.keys())] if key in entries}
    return {**headlines(ordered, sections), "sections": ordered}


def headlines(entries: Mapping[str, Any], sections: Mapping[str, Section]) -> dict[str, float]:
    """Single numbers that the sections declare.

    Args:
        entries: Stored sections.
        sections: Their modules.
    """
    numbers: dict[str, float] = {}
    for name, entry in entries.items():
        if name in sections:
            numbers |= {key: round(float(v), 4) for key, v in headline(sections[name], entry["result"]).items()}
    return numbers


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write it, readable in a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
