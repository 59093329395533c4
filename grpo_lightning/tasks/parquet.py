"""Tasks from Parquet files."""

from bisect import bisect_right
from collections.abc import Collection, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks.records import RecordTasks


class ParquetTasks(RecordTasks):
    """One task a row. Columns become the task's data, which reward functions ask for by name.

    A task needs a prompt: a string (one user message) or a list of chat messages. It may have a unique ``id``;
    otherwise the id is its position, counted from 1.

    Args:
        path: A file, or a folder whose ``*.parquet`` files are read in the order of their names.
        columns: Column that each value comes from, where the names differ: ``{"prompt": "question", "answer":
            "solution", "id": "uid"}``.
    """

    def __init__(self, path: str | Path, *, columns: dict[str, str] | None = None) -> None:
        super().__init__(_Rows(_files(Path(path))), str(path), columns=columns)


def _files(path: Path) -> list[Path]:
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ConfigurationError(f"expected a Parquet file or a folder of *.parquet files, but there is none at {path}")
    return files


class _Rows:
    # Files are kept apart, as their columns and types may differ.
    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._tables = [_read(file) for file in files]
        self._ends: list[int] = list(accumulate(table.num_rows for table in self._tables))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, row = self._place(index)
        record: dict[str, Any] = self._tables[file].slice(row, 1).to_pylist()[0]
        return record

    def scan(self, columns: Collection[str]) -> Iterator[dict[str, Any]]:
        for table in self._tables:
            wanted = [name for name in table.column_names if name in columns]
            for batch in table.select(wanted).to_batches(max_chunksize=1024):
                yield from batch.to_pylist()

    def where(self, index: int) -> str:
        file, row = self._place(index)
        return f"{self._files[file]}, row {row + 1}"

    def _place(self, index: int) -> tuple[int, int]:
        file = bisect_right(self._ends, index)
        return file, index - (self._ends[file - 1] if file else 0)


def _read(file: Path) -> Any:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as opened:
            return opened.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigurationError(f"expected a Parquet file, but cannot read {file}: {error}") from error
