"""Epochs on the disk: a folder of Parquet files each, whole or absent."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow.parquet import ParquetFile, write_table

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.staging import discard, staged, staged_file
from grpo_lightning.trajectories.stored import StoredEpoch
from grpo_lightning.trajectories.tables import FORMAT, METADATA, SCHEMAS, format_of, from_tables, to_tables

FOLDER = "trajectories"
"""Name, in a run's folder, of the folder with a folder for each epoch."""

LOG_RATIOS = "log_ratios.parquet"
"""Name of the file with what training made of the tokens."""

_LOG_RATIO_SCHEMA = pa.schema([("log_ratio", pa.float64())])
_FLOATS = ("logprob", "log_ratio")


def write_epoch(folder: Path, stored: StoredEpoch) -> Path:
    """Write an epoch into a run's folder, in place of what is stored of it.

    Tables that are written together and belong together are one folder, so that a rename makes them appear at once.

    Args:
        folder: The run's folder.
        stored: The epoch.

    Returns:
        Its folder: ``trajectories/epoch-00003`` with ``groups.parquet``, ``episodes.parquet``, ``turns.parquet``,
        ``tokens.parquet`` and, if it was trained to its end, ``log_ratios.parquet``.

    Raises:
        WriteError: If there is no space for it.
    """
    target = folder / FOLDER / f"epoch-{stored.origin.epoch:05d}"
    for abandoned in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    with staged(target, replace=True) as staging:
        for name, table in to_tables(stored).items():
            _write(table, staging / f"{name}.parquet")
        if stored.log_ratios is not None:
            _write(_log_ratio_table(stored.log_ratios), staging / LOG_RATIOS)
    return target


def write_log_ratios(path: Path, log_ratios: NDArray[np.float64]) -> None:
    """Add the log-ratios to a stored epoch that has been trained to its end.

    Args:
        path: The epoch's folder.
        log_ratios: As `StoredEpoch.log_ratios`.

    Raises:
        WriteError: If there is no space for them.
    """
    with staged_file(path / LOG_RATIOS) as staging:
        _write(_log_ratio_table(log_ratios), staging)


def load_epoch(path: Path) -> StoredEpoch:
    """Read an epoch.

    Args:
        path: Its folder.

    Raises:
        ConfigurationError: If it is not there, broken, of something else, or of a later version, with the file's name.
    """
    if not path.is_dir():
        raise ConfigurationError(f"expected a stored epoch, but there is no folder {path}")
    tables = {name: _read(path / f"{name}.parquet", schema) for name, schema in SCHEMAS.items()}
    try:
        stored = from_tables(tables)
    except Exception as error:
        # Each file is whole and ours by now, but what somebody changed in them can fail in any way.
        raise ConfigurationError(f"expected the tables in {path} to fit each other, but {error}") from error
    if not (path / LOG_RATIOS).exists():
        return stored
    log_ratios = _read(path / LOG_RATIOS, _LOG_RATIO_SCHEMA)["log_ratio"].to_numpy()
    if len(log_ratios) != tables["tokens"].num_rows:
        raise ConfigurationError(
            f"expected one log-ratio for each of the {tables['tokens'].num_rows} tokens, but {path / LOG_RATIOS} holds "
            f"{len(log_ratios)}"
        )
    return StoredEpoch(**{**vars(stored), "log_ratios": log_ratios})


def stored_epochs(run: Path) -> dict[int, Path]:
    """Folder of each epoch that a run has stored, in order.

    Args:
        run: The run's folder.
    """
    paths = (run / FOLDER).glob("epoch-*")
    found = {int(match[1]): path for path in paths if (match := re.fullmatch(r"epoch-(\d+)", path.name))}
    return dict(sorted(found.items()))


def drop_later_epochs(run: Path, begun: int, finished: int) -> None:
    """Take out what will be stored again: epochs from the first not yet begun, and log-ratios of unfinished ones.

    Args:
        run: The run's folder.
        begun: Epochs begun.
        finished: Epochs trained to their end.
    """
    for epoch, path in stored_epochs(run).items():
        if epoch >= begun:
            discard(path)
        elif epoch >= finished:
            (path / LOG_RATIOS).unlink(missing_ok=True)


def _log_ratio_table(log_ratios: NDArray[np.float64]) -> Any:
    table = pa.table({"log_ratio": pa.array(log_ratios, mask=np.isnan(log_ratios))}, schema=_LOG_RATIO_SCHEMA)
    return table.replace_schema_metadata({METADATA: f'{{"format":{FORMAT}}}'})


def _write(table: Any, path: Path) -> None:
    # Numbers that hardly repeat pack best with their bytes sorted by place; all else as indices of what does repeat.
    floats = [name for name in table.column_names if name in _FLOATS]
    write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=[name for name in table.column_names if name not in floats],
        column_encoding=dict.fromkeys(floats, "BYTE_STREAM_SPLIT") or None,
        write_page_checksum=True,
    )


def _read(path: Path, schema: Any) -> Any:
    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
        number = format_of(table)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"expected {path}, but there is no such file: the stored epoch is not whole"
        ) from error
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"expected a file of stored trajectories, but cannot read {path}: {error}") from error
    if number is None:
        raise ConfigurationError(f"expected a file of stored trajectories, but {path} is of something else")
    if number > FORMAT:
        raise ConfigurationError(
            f"expected trajectories stored in format {FORMAT} or before, but {path} is in format {number}: update "
            "grpo-lightning"
        )
    if not table.schema.equals(schema):
        raise ConfigurationError(f"expected the columns\n{schema}\nin {path}, but got\n{table.schema}")
    return table
