"""What this project computes on the stored tensors, by the same functions that training calls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.trl_losses.batch import SAMPLES, Batch
from benchmarks.trl_losses.cases import Case
from grpo_lightning.functional import token_weights
from grpo_lightning.functional.advantages import ESTIMATORS, Judged
from grpo_lightning.objective import LossInputs, Objective, policy_loss


@dataclass(frozen=True)
class Computed:
    """What came out.

    Attributes:
        loss: Of the optimizer step.
        gradient: By the log-probabilities, ``[N]``.
        entropy_gradient: By the entropies, ``[N]``.
        advantages: Of all answers.
    """

    loss: float
    gradient: Tensor
    entropy_gradient: Tensor
    advantages: Tensor


def computed(case: Case, batch: Batch, answers: Sequence[int]) -> Computed:
    """Advantages of all answers, and loss and gradients of an optimizer step on some.

    Args:
        case: The comparison.
        batch: The tensors.
        answers: The answers that the optimizer step is on.
    """
    settings = dict(case.here)
    advantages_S = advantages_of(case, batch, settings)
    weight_N = weights_of(case, batch, answers, settings)
    objective = objective_of(settings)
    logprobs_N = _tensor(batch.old if case.fresh else batch.logprobs).requires_grad_()
    entropy_N = _tensor(batch.entropy).requires_grad_()
    lengths = torch.tensor(batch.lengths)
    inputs = LossInputs(
        logprobs=logprobs_N,
        old_logprobs=_tensor(batch.old),
        advantages=advantages_S.repeat_interleave(lengths),
        weight=weight_N,
        sequence=torch.arange(len(lengths)).repeat_interleave(lengths),
        behaviour=_tensor(batch.sampling),
        focus=focus_of(objective, entropy_N.detach(), weight_N),
        reference=_tensor(batch.reference),
        entropy=entropy_N,
    )
    loss = policy_loss(objective, inputs).loss
    gradient, entropy_gradient = torch.autograd.grad(loss, [logprobs_N, entropy_N], materialize_grads=True)
    return Computed(loss.item(), gradient, entropy_gradient, advantages_S)


def objective_of(settings: Mapping[str, Any]) -> Objective:
    """The objective that `GRPOModule` would make of these settings."""
    objective = Objective.from_settings(
        surrogate=settings.get("surrogate", "clipped"),
        surrogate_args=settings.get("surrogate_args", {}),
        clips={name: settings.get(name) for name in ("clip_low", "clip_high")},
        correction=settings.get("correction"),
        correction_args=settings.get("correction_args"),
        focus_share=settings.get("entropy_share"),
        ratio_level=settings.get("ratio_level", "token"),
        kl_estimator=settings.get("kl_estimator", "k3"),
    )
    return replace(objective, kl_coef=settings.get("kl_coef", 0.0), entropy_coef=settings.get("entropy_coef", 0.0))


def advantages_of(case: Case, batch: Batch, settings: Mapping[str, Any]) -> Tensor:
    """Advantages of all answers."""
    parts_SK = _tensor(batch.rewards) * case.reward_scale
    weights_K = _tensor(batch.reward_weights)
    valid_S = torch.tensor([answer not in case.unscorable for answer in range(len(batch.lengths))])
    grouped = (-1, SAMPLES)
    judged = Judged(
        rewards_PG=(parts_SK @ weights_K).view(grouped),
        valid_PG=valid_S.view(grouped),
        lengths_PG=torch.tensor(batch.lengths).view(grouped),
        greedy_P=torch.full((len(batch.lengths) // SAMPLES,), torch.nan, dtype=torch.float64),
        parts_PGK=parts_SK.view(*grouped, len(weights_K)),
        part_weights_K=weights_K,
    )
    estimate = partial(ESTIMATORS[settings.get("advantage", "group_mean")], **settings.get("advantage_args", {}))
    return estimate(judged).flatten() * case.advantage_scale


def weights_of(case: Case, batch: Batch, answers: Sequence[int], settings: Mapping[str, Any]) -> Tensor:
    """Weights of the tokens; what a tool wrote, and answers that do not count, have 0, as `usable_rows` makes it."""
    left_out = {*case.unscorable, *(batch.truncated if case.trl.get("mask_truncated_completions") else ())}
    counted_N = torch.zeros(sum(batch.lengths), dtype=torch.float64)
    acted_N = _tensor(batch.acted) if case.tools else torch.ones_like(counted_N)
    spans = [batch.spans()[answer] for answer in answers if answer not in left_out]
    lengths = [int(acted_N[begin:end].sum()) for begin, end in spans]
    weights = token_weights(
        lengths, settings.get("aggregation", "sequence"), max_length=settings.get("aggregation_length")
    )
    for (begin, end), weight in zip(spans, weights, strict=True):
        counted_N[begin:end] = weight * acted_N[begin:end]
    return counted_N


def focus_of(objective: Objective, entropy_N: Tensor, weight_N: Tensor) -> Tensor | None:
    """Tokens of the optimizer step that the surrogate is computed of."""
    if objective.focus is None:
        return None
    real_N = weight_N != 0
    return torch.zeros_like(real_N).masked_scatter(real_N, objective.focus(entropy_N[real_N]))


def _tensor(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
