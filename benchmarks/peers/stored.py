"""Runs in folders of their names, and all of them in one file."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZIP_LZMA, ZipFile, ZipInfo

ARCHIVE = Path(__file__).parents[1] / "peers_runs.zip"
"""The runs that the page is about."""
FACTS = "run.json"
"""Beside a run's scalars: what else is known of it."""


def facts_of(folder: Path) -> dict[str, Any]:
    """What is known of a run beside its scalars; nothing if the file is missing.

    Args:
        folder: The run's folder.
    """
    path = folder / FACTS
    facts: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return facts


def pack(runs: Path, names: Iterable[str], archive: Path) -> None:
    """Put runs into one file.

    Args:
        runs: Folder of the runs' folders.
        names: Which runs.
        archive: The file; overwritten. The same runs give the same bytes.
    """
    with ZipFile(archive, "w", ZIP_LZMA) as file:
        for name in names:
            for path in sorted((runs / name).iterdir()):
                # Without the time of the file, and with nobody's name.
                file.writestr(ZipInfo(f"{name}/{path.name}"), path.read_bytes(), ZIP_LZMA)


def unpack(archive: Path, runs: Path) -> None:
    """Take all runs out again.

    Args:
        archive: What `pack` wrote.
        runs: Folder of the runs' folders.
    """
    with ZipFile(archive) as file:
        file.extractall(runs)
