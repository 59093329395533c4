"""Levels at which the policy's ratio to the old policy is taken.

Shapes: ``N`` sampled tokens of a micro-batch, flat over its sequences.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from grpo_lightning.functional.masked import counted, expect_one_shape, refuse_infinite, sequence_mean, sequence_sum

RatioLevel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``f(logprobs_N, old_logprobs_N, weight_N, sequence_N) -> log_ratio_N``."""


def token(logprobs_N: Tensor, old_logprobs_N: Tensor, weight_N: Tensor, sequence_N: Tensor) -> Tensor:
    """Each token has its own ratio, as in PPO and GRPO.

        log r_t = log policy(y_t) - log old_policy(y_t)

    Source: PPO, equation 6, https://arxiv.org/abs/1707.06347; GRPO, equation 3, https://arxiv.org/abs/2402.03300
    Peers: TRL (`importance_sampling_level="token"`), verl (`vanilla`)
    Departs: verl clamps the log-ratio to -20 .. 20, here it is left as it is.
    Use: the default; when tokens have advantages of their own.

    Args:
        logprobs_N: Log-probabilities under the current policy in nats, with gradient, shape ``[N]``.
        old_logprobs_N: Log-probabilities under the old policy in nats, without gradient, shape ``[N]``.
        weight_N: Weight of each token, shape ``[N]``; where it is 0 the token may hold anything, NaN included.
        sequence_N: Sequence of each token, int64 in ``0 .. S - 1``, shape ``[N]``.

    Returns:
        Log-ratios in nats, with gradient, shape ``[N]``; 0 without gradient where the weight is 0.

    Raises:
        ValueError: If shapes differ, or ``old_logprobs_N`` requires grad (the gradient of the ratio would then cancel)
            or is infinite where the weight is not 0.
    """
    expect_one_shape(logprobs=logprobs_N, old_logprobs=old_logprobs_N, weight=weight_N, sequence=sequence_N)
    if old_logprobs_N.requires_grad:
        raise ValueError("expected old logprobs without gradient, but they require grad: detach them")
    old_N = counted(old_logprobs_N, weight_N)
    refuse_infinite("old logprobs where the weight is not 0", old_N)
    return counted(logprobs_N, weight_N) - old_N


def sequence(logprobs_N: Tensor, old_logprobs_N: Tensor, weight_N: Tensor, sequence_N: Tensor) -> Tensor:
    """All tokens of a sequence have one ratio: the geometric mean of their own ratios.

        log s_i = mean over the tokens t of i of (log policy(y_t) - log old_policy(y_t))

    The gradient of every token's ratio flows to all tokens of its sequence. Tokens of weight 0 are not in the mean.

    Source: GSPO, definition of s_i, https://arxiv.org/abs/2507.18071
    Peers: TRL (`importance_sampling_level="sequence"`)
    Use: when rewards belong to whole sequences and token ratios are noisy, as with mixtures of experts. The clips are
        then much smaller: the paper takes 3e-4 below and 4e-4 above.

    Args:
        logprobs_N: Log-probabilities under the current policy in nats, with gradient, shape ``[N]``.
        old_logprobs_N: Log-probabilities under the old policy in nats, without gradient, shape ``[N]``.
        weight_N: Weight of each token, shape ``[N]``; where it is 0 the token may hold anything, NaN included.
        sequence_N: Sequence of each token, int64 in ``0 .. S - 1``, shape ``[N]``.

    Returns:
        Log-ratios in nats, with gradient, shape ``[N]``; 0 without gradient where the weight is 0.

    Raises:
        ValueError: As `token`.
    """
    log_ratio_N = token(logprobs_N, old_logprobs_N, weight_N, sequence_N)
    return counted(sequence_mean(log_ratio_N, weight_N, sequence_N), weight_N)


def sequence_token(logprobs_N: Tensor, old_logprobs_N: Tensor, weight_N: Tensor, sequence_N: Tensor) -> Tensor:
    """The value of the sequence's ratio with the gradient of the token's own log-probability.

        log s_it = sg[log s_i] + log policy(y_t) - sg[log policy(y_t)]

    ``sg`` stops the gradient and ``s_i`` is the ratio of `sequence`. Where all tokens of a sequence have one advantage
    and one weight, loss and gradient are those of `sequence`.

    Source: GSPO-token, definition of s_it, https://arxiv.org/abs/2507.18071
    Peers: TRL (`importance_sampling_level="sequence_token"` of the former experimental `gspo_token`), verl (`gspo`)
    Departs: verl caps the log-ratio at 10, here it is left as it is.
    Use: as `sequence`, when the tokens of a sequence have different advantages.

    Args:
        logprobs_N: Log-probabilities under the current policy in nats, with gradient, shape ``[N]``.
        old_logprobs_N: Log-probabilities under the old policy in nats, without gradient, shape ``[N]``.
        weight_N: Weight of each token, shape ``[N]``; where it is 0 the token may hold anything, NaN included.
        sequence_N: Sequence of each token, int64 in ``0 .. S - 1``, shape ``[N]``.

    Returns:
        Log-ratios in nats, with gradient, shape ``[N]``; 0 without gradient where the weight is 0.

    Raises:
        ValueError: As `token`.
    """
    value_N = sequence(logprobs_N.detach(), old_logprobs_N, weight_N, sequence_N)
    # A token that has become impossible has no gradient here, as at the other levels: its difference would be NaN.
    own_N = torch.where((weight_N == 0) | (logprobs_N == -torch.inf), 0.0, logprobs_N)
    return value_N + (own_N - own_N.detach())


def sequence_product(logprobs_N: Tensor, old_logprobs_N: Tensor, weight_N: Tensor, sequence_N: Tensor) -> Tensor:
    """All tokens of a sequence have one ratio: that of the probabilities of the whole sequence.

        log r_i = sum over the tokens t of i of (log policy(y_t) - log old_policy(y_t))

    The only unbiased one of the levels. Its variance grows exponentially with the length, and the ratio of a long
    sequence can exceed what float32 holds (a log-ratio of 88), so take it with a surrogate that bounds large ratios for
    both signs of the advantage. Every token carries the ratio of the whole sequence, so the weights should be
    those of a mean over the tokens of each sequence.

    Source: importance sampling of whole trajectories, Precup, Sutton and Singh, Eligibility traces for off-policy
        policy evaluation, ICML 2000
    Peers: TRL (`RLOOTrainer`)
    Use: short answers, or to measure what the biased levels lose.

    Args:
        logprobs_N: Log-probabilities under the current policy in nats, with gradient, shape ``[N]``.
        old_logprobs_N: Log-probabilities under the old policy in nats, without gradient, shape ``[N]``.
        weight_N: Weight of each token, shape ``[N]``; where it is 0 the token may hold anything, NaN included.
        sequence_N: Sequence of each token, int64 in ``0 .. S - 1``, shape ``[N]``.

    Returns:
        Log-ratios in nats, with gradient, shape ``[N]``; 0 without gradient where the weight is 0.

    Raises:
        ValueError: As `token`.
    """
    log_ratio_N = token(logprobs_N, old_logprobs_N, weight_N, sequence_N)
    return counted(sequence_sum(log_ratio_N, sequence_N), weight_N)


RatioName = Literal["token", "sequence", "sequence_token", "sequence_product"]
"""Names in `RATIO_LEVELS`."""

RATIO_LEVELS: dict[str, RatioLevel] = {
    "token": token,
    "sequence": sequence,
    "sequence_token": sequence_token,
    "sequence_product": sequence_product,
}
"""Ratio levels by name."""
