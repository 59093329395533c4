"""``doctor.json`` and ``doctor.html`` on the disk."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_lightning.diagnostics.record import FORMAT
from grpo_lightning.diagnostics.report.page import render
from grpo_lightning.diagnostics.report.shape import check_shape
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.staging import staged_file

FACTS = "doctor.json"
PAGE = "doctor.html"


def write_report(folder: Path, record: Mapping[str, Any]) -> None:
    """Write both, each whole or not at all.

    Args:
        folder: Where to; it is made.
        record: What ``doctor.json`` holds.

    Raises:
        WriteError: If there is no space.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    with staged_file(folder / FACTS) as staging:
        staging.write_text(text, encoding="utf-8")
    write_page(folder, record)


def write_page(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the page alone.

    Args:
        folder: Where to.
        record: What ``doctor.json`` holds.

    Raises:
        WriteError: If there is no space.
    """
    title = "/".join(folder.resolve().parts[-2:])
    with staged_file(folder / PAGE) as staging:
        # A lone surrogate, which a text of the run may hold, has no bytes.
        staging.write_text(render(record, title), encoding="utf-8", errors="replace")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run's ``doctor.json`` holds; None if there is none.

    Args:
        folder: The run's folder.

    Raises:
        ConfigurationError: If it cannot be read, is damaged, or another version wrote it.
    """
    path = folder / FACTS
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"expected the doctor's record in {path}, but it cannot be read: {error}; delete it, and what the logs "
            "say is examined instead"
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise ConfigurationError(
            f"expected format {FORMAT} of the doctor's record in {path}, but got {found!r}; read it with the version "
            "of grpo-lightning that wrote it"
        )
    try:
        check_shape(record)
        render(record)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"expected the doctor's record in {path}, but it is damaged: {str(error) or type(error).__name__}; "
            "delete it, and what the logs say is examined instead"
        ) from error
    return record


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
