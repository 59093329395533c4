"""What the policy actually said."""

import json
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.rollout.types import Group


class CompletionLog(Callback):
    """Appends every sampled completion with its rewards and advantage to ``completions.jsonl`` in the run's folder.

    One JSON object a line: epoch, task, prompt, completion, reward, rewards by name, advantage, length, finish
    reason, policy version.

    Args:
        prompts_per_epoch: Groups to write an epoch, from the first; all by default.
    """

    def __init__(self, prompts_per_epoch: int | None = None) -> None:
        self._limit = prompts_per_epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the epoch's rollout before training on it: it survives whatever comes."""
        data = getattr(trainer, "datamodule", None)
        if not trainer.is_global_zero or not isinstance(data, RolloutDataModule) or data.rollout is None:
            return
        path = run_directory(trainer) / "completions.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            for record in _records(data.rollout.groups[: self._limit], trainer.current_epoch):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _records(groups: Iterable[Group], epoch: int) -> Iterable[dict[str, Any]]:
    for group in groups:
        for sample, advantage in zip(group.samples, group.advantages, strict=True):
            yield {
                "epoch": epoch,
                "task": group.task.id,
                "prompt": [dict(m) for m in group.task.messages],
                "completion": sample.action.text,
                "reward": sample.reward,
                "rewards": dict(sample.rewards),
                "advantage": advantage,
                "tokens": len(sample.action.token_ids),
                "finish_reason": sample.action.finish_reason,
                "policy_version": sample.action.policy_version,
                **({"failure": sample.failure} if sample.failure else {}),
            }
