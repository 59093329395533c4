"""A run's folder: its settings, its checkpoints, and what it has written so far."""

import csv
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError


def find_run(folder: Path) -> tuple[Path, Path]:
    """Settings and newest whole checkpoint of a run.

    Args:
        folder: The run's folder.

    Raises:
        ConfigurationError: If the folder is no run, with what was looked for.
    """
    config, checkpoints = folder / "config.yaml", folder / "checkpoints"
    # Each time that a run goes on, its settings then are saved under the next number.
    later = sorted(folder.glob("config-*.yaml"), key=lambda path: int(path.stem.rpartition("-")[2]))
    candidates = sorted(checkpoints.glob("*.ckpt"), key=_age, reverse=True)
    # A checkpoint is a zip archive, whose directory is at its end: one that was cut off has none.
    whole = [path for path in candidates if zipfile.is_zipfile(path)]
    if config.is_file() and whole:
        return (later or [config])[-1], whole[0]
    looked_for = {
        config: config.is_file(),
        checkpoints / "*.ckpt": bool(candidates),
        **({checkpoints / "*.ckpt (whole)": False} if candidates and not whole else {}),
    }
    found = ", ".join(f"{path} ({'found' if is_there else 'not there'})" for path, is_there in looked_for.items())
    raise ConfigurationError(f"expected a run to resume in {folder}, but it holds none; looked for {found}")


def _age(path: Path) -> tuple[bool, float]:
    """``last`` before the others, by the time of writing; those by their step."""
    if path.stem.startswith("last"):
        return True, path.stat().st_mtime
    step = re.search(r"step=(\d+)", path.stem)
    return False, float(step[1]) if step else -1.0


@dataclass(frozen=True)
class Progress:
    """How far a checkpoint has come.

    Attributes:
        begun: Epochs begun.
        finished: Epochs trained to their end.
        step: Optimizer steps taken.
    """

    begun: int
    finished: int
    step: int


def checkpoint_progress(checkpoint: Mapping[str, Any]) -> Progress:
    """How far a loaded checkpoint of Lightning has come."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return Progress(epochs["started"], epochs["processed"], checkpoint["global_step"])


def drop_later_records(folder: Path, progress: Progress) -> None:
    """Take what the run logged after its checkpoint out of ``metrics.csv`` and ``completions.jsonl``.

    It will be logged again, and would stand there twice.

    Args:
        folder: The run's folder.
        progress: How far the checkpoint has come.
    """
    metrics, completions = folder / "metrics.csv", folder / "completions.jsonl"
    if metrics.is_file():
        with metrics.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = [
                row
                for row in reader
                if float(row.get("epoch") or 0) < progress.finished or float(row.get("step") or 0) < progress.step
            ]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=reader.fieldnames or ())
        writer.writeheader()
        writer.writerows(rows)
        _replace(metrics, text.getvalue())
    if completions.is_file():
        lines = completions.read_text(encoding="utf-8").splitlines(keepends=True)
        # An epoch's completions are written when it begins.
        kept = [line for line in lines if json.loads(line)["epoch"] < progress.begun]
        _replace(completions, "".join(kept))


def _replace(path: Path, text: str) -> None:
    """Put a text in a file's place: at any moment the old or the new one is there whole."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8", newline="")
    os.replace(beside, path)
