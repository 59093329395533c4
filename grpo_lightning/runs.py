"""A run's folder: its settings, its checkpoints, and what it has written so far."""

import csv
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from grpo_lightning.errors import ConfigurationError


def find_run(folder: Path) -> tuple[Path, Path]:
    """Settings and newest whole checkpoint of a run.

    Args:
        folder: The run's folder.

    Raises:
        ConfigurationError: If the folder is no run, with what was looked for.
    """
    config, checkpoint = folder / "config.yaml", newest_checkpoint(folder)
    if config.is_file() and checkpoint is not None:
        return newest_settings(folder), checkpoint
    looked_for = {config: config.is_file(), folder / "checkpoints" / "*.ckpt": bool(_checkpoints(folder))}
    if _checkpoints(folder) and checkpoint is None:
        looked_for[folder / "checkpoints" / "*.ckpt (whole)"] = False
    found = ", ".join(f"{path} ({'found' if is_there else 'not there'})" for path, is_there in looked_for.items())
    raise ConfigurationError(f"expected a run to resume in {folder}, but it holds none; looked for {found}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the highest step, of several the one written last; None if there is none.

    Args:
        folder: A run's folder, or one of checkpoints.
    """
    steps = {path: _step(path) for path in _checkpoints(folder)}
    whole = [(step, path.stat().st_mtime, path) for path, step in steps.items() if step is not None]
    return max(whole)[2] if whole else None


def checkpoint_of_version(folder: Path, version: int) -> Path | None:
    """A whole checkpoint whose policy has a version; None if there is none.

    Args:
        folder: A run's folder, or one of checkpoints.
        version: The policy version.
    """
    return next((path for path in _checkpoints(folder) if _policy_version(path) == version), None)


def _checkpoints(folder: Path) -> list[Path]:
    return [*folder.glob("*.ckpt"), *folder.glob("checkpoints/*.ckpt")]


def _step(checkpoint: Path) -> int | None:
    """Optimizer steps before a checkpoint; None if it is not whole."""
    return _number(checkpoint, "global_step")


def _policy_version(checkpoint: Path) -> int | None:
    """Version of the policy that a checkpoint holds; None if it is not whole, or no checkpoint of ours."""
    return _number(checkpoint, "grpo_lightning", "policy_version")


def _number(checkpoint: Path, *keys: str) -> int | None:
    # A checkpoint is a zip archive, whose directory is at its end: one that was cut off has none.
    if not zipfile.is_zipfile(checkpoint):
        return None
    import torch

    try:
        content = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
        return int(reduce(getitem, keys, content))
    except Exception:
        # Reading a foreign file can fail in any way.
        return None


def run_model(folder: Path) -> str | None:
    """Directory or hub name of the model that a run trained; None if the run's folder does not say.

    Args:
        folder: The run's folder, with ``config.yaml`` of a command line or ``hparams.yaml`` of a logger.
    """
    for path in (newest_settings(folder), folder / "hparams.yaml"):
        try:
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        # ``model: {model: ...}`` of a command line, within ``init_args`` for a class of one's own; a logger's is flat.
        for key in ("model", "init_args", "model"):
            settings = settings.get(key, settings) if isinstance(settings, dict) else settings
        if isinstance(settings, str):
            return settings
    return None


def newest_settings(folder: Path) -> Path:
    """The settings of a run as they were when it last went on.

    Each time that a run goes on, its settings then are saved under the next number.

    Args:
        folder: The run's folder.
    """
    numbers = {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"config-(\d+)\.yaml", path.name))}
    return folder / f"config-{max(numbers)}.yaml" if numbers else folder / "config.yaml"


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
    """Take what the run wrote after its checkpoint out of ``metrics.csv``, ``completions.jsonl`` and ``trajectories``.

    It will be written again, and would stand there twice.

    Args:
        folder: The run's folder.
        progress: How far the checkpoint has come.
    """
    # It loads pyarrow, which finding a run does not need.
    from grpo_lightning.trajectories.store import drop_later_epochs

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
    drop_later_epochs(folder, progress.begun, progress.finished)


def _replace(path: Path, text: str) -> None:
    """Put a text in a file's place: at any moment the old or the new one is there whole."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8", newline="")
    os.replace(beside, path)
