"""Judging every optimizer step before it is applied."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from grpo_lightning.datamodule import RolloutDataModule
from grpo_lightning.diagnostics import MicroBatchEvidence, Status, Verdict
from grpo_lightning.diagnostics.checks import (
    MAX_MISMATCH,
    check_alignment,
    check_finite,
    check_gradient,
    check_mismatch,
    check_moved,
    check_ratio,
    check_sampler,
    check_served_adapter,
    check_stored,
    mismatch_rms,
    uncertain_tokens,
)
from grpo_lightning.distributed import processes
from grpo_lightning.errors import DegeneracyError, RatioDegeneracyError
from grpo_lightning.module import GRPOModule
from grpo_lightning.rollout.batch import PackedBatch

logger = logging.getLogger(__name__)

MIN_STD = 1e-4
"""Founding rule: a ratio with a smaller spread carries no information, where it should carry some."""

_BASE_TOKENS = 512
"""Input tokens of the base-model forward that shows which adapter the engine serves; once a rollout."""

_NO_BASE = "All weights are trained: there is no base model beside the policy to tell it from."


class RatioDegeneracyDetector(Callback):
    """Halts training, before the update is applied, when the update cannot mean anything.

    For every optimizer step it looks at the very log-ratios that the loss used, before clipping, and knows how many
    updates lie between sampling and now. A healthy first step after sampling (ratio 1, std 1e-5 in float32) passes;
    a policy that is stuck does not. Checks run in causal order and the first failure names the cause:

    1. logprobs and gradient are finite; 2. the old logprobs are the stored ones; 3. the sampler's logprobs are
    not zero-filled or copied; 4. they are aligned with their tokens; 5. the engine serves this adapter; 6. it agrees
    with the trainer as on the first rollout; 7. the ratios vary where they should; 8. the optimizer moves the
    parameters.

    Args:
        min_std: Spread of the ratio below which it is degenerate.
        strict: Halt on ``std < min_std`` whatever the number of updates since sampling. This also halts a healthy
            first update on a float32 engine: use it only with several updates per rollout or a noisy engine.
        action: ``"halt"`` raises, ``"warn"`` warns and goes on.
        warn_std: Optionally warn when the ratio's std is below this level after at least one update since sampling.
            No fixed level is right for all runs (0.006 is a healthy value), hence off by default.
        max_mismatch: Largest RMS difference in nats between the trainer's and the engine's logprobs right after
            sampling, when both hold the same weights.
        bitwise_consistent_engine: Declare that the engine's logprobs equal the trainer's bit for bit by design.
    """

    def __init__(
        self,
        *,
        min_std: float = MIN_STD,
        strict: bool = False,
        action: Literal["halt", "warn"] = "halt",
        warn_std: float | None = None,
        max_mismatch: float = MAX_MISMATCH,
        bitwise_consistent_engine: bool = False,
    ) -> None:
        self._min_std = min_std
        self._strict = strict
        self._action = action
        self._warn_std = warn_std
        self._max_mismatch = max_mismatch
        self._bitwise = bitwise_consistent_engine
        self._first_mismatch: float | None = None
        self._announced = False
        self._base: Tensor | None = None
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        self._expected_drift = 0.0
        self._weight_sum = 0.0
        self._lr = 0.0
        self._grad_norm = 0.0
        self.verdicts: list[Verdict] = []

    @property
    def state_key(self) -> str:
        """Key of the state in checkpoints, independent of the class's name."""
        return "grpo_lightning.ratio_degeneracy"

    def state_dict(self) -> dict[str, Any]:
        """The mismatch of the first rollout, against which later ones are judged, and the drift in this one."""
        return {"first_mismatch": self._first_mismatch, "expected_drift": self._expected_drift}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        self._first_mismatch = state_dict["first_mismatch"]
        self._expected_drift = state_dict["expected_drift"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; a checkpoint's state is restored after this."""
        self._first_mismatch, self._announced, self._base, self._before = None, False, None, {}
        self._expected_drift = self._weight_sum = self._lr = self._grad_norm = 0.0
        self.verdicts = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """On a rollout's first micro-batch, ask what the base model would have said."""
        if not isinstance(batch, PackedBatch) or not batch.first_of_rollout:
            return
        module = _grpo(pl_module)
        self._expected_drift = 0.0
        self._base = None
        policy = module.policy
        # A fresh adapter still is the base model.
        differs = policy.has_adapter and (module.policy_version > 0 or policy.start_digest is not None)
        if differs and processes().first:
            # The loss runs under the Trainer's precision; what it is compared with must too.
            with trainer.precision_plugin.train_step_context(), policy.base():
                logprobs, _ = policy.token_logprobs(batch.first_rows(_BASE_TOKENS))
            kept = batch.loss_weight[: len(logprobs)] > 0
            self._base = logprobs[kept].double().cpu()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step. Nothing has been applied yet when this raises."""
        module = _grpo(pl_module)
        update = module.current_update()
        stats = update.ratio
        if not self._announced:
            rank_zero_info("using stored sample-time logprobs as old, current policy as new")
            self._announced = True
        logger.info(
            "PPO Ratio Check - mean: %.6f, std: %.6g, count: %d",
            stats["mean"],
            stats["std"],
            int(stats["count"]),
        )
        gradients = {
            name: (p, p.grad.detach()) for name, p in module.policy.trainable_parameters().items() if p.grad is not None
        }
        self._grad_norm = update.grad_norm
        evidence, has_adapter = update.evidence, module.policy.has_adapter
        # The first process has the ledger; all halt together.
        self.verdicts = processes().from_first(lambda: self._judge(_with_ledger(evidence, trainer), stats, has_adapter))
        self._conclude(self.verdicts)
        # What the step is about to do: gradient and parameters, to compare with after it.
        # Schedulers step before the hook that follows the step.
        self._lr = max(float(group["lr"]) for group in optimizer.param_groups)
        self._weight_sum = float(evidence.weighted_advantage.abs().sum())
        self._before = {name: (p.detach().clone(), grad.clone()) for name, (p, grad) in gradients.items()}

    def _judge(self, evidence: MicroBatchEvidence, stats: Mapping[str, float], has_adapter: bool) -> list[Verdict]:
        k = int(evidence.updates_since_sampling.max()) if len(evidence) else 0
        verdicts = [check_finite(evidence), check_gradient(self._grad_norm), check_stored(evidence)]
        if not self._bitwise:
            verdicts.append(check_sampler(evidence))
        verdicts.append(check_alignment(evidence))
        if self._base is not None:
            verdicts.append(check_served_adapter(evidence, self._base, self._first_mismatch))
            self._base = None
        elif not has_adapter:
            verdicts.append(Verdict("served adapter", Status.NO_POWER, _NO_BASE))
        verdicts.append(check_mismatch(evidence, self._first_mismatch, self._max_mismatch))
        if self._first_mismatch is None and not any(v.status is Status.FAIL for v in verdicts):
            self._first_mismatch = mismatch_rms(evidence)
        verdicts.append(
            check_ratio(
                stats["std"],
                int(stats["count"]),
                k,
                self._expected_drift,
                uncertain=uncertain_tokens(evidence.logprobs),
                min_std=self._min_std,
                strict=self._strict,
                details=dict(stats),
            )
        )
        if self._warn_std is not None and k > 0 and stats["std"] < self._warn_std:
            rank_zero_warn(f"PPO ratio std {stats['std']:.3g} is below warn_std={self._warn_std:g} after {k} updates.")
        return verdicts

    def _conclude(self, new: Sequence[Verdict]) -> None:
        """Act on the first failure among new verdicts."""
        failed = next((v for v in new if v.status is Status.FAIL), None)
        if failed is None:
            return
        message = _message(failed, self.verdicts)
        if self._action == "warn":
            rank_zero_warn(message)
            return
        raise (RatioDegeneracyError if failed.check in _RATIO_CHECKS else DegeneracyError)(message)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the step: what did it change, and what must the ratios show next time?"""
        if not self._before:
            return
        module = _grpo(pl_module)
        before, self._before = self._before, {}
        current = module.policy.trainable_parameters()
        squares = loss_change = 0.0
        for name, (old, grad) in before.items():
            step = current[name].detach() - old
            squares += float(step.double().square().sum())
            loss_change += float(torch.dot(step.flatten().double(), grad.flatten().double()))
        if self._weight_sum > 0:
            self._expected_drift += abs(loss_change) / self._weight_sum
        pl_module.log("policy/update_norm", squares**0.5, on_step=True, on_epoch=False)
        moved = check_moved(
            grad_norm=self._grad_norm, lr=self._lr, update_norm=squares**0.5, updates=module.policy_version
        )
        self.verdicts = [*self.verdicts, moved]
        self._conclude([moved])


_RATIO_CHECKS = ("old logprobs", "ratio")


def _grpo(module: LightningModule) -> GRPOModule:
    if not isinstance(module, GRPOModule):
        raise TypeError(f"expected a GRPOModule, but got {type(module).__name__}")
    return module


def _with_ledger(evidence: MicroBatchEvidence, trainer: Trainer) -> MicroBatchEvidence:
    """Put the engine's logprobs of these tokens beside what the loss used."""
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, RolloutDataModule) and data.rollout is not None:
        stored = data.rollout.stored_logprobs(evidence.ledger_index)
        return replace(evidence, stored=stored)
    return evidence


def _message(failed: Verdict, verdicts: list[Verdict]) -> str:
    lines = [str(failed)]
    if failed.check in _RATIO_CHECKS and "degenerate" not in failed.message:
        std = failed.evidence.get("log-ratio used, std")
        shown = f" (std={std:.3g})" if isinstance(std, float) else ""
        lines.insert(0, f"PPO ratios are degenerate{shown}. Training cannot proceed.")
    passed = [v.check for v in verdicts if v.status is Status.PASS]
    silent = [f"{v.check} ({v.message})" for v in verdicts if v.status is Status.NO_POWER]
    lines.append(f"Checks passed: {', '.join(passed) or 'none'}.")
    if silent:
        lines.append(f"Checks that could not tell: {'; '.join(silent)}")
    return "\n".join(lines)
