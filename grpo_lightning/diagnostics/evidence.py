"""What the checks see of a micro-batch: the very tensors that the loss used.

Shapes: ``N`` sampled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from grpo_lightning.functional import kl_k3


@dataclass(frozen=True)
class MicroBatchEvidence:
    """Sampled tokens of one or several micro-batches, fillers left out, on the CPU, without gradient.

    Attributes:
        ledger_index: Row of the token among all ledger rows of its rollout, int64 ``[N]``.
        sequence: Its sequence, named by the ledger row of the first token sampled in it, int64 ``[N]``.
        first_of_rollout: Whether its micro-batch was the first after sampling, bool ``[N]``.
        logprobs: Under the current policy, float64 ``[N]``.
        log_ratio: The log-ratio that the loss used, before clipping, float64 ``[N]``.
        behaviour: Log-probability under the engine as the batch has it, float64 ``[N]``.
        proximal: What the trainer said before the epoch, as the rollout keeps it, float64 ``[N]``; NaN where the ratio
            compares with the engine.
        stored: The engine's logprobs in the rollout's own ledger, not the batch's, float64 ``[N]``; NaN if unknown.
        loss_weight: Weight in the loss of the whole optimizer step, float64 ``[N]``.
        advantage: Advantage, float64 ``[N]``.
        updates_since_sampling: Changes of the policy since the token was sampled, int64 ``[N]``.
        marked: Whether the surrogate treats it apart (`PackedBatch.marked`), bool ``[N]``.
        clipped_low: Whether the lower clip binds, bool ``[N]``.
        clipped_high: Whether the upper clip binds, bool ``[N]``.
        factor: What correction and focus multiplied its surrogate by, float64 ``[N]``.
        dropped: Whether the correction dropped it, bool ``[N]``.
        capped: Whether its correction reached the cap, bool ``[N]``.
        entropy: Of the current policy at this position, nats, float64 ``[N]``.
        surprisal_variance: Variance of ``-log p`` under the current policy, nats squared, float64 ``[N]``.
        mass_above: Probability of all tokens that the current policy finds likelier, float64 ``[N]``.
        reference: Log-probability under the reference, float64 ``[N]``; NaN if it was not computed.
        log_mass: Logarithm of the mass that a declared truncation of the sampling keeps, float64 ``[N]``: 0 without
            one, NaN where it was not computed.
        gradient: What the backward pass brought to ``logprobs``: the loss's derivative times the number of
            processes, float64 ``[N]``; NaN if none came.
    """

    ledger_index: Tensor
    sequence: Tensor
    first_of_rollout: Tensor
    logprobs: Tensor
    log_ratio: Tensor
    behaviour: Tensor
    proximal: Tensor
    stored: Tensor
    loss_weight: Tensor
    advantage: Tensor
    updates_since_sampling: Tensor
    marked: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    factor: Tensor
    dropped: Tensor
    capped: Tensor
    entropy: Tensor
    surprisal_variance: Tensor
    mass_above: Tensor
    reference: Tensor
    log_mass: Tensor
    gradient: Tensor

    @property
    def sampler_log_ratio(self) -> Tensor:
        """Log-ratio to the engine, whatever the loss compares with, float64 ``[N]``."""
        return self.logprobs - self.behaviour

    @property
    def reference_kl(self) -> Tensor:
        """k3 to the reference, nats, float64 ``[N]``; NaN if the reference was not computed."""
        return kl_k3(self.logprobs, self.reference)

    def __len__(self) -> int:
        return self.logprobs.shape[0]

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All tokens of several micro-batches."""
        return cls(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)})
