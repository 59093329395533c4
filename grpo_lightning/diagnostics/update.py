"""What one optimizer step sees, of all processes together."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.functional import TokenLogprobs
from grpo_lightning.objective import PolicyLoss
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

    def numbers(self) -> dict[str, float]:
        """Its numbers under the names that epochs log them by; see ``docs/metrics.md``."""
        evidence, d = self.evidence, self.evidence.log_ratio
        numbers = {f"ppo/ratio_{name}": value for name, value in self.ratio.items()}
        numbers["policy/grad_norm"] = self.grad_norm
        if not len(evidence):
            return numbers
        numbers |= {
            "ppo/clip_fraction_low": float(evidence.clipped_low.double().mean()),
            "ppo/clip_fraction_high": float(evidence.clipped_high.double().mean()),
            "ppo/kl_k3": float((torch.expm1(d) - d).mean()),
            "ppo/updates_since_sampling": float(evidence.updates_since_sampling.max()),
            "policy/entropy": float(evidence.entropy.mean()),
        }
        fresh = evidence.first_of_rollout & (evidence.updates_since_sampling == 0)
        if bool(fresh.any()):
            numbers["mismatch/logprob_abs_mean"] = float(evidence.sampler_log_ratio[fresh].abs().mean())
        return numbers


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """Norm of all gradients together, summed in float64."""
    return math.sqrt(sum(float(grad.detach().double().square().sum()) for grad in gradients))


def micro_batch_evidence(
    batch: PackedBatch, current: TokenLogprobs, loss: PolicyLoss, reference: Tensor, version: int
) -> MicroBatchEvidence:
    """The evidence of one micro-batch.

    Args:
        batch: The micro-batch.
        current: What the current policy says of its targets.
        loss: What the loss was.
        reference: Log-probabilities under the reference, ``[N]``; NaN if they were not computed.
        version: The policy's version.
    """
    real = (batch.loss_weight > 0).cpu()
    count = int(real.sum())

    unknown = torch.full((count,), torch.nan, dtype=torch.float64)
    first_row = torch.full_like(batch.ledger_index, torch.iinfo(torch.int64).max)
    first_row.scatter_reduce_(0, batch.sequence_index, batch.ledger_index, "amin")

    def keep(values: Tensor) -> Tensor:
        return values.detach().cpu()[real]

    return MicroBatchEvidence(
        ledger_index=keep(batch.ledger_index),
        sequence=keep(first_row[batch.sequence_index]),
        first_of_rollout=torch.full((count,), batch.first_of_rollout),
        logprobs=keep(current.logprobs).double(),
        log_ratio=keep(loss.log_ratio).double(),
        behaviour=keep(batch.old_logprobs).double(),
        proximal=unknown,
        stored=unknown,
        loss_weight=keep(batch.loss_weight).double(),
        advantage=keep(batch.advantages).double(),
        updates_since_sampling=version - keep(batch.policy_version),
        marked=keep(batch.marked),
        clipped_low=keep(loss.clipped_low),
        clipped_high=keep(loss.clipped_high),
        factor=keep(loss.factor).double(),
        dropped=keep(loss.dropped),
        capped=keep(loss.capped),
        entropy=keep(current.entropy).double(),
        surprisal_variance=keep(current.surprisal_variance).double(),
        mass_above=keep(current.mass_above).double(),
        reference=keep(reference).double(),
        log_mass=torch.zeros_like(unknown),
        gradient=unknown,
    )
