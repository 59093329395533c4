"""What ``predict`` generated, in a file."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from grpo_lightning.callbacks.run_directory import new_file, run_directory
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.records import episode_record


class PredictionWriter(Callback):
    """Writes every completion of ``predict`` to ``predictions.jsonl`` in the run's folder, as batches finish.

    Where that is there already, to ``predictions-1.jsonl`` and so on.

    One JSON object a line: task, prompt, completion, token ids, logprobs (of each token, at the temperature it was
    sampled with) and their sum, reward, rewards by name, finish reason, policy version. Rewards are null where none
    applies.
    """

    def __init__(self) -> None:
        self.path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose a new file in the run's folder: another policy's answers are not added to."""
        self.path = new_file(run_directory(trainer), "predictions.jsonl")

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
        assert self.path is not None, "on_predict_start comes first"
        with self.path.open("a", encoding="utf-8") as file:
            for record in prediction_records(outputs):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the predictions are."""
        if trainer.is_global_zero:
            print(f"Predictions: {self.path}", flush=True)


def prediction_records(groups: Iterable[Group]) -> Iterator[dict[str, Any]]:
    """One record for each completion.

    Args:
        groups: Answered tasks.
    """
    for group in groups:
        for episode in group.episodes:
            sampled = [
                (ledger.token_ids[ledger.sampled], ledger.logprobs[ledger.sampled]) for ledger in episode.ledgers
            ]
            logprobs = [value for _, values in sampled for value in values.tolist()]
            yield {
                **episode_record(group.task, episode),
                "token_ids": [token for ids, _ in sampled for token in ids.tolist()],
                "logprobs": logprobs,
                "logprob_sum": sum(logprobs),
            }
