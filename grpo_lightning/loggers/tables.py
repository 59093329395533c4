"""Tables for loggers that take them, each in its own way."""

import html
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from grpo_lightning.loggers.trackio import TrackioLogger

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|>])")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: What it is logged under.
        columns: Names of the columns.
        rows: Text, numbers or None, one per column.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]


class TableWriter:
    """Gives tables to loggers, and goes on without those that fail: a table is not worth a run."""

    def __init__(self) -> None:
        self._failed: set[type[Logger]] = set()

    def write(self, loggers: Iterable[Logger], table: Table, step: int) -> None:
        """Log a table to each logger that takes one; warn once for each kind of logger that fails.

        Args:
            loggers: All loggers of the run.
            table: The table.
            step: Optimizer steps taken.
        """
        for logger in loggers:
            write = next((write for kind, write in _WRITERS.items() if isinstance(logger, kind)), None)
            if write is None or type(logger) in self._failed:
                continue
            try:
                write(logger, table, step)
            except Exception as error:
                self._failed.add(type(logger))
                rank_zero_warn(
                    f"{type(logger).__name__} did not take the table {table.name!r} and will get no more of them: "
                    f"{type(error).__name__}: {error}"
                )


def escape_markdown(value: str | float | None) -> str:
    """Text that a Markdown table shows as it is, on one line.

    Args:
        value: What to show; nothing for None.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        return f"{value:.6g}"
    escaped = _MARKDOWN.sub(r"\\\1", html.escape(value, quote=False).replace("&gt;", ">"))
    return re.sub(r"\r\n|\r|\n", "<br>", escaped)


def markdown_table(table: Table) -> str:
    """The table as Markdown, with all text escaped.

    Args:
        table: The table.
    """
    cells = [[escape_markdown(cell) for cell in row] for row in (table.columns, *table.rows)]
    cells.insert(1, ["---"] * len(table.columns))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _to_wandb(logger: Any, table: Table, step: int) -> None:
    logger.log_table(table.name, columns=list(table.columns), data=[list(row) for row in table.rows], step=step)


def _to_mlflow(logger: Any, table: Table, step: int) -> None:
    columns = dict(zip(table.columns, map(list, zip(*table.rows, strict=True)), strict=True))
    # MLflow appends to the file of that name: it fetches it first, with a bar that would cross the Trainer's.
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logger.experiment.log_table(logger.run_id, data=columns, artifact_file=f"{table.name}.json")


def _to_trackio(logger: Any, table: Table, step: int) -> None:
    import trackio

    data = [list(row) for row in table.rows]
    logger.experiment.log({table.name: trackio.Table(columns=list(table.columns), data=data)}, step=step)


def _to_tensorboard(logger: Any, table: Table, step: int) -> None:
    logger.experiment.add_text(table.name, markdown_table(table), step)


_WRITERS: dict[type[Logger], Callable[[Any, Table, int], None]] = {
    WandbLogger: _to_wandb,
    MLFlowLogger: _to_mlflow,
    TrackioLogger: _to_trackio,
    TensorBoardLogger: _to_tensorboard,
}
