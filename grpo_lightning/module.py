"""The policy and its GRPO loss as a LightningModule."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from grpo_lightning.adapter_config import DEFAULT_ALPHA, DEFAULT_RANK, DEFAULT_TARGETS, largest_rank
from grpo_lightning.attention import SHARED_PROMPT
from grpo_lightning.checkpoint_check import (
    STATE_KEY,
    StartRecord,
    check_start,
    check_weights,
    drop_partial_update,
    start_record,
)
from grpo_lightning.checkpoint_io import DurableCheckpointIO
from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.diagnostics import MicroBatchEvidence
from grpo_lightning.diagnostics.update import Update, gradient_norm, micro_batch_evidence
from grpo_lightning.distributed import processes
from grpo_lightning.errors import CheckpointError, ConfigurationError
from grpo_lightning.functional import Aggregation, clipped_surrogate, kl_k3, token_weights
from grpo_lightning.functional.lr_schedule import LRSchedule, lr_factor
from grpo_lightning.loading import Dtype, adapter_settings, load_policy
from grpo_lightning.metrics import EpochStatistics, RatioStats
from grpo_lightning.model_source import expanded
from grpo_lightning.policy import Policy
from grpo_lightning.redact import redact, redact_hyperparameters
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.episode import Predictions
from grpo_lightning.rollout.task_batch import TaskBatch
from grpo_lightning.trainer_check import epoch_updates


class GRPOModule(LightningModule):
    """A causal language model, with LoRA or whole, trained by GRPO on the packed batches of `RolloutDataModule`.

    Optimization is automatic: ``gradient_clip_val``, ``accumulate_grad_batches`` and ``precision`` of the Trainer
    mean what they always do, and the loss does not depend on how an optimizer step is cut into micro-batches.

    Args:
        model: Directory or hub name of a Hugging Face causal language model.
        adapter: Folder of an adapter in PEFT's format to continue. Rank, alpha and targets are then the folder's, and
            ``kl_coef`` weighs the KL to the adapter as it was at the start.
        full_finetuning: Train all weights instead of an adapter. Needs float32 weights and an engine that takes whole
            models (`TransformersEngine`).
        dtype: Dtype of the base model's weights and computation; ``"auto"`` takes the checkpoint's. The adapter is
            float32 in any case.
        attn_implementation: ``"grpo_shared_prompt"`` computes each prompt once per group. ``"sdpa"`` and ``"eager"``
            give the same result with a dense mask; others compute each prompt once per sample.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        lora_rank: Rank of a fresh adapter.
        lora_alpha: Scale of a fresh adapter times its rank.
        lora_dropout: Dropout before the adapter. 0, because noise in the ratio hides what the detectors look for.
        lora_targets: Layers that get a fresh adapter: a name or a list of names, ``"all-linear"``, or any other string
            as a regular expression for whole module names.
        learning_rate: Peak learning rate of AdamW. Adapters take about ten times that of full fine-tuning.
        weight_decay: Weight decay of AdamW.
        warmup_updates: Optimizer steps over which the learning rate rises linearly from 0.
        lr_schedule: What it does afterwards, until the planned end of training.
        clip_low: Lower clip of the ratio: it may fall to ``1 - clip_low``.
        clip_high: Upper clip of the ratio: it may rise to ``1 + clip_high``.
        kl_coef: Weight of the k3 KL to the policy before training. 0 skips that forward.
        aggregation: ``"sequence"`` averages tokens within a sequence first (GRPO), ``"token"`` over all tokens (DAPO).
    """

    def __init__(
        self,
        model: str,
        *,
        adapter: str | None = None,
        full_finetuning: bool = False,
        dtype: Dtype = "auto",
        attn_implementation: str = SHARED_PROMPT,
        gradient_checkpointing: bool = False,
        lora_rank: int = DEFAULT_RANK,
        lora_alpha: float = DEFAULT_ALPHA,
        lora_dropout: float = 0.0,
        lora_targets: str | list[str] = DEFAULT_TARGETS,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_updates: int = 0,
        lr_schedule: LRSchedule = "constant",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coef: float = 0.0,
        aggregation: Aggregation = "sequence",
    ) -> None:
        super().__init__()
        model, adapter = expanded(model), adapter and expanded(adapter)
        if learning_rate < 0 or kl_coef < 0 or warmup_updates < 0:
            raise ConfigurationError(
                "expected learning_rate, kl_coef and warmup_updates >= 0, but got "
                f"{learning_rate}, {kl_coef} and {warmup_updates}"
            )
        self.adapter_config = adapter_settings(
            adapter=adapter,
            full_finetuning=full_finetuning,
            dtype=dtype,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            lora_targets=lora_targets,
        )
        self.save_hyperparameters()
        # From the command line the line above takes what was given, not what it is by now.
        self.hparams.update(model=model, adapter=adapter)
        self.model_name = model
        self.policy: Policy
        self._start_record: StartRecord = {}
        # Checkpoints hold what is trained alone; its key set is checked exactly in on_load_checkpoint.
        self.strict_loading = False
        self.policy_version = 0
        self.fitting = False
        self._statistics = EpochStatistics()
        self._evidence: list[MicroBatchEvidence] = []
        self._input_tokens = 0
        self._update: Update | None = None
        self._batch_begin = 0.0

    @property
    def adapter_rank(self) -> int:
        """Largest rank of the adapter; 0 without one."""
        return 0 if self.adapter_config is None else largest_rank(self.adapter_config)

    @property
    def hparams_initial(self) -> AttributeDict:
        """What loggers get of the settings: no secrets."""
        return AttributeDict(redact(dict(super().hparams_initial)))

    def configure_model(self) -> None:
        """Load the policy (once)."""
        if not hasattr(self, "policy"):
            h = self.hparams
            self.policy = load_policy(
                h["model"],
                adapter=h["adapter"],
                full_finetuning=h["full_finetuning"],
                hold_reference=h["kl_coef"] > 0,
                dtype=h["dtype"],
                attn_implementation=h["attn_implementation"],
                lora_rank=h["lora_rank"],
                lora_alpha=h["lora_alpha"],
                lora_dropout=h["lora_dropout"],
                lora_targets=h["lora_targets"],
                gradient_checkpointing=h["gradient_checkpointing"],
            )
            self.policy.check_head()
            self._start_record = start_record(self.policy)

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks without which a run would be unsafe or mute, where the Trainer has none of their kind."""
        from grpo_lightning.callbacks import EpochLine, LoRAWeightSync, PredictionWriter, RunDoctor

        present = self.trainer.callbacks  # type: ignore[attr-defined]
        kinds: tuple[type[Callback], ...] = (LoRAWeightSync, RunDoctor, EpochLine)
        if self.trainer.predicting:
            kinds += (PredictionWriter,)
        return [kind() for kind in kinds if not any(isinstance(c, kind) for c in present)]

    def configure_optimizers(self) -> Any:
        """AdamW over what is trained, with the learning rate's schedule counted in optimizer steps."""
        optimizer = AdamW(
            list(self.policy.trainable_parameters().values()),
            lr=self.hparams["learning_rate"],
            weight_decay=self.hparams["weight_decay"],
        )
        scheduler = LambdaLR(optimizer, self._lr_factor())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self) -> Callable[[int], float]:
        schedule = self.hparams["lr_schedule"]
        planned = self._planned_updates() if schedule != "constant" else 0
        return partial(lr_factor, warmup=self.hparams["warmup_updates"], planned=planned, schedule=schedule)

    def _planned_updates(self) -> int:
        """Optimizer steps of the whole run, by arithmetic: Lightning's estimate would build the train loader."""
        trainer, data = self.trainer, self._data()
        ends = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and data is not None:
            ends.append(trainer.max_epochs * epoch_updates(trainer, data.updates_per_epoch))
        if not ends:
            raise ConfigurationError(
                f"lr_schedule={self.hparams['lr_schedule']!r} needs a planned end: set Trainer(max_epochs=...)"
            )
        return min(ends)

    def setup(self, stage: str) -> None:
        """Forget a fit that ended in an exception, and write checkpoints that are whole or absent."""
        self.fitting = False
        strategy = self.trainer.strategy
        if type(strategy.checkpoint_io) is TorchCheckpointIO:
            strategy.checkpoint_io = DurableCheckpointIO()
        elif isinstance(strategy.checkpoint_io, _WrappingCheckpointIO):
            name = type(strategy.checkpoint_io).__name__
            rank_zero_warn(f"{name} writes through Lightning: a checkpoint may be left incomplete by a power cut.")

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

    def on_train_start(self) -> None:
        """Where an epoch goes on in its middle, no other hook of Lightning sets a scheduled accumulation."""
        data = self._data()
        if data is not None:
            self.trainer.accumulate_grad_batches = data.layout().micro_batches

    def on_train_epoch_start(self) -> None:
        """Start the epoch's counters."""
        self._statistics.reset()

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Start the update's evidence on its first micro-batch.

        Raises:
            ConfigurationError: If ``accumulate_grad_batches`` is not what the rollout was cut for.
        """
        self._batch_begin = time.perf_counter()
        data = self._data()
        if data is not None and data.rollout is not None:
            data.rollout.layout.check_accumulation(self.trainer.accumulate_grad_batches)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._evidence, self._input_tokens, self._update = [], 0, None

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, scaled so that Lightning's and DDP's averages give the exact global mean."""
        loss, evidence = self.batch_loss(batch)
        self._evidence.append(evidence)
        self._input_tokens += batch.num_tokens
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def batch_loss(self, batch: PackedBatch) -> tuple[Tensor, MicroBatchEvidence]:
        """A micro-batch's share of the loss of its optimizer step, and what the checks see of it.

        Args:
            batch: The micro-batch, on this module's device.

        Raises:
            LedgerError: If not all of its targets were sampled by the policy.
        """
        batch.require_sampled()
        current = self.policy.token_logprobs(batch)
        logprobs = current.logprobs
        surrogate = clipped_surrogate(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.loss_weight,
            clip_low=self.hparams["clip_low"],
            clip_high=self.hparams["clip_high"],
        )
        loss = surrogate.loss
        reference = torch.full_like(current.entropy, torch.nan)
        if self.hparams["kl_coef"] > 0:
            with self.policy.reference():
                reference, *_ = self.policy.token_logprobs(batch)
            loss = loss + self.hparams["kl_coef"] * (batch.loss_weight * kl_k3(logprobs, reference)).sum()
        evidence = micro_batch_evidence(batch, current, surrogate, reference, self.policy_version)
        if logprobs.requires_grad:
            note = partial(self._note_gradient, len(self._evidence), batch.loss_weight > 0)
            logprobs.register_hook(note)  # type: ignore[no-untyped-call]
        return loss, evidence

    def _note_gradient(self, micro_batch: int, real: Tensor, gradient: Tensor) -> None:
        """What the backward pass brings to the log-probabilities of a micro-batch belongs to its evidence."""
        if micro_batch < len(self._evidence):
            noted = gradient.detach()[real].cpu().double()
            self._evidence[micro_batch] = replace(self._evidence[micro_batch], gradient=noted)

    def current_update(self) -> Update:
        """What the optimizer step that is about to be taken sees, of all processes together.

        All processes must call it; the result is kept until the next step's first micro-batch.
        """
        if self._update is None:
            mine = (MicroBatchEvidence.join(self._evidence), self._input_tokens)
            parts, tokens = zip(*processes().gather(mine), strict=True)
            evidence = MicroBatchEvidence.join(parts)
            stats = RatioStats(sync_on_compute=False)
            stats.update(evidence.log_ratio)
            self._update = Update(
                evidence=evidence,
                ratio={name: float(value) for name, value in stats.compute().items()},
                input_tokens=sum(tokens),
                grad_norm=gradient_norm(p.grad for p in self.policy.parameters() if p.grad is not None),
            )
        return self._update

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log what the update saw.

        Raises:
            FloatingPointError: If the loss is not finite; the step is not taken.
        """
        update = self.current_update()
        finite = update.evidence.log_ratio.isfinite()
        if not bool(finite.all()):
            raise FloatingPointError(
                f"the loss is not finite in epoch {self.current_epoch}: {int((~finite).sum())} of {len(finite)} "
                "log-ratios are not"
            )
        self._statistics.add_update(update.evidence, update.input_tokens)
        self.log("policy/grad_norm", update.grad_norm, on_step=True, on_epoch=False)
        self.log_dict({f"ppo/ratio_{name}": v for name, v in update.ratio.items()}, on_step=True, on_epoch=False)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and count it as a new policy version."""
        super().optimizer_step(*args, **kwargs)
        self.weights_changed()

    def examined(self, seconds: float) -> None:
        """Count time that the doctor took between an epoch's start and end; it is none of the training's."""
        self._batch_begin += seconds
        self._statistics.add_doctor_seconds(seconds)

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        """Count the time: a validation may follow before the epoch ends."""
        self._statistics.add_seconds(time.perf_counter() - self._batch_begin)

    def on_train_epoch_end(self) -> None:
        """Log the epoch under the same names as each update."""
        self.log_dict(self.epoch_metrics(), on_step=False, on_epoch=True, sync_dist=True)

    def epoch_metrics(self) -> dict[str, float]:
        """What the current epoch sampled, what it trained, what it cost; see ``docs/metrics.md``."""
        data = self._data()
        sampled = {} if data is None or data.rollout is None else data.rollout.origin.metrics
        trained = self._statistics.compute()
        doctor = trained["time/doctor_seconds"] + sampled.get("time/doctor_seconds", 0.0)
        return {**trained, **sampled, "time/doctor_seconds": doctor}

    def _data(self) -> RolloutDataModule | None:
        data = getattr(self.trainer, "datamodule", None)
        return data if isinstance(data, RolloutDataModule) else None

    def validation_step(self, batch: TaskBatch, batch_idx: int) -> None:
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
                    sync_dist=True,
                )

    def predict_step(self, batch: TaskBatch, batch_idx: int) -> Predictions:
        """Answer one batch of the tasks to predict."""
        return Predictions(self.trainer.datamodule.predict(batch))  # type: ignore[attr-defined]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is trained, drop the frozen base and any secret; note the start, the version, the epoch so far."""
        redact_hyperparameters(checkpoint)
        trainable = self._trainable_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trainable}
        checkpoint[STATE_KEY] = {
            "prompts": None if (data := self._data()) is None else data.sampler.encoder.record(),
            "policy_version": self.policy_version,
            "statistics": self._statistics.state_dict(),
            "start": self._start_record,
        }
        drop_partial_update(checkpoint, self.trainer.accumulate_grad_batches)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the version, after checking that the checkpoint holds exactly the weights that are trained here.

        Raises:
            CheckpointError: If keys are missing or unknown, or the policy started from something else.
        """
        state = checkpoint.get(STATE_KEY)
        if state is None:
            raise CheckpointError("expected a checkpoint of a GRPOModule, but this one was saved by something else")
        check_start(state["start"], self._start_record, self.model_name, self.hparams["adapter"])
        trainable = self._trainable_keys()
        expected = {name: tensor for name, tensor in self.state_dict().items() if name in trainable}
        check_weights(checkpoint["state_dict"], expected)
        data = self._data() if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING else None
        if data is not None and type(data).__qualname__ not in checkpoint:
            raise CheckpointError(
                f"the checkpoint holds no state of {type(data).__name__}, so the order of tasks cannot go on. Resume "
                "with the data module class that the run was started with"
            )
        self.policy_version = state["policy_version"]
        self._statistics.load_state_dict(state["statistics"])

    def _trainable_keys(self) -> set[str]:
        return {f"policy.model.{name}" for name in self.policy.trainable_parameters()}
