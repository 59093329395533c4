"""What the policy actually said."""

import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.loggers.tables import Table, TableWriter
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.records import episode_record


class CompletionLog(Callback):
    """Appends every sampled completion with its rewards and advantage to ``completions.jsonl`` in the run's folder.

    One JSON object a line: epoch, task, prompt, completion, reward, rewards by name, advantage, length, finish
    reason, policy version. Some of them also go to the loggers that take tables (W&B, MLflow, Trackio, TensorBoard),
    as ``completions``: those of the groups with the highest and the lowest mean reward, in turns.

    Args:
        prompts_per_epoch: Groups to write an epoch, from the first; all by default.
        rows: Completions in the table of an epoch; no table if 0.
    """

    def __init__(self, prompts_per_epoch: int | None = None, rows: int = 16) -> None:
        if rows < 0:
            raise ConfigurationError(f"expected rows >= 0, but got {rows}")
        self._limit = prompts_per_epoch
        self._rows = rows
        self._tables = TableWriter()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have all ranks agree on the run's folder."""
        if stage == "fit":
            run_directory(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's rollout before training on it: it survives whatever comes."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(data, RolloutDataModule) or data.rollout is None:
            return
        groups = data.rollout.groups
        path = run_directory(trainer) / "completions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for record in _records(groups[: self._limit], trainer.current_epoch):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if self._rows and groups:
            table = completion_table(groups, trainer.current_epoch, self._rows)
            self._tables.write(trainer.loggers, table, trainer.global_step)


def completion_table(groups: Sequence[Group], epoch: int, rows: int) -> Table:
    """Completions of the best group, the worst, the second best, and so on.

    Args:
        groups: The epoch's groups.
        epoch: The epoch.
        rows: How many completions at most.
    """
    ordered = sorted(groups, key=_mean_reward, reverse=True)
    turns = [group for pair in zip(ordered, reversed(ordered), strict=True) for group in pair][: len(ordered)]
    records = list(_records(turns, epoch))[:rows]
    names = list(dict.fromkeys(name for record in records for name in record["rewards"]))
    return Table(
        "completions",
        ("epoch", "task", "prompt", "completion", "reward", "advantage", *(f"reward/{name}" for name in names)),
        tuple(
            (
                record["epoch"],
                record["task"],
                "\n".join(f"{message.get('role')}: {message.get('content')}" for message in record["prompt"]),
                record["completion"],
                record["reward"],
                record["advantage"],
                *(record["rewards"].get(name) for name in names),
            )
            for record in records
        ),
    )


def _mean_reward(group: Group) -> float:
    return fmean([e.reward for e in group.episodes if e.reward is not None] or [-math.inf])


def _records(groups: Iterable[Group], epoch: int) -> Iterable[dict[str, Any]]:
    for group in groups:
        for episode, advantages in zip(group.episodes, group.advantages, strict=True):
            # One number where the turns do not differ.
            same = len(set(advantages)) <= 1
            yield {
                "epoch": epoch,
                **episode_record(group.task, episode),
                "advantage": (advantages[0] if advantages else 0.0) if same else list(advantages),
            }
