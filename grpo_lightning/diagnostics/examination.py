"""What every part of the doctor is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from grpo_lightning.diagnostics.checks.step import StepSize
from grpo_lightning.diagnostics.thresholds import Thresholds
from grpo_lightning.diagnostics.truncation import Kept
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.diagnostics.verdict import Verdict
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.rollout import Rollout

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from grpo_lightning.callbacks.lora_sync import LoRAWeightSync
    from grpo_lightning.datamodule import RolloutDataModule
    from grpo_lightning.module import GRPOModule


@dataclass(frozen=True)
class Run:
    """The run that is examined, at one moment.

    Attributes:
        trainer: Its Trainer.
        module: Its module.
        data: Its data module; None if batches come from elsewhere.
        sync: What publishes the adapter; None if nothing does.
        thresholds: The doctor's limits.
        kept: What a declared truncation of the sampling keeps, of the first tokens of the rollout that is trained on;
            None without one, and in all processes but the first.
        noise_floor: RMS difference in nats between trainer and engine at equal weights, as measured before the first
            rollout, the largest of all measurements; None if it was not. 0 says that they compute alike bit for bit.
    """

    trainer: "Trainer"
    module: "GRPOModule"
    data: "RolloutDataModule | None"
    sync: "LoRAWeightSync | None"
    thresholds: Thresholds
    noise_floor: float | None = None
    kept: Kept | None = None

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the policy's parameters by name; going through a model's modules takes milliseconds."""
        return dict(self.module.policy.model.named_parameters())

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """Those that are trained, as they are asked for."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}


class Examination:
    """One part of the doctor: it sees the run at fixed moments and answers with verdicts.

    A moment's verdicts of all parts are judged together. Where a hook is called in the first process alone, nothing in
    it may wait for the others.

    Attributes:
        name: Names the part in checkpoints and in ``doctor.json``.
        noise_floor: See `Run.noise_floor`; None if this part did not measure it.
    """

    name = ""
    noise_floor: float | None = None

    def reset(self) -> None:
        """Forget an earlier run."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""

    def facts(self) -> dict[str, Any]:
        """What the report shows of this part, as JSON values; see ``docs/reference/doctor-json.md``."""
        return {}

    def on_sync(self, run: Run) -> Sequence[Verdict]:
        """The engine serves a newly published policy and generates nothing yet; first process."""
        return ()

    def on_rollout(self, run: Run, rollout: Rollout) -> Sequence[Verdict]:
        """A rollout is about to be trained on; first process, which has its groups."""
        return ()

    def on_batch(self, run: Run, batch: PackedBatch) -> None:
        """A micro-batch is about to be computed; every process."""

    def on_update(self, run: Run, update: Update) -> Sequence[Verdict]:
        """All gradients of an optimizer step are there, and nothing is applied yet; first process.

        `Update.evidence` is that of all processes, with the ledger's logprobs.
        """
        return ()

    def before_step(self, run: Run, update: Update, optimizer: Optimizer) -> None:
        """The step is about to be taken; every process."""

    def after_step(self, run: Run, update: Update, step: StepSize) -> Sequence[Verdict]:
        """The step was taken; every process, with equal verdicts."""
        return ()
