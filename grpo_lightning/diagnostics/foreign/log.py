"""Logs of scalars, of this and of other trainers, under one set of names."""

import csv
import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_lightning.errors import ConfigurationError

NAMES: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "policy_loss", "actor/pg_loss"),
    "learning_rate": ("learning_rate", "policy/learning_rate", "lr", "lr-adamw", "actor/lr", "actor_lr"),
    "policy/grad_norm": ("policy/grad_norm", "grad_norm", "actor/grad_norm"),
    "reward/mean": ("reward/mean", "reward", "critic/rewards/mean", "critic/score/mean"),
    "reward/std": ("reward/std", "reward_std"),
    "group/zero_variance_fraction": ("group/zero_variance_fraction", "frac_reward_zero_std"),
    "policy/kl_reference": ("policy/kl_reference", "kl", "objective/kl", "actor/kl_loss"),
    "policy/entropy": ("policy/entropy", "entropy", "actor/entropy", "actor/entropy_loss"),
    "ppo/clip_fraction": ("ppo/clip_fraction", "clip_ratio/region_mean", "clip_ratio", "actor/pg_clipfrac"),
    "ppo/clip_fraction_low": ("ppo/clip_fraction_low", "clip_ratio/low_mean"),
    "ppo/clip_fraction_high": ("ppo/clip_fraction_high", "clip_ratio/high_mean"),
    "ppo/ratio_mean": ("ppo/ratio_mean", "ratio_mean", "ratio"),
    "ppo/ratio_std": ("ppo/ratio_std", "ratio_std"),
    "ppo/updates_since_sampling": ("ppo/updates_since_sampling",),
    "mismatch/logprob_abs_mean": ("mismatch/logprob_abs_mean", "sampling/sampling_logp_difference/mean"),
    "mismatch/logprob_abs_max": ("mismatch/logprob_abs_max", "sampling/sampling_logp_difference/max"),
    "completion/length_mean": (
        "completion/length_mean",
        "completions/mean_length",
        "completion_length",
        "response_length/mean",
        "response_length",
    ),
    "completion/length_max": ("completion/length_max", "completions/max_length", "response_length/max"),
    "completion/truncated_fraction": (
        "completion/truncated_fraction",
        "completions/clipped_ratio",
        "response_length/clip_ratio",
    ),
    "seconds": ("train_runtime",),
    "step_seconds": ("step_time",),
}
"""From our name of a number to all names that it goes by, in lower case, the best first."""

_STEPS = ("step", "global_step", "_step", "trainer/global_step")
_CANONICAL = {alias: name for name, aliases in NAMES.items() for alias in aliases}
_PHASES = tuple(f"time/{phase}_seconds" for phase in ("rollout", "train", "sync", "doctor"))
_WAITED = "time/rollout_wait_seconds"
"""Stands for the rollout's seconds where it is logged: they may lie within those of the training."""


@dataclass(frozen=True)
class Log:
    """Numbers over the steps of a run.

    Attributes:
        rows: Step, and the numbers that were logged there by our names, not finite ones too.
        seconds: How long the run took; None if the log does not say.
    """

    rows: tuple[tuple[float, Mapping[str, float]], ...]
    seconds: float | None = None

    def values(self, name: str) -> list[float]:
        """All that was logged under one of our names, in order."""
        return [values[name] for _, values in self.rows if name in values]

    def finite(self, name: str) -> list[float]:
        """Those that are finite."""
        return [value for value in self.values(name) if math.isfinite(value)]


def read_log(path: Path) -> Log:
    """Read a log of scalars.

    Args:
        path: TRL's ``trainer_state.json``, a folder with it or with checkpoints that have it, or a CSV file.

    Raises:
        ConfigurationError: If it is none of these, is empty, or holds no number that is known.
    """
    path = _file(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"expected a log at {path}, but it cannot be read: {error}") from error
    if not content.strip():
        raise ConfigurationError(f"expected a log at {path}, but the file is empty")
    return _log(path, _csv_rows(path, content) if path.suffix == ".csv" else _trl_rows(path, content))


def _file(path: Path) -> Path:
    if not path.exists():
        raise ConfigurationError(
            f"expected a log, but there is nothing at {path}; give trainer_state.json, or a CSV file"
        )
    if not path.is_dir():
        return path
    found = [path / "trainer_state.json", *path.glob("checkpoint-*/trainer_state.json")]
    steps = {
        file: int(m[1]) if (m := re.search(r"(\d+)$", file.parent.name)) else 0 for file in found if file.is_file()
    }
    if not steps:
        raise ConfigurationError(f"expected trainer_state.json in {path} or in its checkpoint-*, but there is none")
    return found[0] if found[0] in steps else max(steps, key=lambda file: steps[file])


