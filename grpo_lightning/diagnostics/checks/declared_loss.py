"""The gradient that a declared loss must have at the logprobs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.objective import LossInputs, Objective, kl_of, policy_terms

ROUNDING = 1e-5
"""Relative rounding of the terms of the gradient, which are float32 whatever the model's precision (eps = 1.2e-7)."""


class DeclaredLoss(Protocol):
    """What a module says that it minimises."""

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference."""

    def surrogate_gradient(self, evidence: MicroBatchEvidence) -> Tensor:
        """Derivative of the surrogate by each logprob, times the processes, float64 ``[N]``."""

    def kl_gradient(self, evidence: MicroBatchEvidence) -> Tensor:
        """Derivative of the weighted KL, float64 ``[N]``."""

    def scale(self, evidence: MicroBatchEvidence) -> float:
        """Norm of the terms that the gradient is the difference of: what its rounding is relative to."""

    def at_limit(self, evidence: MicroBatchEvidence) -> Tensor:
        """Where rounding decides whether a token has a gradient, bool ``[N]``."""

    def alternatives(self, evidence: MicroBatchEvidence) -> Mapping[str, Tensor]:
        """Gradients of losses that are easily written instead of this one, by what is wrong with them."""


@dataclass(frozen=True)
class ClippedLoss:
    """PPO's clipped surrogate and k3, whose gradients are written out here once more.

    Attributes:
        clip_low: How far below 1 the ratio may fall.
        clip_high: How far above 1 the ratio may rise.
        kl_coef: Weight of the k3 KL to the reference.
        processes: Training processes; what arrives is multiplied by their number, DDP's mean divides by it.
    """

    clip_low: float
    clip_high: float
    kl_coef: float = 0.0
    processes: int = 1

    def surrogate_gradient(self, evidence: MicroBatchEvidence) -> Tensor:
        """Derivative of the clipped surrogate by each logprob, ``-w A r`` where no clip binds, float64 ``[N]``."""
        ratio = evidence.log_ratio.exp()
        bound = self._bound(ratio, evidence.advantage)
        return torch.where(bound, 0.0, -self._weight(evidence) * evidence.advantage * ratio)

    def kl_gradient(self, evidence: MicroBatchEvidence) -> Tensor:
        """Derivative of the weighted k3, ``kl_coef w (1 - exp(reference - c))``, float64 ``[N]``."""
        if self.kl_coef == 0:
            return torch.zeros_like(evidence.logprobs)
        return self.kl_coef * self._weight(evidence) * (1 - (evidence.reference - evidence.logprobs).exp())

    def scale(self, evidence: MicroBatchEvidence) -> float:
        """Norm of the terms that the gradient is the difference of: what its rounding is relative to."""
        kl = 2 + (evidence.reference - evidence.logprobs).exp() if self.kl_coef else torch.zeros(())
        terms = evidence.advantage.abs() * evidence.log_ratio.exp() + self.kl_coef * kl
        return float((self._weight(evidence) * terms).norm())

    def at_limit(self, evidence: MicroBatchEvidence) -> Tensor:
        """Where rounding decides whether a clip binds, bool ``[N]``."""
        ratio = evidence.log_ratio.exp()
        limits = torch.tensor([1 - self.clip_low, 1 + self.clip_high], dtype=ratio.dtype)
        return ((ratio[:, None] - limits).abs() < ROUNDING).any(1)

    def alternatives(self, evidence: MicroBatchEvidence) -> dict[str, Tensor]:
        """Gradients of losses that are easily written instead of this one, by what is wrong with them."""
        weight, ratio = self._weight(evidence), evidence.log_ratio.exp()
        plain = -weight * evidence.advantage
        kl = self.kl_gradient(evidence)
        outside = (ratio < 1 - self.clip_low) | (ratio > 1 + self.clip_high)
        found = {
            "clipping is left out": plain * ratio + kl,
            "the ratio is left out": plain + kl,
            "the ratio is left out where no clip binds": torch.where(self._bound(ratio, evidence.advantage), 0.0, plain)
            + kl,
            "the ratio is clipped on both sides whatever the advantage's sign": torch.where(outside, 0.0, plain * ratio)
            + kl,
        }
        if self.kl_coef:
            found["the KL term is left out"] = self.surrogate_gradient(evidence)
        return found

    def _weight(self, evidence: MicroBatchEvidence) -> Tensor:
        return evidence.loss_weight * self.processes

    def _bound(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ((ratio > 1 + self.clip_high) & (advantage > 0)) | ((ratio < 1 - self.clip_low) & (advantage < 0))


@dataclass(frozen=True)
class RecomputedLoss:
    """Any objective, computed again in float64 from the evidence alone.

    It sees what the module fed its loss with and how it weighed it, but takes the surrogate's own formula as it is:
    that one is held against its paper by the tests.

    Attributes:
        objective: The objective.
        processes: Training processes; what arrives is multiplied by their number, DDP's mean divides by it.
    """

    objective: Objective
    processes: int = 1

    @property
    def kl_coef(self) -> float:
        """Weight of the KL to the reference."""
        return self.objective.kl_coef

    def surrogate_gradient(self, evidence: MicroBatchEvidence) -> Tensor:
        """Derivative of the surrogate by each logprob, float64 ``[N]``."""
        return self._surrogate_gradient(evidence, 0.0)

    def kl_gradient(self, evidence: MicroBatchEvidence) -> Tensor:
        """Derivative of the weighted KL, float64 ``[N]``."""
        if not self.kl_coef:
            return torch.zeros_like(evidence.logprobs)
        factor = self.processes * self.kl_coef * evidence.loss_weight
        estimator = self.objective.kl_estimator
        return _gradient(lambda logprobs: (factor * kl_of(estimator, logprobs, evidence.reference)).sum(), evidence, 0)

    def scale(self, evidence: MicroBatchEvidence) -> float:
        """Norm of the terms that the gradient is the difference of: what its rounding is relative to."""
        weight = self.processes * evidence.loss_weight
        kl = 2 + (evidence.reference - evidence.logprobs).exp() if self.kl_coef else torch.zeros(())
        # A ratio beyond e^5 has no gradient in any of them but the unbounded ones, where it is its own scale.
        ratio = 1 + evidence.log_ratio.clamp_max(5).exp()
        return float((weight * (evidence.factor * evidence.advantage.abs() * ratio + self.kl_coef * kl)).norm())

    def at_limit(self, evidence: MicroBatchEvidence) -> Tensor:
        """Where rounding decides whether a token has a gradient, bool ``[N]``."""
        above, below = (self._surrogate_gradient(evidence, shift) for shift in (ROUNDING, -ROUNDING))
        usual = self.processes * (evidence.loss_weight * evidence.advantage).abs()
        sudden: Tensor = (above - below).abs() > ROUNDING**0.5 * (usual + torch.maximum(above.abs(), below.abs()))
        return sudden

    def alternatives(self, evidence: MicroBatchEvidence) -> dict[str, Tensor]:
        """The gradient without its KL term, and PPO's in place of the declared surrogate's."""
        kl, surrogate = self.kl_gradient(evidence), self.surrogate_gradient(evidence)
        plain = -self.processes * evidence.loss_weight * evidence.advantage
        found = {"the ratio is left out": plain + kl}
        found["the ratio is each token's own, and nothing is clipped"] = plain * evidence.log_ratio.exp() + kl
        if self.kl_coef:
            found["the KL term is left out"] = surrogate
        return found

    def _surrogate_gradient(self, evidence: MicroBatchEvidence, shift: float) -> Tensor:
        old = evidence.logprobs - evidence.log_ratio
        real = evidence.loss_weight != 0
        if not bool((evidence.logprobs.isfinite() & old.isfinite()).all()):
            return torch.full_like(evidence.logprobs, torch.nan)

        def loss(logprobs: Tensor) -> Tensor:
            inputs = LossInputs(
                logprobs=logprobs,
                old_logprobs=old,
                advantages=evidence.advantage,
                weight=self.processes * evidence.loss_weight,
                sequence=evidence.sequence,
                marked=evidence.marked,
            )
            terms = policy_terms(self.objective, inputs, real)
            total: Tensor = (terms.weight * evidence.factor[real] * self.objective.surrogate(terms).loss).sum()
            return total

        return _gradient(loss, evidence, shift)


def _gradient(loss: Callable[[Tensor], Tensor], evidence: MicroBatchEvidence, shift: float) -> Tensor:
    with torch.enable_grad():
        logprobs = (evidence.logprobs + shift).detach().requires_grad_()
        if not len(logprobs):
            return torch.zeros_like(evidence.logprobs)
        loss(logprobs).backward()  # type: ignore[no-untyped-call]
    return torch.zeros_like(evidence.logprobs) if logprobs.grad is None else logprobs.grad


def declared_loss(objective: Objective, processes: int) -> DeclaredLoss:
    """How the gradient of an objective is known: in closed form where it is GRPO's own, else by computing it again.

    Args:
        objective: The objective.
        processes: Training processes.
    """
    clips = objective.plain_clips()
    if clips is None:
        return RecomputedLoss(objective, processes)
    return ClippedLoss(*clips, kl_coef=objective.kl_coef, processes=processes)
