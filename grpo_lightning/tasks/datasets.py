"""Tasks from Hugging Face datasets on disk."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks.records import RecordTasks


class DatasetTasks(RecordTasks):
    """One task a row of a Hugging Face dataset on disk. Columns become the task's data, which reward functions ask for.

    A task needs a prompt: a string (one user message) or a list of chat messages. It may have a unique ``id``;
    otherwise the id is its position, counted from 1.

    Args:
        path: A folder written by ``save_to_disk``, or a file or folder that ``datasets.load_dataset`` reads (CSV, JSON,
            Parquet, text, ...). A dataset of the hub must be saved to disk first.
        split: Which split; may be omitted where there is only one.
        columns: Column that each value comes from, where the names differ: ``{"prompt": "question", "answer":
            "solution", "id": "uid"}``.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        split: str | None = None,
        columns: dict[str, str] | None = None,
    ) -> None:
        dataset = _choose(_load(Path(path)), split, path)
        super().__init__(_Rows(dataset, path), str(path), columns=columns)


class _Rows:
    def __init__(self, dataset: Any, path: str | Path) -> None:
        # A saved format would give tensors or arrays in place of plain values.
        self._dataset = dataset.with_format(None)
        self._path = path

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: dict[str, Any] = self._dataset[index]
        return record

    def scan(self, columns: Collection[str]) -> Iterator[dict[str, Any]]:
        there: list[str] = self._dataset.column_names
        # Batches without columns would have no rows to speak of.
        wanted = [name for name in there if name in columns] or there[:1]
        for batch in self._dataset.select_columns(wanted).iter(batch_size=1024):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def where(self, index: int) -> str:
        return f"{self._path}, row {index + 1}"


def _load(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ConfigurationError("DatasetTasks needs datasets: install grpo-lightning[datasets]") from error
    if not path.exists():
        raise ConfigurationError(
            f"expected a dataset on disk, but there is none at {path}; download one of the hub first, with "
            "datasets.load_dataset(name).save_to_disk(folder)"
        )
    try:
        if path.is_file():
            return datasets.load_dataset(str(path.resolve().parent), data_files=path.name)
        saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        return datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path.resolve()))
    except Exception as error:
        # What damaged or empty data raise is not documented (IndexError is among it). Where datasets wraps an error,
        # its own only says that there was one.
        cause = error.__cause__ or error
        raise ConfigurationError(
            f"expected a dataset with rows, but datasets cannot read {path}: {type(cause).__name__}: {cause}"
        ) from error


def _choose(loaded: Any, split: str | None, path: str | Path) -> Any:
    """One split of what was loaded: a dataset, or a dictionary of them."""
    splits = loaded if isinstance(loaded, dict) else {loaded.split and str(loaded.split): loaded}
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise ConfigurationError(
            f"expected split to be one of {', '.join(map(repr, splits))} of {path}, but got {split!r}"
        )
    return splits[split]
