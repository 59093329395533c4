"""The policy and its GRPO loss as a LightningModule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from grpo_lightning.adapter_config import DEFAULT_ALPHA, DEFAULT_RANK, DEFAULT_TARGETS
from grpo_lightning.attention import SHARED_PROMPT
from grpo_lightning.bounds import require_not_negative
from grpo_lightning.checkpoint_check import StartRecord
from grpo_lightning.coefficients import Coefficients, Controls
from grpo_lightning.compiled import as_in_training
from grpo_lightning.diagnostics import MicroBatchEvidence
from grpo_lightning.diagnostics.update import Update, gradient_norm, micro_batch_evidence
from grpo_lightning.distributed import processes
from grpo_lightning.early_end import check_max_kl, end_epoch, is_beyond
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.functional import AGGREGATIONS, Aggregation, KLEstimator, RatioName, TokenLoss, kl_k3, token_weights
from grpo_lightning.functional.correction import Correction
from grpo_lightning.functional.logprobs import TokenLogprobs
from grpo_lightning.functional.lr_schedule import LRSchedule
from grpo_lightning.loading import Dtype, adapter_settings
from grpo_lightning.metrics import EpochStatistics, RatioStats
from grpo_lightning.model_source import expanded
from grpo_lightning.named import name_of, one_of
from grpo_lightning.objective import LossInputs, Objective, policy_loss
from grpo_lightning.peak_memory import PEAK, peak_bytes
from grpo_lightning.phases import PhaseClock, time_metrics, train_throughput
from grpo_lightning.policy import evaluating
from grpo_lightning.policy_module import PolicyModule
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.rescored import Rescored, rescore
from grpo_lightning.rollout.rollout import Rollout


class GRPOModule(PolicyModule):
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
            give the same result with a dense mask, ``"flex_attention"`` (GPU only, untested there) with a block mask;
            others compute each prompt once per sample.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        torch_compile: Compile the layers: training steps are faster (see ``docs/performance.md``) once the first has
            waited for the compiler, about a minute on two cores. Needs a C++ compiler on CPUs.
        lora_rank: Rank of a fresh adapter.
        lora_alpha: Scale of a fresh adapter times its rank.
        lora_dropout: Dropout before the adapter. 0, because noise in the ratio hides what the detectors look for.
        lora_targets: Layers that get a fresh adapter: a name or a list of names, ``"all-linear"``, or any other string
            as a regular expression for whole module names.
        learning_rate: Peak learning rate of AdamW. Adapters take about ten times that of full fine-tuning.
        weight_decay: Weight decay of AdamW.
        warmup_updates: Optimizer steps over which the learning rate rises linearly from 0.
        lr_schedule: What it does afterwards, until the planned end of training.
        surrogate: The policy-gradient loss of a token: a name of ``docs/algorithms.md`` (``"clipped"`` is PPO's and
            GRPO's), or a function of `PolicyTerms` that returns a `TokenLoss`, in YAML its import path.
        surrogate_args: Its settings beside the clips.
        ratio_level: What the ratio compares: ``"token"`` (PPO, GRPO), ``"sequence"`` or ``"sequence_token"`` (GSPO), or
            ``"sequence_product"``.
        clip_low: Lower clip of the ratio, which may fall to ``1 - clip_low``; by default the surrogate's own, 0.2 for
            ``"clipped"``.
        clip_high: Upper clip of the ratio, which may rise to ``1 + clip_high``; by default the surrogate's own.
        kl_coef: Weight of the KL to the policy before training. 0 skips that forward.
        kl_estimator: Estimator of that KL: ``"k3"`` (GRPO), ``"k2"`` or ``"abs"``; in the reward also ``"k1"``.
        kl_in: Whether it stands in the ``"loss"``, or its sum over an episode is subtracted from the ``"reward"``, at
            the cost of a forward pass of the policy.
        old_logprobs: What the ratio compares with: what the ``"engine"`` returned, or what the ``"trainer"`` computes
            of each rollout before it trains on it (decoupled PPO's proximal policy), at the cost of a forward pass.
        correction: Factor for the difference of the two: a name of ``docs/algorithms.md``, or a function, in YAML its
            import path. It implies ``old_logprobs="trainer"``.
        correction_args: Its settings.
        entropy_share: Share of an update's tokens, those of the highest entropy, that the surrogate is computed of; all
            by default.
        kl_target: KL in nats a token that ``kl_coef`` is moved towards at every update; by default it stays.
        kl_horizon: Updates in which it follows.
        entropy_coef: Weight of the policy's entropy, which is maximised.
        entropy_target: Entropy in nats a token below which that weight rises; by default it stays.
        entropy_step: By how much, at each update.
        entropy_max: How far.
        aggregation: How tokens are averaged: ``"sequence"`` within a sequence first (GRPO), ``"token"`` over all tokens
            of the step (DAPO), ``"constant"`` by a fixed length (Dr. GRPO), ``"sequence_sum"`` not at all.
        aggregation_length: That fixed length; by default the longest completion that is allowed.
        max_kl: KL in nats a token from the policy that the ratio compares with (``ppo/kl_k3``) at which an update is
            the last of its epoch; none by default.
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
        torch_compile: bool = False,
        lora_rank: int = DEFAULT_RANK,
        lora_alpha: float = DEFAULT_ALPHA,
        lora_dropout: float = 0.0,
        lora_targets: str | list[str] = DEFAULT_TARGETS,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_updates: int = 0,
        lr_schedule: LRSchedule = "constant",
        surrogate: str | Callable[..., TokenLoss] = "clipped",
        surrogate_args: dict[str, Any] | None = None,
        ratio_level: RatioName = "token",
        clip_low: float | None = None,
        clip_high: float | None = None,
        kl_coef: float = 0.0,
        kl_estimator: KLEstimator = "k3",
        kl_in: Literal["loss", "reward"] = "loss",
        kl_target: float | None = None,
        kl_horizon: float = 100.0,
        entropy_coef: float = 0.0,
        entropy_target: float | None = None,
        entropy_step: float = 1e-3,
        entropy_max: float = 0.1,
        old_logprobs: Literal["engine", "trainer"] = "engine",
        correction: str | Callable[..., Correction] | None = None,
        correction_args: dict[str, Any] | None = None,
        entropy_share: float | None = None,
        aggregation: Aggregation = "sequence",
        aggregation_length: int | None = None,
        max_kl: float | None = None,
    ) -> None:
        super().__init__()
        model, adapter = expanded(model), adapter and expanded(adapter)
        require_not_negative(
            learning_rate=learning_rate, kl_coef=kl_coef, warmup_updates=warmup_updates, entropy_coef=entropy_coef
        )
        self._controls = Controls(kl_target, kl_horizon, entropy_target, entropy_step, entropy_max)
        self._controls.check(kl_coef)
        self._coefficients = Coefficients.start(kl_coef, entropy_coef, self._controls)
        self.adapter_config = adapter_settings(
            adapter=adapter,
            full_finetuning=full_finetuning,
            dtype=dtype,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            lora_targets=lora_targets,
        )
        check_max_kl(max_kl)
        one_of("aggregation", aggregation, AGGREGATIONS)
        if aggregation_length is not None and aggregation_length < 1:
            raise ConfigurationError(f"expected aggregation_length >= 1 token, but got {aggregation_length}")
        self._objective = Objective.from_settings(
            surrogate=surrogate,
            surrogate_args=surrogate_args or {},
            clips={"clip_low": clip_low, "clip_high": clip_high},
            old_logprobs=old_logprobs,
            correction=correction,
            correction_args=correction_args,
            focus_share=entropy_share,
            ratio_level=ratio_level,
            kl_estimator=kl_estimator,
            kl_in=kl_in,
        )
        self.save_hyperparameters()
        # From the command line the line above takes what was given, not what it is by now.
        self.hparams.update(model=model, adapter=adapter, surrogate=name_of(surrogate), correction=name_of(correction))
        self.model_name = model
        self._start_record: StartRecord = {}
        # Checkpoints hold what is trained alone; its key set is checked exactly in on_load_checkpoint.
        self.strict_loading = False
        self.policy_version = 0
        self.fitting = False
        self.phases = PhaseClock()
        self._statistics = EpochStatistics(corrected=correction is not None)
        self._evidence: list[MicroBatchEvidence] = []
        self._input_tokens = 0
        self._update: Update | None = None

    @property
    def objective(self) -> Objective:
        """The loss, with its weights as they are now."""
        now = self._coefficients
        in_loss = self.hparams["kl_in"] == "loss"
        return replace(
            self._objective,
            kl_coef=now.kl if in_loss else 0.0,
            kl_reward=0.0 if in_loss else now.kl,
            entropy_coef=now.entropy_active,
        )

    def training_state(self) -> dict[str, Any]:
        """The numbers of the epoch so far, the weights of the loss, and where the time went."""
        return {
            "statistics": self._statistics.state_dict(),
            "coefficients": asdict(self._coefficients),
            "phases": self.phases.state_dict(),
        }

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._statistics.load_state_dict(state["statistics"])
        self._coefficients = Coefficients(**state["coefficients"])
        self.phases.load_state_dict(state["phases"])

    def token_weights(self, lengths: Sequence[int]) -> list[float]:
        """Loss weight of a token in each of an optimizer step's sequences (`functional.token_weights`)."""
        return token_weights(lengths, self.hparams["aggregation"], max_length=self.aggregation_length)

    @property
    def aggregation_length(self) -> int | None:
        """The fixed length that ``aggregation="constant"`` divides by."""
        data, given = self._data(), self.hparams["aggregation_length"]
        return given if given is not None or data is None else data.max_sampled

    def on_train_start(self) -> None:
        """Where an epoch goes on in its middle, no other hook of Lightning sets a scheduled accumulation."""
        self.phases.started()
        data = self._data()
        if data is not None:
            self.trainer.accumulate_grad_batches = data.layout().micro_batches

    def on_train_epoch_start(self) -> None:
        """Start the epoch's counters."""
        self.phases.begin_epoch()
        self._statistics.reset()

    def on_train_batch_start(self, batch: PackedBatch, batch_idx: int) -> None:
        """Start the update's evidence on its first micro-batch.

        Raises:
            ConfigurationError: If ``accumulate_grad_batches`` is not what the rollout was cut for.
        """
        self.phases.begin("train")
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
        objective = self.objective
        with self.phases("train_forward"):
            current = self.policy.token_logprobs(batch, entropy_gradient=objective.entropy_coef > 0)
            logprobs = current.logprobs
            reference = torch.full_like(logprobs, torch.nan)
            if objective.kl_coef:
                with as_in_training(), self.policy.reference():
                    reference, *_ = self.policy.token_logprobs(batch)
        with self.phases("train_loss"):
            loss, evidence = self._judged(objective, batch, current, reference)
        if logprobs.requires_grad:
            note = partial(self._note_gradient, len(self._evidence), batch.loss_weight > 0)
            logprobs.register_hook(note)  # type: ignore[no-untyped-call]
        return loss, evidence

    def _judged(
        self, objective: Objective, batch: PackedBatch, current: TokenLogprobs, reference: Tensor
    ) -> tuple[Tensor, MicroBatchEvidence]:
        """The loss of what was computed, and its evidence."""
        loss = policy_loss(
            objective,
            LossInputs(
                logprobs=current.logprobs,
                old_logprobs=batch.proximal_logprobs if objective.proximal else batch.old_logprobs,
                advantages=batch.advantages,
                weight=batch.loss_weight,
                sequence=batch.sequence_index,
                marked=batch.marked,
                behaviour=batch.old_logprobs,
                focus=batch.focus,
                reference=reference,
                entropy=current.entropy,
            ),
        )
        return loss.loss, micro_batch_evidence(batch, current, loss, reference, self.policy_version)

    def rescore(self, rollout: Rollout) -> Rescored:
        """What this policy says of a rollout that it is about to be trained on, without dropout.

        All processes must call it.
        """

        def compute(batch: PackedBatch) -> dict[str, Tensor]:
            batch = batch.to(self.device)
            current = self.policy.token_logprobs(batch)
            found = {"logprobs": current.logprobs, "entropy": current.entropy}
            if self.objective.kl_reward > 0:
                with self.policy.reference():
                    found["reference"] = self.policy.token_logprobs(batch).logprobs
            return found

        quiet = self.trainer.precision_plugin.forward_context()
        with evaluating(self.policy), torch.no_grad(), as_in_training(), quiet:
            return rescore(rollout.batches, rollout.layout, compute)

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
        self.log_dict(self._controls.shown(self._coefficients), on_step=True, on_epoch=False)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step and count it as a new policy version; beyond ``max_kl`` it was the epoch's last."""
        super().optimizer_step(*args, **kwargs)
        self.weights_changed()
        evidence, max_kl = self.current_update().evidence, self.hparams["max_kl"]
        if len(evidence):
            kl = self._reference_kl(evidence)
            self._coefficients = self._coefficients.after(self._controls, kl, float(evidence.entropy.mean()))
        if max_kl is not None and is_beyond(evidence.log_ratio, max_kl):
            end_epoch(self.trainer)

    def _reference_kl(self, evidence: MicroBatchEvidence) -> float | None:
        """Mean k3 to the reference of an update, or of the rollout where it stands in the reward; None without one."""
        values = evidence.reference_kl
        data = self._data()
        if self.objective.kl_reward > 0 and data is not None and data.rollout is not None:
            rescored = data.rollout.rescored
            values = values if rescored is None else kl_k3(rescored.logprobs, rescored.reference)
        values = values[~values.isnan()]
        return float(values.mean()) if len(values) else None

    def on_train_batch_end(self, outputs: Any, batch: PackedBatch, batch_idx: int) -> None:
        """Count the time: a validation may follow before the epoch ends."""
        self.phases.end("train")

    def on_train_epoch_end(self) -> None:
        """Log the epoch under the same names as each update."""
        metrics = self.epoch_metrics()
        self.log(PEAK, metrics.pop(PEAK), on_step=False, on_epoch=True, sync_dist=True, reduce_fx="max")
        self.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True)
        self.phases.end_epoch()

    def epoch_metrics(self) -> dict[str, float]:
        """What the current epoch sampled, what it trained, what it cost; see ``docs/metrics.md``."""
        data = self._data()
        sampled = {} if data is None or data.rollout is None else data.rollout.origin.metrics
        trained, times = self._statistics.compute(), time_metrics(self.phases.epoch())
        speed = train_throughput(times["time/train_seconds"], trained["tokens/input"], trained["tokens/trained"])
        return {**trained, **sampled, **times, **speed, PEAK: peak_bytes(self.device) / 2**30}
