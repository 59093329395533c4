"""What a run logged, one row for each update; no package is needed to read it."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = dict[str, float]

UPDATE = "policy/grad_norm"
"""Logged at every optimizer step, and only there."""


def scalars_of(run_folder: Path) -> list[Row]:
    """Rows of a run's ``metrics.csv``, one for each update.

    What an epoch logged stands in each of its updates, except where the update has a value of its own. What a
    validation measured stands in the last update before it alone.

    Args:
        run_folder: Holds the ``metrics.csv`` that Lightning's ``CSVLogger`` wrote.

    Raises:
        ValueError: If it has no updates.
    """
    with (run_folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        logged = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    merged: dict[float, Row] = {}
    for row in logged:
        # The update's own values come first.
        merged[row["step"]] = row | merged.get(row["step"], {})
    updates = [row for _, row in sorted(merged.items()) if UPDATE in row]
    if not updates:
        raise ValueError(f"expected updates in {run_folder / 'metrics.csv'}, but no row has {UPDATE!r}")
    last = {row["epoch"]: row for row in updates}
    return [
        {name: value for name, value in last[row["epoch"]].items() if not name.startswith("val/")} | row
        for row in updates
    ]


def write_scalars(run_folder: Path, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Write rows in the form that `scalars_of` reads, with six significant digits.

    Args:
        run_folder: Where to; made if it is not there.
        rows: As `scalars_of` returns them.
        names: Which columns.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    with (run_folder / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_written(row, name) for name in names] for row in rows)


def _written(row: Mapping[str, float], name: str) -> str:
    return f"{row[name]:.6g}" if name in row else ""
