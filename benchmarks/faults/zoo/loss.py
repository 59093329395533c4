"""Faults in the loss."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

import grpo_lightning.module
import grpo_lightning.objective
from benchmarks.faults.fault import PRE_FLIGHT, Stage, fault, updates
from grpo_lightning.module import GRPOModule
from grpo_lightning.objective import LossInputs, Objective, PolicyLoss
from grpo_lightning.policy import Policy


def textbook_loss(inputs: LossInputs) -> PolicyLoss:
    """PPO's surrogate as it stands in many repositories, without any check of what it is given."""
    log_ratio = inputs.logprobs - inputs.old_logprobs
    ratio, advantages = log_ratio.exp(), inputs.advantages
    clipped = ratio.clamp(0.8, 1.2)
    loss = -(inputs.weight * torch.minimum(ratio * advantages, clipped * advantages)).sum()
    low = (ratio < 0.8) & (advantages < 0)
    high = (ratio > 1.2) & (advantages > 0)
    nowhere = torch.zeros_like(low)
    return PolicyLoss(loss, log_ratio.detach(), low, high, torch.ones_like(inputs.weight), nowhere, nowhere)


def _replace_loss(stage: Stage, make: Any) -> None:
    stage.wrap(grpo_lightning.module, "policy_loss", make)


def _with(change: Callable[[LossInputs], dict[str, Tensor]]) -> Any:
    """A loss that is given something else."""
    return lambda loss: lambda objective, inputs: loss(objective, replace(inputs, **change(inputs)))


@fault("old_recomputed", deadline=updates(1))
def old_is_current(stage: Stage) -> None:
    """Both branches of a condition compute the current policy's logprobs: the loss compares them with themselves."""
    _replace_loss(stage, _with(lambda inputs: {"old_logprobs": inputs.logprobs.detach()}))


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
        def wrong(objective: Objective, inputs: LossInputs) -> PolicyLoss:
            new = inputs.logprobs
            return textbook_loss(replace(inputs, old_logprobs=inputs.old_logprobs + (new - new.detach())))

        return wrong

    _replace_loss(stage, attached)


@fault("old_replaced", deadline=updates(1))
def old_rounded_to_bf16(stage: Stage) -> None:
    """The stored logprobs pass through bfloat16 on their way to the loss."""

    def rounded(inputs: LossInputs) -> dict[str, Tensor]:
        old = inputs.old_logprobs
        stage.note(not torch.equal(old, old.bfloat16().to(old)))
        return {"old_logprobs": old.bfloat16().to(old)}

    _replace_loss(stage, _with(rounded))


@fault("wrong_sign", deadline=updates(1))
def loss_sign(stage: Stage) -> None:
    """The loss is maximised: a minus sign is missing."""

    def negated(loss: Any) -> Any:
        def wrong(objective: Objective, inputs: LossInputs) -> PolicyLoss:
            right = loss(objective, inputs)
            return replace(right, loss=-right.loss)

        return wrong

    _replace_loss(stage, negated)


@fault("wrong_gradient", deadline=updates(6))
def clip_ignored(stage: Stage) -> None:
    """The clipped branch is computed and then not used: ratios beyond the clip still push."""
    stage.module["learning_rate"] = 3e-3
    stage.data["inner_epochs"] = 4

    def unclipped(loss: Any) -> Any:
        def wrong(objective: Objective, inputs: LossInputs) -> PolicyLoss:
            right = loss(objective, inputs)
            stage.note(bool((right.clipped_low | right.clipped_high).any()))
            ratio = (inputs.logprobs - inputs.old_logprobs).exp()
            return replace(right, loss=-(inputs.weight * ratio * inputs.advantages).sum())

        return wrong

    _replace_loss(stage, unclipped)


@fault("wrong_gradient", deadline=updates(3))
def kl_sign(stage: Stage) -> None:
    """The KL penalty is subtracted: the policy is paid for leaving its reference."""
    stage.module["kl_coef"] = 0.2
    stage.data["inner_epochs"] = 2
    stage.wrap(grpo_lightning.objective, "kl_of", lambda kl: lambda *given: -kl(*given))


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

    _replace_loss(stage, _with(lambda inputs: {"weight": inputs.weight / inputs.weight.sum()}))


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
