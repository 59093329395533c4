"""From the records of a file to tasks: what all sources that read files share."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, Protocol

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Message, Task

Record = Mapping[str, Any]
"""The values of one record, by column."""


class Records(Protocol):
    """Records that a source has opened."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """All columns of one record."""
        ...

    def scan(self, columns: Collection[str]) -> Iterable[Record]:
        """Every record in order, with at least those of these columns that it has."""
        ...

    def where(self, index: int) -> str:
        """File and position of a record, for messages."""
        ...


class RecordTasks:
    """Tasks made of records. All are checked at once; each becomes a `Task` when it is asked for.

    Args:
        records: The records.
        origin: What the user gave to find them, for messages.
        columns: Column of each value, where it has another name. ``"prompt"`` and ``"id"`` name the task's own values,
            any other name an argument of reward functions. Columns that are not mapped keep their names.

    Raises:
        ConfigurationError: If there are no records, a column or a prompt is missing, or an id comes twice.
    """

    def __init__(self, records: Records, origin: str, *, columns: Mapping[str, str] | None) -> None:
        if not len(records):
            raise ConfigurationError(f"expected at least one task, but {origin} is empty")
        given = dict(columns or {})
        self._records = records
        self._columns = {"prompt": "prompt", "id": "id", **given}
        required = {"prompt": "prompt", **given}
        ids: Counter[str] = Counter()
        for index, record in enumerate(records.scan(set(self._columns.values()))):
            for name, column in required.items():
                if column not in record:
                    raise ConfigurationError(_missing(records.where(index), name, column, sorted(records[index])))
            if _messages(record[self._columns["prompt"]]) is None:
                raise ConfigurationError(
                    f"{records.where(index)}: expected {self._columns['prompt']!r} to be a string or a list of chat "
                    f"messages, each with role and content, but got {record[self._columns['prompt']]!r}"
                )
            ids[self._id(index, record)] += 1
        repeated = [name for name, count in ids.items() if count > 1]
        if repeated:
            # Seeds and logs tell tasks apart by their ids alone.
            raise ConfigurationError(f"expected unique ids, but {origin} repeats {', '.join(map(repr, repeated[:3]))}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Task:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record = self._records[index]
        data = {name: value for name, value in record.items() if name not in self._columns.values()}
        data |= {name: record[column] for name, column in self._columns.items() if column in record}
        messages = _messages(data.pop("prompt"))
        assert messages is not None, "checked at construction"
        data.pop("id", None)
        return Task(self._id(index, record), messages, data)

    def _id(self, index: int, record: Record) -> str:
        name = record.get(self._columns["id"])
        return str(index + 1 if name is None else name)


def _messages(prompt: Any) -> tuple[Message, ...] | None:
    """The prompt as chat messages, or None if it is neither text nor messages."""
    if isinstance(prompt, str):
        return ({"role": "user", "content": prompt},)
    if not isinstance(prompt, list) or not prompt or not all(map(_is_message, prompt)):
        return None
    # Columnar files give every message the fields of all others; to a chat template None is a value.
    return tuple({key: value for key, value in message.items() if value is not None} for message in prompt)


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and any(message.get(key) is not None for key in ("content", "tool_calls"))
    )


def _missing(where: str, name: str, column: str, there: list[str]) -> str:
    asked = f"the column {column!r}" + (f" for {name!r}" if name != column else "")
    nearest = get_close_matches(column, there, n=1)
    hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
    return (
        f"{where}: expected {asked}, but the columns are {', '.join(map(repr, there))}. {hint}"
        f"Name the right one with columns={{{name!r}: ...}}"
    )
