"""One run: an algorithm, a seed."""

import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from benchmarks.faults.witness import Witness
from benchmarks.learning.algorithms import Settings
from benchmarks.learning.exact import examine
from benchmarks.learning.sums import Sum, Sums, right
from grpo_lightning import GRPOModule, RolloutDataModule, TransformersEngine
from grpo_lightning.callbacks import EpochLine


class Examiner(Callback):
    """Examines the policy before training and after every epoch, on a copy: the policy is not touched.

    Args:
        start: Folder of the model.
        held_out: Sums that it is asked.
    """

    def __init__(self, start: Path, held_out: list[Sum]) -> None:
        from transformers import AutoModelForCausalLM

        self._copy: Any = AutoModelForCausalLM.from_pretrained(start, dtype="float32").eval()
        self._held_out = held_out
        self.scores: list[dict[str, float]] = []
        self.epochs: list[dict[str, float]] = []
        self.seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before."""
        self._examine(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each epoch."""
        assert isinstance(pl_module, GRPOModule)
        self._examine(pl_module)
        self.epochs.append(pl_module.epoch_metrics())

    def _examine(self, module: Any) -> None:
        begin = time.process_time()
        self._copy.load_state_dict(module.policy.causal_lm.state_dict())
        self.scores.append(asdict(examine(self._copy, self._held_out)))
        self.seconds += time.process_time() - begin


class _Quiet(EpochLine):
    """Says nothing."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing."""


def train(
    settings: Settings, start: Path, train_sums: list[Sum], held_out: list[Sum], *, seed: int, epochs: int, folder: Path
) -> dict[str, Any]:
    """Train once and say what came of it.

    Args:
        settings: Of module and data module.
        start: Folder of the model.
        train_sums: Sums to train on.
        held_out: Sums to examine it on.
        seed: Of the order of tasks and of sampling.
        epochs: Rollouts.
        folder: For what the run leaves behind.
    """
    seed_everything(seed, verbose=False)
    # What the doctor says is written down and not acted on: all runs are equally long.
    doctor, examiner = Witness(acts=False), Examiner(start, held_out)
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[doctor, examiner, _Quiet()],
        )
        engine = TransformersEngine(dtype="float32", max_batch_size=128)
        try:
            trainer.fit(
                GRPOModule(str(start), **settings["model"]),
                RolloutDataModule(Sums(train_sums), right, engine=engine, seed=seed, **settings["data"]),
            )
        finally:
            engine.close()
    return {
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "examiner_cpu_seconds": round(examiner.seconds, 1),
        "updates": trainer.global_step,
        **curves(examiner),
        "verdicts": doctor.counts,
        "findings": sorted({f"{f.reaction} {f.cause}: {f.text.splitlines()[0]}" for f in doctor.findings}),
    }


def curves(examiner: Examiner) -> dict[str, list[float]]:
    """The course of a run; scores begin before training, the rest with the first epoch."""
    names = {
        "entropy_sampled": "policy/entropy",
        "clip_low": "ppo/clip_fraction_low",
        "clip_high": "ppo/clip_fraction_high",
        "kl": "ppo/kl_k3",
        "replaced": "group/replaced",
    }
    scores = {name: [round(s[name], 5) for s in examiner.scores] for name in examiner.scores[0]}
    return scores | {
        short: [round(e[name], 6) for e in examiner.epochs]
        for short, name in names.items()
        if name in examiner.epochs[0]
    }
