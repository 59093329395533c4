"""Tasks from a JSON Lines file."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task


class JsonlTasks:
    """One JSON object a line. Its other fields become the task's data, which reward functions ask for by name.

    Args:
        path: The file, UTF-8.
        prompt_field: Field with the prompt: a string (one user message), or a list of chat messages.
        id_field: Field with a unique name; the line number if omitted or absent.
        system_prompt: A system message to put first.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        prompt_field: str = "prompt",
        id_field: str = "id",
        system_prompt: str | None = None,
    ) -> None:
        self._path = Path(path)
        if not self._path.is_file():
            raise ConfigurationError(f"expected a JSON Lines file, but there is none at {self._path}")
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        try:
            text = self._path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigurationError(f"expected UTF-8, but {self._path} is not: {error}") from error
        self._tasks = [
            self._parse(number, line, prompt_field, id_field, system)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
        repeated = [name for name, count in Counter(task.id for task in self._tasks).items() if count > 1]
        if repeated:
            raise ConfigurationError(
                f"expected unique ids, but {self._path} repeats {', '.join(map(repr, repeated[:3]))}"
            )
        if not self._tasks:
            raise ConfigurationError(f"expected at least one task, but {self._path} is empty")

    def _parse(self, number: int, line: str, prompt_field: str, id_field: str, system: list[dict[str, Any]]) -> Task:
        where = f"{self._path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"{where}: expected a JSON object, but got invalid JSON: {error}") from error
        if not isinstance(record, dict) or prompt_field not in record:
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ConfigurationError(f"{where}: expected an object with the field {prompt_field!r}, but got {found}")
        prompt = record[prompt_field]
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        elif isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
            messages = prompt
        else:
            raise ConfigurationError(
                f"{where}: expected {prompt_field!r} to be a string or a list of chat messages, but got {prompt!r}"
            )
        data = {name: value for name, value in record.items() if name not in (prompt_field, id_field)}
        name = record.get(id_field)
        return Task(str(number if name is None else name), (*system, *messages), data)

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> Task:
        return self._tasks[index]
