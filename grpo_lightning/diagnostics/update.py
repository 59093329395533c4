"""What one optimizer step sees, of all processes together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.functional import PolicyLoss
from grpo_lightning.rollout.batch import PackedBatch


@dataclass(frozen=True)
class Update:
    """What an optimizer step sees, of all processes together.

    Attributes:
        evidence: Its sampled tokens.
        ratio: Statistics of the ratio before clipping: mean, std, min, max, count.
        input_tokens: Tokens that went through the model for it.
        grad_norm: Norm of the gradient before clipping.
    """

    evidence: MicroBatchEvidence
    ratio: dict[str, float]
    input_tokens: int
    grad_norm: float


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """Norm of all gradients together, summed in float64."""
    return math.sqrt(sum(float(grad.detach().double().square().sum()) for grad in gradients))


def micro_batch_evidence(
    batch: PackedBatch, logprobs: Tensor, loss: PolicyLoss, entropy: Tensor, reference_kl: Tensor, version: int
) -> MicroBatchEvidence:
    """The evidence of one micro-batch.

    Args:
        batch: The micro-batch.
        logprobs: Current log-probabilities, ``[N]``.
        loss: What the surrogate computed from them.
        entropy: Entropies, ``[N]``.
        reference_kl: KL to the reference, ``[N]``; NaN if it was not computed.
        version: The policy's version.
    """
    real = (batch.loss_weight > 0).cpu()
    count = int(real.sum())

    first_row = torch.full_like(batch.ledger_index, torch.iinfo(torch.int64).max)
    first_row.scatter_reduce_(0, batch.sequence_index, batch.ledger_index, "amin")

    def keep(values: Tensor) -> Tensor:
        return values.detach().cpu()[real]

    return MicroBatchEvidence(
        ledger_index=keep(batch.ledger_index),
        sequence=keep(first_row[batch.sequence_index]),
        first_of_rollout=torch.full((count,), batch.first_of_rollout),
        logprobs=keep(logprobs).double(),
        log_ratio=keep(loss.log_ratio).double(),
        stored=torch.full((count,), torch.nan, dtype=torch.float64),
        weighted_advantage=keep(batch.loss_weight * batch.advantages).double(),
        updates_since_sampling=version - keep(batch.policy_version),
        clipped_low=keep(loss.clipped_low),
        clipped_high=keep(loss.clipped_high),
        entropy=keep(entropy).double(),
        reference_kl=keep(reference_kl).double(),
    )
