"""What ``predict`` generated, in a file."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.callbacks.run_directory import run_directory
from grpo_lightning.rollout.types import Group


class PredictionWriter(Callback):
    """Appends every completion of ``predict`` to ``predictions.jsonl`` in the run's folder, as batches finish.

    One JSON object a line: task, prompt, completion, token ids, logprobs (of each token, at the temperature it was
    sampled with) and their sum, reward, rewards by name, finish reason, policy version. Rewards are null where none
    applies.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the run's folder."""
        self._path = run_directory(trainer) / "predictions.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch, which every process has."""
        if not trainer.is_global_zero:
            return
        assert self._path is not None, "on_predict_start comes first"
        with self._path.open("a", encoding="utf-8") as file:
            for record in prediction_records(outputs):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the predictions are."""
        if trainer.is_global_zero:
            print(f"Predictions: {self._path}", flush=True)


def prediction_records(groups: Iterable[Group]) -> Iterator[dict[str, Any]]:
    """One record for each completion.

    Args:
        groups: Answered tasks.
    """
    for group in groups:
        for sample in group.samples:
            yield {
                "task": group.task.id,
                "prompt": [dict(message) for message in group.task.messages],
                "completion": sample.action.text,
                "token_ids": list(sample.action.token_ids),
                "logprobs": list(sample.action.token_logprobs),
                "logprob_sum": sample.action.logprob_sum,
                "reward": sample.reward,
                "rewards": dict(sample.rewards),
                "finish_reason": sample.action.finish_reason,
                "policy_version": sample.action.policy_version,
            }
