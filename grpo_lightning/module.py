"""The policy and its GRPO loss as a LightningModule."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grpo_lightning.attention import SHARED_PROMPT
from grpo_lightning.datamodule import EvaluationBatch, RolloutDataModule
from grpo_lightning.diagnostics import MicroBatchEvidence
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional import Aggregation, clipped_surrogate, kl_k3, token_weights
from grpo_lightning.metrics import RatioStats
from grpo_lightning.policy import Dtype, Policy, load_policy
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.types import Predictions

_POLICY_VERSION_KEY = "grpo_lightning_policy_version"


class GRPOModule(LightningModule):
    """A causal language model with LoRA, trained by GRPO on the packed batches of `RolloutDataModule`.

    Optimization is automatic: ``gradient_clip_val``, ``accumulate_grad_batches`` and ``precision`` of the Trainer
    mean what they always do, and the loss does not depend on how an optimizer step is cut into micro-batches.

    Args:
        model: Directory or hub name of a Hugging Face causal language model.
        dtype: Dtype of the base model's weights and computation; ``"auto"`` takes the checkpoint's. The adapter is
            float32 in any case.
        attn_implementation: ``"grpo_shared_prompt"`` computes each prompt once per group. ``"sdpa"`` and ``"eager"``
            give the same result with a dense mask; others compute each prompt once per sample.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        lora_rank: Rank of the adapter.
        lora_alpha: Scale of the adapter times its rank.
        lora_dropout: Dropout before the adapter. 0, because noise in the ratio hides what the detectors look for.
        lora_targets: Layers with an adapter, by name, or ``"all-linear"``.
        learning_rate: Peak learning rate of AdamW. Adapters take about ten times that of full fine-tuning.
        weight_decay: Weight decay of AdamW.
        warmup_updates: Optimizer steps over which the learning rate rises linearly from 0.
        lr_schedule: What it does afterwards, until the planned end of training.
        clip_low: Lower clip of the ratio: it may fall to ``1 - clip_low``.
        clip_high: Upper clip of the ratio: it may rise to ``1 + clip_high``.
        kl_coef: Weight of the k3 KL to the base model. 0 skips the reference's forward.
        aggregation: ``"sequence"`` averages tokens within a sequence first (GRPO), ``"token"`` over all tokens (DAPO).
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: Dtype = "auto",
        attn_implementation: str = SHARED_PROMPT,
        gradient_checkpointing: bool = False,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        lora_targets: str | list[str] = "all-linear",
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_updates: int = 0,
        lr_schedule: Literal["constant", "linear", "cosine"] = "constant",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coef: float = 0.0,
        aggregation: Aggregation = "sequence",
    ) -> None:
        super().__init__()
        if learning_rate < 0 or kl_coef < 0 or warmup_updates < 0:
            raise ConfigurationError(
                "expected learning_rate, kl_coef and warmup_updates >= 0, but got "
                f"{learning_rate}, {kl_coef} and {warmup_updates}"
            )
        self.save_hyperparameters()
        self.model_name = model
        self.policy: Policy
        # Checkpoints hold the adapter alone; its key set is checked exactly in on_load_checkpoint.
        self.strict_loading = False
        self.policy_version = 0
        self.evidence: list[MicroBatchEvidence] = []
        self.update_ratio = RatioStats()
        self.epoch_ratio = RatioStats()
        self._sums: dict[str, float] = {}
        self._epoch_max_k = 0
        self._train_tokens = 0
        self._train_begin = 0.0
        self._train_seconds = 0.0
        self.fitting = False

    def configure_model(self) -> None:
        """Load base model and adapter (once)."""
        if not hasattr(self, "policy"):
            h = self.hparams
            self.policy = load_policy(
                h["model"],
                dtype=h["dtype"],
                attn_implementation=h["attn_implementation"],
                lora_rank=h["lora_rank"],
                lora_alpha=h["lora_alpha"],
                lora_dropout=h["lora_dropout"],
                lora_targets=h["lora_targets"],
                gradient_checkpointing=h["gradient_checkpointing"],
            )
            self.policy.check_head()

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks without which a run would be unsafe or mute, where the Trainer has none of their kind."""
        from grpo_lightning.callbacks import EpochLine, LoRAWeightSync, PredictionWriter, RatioDegeneracyDetector

        present = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds: tuple[type[Callback], ...] = (LoRAWeightSync, RatioDegeneracyDetector, EpochLine)
        if self.trainer.predicting:
            kinds += (PredictionWriter,)
        return [kind() for kind in kinds if not any(isinstance(c, kind) for c in present)]

    def configure_optimizers(self) -> Any:
        """AdamW over the adapter, with the learning rate's schedule counted in optimizer steps."""
        optimizer = AdamW(
            list(self.policy.trainable_parameters().values()),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        scheduler = LambdaLR(optimizer, self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self) -> Callable[[int], float]:
        warmup, schedule = int(self.hparams["warmup_updates"]), str(self.hparams["lr_schedule"])
        planned = self._planned_updates() if schedule != "constant" else 0

        def factor(update: int) -> float:
            if update < warmup:
                return update / warmup
            if schedule == "constant":
                return 1.0
            progress = min(1.0, (update - warmup) / max(1, planned - warmup))
            return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

        return factor

    def _planned_updates(self) -> int:
        """Optimizer steps of the whole run, by arithmetic: Lightning's estimate would build the train loader."""
        trainer = self.trainer
        if trainer.max_steps > 0:
            return trainer.max_steps
        data = self._data()
        if trainer.max_epochs is None or trainer.max_epochs < 0 or data is None:
            raise ConfigurationError(
                f"lr_schedule={self.hparams['lr_schedule']!r} needs a planned end: set Trainer(max_epochs=...)"
            )
        return trainer.max_epochs * data.updates_per_epoch

    def setup(self, stage: str) -> None:
        """An earlier fit may have ended in an exception."""
        self.fitting = False

    def on_fit_start(self) -> None:
        """From here on rollouts may be made."""
        self.fitting = True

    def on_fit_end(self) -> None:
        """Training is over."""
        self.fitting = False

    def token_weights(self, lengths: Sequence[int]) -> list[float]:
        """Loss weight of a token in each of an optimizer step's sequences (`functional.token_weights`)."""
        return token_weights(lengths, self.hparams["aggregation"])

    def weights_changed(self) -> None:
        """Count a change of the weights. Whoever writes to them outside the optimizer must call this."""
        self.policy_version += 1

    def on_train_epoch_start(self) -> None:
        """Start the epoch's counters.

        Raises:
            ConfigurationError: If ``accumulate_grad_batches`` is not what the rollout was cut for.
        """
        data = self._data()
        if data is not None and data.rollout is not None:
            expected = data.updates_per_epoch * self.trainer.accumulate_grad_batches
            if len(data.rollout.batches) != expected:
                raise ConfigurationError(
                    f"expected {expected} micro-batches, but the rollout was cut into {len(data.rollout.batches)}: "
                    "accumulate_grad_batches changed meanwhile (GradientAccumulationScheduler is not supported)"
                )
        self.epoch_ratio.reset()
        self._sums = {}
        self._epoch_max_k = 0
        self._train_tokens = 0
        self._train_begin = time.perf_counter()

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Start the update's counters on its first micro-batch."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.evidence = []
            self.update_ratio.reset()

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that Lightning's and DDP's averages give the exact global mean.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        logprobs, entropy = self.policy.token_logprobs(batch)
        surrogate = clipped_surrogate(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.loss_weight,
            clip_low=self.hparams["clip_low"],
            clip_high=self.hparams["clip_high"],
        )
        loss = surrogate.loss
        real = batch.loss_weight > 0
        if self.hparams["kl_coef"] > 0:
            with self.policy.reference():
                reference, _ = self.policy.token_logprobs(batch)
            kl = kl_k3(logprobs, reference)
            loss = loss + self.hparams["kl_coef"] * (batch.loss_weight * kl).sum()
            self._add("kl_reference", kl.detach()[real].sum())
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} in epoch {self.current_epoch}, batch {batch_idx}: log-ratios in "
                f"[{float(surrogate.log_ratio.min()):.3g}, {float(surrogate.log_ratio.max()):.3g}]"
            )
        log_ratio = surrogate.log_ratio[real]
        k = self.policy_version - batch.policy_version[real]
        self.update_ratio.update(log_ratio)
        self.epoch_ratio.update(log_ratio)
        self.evidence.append(_evidence(batch, logprobs, surrogate.log_ratio, self.policy_version))
        self._add("tokens", real.sum())
        self._add("clipped_low", surrogate.clipped_low[real].sum())
        self._add("clipped_high", surrogate.clipped_high[real].sum())
        self._add("kl_k1", -log_ratio.sum())
        self._add("kl_k3", (torch.expm1(log_ratio) - log_ratio).sum())
        self._add("entropy", entropy[real].sum())
        if batch.first_of_rollout and bool((k == 0).all()):
            self._add("fresh_tokens", real.sum())
            self._add("fresh_abs", log_ratio.abs().sum())
            self._sums["fresh_max"] = float(log_ratio.abs().max()) if len(log_ratio) else 0.0
            self._add("fresh_k3", (torch.expm1(log_ratio) - log_ratio).sum())
        self._epoch_max_k = max(self._epoch_max_k, int(k.max()) if len(k) else 0)
        self._train_tokens += batch.num_tokens
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log what the update saw."""
        grads = [p.grad.norm() for p in self.policy.trainable_parameters().values() if p.grad is not None]
        norm = torch.stack(grads).norm() if grads else torch.zeros(())
        self.log("policy/grad_norm", norm, on_step=True, on_epoch=False)
        self.log_dict(
            {f"ppo/ratio_{name}": value.float() for name, value in self.update_ratio.compute().items()},
            on_step=True,
            on_epoch=False,
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and count it as a new policy version."""
        super().optimizer_step(*args, **kwargs)
        self.weights_changed()

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        """Stop the epoch's clock: validation follows before the epoch ends."""
        self._train_seconds = time.perf_counter() - self._train_begin

    def on_train_epoch_end(self) -> None:
        """Log the epoch under the same names as each update."""
        self.log_dict(self.epoch_metrics(), on_step=False, on_epoch=True)

    def epoch_metrics(self) -> dict[str, Any]:
        """What the current epoch sampled, what it trained, what it cost; see ``docs/metrics.md``."""
        sums = {"tokens": 0.0, **self._sums}
        tokens = max(1.0, sums["tokens"])
        metrics: dict[str, Any] = {f"ppo/ratio_{n}": v.float() for n, v in self.epoch_ratio.compute().items()}
        metrics |= {
            "ppo/clip_fraction_low": sums.get("clipped_low", 0.0) / tokens,
            "ppo/clip_fraction_high": sums.get("clipped_high", 0.0) / tokens,
            "ppo/kl_k1": sums.get("kl_k1", 0.0) / tokens,
            "ppo/kl_k3": sums.get("kl_k3", 0.0) / tokens,
            "ppo/updates_since_sampling": float(self._epoch_max_k),
            "policy/entropy": sums.get("entropy", 0.0) / tokens,
            "tokens/trained": sums["tokens"],
            "time/train_seconds": self._train_seconds,
            "throughput/train_tokens_per_second": self._train_tokens / max(1e-9, self._train_seconds),
        }
        if "kl_reference" in sums:
            metrics["policy/kl_reference"] = sums["kl_reference"] / tokens
        fresh = sums.get("fresh_tokens", 0.0)
        if fresh:
            metrics["mismatch/logprob_abs_mean"] = sums["fresh_abs"] / fresh
            metrics["mismatch/logprob_abs_max"] = sums["fresh_max"]
            metrics["mismatch/kl_k3"] = sums["fresh_k3"] / fresh
        data = self._data()
        if data is not None:
            metrics |= data.rollout_metrics
        return metrics

    def _data(self) -> RolloutDataModule | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, RolloutDataModule) else None

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Generate and score one batch of held-out tasks."""
        scores = self.trainer.datamodule.evaluate(batch)  # type: ignore[attr-defined]
        for name, values in scores.items():
            if values:
                self.log(
                    f"val/{name}",
                    sum(values) / len(values),
                    batch_size=len(values),
                    on_step=False,
                    on_epoch=True,
                    prog_bar=name == "accuracy",
                )

    def predict_step(self, batch: EvaluationBatch, batch_idx: int) -> Predictions:
        """Answer one batch of the tasks to predict."""
        return Predictions(self.trainer.datamodule.predict(batch))  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter, drop the frozen base, and note the policy's version."""
        trainable = self._trainable_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint[_POLICY_VERSION_KEY] = self.policy_version

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the version, after checking that the checkpoint holds exactly this adapter.

        Raises:
            ConfigurationError: If keys are missing or unknown.
        """
        expected, found = self._trainable_keys(), set(checkpoint["state_dict"])
        if expected != found:
            missing, unknown = sorted(expected - found), sorted(found - expected)
            raise ConfigurationError(
                f"the checkpoint does not fit this adapter: {len(missing)} parameters are missing {missing[:3]}, "
                f"{len(unknown)} are unknown {unknown[:3]}. Are model, lora_targets and lora_rank the same?"
            )
        self.policy_version = checkpoint[_POLICY_VERSION_KEY]

    def _trainable_keys(self) -> set[str]:
        return {f"policy.model.{name}" for name in self.policy.trainable_parameters()}


def _evidence(batch: PackedBatch, logprobs: Tensor, log_ratio: Tensor, version: int) -> MicroBatchEvidence:
    real = (batch.loss_weight > 0).cpu()
    count = int(real.sum())

    def keep(values: Tensor) -> Tensor:
        return values.detach().cpu()[real]

    return MicroBatchEvidence(
        batch_index=torch.full((count,), batch.index),
        token_index=torch.arange(len(real))[real],
        sequence=keep(batch.sequence_index),
        logprobs=keep(logprobs).double(),
        log_ratio=keep(log_ratio).double(),
        stored=torch.full((count,), torch.nan, dtype=torch.float64),
        weighted_advantage=keep(batch.loss_weight * batch.advantages).double(),
        updates_since_sampling=version - keep(batch.policy_version),
    )
