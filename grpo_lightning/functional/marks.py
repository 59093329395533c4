"""Tokens that are marked once for a whole optimizer step, before its first micro-batch.

Marks are shares of all tokens of the step, so that they do not depend on how the step is cut into micro-batches.

Shapes: ``N`` sampled tokens of an optimizer step, over all processes, without those of weight 0.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from grpo_lightning.functional.masked import expect_one_shape

Marks = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From old logprobs, advantages and uniform random numbers in [0, 1) of a step's tokens, float64 ``[N]`` each, to those
that are chosen, bool ``[N]``."""


def covariance(logprobs_N: Tensor, advantages_N: Tensor) -> Tensor:
    """What each token adds to the covariance of log-probability and advantage.

        cov_t = (log p_t - mean log p) (A_t - mean A)

    The mean of the values is the covariance, which predicts how fast a policy-gradient step lowers the entropy: tokens
    that are likely and good, or unlikely and bad, have large positive values.

    Source: Clip-Cov and KL-Cov, definition of the token-wise covariance, https://arxiv.org/abs/2505.22617
    Peers: verl (inside `clip_cov` and `kl_cov`)
    Departs: verl takes the current log-probabilities and the means of each micro-batch; here it is the old ones and
        the means of the step.
    Use: to choose marks.

    Args:
        logprobs_N: Log-probabilities under the old policy in nats, shape ``[N]``.
        advantages_N: Advantage of each token, shape ``[N]``.

    Returns:
        Centred products, shape ``[N]``, without gradient.

    Raises:
        ValueError: If shapes differ or a value is not finite.
    """
    expect_one_shape(logprobs=logprobs_N, advantages=advantages_N)
    for name, values in (("logprobs", logprobs_N), ("advantages", advantages_N)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"expected finite {name}, but got {int((~values.isfinite()).sum())} that are not")
    logprobs_N = logprobs_N.detach()
    return (logprobs_N - logprobs_N.mean()) * (advantages_N.detach() - advantages_N.detach().mean())


def clip_cov_marks(
    covariance_N: Tensor, *, share: float = 0.0002, low: float = 1.0, high: float = 5.0, keys_N: Tensor
) -> Tensor:
    """Tokens drawn at random among those of high covariance, to lose their gradient.

        candidates = {t: low <= cov_t <= high}
        marks = the max(1, floor(share N)) candidates of smallest key, or all of them if there are fewer

    The random keys are given, so that the choice is a pure function of its arguments. Of equal keys the first comes
    first.

    Source: Clip-Cov, section on Clip-Cov, https://arxiv.org/abs/2505.22617
    Peers: verl (`clip_cov`: `clip_cov_ratio`, `clip_cov_lb`, `clip_cov_ub`; same defaults)
    Departs: verl chooses anew in each micro-batch, at least one token each time, leaves out tokens that the PPO clip
        binds (at the first update of a step there are none), and leaves out the ends of the interval.
    Use: with the surrogate `clip_cov`, against collapsing entropy.

    Args:
        covariance_N: Result of `covariance`, shape ``[N]``.
        share: Share of all tokens to mark, in (0, 1]; rounded down, but at least one token.
        low: Smallest covariance of a candidate.
        high: Largest covariance of a candidate, above ``low``.
        keys_N: Independent uniform random numbers in [0, 1), shape ``[N]``.

    Returns:
        Marks, bool, shape ``[N]``.

    Raises:
        ValueError: If shapes differ or an argument is out of range.
    """
    expect_one_shape(covariance=covariance_N, keys=keys_N)
    if not low < high:
        raise ValueError(f"expected low < high, but got low {low} and high {high}")
    if not bool(((keys_N >= 0) & (keys_N < 1)).all()):
        raise ValueError("expected keys_N in [0, 1), but got others")
    candidates_N = (covariance_N >= low) & (covariance_N <= high)
    order_N = torch.where(candidates_N, keys_N, torch.inf).argsort(stable=True)
    return _first(order_N, _count(share, covariance_N)) & candidates_N


def kl_cov_marks(covariance_N: Tensor, *, share: float = 0.002) -> Tensor:
    """The tokens of largest covariance, to be penalised for moving away from the old policy.

        marks = the max(1, floor(share N)) tokens of largest cov_t

    Of equal covariances the first comes first.

    Source: KL-Cov, section on KL-Cov, https://arxiv.org/abs/2505.22617
    Peers: verl (`kl_cov`: `kl_cov_ratio`)
    Departs: verl chooses anew in each micro-batch, at least one token each time, and its default share is 0.0002; the
        default here is what the authors run a 7B model with.
    Use: with the surrogate `kl_cov`, against collapsing entropy.

    Args:
        covariance_N: Result of `covariance`, shape ``[N]``.
        share: Share of all tokens to mark, in (0, 1]; rounded down, but at least one token.

    Returns:
        Marks, bool, shape ``[N]``.

    Raises:
        ValueError: If ``share`` is out of range.
    """
    expect_one_shape(covariance=covariance_N)
    order_N = covariance_N.argsort(stable=True, descending=True)
    return _first(order_N, _count(share, covariance_N))


def _count(share: float, values_N: Tensor) -> int:
    if not 0 < share <= 1:
        raise ValueError(f"expected 0 < share <= 1, but got {share}")
    # 0.29 times 100 is a little less than 29.
    return max(1, math.floor(share * len(values_N) + 1e-6))


def _first(order_N: Tensor, count: int) -> Tensor:
    marks_N = torch.zeros_like(order_N, dtype=torch.bool)
    marks_N[order_N[:count]] = True
    return marks_N
