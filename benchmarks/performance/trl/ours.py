"""This project's side: a run as users start one, whose epochs are taken in turns.

Run: python -m benchmarks.performance.trl.ours SPEC.json
"""

import resource
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.performance.engines import make_engine
from benchmarks.performance.trl.cases import REWARDS, Case
from benchmarks.performance.turns import Turns, spec
from grpo_lightning import GRPOModule, RolloutDataModule
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.loader import BatchLoader
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import sequential

PHASES = ("rollout", "train", "sync", "doctor")


class TurnTaking(RolloutDataModule):
    """Waits before each epoch's rollout.

    Args:
        turns: The gate.
        exact: Ban the tokens that end completions, so that all are of the greatest length.
        **settings: Of `RolloutDataModule`.
    """

    def __init__(self, turns: Turns, exact: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._turns = turns
        self._exact = exact
        self._epoch = -1

    def setup(self, stage: str) -> None:
        """As ever, then ban the ends, in sampling and in the trainer's softmax alike."""
        super().setup(stage)
        if self._exact:
            banned = {*self.sampler.banned_token_ids, *self.sampler.encoder.stop_token_ids}
            self._sampler = replace(self.sampler, banned_token_ids=tuple(sorted(banned)))

    def train_dataloader(self) -> BatchLoader[PackedBatch]:
        """Wait, then make the rollout; all until the next time belongs to the turn."""
        epoch = self._trainer().fit_loop.epoch_progress.current.processed
        if epoch != self._epoch:
            self._epoch = epoch
            self._turns.wait()
        return super().train_dataloader()


class Report(Callback):
    """Reports each epoch."""

    def __init__(self, turns: Turns, completions: int) -> None:
        self._turns = turns
        self._completions = completions

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What it was made of."""
        assert isinstance(pl_module, GRPOModule)
        metrics = pl_module.epoch_metrics()
        self._turns.note(
            {
                "phases": {name: metrics[f"time/{name}_seconds"] for name in PHASES},
                "reward": metrics["reward/mean"],
                "tokens": metrics["tokens/sampled"] / self._completions,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last epoch has no successor that would end it."""
        self._turns.finish()


def main() -> None:
    """Train, an epoch a turn."""
    asked, turns = spec(), Turns()
    case = Case(**asked["case"])
    seed_everything(asked.get("seed", 0), verbose=False)
    data = TurnTaking(
        turns,
        case.exact,
        tasks=[Task(id=t["id"], messages=tuple(t["messages"]), data=t["data"]) for t in asked["tasks"]],
        rewards=REWARDS[case.reward],
        engine=make_engine("bfloat16"),
        order=sequential,
        prompts_per_rollout=case.prompts,
        samples_per_prompt=case.samples,
        max_tokens=case.tokens,
        max_prompt_tokens=max(case.prompt_tokens, 128),
        seed=asked.get("seed", 0),
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=asked["updates"],
        gradient_clip_val=1.0,
        callbacks=[Report(turns, case.completions)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    compiles = asked.get("torch_compile", False)
    module = GRPOModule(asked["model"], dtype="bfloat16", torch_compile=compiles, learning_rate=case.learning_rate)
    trainer.fit(module, data)


if __name__ == "__main__":
    main()
