"""The founding checks of every update: the ratios mean something."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

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
)
from grpo_lightning.diagnostics.checks.common import uncertain_tokens
from grpo_lightning.diagnostics.checks.step import StepSize
from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.examination import Examination, Run
from grpo_lightning.diagnostics.rounding import MIN_APART, rounding
from grpo_lightning.diagnostics.scoring import quiet
from grpo_lightning.diagnostics.update import Update
from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.distributed import processes
from grpo_lightning.rollout.batch import PackedBatch

MIN_STD = 1e-4
"""Founding rule: a ratio with a smaller spread carries no information, where it should carry some."""

_BASE_TOKENS = 512
"""Input tokens of the base-model forward that shows which adapter the engine serves; once a rollout."""

_NO_BASE = "All weights are trained: there is no base model beside the policy to tell it from."


class RatioExamination(Examination):
    """Compares what the loss used with what the sampler stored, and what moved with what should have.

    Args:
        min_std: Spread of the ratio below which it is degenerate.
        strict: Judge by ``min_std`` alone.
        warn_std: Optionally warn below this spread.
        max_mismatch: Largest RMS difference in nats between trainer and engine right after sampling.
        bitwise_consistent_engine: The engine's logprobs equal the trainer's by design.
        compare_base: Whether to ask the base model of each rollout which adapter the engine serves, for want of a
            canary; asked in the first process.
    """

    name = "ratio"

    def __init__(
        self,
        *,
        min_std: float = MIN_STD,
        strict: bool = False,
        warn_std: float | None = None,
        max_mismatch: float = MAX_MISMATCH,
        bitwise_consistent_engine: bool = False,
        compare_base: Callable[[], bool] = lambda: True,
    ) -> None:
        self._min_std = min_std
        self._strict = strict
        self._warn_std = warn_std
        self._max_mismatch = max_mismatch
        self._bitwise = bitwise_consistent_engine
        self._compare_base = compare_base
        self.reset()

    def reset(self) -> None:
        """Forget an earlier run."""
        self._first_mismatch: float | None = None
        self._expected_drift = 0.0
        self._begun_at: int | None = None
        self._base: Tensor | None = None
        self._batch: PackedBatch | None = None

    def state_dict(self) -> dict[str, Any]:
        """The mismatch of the first rollout, against which later ones are judged; this one's beginning and drift."""
        return {
            "first_mismatch": self._first_mismatch,
            "expected_drift": self._expected_drift,
            "begun_at": self._begun_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._first_mismatch = state["first_mismatch"]
        self._expected_drift = state["expected_drift"]
        self._begun_at = state["begun_at"]

    def on_batch(self, run: Run, batch: PackedBatch) -> None:
        """On a rollout's first micro-batch, ask what the base model would have said."""
        if not batch.first_of_rollout:
            return
        self._expected_drift = 0.0
        self._begun_at = run.module.policy_version
        self._batch = batch
        self._base = None
        policy = run.module.policy
        # A fresh adapter still is the base model.
        differs = policy.has_adapter and (run.module.policy_version > 0 or policy.start_digest is not None)
        if differs and processes().first and self._compare_base():
            # The loss runs under the Trainer's precision; what it is compared with must too.
            with run.trainer.precision_plugin.train_step_context(), policy.base():
                logprobs, *_ = policy.token_logprobs(batch.first_rows(_BASE_TOKENS))
            kept = batch.loss_weight[: len(logprobs)] > 0
            self._base = logprobs[kept].double().cpu()

    def on_update(self, run: Run, update: Update) -> Sequence[Verdict]:
        """Judge the update's numbers."""
        evidence, stats = update.evidence, update.ratio
        k = self._age(run, evidence)
        verdicts = [check_finite(evidence), check_gradient(update.grad_norm), check_stored(evidence)]
        # What differed before is no copy where it happens to be equal, as the logprobs of a collapsed policy may be.
        differed = bool(self._first_mismatch)
        alike = self._bitwise or differed or run.noise_floor == 0 or rounding(run) > MIN_APART
        verdicts.append(check_sampler(evidence, alike=alike))
        verdicts.append(check_alignment(evidence))
        if self._base is not None:
            verdicts.append(check_served_adapter(evidence, self._base, self._first_mismatch))
            self._base = None
        elif not run.module.policy.has_adapter:
            verdicts.append(Verdict("served adapter", Status.NO_POWER, _NO_BASE))
        verdicts.append(self._mismatch(run, evidence))
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

    def _age(self, run: Run, evidence: MicroBatchEvidence) -> int:
        """Updates since what the ratio compares with: since the epoch began where the trainer computed that."""
        since_sampling = int(evidence.updates_since_sampling.max()) if len(evidence) else 0
        if not run.module.objective.proximal or self._begun_at is None:
            return since_sampling
        return min(since_sampling, run.module.policy_version - self._begun_at)

    def _mismatch(self, run: Run, evidence: MicroBatchEvidence) -> Verdict:
        """Do trainer and engine agree, if need be without the trainer's dropout?"""
        batch, self._batch = self._batch, None
        verdict = check_mismatch(evidence, self._first_mismatch, self._max_mismatch, run.noise_floor, rounding(run))
        if verdict.status is not Status.FAIL or batch is None or run.data is None or run.data.rollout is None:
            return verdict
        if not _draws_dropout(run.module.policy.model):
            return verdict
        batch = batch.first_rows(_BASE_TOKENS)
        index = batch.ledger_index.cpu()
        same = torch.isin(evidence.ledger_index, index)
        stored = run.data.rollout.stored_logprobs(index)
        with quiet(run):
            logprobs = run.module.policy.token_logprobs(batch).logprobs.double().cpu()
        with_dropout = _rms((evidence.stored - evidence.logprobs + evidence.log_mass)[same])
        mass = torch.zeros_like(logprobs) if run.kept is None else run.kept.mass_of(index, logprobs - stored)
        without = _rms(stored - logprobs + mass)
        allowed = float(verdict.evidence["allowed"])
        # Tokens that agreed all along say nothing about those that did not.
        if not without <= allowed < with_dropout:
            return verdict
        shown = {"mismatch RMS of some tokens": with_dropout, "mismatch RMS without dropout": without}
        return Verdict(verdict.check, Status.PASS, evidence={**verdict.evidence, **shown})

    def after_step(self, run: Run, update: Update, step: StepSize) -> Sequence[Verdict]:
        """What did the step change, and what must the ratios show next time?"""
        weight = float((update.evidence.loss_weight * update.evidence.advantage).abs().sum())
        if weight > 0:
            self._expected_drift += abs(step.loss_change) / weight
        run.module.log("policy/update_norm", step.norm, on_step=True, on_epoch=False)
        return [
            check_moved(
                grad_norm=update.grad_norm,
                lr=step.lr,
                update_norm=step.norm,
                updates=run.module.policy_version,
                counted=step.counted,
                absorbed=step.absorbed(run.trainable),
                rounded=step.rounded(run.trainable),
            )
        ]


def _rms(values: Tensor) -> float:
    return float(values[~values.isnan()].square().mean().sqrt())


def _draws_dropout(model: nn.Module) -> bool:
    """Whether the model computes with dropout as it is now; attention has it as a number."""

    def share(module: nn.Module) -> float:
        return float(module.p if isinstance(module, _DropoutNd) else getattr(module, "attention_dropout", 0.0) or 0.0)

    return any(module.training and share(module) > 0 for module in model.modules())