def _trl_rows(path: Path, content: str) -> Sequence[Mapping[str, Any]]:
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"expected JSON in {path}, but {error}; a CSV file must end in .csv") from error
    rows = state.get("log_history") if isinstance(state, dict) else state
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        keys = ", ".join(list(state)[:8]) if isinstance(state, dict) else type(state).__name__
        raise ConfigurationError(
            f"expected the state of a Hugging Face Trainer in {path}, with log_history, but got: {keys}"
        )
    if not rows:
        raise ConfigurationError(f"expected entries in log_history of {path}, but there are none; set logging_steps=1")
    return rows


def _csv_rows(path: Path, content: str) -> Sequence[Mapping[str, Any]]:
    try:
        rows = list(csv.DictReader(content.splitlines(), restkey="", strict=True))
    except csv.Error as error:
        raise ConfigurationError(f"expected a table with a line of names in {path}, but {error}") from error
    if not rows:
        raise ConfigurationError(f"expected rows below the names in {path}, but there are none")
    return rows


def _log(path: Path, rows: Sequence[Mapping[str, Any]]) -> Log:
    columns = dict.fromkeys(name for row in rows for name in row if name)
    known = _known(path, list(columns))
    steps = next((c for wanted in _STEPS for c in columns if _plain(c) == wanted), None)
    read = []
    for index, row in enumerate(rows):
        values = {name: _number(path, column, index, row.get(column)) for name, column in known.items()}
        at = _number(path, steps, index, row.get(steps)) if steps else None
        if at is not None and not math.isfinite(at):
            raise ConfigurationError(f"expected finite steps in {path}, but entry {index + 1} holds {at}")
        read.append((float(index) if at is None else at, {n: v for n, v in values.items() if v is not None}))
    return Log(tuple(read), _seconds(path, rows, read))


def _known(path: Path, columns: Sequence[str]) -> dict[str, str]:
    """The column of each number; of several that it goes by, the best."""
    found: dict[str, list[str]] = {}
    for column in columns:
        if (name := _CANONICAL.get(_plain(column))) is not None:
            found.setdefault(name, []).append(column)
    if not set(found) - {"seconds", "step_seconds"}:
        raise ConfigurationError(_nothing_known(path, columns))
    known = {}
    for name, same in found.items():
        runs = {column.split(" - ")[0] for column in same if " - " in column}
        if len(runs) > 1:
            raise ConfigurationError(
                f"expected one run in {path}, but it holds {len(runs)}: {', '.join(sorted(runs)[:5])}; export them one "
                "by one"
            )
        known[name] = min(same, key=lambda column: NAMES[name].index(_plain(column)))
    return known


def _plain(column: str) -> str:
    """A column's name without what W&B puts before it: the run's name, ``train/``."""
    return column.rsplit(" - ", 1)[-1].strip().lower().removeprefix("train/")


def _nothing_known(path: Path, columns: Sequence[str]) -> str:
    near = {c: m[0] for c in columns if (m := difflib.get_close_matches(_plain(c), _CANONICAL, n=1, cutoff=0.75))}
    hint = "; did you mean " + ", ".join(f"{m!r} by {c!r}" for c, m in list(near.items())[:3]) + "?" if near else ""
    return (
        f"expected numbers of a GRPO run in {path}, such as reward, kl, entropy, grad_norm or learning_rate, but got: "
        f"{', '.join(columns[:8]) or 'no names'}{hint}"
    )


def _number(path: Path, column: str, index: int, value: Any) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (ValueError, TypeError, OverflowError):
        raise ConfigurationError(
            f"expected numbers under {column!r} in {path}, but entry {index + 1} holds {str(value)[:40]!r}"
        ) from None


def _seconds(
    path: Path, rows: Sequence[Mapping[str, Any]], read: Iterable[tuple[float, Mapping[str, float]]]
) -> float | None:
    """The whole run's, else the sum of its steps', else of its phases'."""
    totals = [values for _, values in read]
    if whole := [values["seconds"] for values in totals if "seconds" in values]:
        return whole[-1]
    logged = {name for row in rows for name in row}
    names = [_WAITED if name == _PHASES[0] and _WAITED in logged else name for name in _PHASES]
    phases = [_number(path, name, i, row.get(name)) or 0.0 for name in names for i, row in enumerate(rows)]
    steps = [(step, values["step_seconds"]) for step, values in read if "step_seconds" in values]
    # A logged step stands for all since the one before it, of which it is the mean.
    ends = [0.0, *(step for step, _ in steps)]
    summed = sum(seconds * (end - begin) for begin, end, (_, seconds) in zip(ends, ends[1:], steps, strict=False))
    total = sum(phases) + summed
    return total if math.isfinite(total) and total > 0 else None
