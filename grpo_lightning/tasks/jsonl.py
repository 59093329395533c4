"""Tasks from a JSON Lines file."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks.records import RecordTasks


class JsonlTasks(RecordTasks):
    """One JSON object a line. Fields become the task's data, which reward functions ask for by name.

    A task needs a prompt: a string (one user message) or a list of chat messages. It may have a unique ``id``;
    otherwise the id is its position, counted from 1.

    Args:
        path: The file, UTF-8. Blank lines are skipped.
        columns: Field that each value comes from, where the names differ: ``{"prompt": "question", "answer":
            "solution", "id": "uid"}``.
    """

    def __init__(self, path: str | Path, *, columns: dict[str, str] | None = None) -> None:
        super().__init__(_Lines(Path(path)), str(path), columns=columns)


class _Lines:
    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigurationError(f"expected a JSON Lines file, but there is none at {path}")
        self._path = path
        self._lines: list[int] = []
        self._records: list[dict[str, Any]] = []
        try:
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._lines.append(number)
                        self._records.append(_parse(line, f"{path}, line {number}"))
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"expected UTF-8, but {path} is not: {error}") from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._records[index]

    def scan(self, columns: Collection[str]) -> Iterable[dict[str, Any]]:
        return self._records

    def where(self, index: int) -> str:
        return f"{self._path}, line {self._lines[index]}"


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"{where}: expected a JSON object, but got invalid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigurationError(f"{where}: expected a JSON object, but got {type(record).__name__}")
    return record
