"""Faults in the loss."""

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

import grpo_lightning.module
from benchmarks.faults.fault import PRE_FLIGHT, Stage, fault, updates
from grpo_lightning.functional import PolicyLoss
from grpo_lightning.module import GRPOModule
from grpo_lightning.policy import Policy


def textbook_loss(
    logprobs: Tensor, old: Tensor, advantages: Tensor, weight: Tensor, *, clip_low: float, clip_high: float
) -> PolicyLoss:
    """PPO's surrogate as it stands in many repositories, without any check of what it is given."""
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -(weight * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    return PolicyLoss(loss, log_ratio.detach(), low.detach(), high.detach())


def _replace_loss(stage: Stage, make: Any) -> None:
    stage.wrap(grpo_lightning.module, "clipped_surrogate", make)


@fault("old_recomputed", deadline=updates(1))
def old_is_current(stage: Stage) -> None:
    """Both branches of a condition compute the current policy's logprobs: the loss compares them with themselves."""
    _replace_loss(stage, lambda loss: lambda new, old, *a, **k: loss(new, new.detach(), *a, **k))


class _RecomputeOld(Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            batch.__dict__["old_logprobs"] = pl_module.policy.token_logprobs(batch)[0]


@fault("old_recomputed", deadline=updates(1))
def old_recomputed_in_batch(stage: Stage) -> None:
    """A callback overwrites the batch's old logprobs with the current policy's before each update."""
    stage.callbacks.append(_RecomputeOld())


@fault("old_attached", deadline=updates(1))
def old_not_detached(stage: Stage) -> None:
    """The old logprobs have the right values but hang on the graph, so that the ratio's gradient cancels."""

    def attached(loss: Any) -> Any:
        return lambda new, old, *a, **k: textbook_loss(new, old + (new - new.detach()), *a, **k)

    _replace_loss(stage, attached)


@fault("old_replaced", deadline=updates(1))
def old_rounded_to_bf16(stage: Stage) -> None:
    """The stored logprobs pass through bfloat16 on their way to the loss."""

    def rounded(loss: Any) -> Any:
        def wrong(new: Tensor, old: Tensor, *args: Any, **settings: Any) -> Any:
            stage.note(not torch.equal(old, old.bfloat16().to(old)))
            return loss(new, old.bfloat16().to(old), *args, **settings)

        return wrong

    _replace_loss(stage, rounded)


@fault("wrong_sign", deadline=updates(1))
def loss_sign(stage: Stage) -> None:
    """The loss is maximised: a minus sign is missing."""

    def negated(loss: Any) -> Any:
        def wrong(*args: Any, **settings: Any) -> PolicyLoss:
            right = loss(*args, **settings)
            return PolicyLoss(-right.loss, right.log_ratio, right.clipped_low, right.clipped_high)

        return wrong

    _replace_loss(stage, negated)


@fault("wrong_gradient", deadline=updates(6))
def clip_ignored(stage: Stage) -> None:
    """The clipped branch is computed and then not used: ratios beyond the clip still push."""
    stage.module["learning_rate"] = 3e-3
    stage.data["inner_epochs"] = 4

    def unclipped(loss: Any) -> Any:
        def wrong(new: Tensor, old: Tensor, advantages: Tensor, weight: Tensor, **clips: float) -> PolicyLoss:
            right = loss(new, old, advantages, weight, **clips)
            stage.note(bool((right.clipped_low | right.clipped_high).any()))
            total = -(weight * (new - old).exp() * advantages).sum()
            return PolicyLoss(total, right.log_ratio, right.clipped_low, right.clipped_high)

        return wrong

    _replace_loss(stage, unclipped)


@fault("wrong_gradient", deadline=updates(3))
def kl_sign(stage: Stage) -> None:
    """The KL penalty is subtracted: the policy is paid for leaving its reference."""
    stage.module["kl_coef"] = 0.2
    stage.data["inner_epochs"] = 2
    stage.wrap(grpo_lightning.module, "kl_k3", lambda kl: lambda new, reference: -kl(new, reference))


@fault("reference_wrong", deadline=updates(3))
def reference_is_current(stage: Stage) -> None:
    """The reference is the policy itself: the KL is 0 whatever happens."""
    stage.module["kl_coef"] = 0.2
    stage.wrap(Policy, "reference", lambda reference: lambda self: torch.no_grad())


@fault("wrong_count", deadline=updates(1))
def wrong_count_longest(stage: Stage) -> None:
    """The mean over a sequence divides by the longest completion that is allowed, not by its own length."""
    longest = stage.data["max_tokens"]
    stage.wrap(
        GRPOModule,
        "token_weights",
        lambda right: lambda self, lengths: [1 / (len(lengths) * longest)] * len(lengths),
    )


@fault("wrong_count", deadline=updates(1))
def wrong_count_of_micro_batch(stage: Stage) -> None:
    """Each micro-batch is averaged over its own tokens instead of the optimizer step's."""
    stage.trainer["accumulate_grad_batches"] = 2

    def local(loss: Any) -> Any:
        return lambda new, old, advantages, weight, **k: loss(new, old, advantages, weight / weight.sum(), **k)

    _replace_loss(stage, local)


@fault("wrong_scale", deadline=updates(1))
def accumulation_not_compensated(stage: Stage) -> None:
    """The loss does not make up for the Trainer's division by the number of accumulated micro-batches."""
    stage.trainer["accumulate_grad_batches"] = 2

    def smaller(step: Any) -> Any:
        return lambda self, batch, index: step(self, batch, index) / self.trainer.accumulate_grad_batches

    stage.wrap(GRPOModule, "training_step", smaller)


@fault("all_masked", deadline=PRE_FLIGHT)
def everything_masked(stage: Stage) -> None:
    """A mask that is empty: all sampled tokens have a weight of 0."""
    stage.wrap(GRPOModule, "token_weights", lambda right: lambda self, lengths: [0.0] * len(lengths))
