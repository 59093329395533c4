"""What ratio levels and surrogates share: tokens of weight 0 left out, sums over sequences, ratios without overflow.

Shapes: ``N`` sampled tokens of a micro-batch, flat over its sequences.
"""

import torch
from torch import Tensor

from grpo_lightning.functional.terms import PolicyTerms, TokenLoss


def expect_one_shape(**tensors: Tensor) -> None:
    """Refuse tensors that are not of one shape ``[N]``."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape [N], but got shapes {shapes}")


def refuse_infinite(what: str, values_N: Tensor) -> None:
    """Refuse infinite values; NaN passes, since it reaches the loss and is seen there."""
    infinite = int(values_N.isinf().sum())
    if infinite:
        raise ValueError(f"expected finite {what}, but got {infinite} infinite of {values_N.numel()}")


def counted(values_N: Tensor, weight_N: Tensor) -> Tensor:
    """The values, with 0 and no gradient where the weight is 0, whatever stood there."""
    return torch.where(weight_N == 0, 0.0, values_N)


def counted_terms(terms: PolicyTerms) -> PolicyTerms:
    """The terms with log-probability, log-ratio and advantage 0, and no gradient, where the weight is 0."""
    expect_one_shape(**vars(terms))
    logprobs, log_ratio, advantages = (
        counted(values, terms.weight) for values in (terms.logprobs, terms.log_ratio, terms.advantages)
    )
    return PolicyTerms(logprobs, log_ratio, advantages.detach(), terms.weight, terms.sequence, terms.marked)


def sequence_sum(values_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Sum over the tokens of each sequence, at each of its tokens, shape ``[N]``."""
    sequences = int(sequence_N.max()) + 1 if len(sequence_N) else 0
    return values_N.new_zeros(sequences).index_add(0, sequence_N, values_N)[sequence_N]


def sequence_mean(values_N: Tensor, weight_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Mean over the tokens of weight other than 0 of each sequence, at each of its tokens, shape ``[N]``."""
    count_N = sequence_sum((weight_N != 0).to(values_N.dtype), sequence_N)
    return sequence_sum(counted(values_N, weight_N), sequence_N) / count_N.clamp(min=1)


def ratio_where(free_N: Tensor, log_ratio_N: Tensor) -> Tensor:
    """The ratio where ``free_N`` holds; elsewhere 1 without gradient.

    Masked before the exponential, so that a ratio that overflows where it has no say gives no NaN (0 times infinity)
    in the gradient.
    """
    return torch.where(free_N, log_ratio_N, 0.0).exp()


def without_bounds(loss_N: Tensor) -> TokenLoss:
    """The loss of a surrogate that removes no token's gradient."""
    none = torch.zeros_like(loss_N, dtype=torch.bool)
    return TokenLoss(loss_N, none, none)
