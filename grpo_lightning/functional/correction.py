"""Corrections for tokens that were sampled from another distribution than the trainer's.

The engine samples from the behaviour policy; the trainer computes the same tokens' log-probabilities with other
kernels, in other precision, or with newer weights. Ratios here go from the behaviour to the proximal policy, the
trainer's at the start of the epoch: ``r = proximal(y) / behaviour(y)``. What the epoch then changes is the surrogate's
matter.

Truncated sampling (top-p, top-k) is the same problem. The engine keeps a set ``K`` of tokens and renormalises, so the
behaviour's probability, which must be the one after truncation, is the full one divided by the kept mass ``Z``. Weights
that hold the ratio undo this on the kept tokens: ``E[r f] = sum of proximal(y) f(y) over y in K``. No weight brings
back tokens outside ``K``: they are never sampled, so what they would add is missing, and a baseline subtracted from
the reward is no longer free, as their probabilities no longer add up to 1. Rejection leaves the weights at 1, so the
factor ``1 / Z`` stays. `COVERS_TRUNCATION` names the corrections that hold the ratio.

Shapes: ``N`` sampled tokens, flat over sequences.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from grpo_lightning.functional.kl import kl_k1, kl_k3


@dataclass(frozen=True)
class Correction:
    """What a correction does to each token. Tokens of weight 0 have weight 1 here and neither mark.

    Attributes:
        weight: Factor of each token's loss, without gradient, finite, shape ``[N]``.
        dropped: Tokens whose factor was set to 0 by masking or rejection, bool, shape ``[N]``.
        truncated: Tokens whose factor was capped, bool, shape ``[N]``.
    """

    weight: Tensor
    dropped: Tensor
    truncated: Tensor


def tis_token(log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor, *, cap: float = 2.0) -> Correction:
    """Truncated importance sampling: each token is weighted by its own ratio, at most by a cap.

        weight = min(r, cap)

    Right for one token given its prefix; that prefixes too come from the engine is not corrected, which is a bias
    that grows with the length and the mismatch.

    Truncated sampling: covered. The ratio of a kept token is the kept mass ``Z <= 1``, so the cap does not bind
    because of it.

    Source: TIS, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
        https://fengyao.notion.site/off-policy-rl
    Peers: TRL (`vllm_importance_sampling_mode: token_truncate`), verl (`rollout_is: token`)
    Departs: TRL can bound the ratio from below too; verl cuts log-ratios to [-20, 20] and can divide by the mean
    Use: For small mismatches, and where sequences are long: its variance does not grow with the length.

    Args:
        log_ratio_N: Proximal minus behaviour log-probability, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        sequence_N: Sequence of each token, int64 from 0, shape ``[N]``.
        cap: Largest weight, above 0.

    Returns:
        The weights and which of them were capped; nothing is dropped.

    Raises:
        ValueError: If the shapes differ, the cap is not positive, or a counted log-ratio is NaN or infinite upwards.
    """
    return _correct(log_ratio_N, weight_N, sequence_N, "token", "truncate", _log_bounds(0, cap, "cap"), cap=cap)


def tis_sequence(log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor, *, cap: float = 2.0) -> Correction:
    """Truncated importance sampling of whole sequences: each is weighted by the product of its ratios, up to a cap.

        weight = min(prod_t r_t, cap)

    Right for whole sequences while the cap does not bind; its variance grows exponentially with the length.

    Truncated sampling: covered. The product of the kept masses is exact on the sequences of kept tokens, but falls
    towards 0 with the length, so that long sequences hardly count.

    Source: TIS at sequence level, "When Speed Kills Stability", https://richardli.xyz/rl-collapse
    Peers: TRL (`vllm_importance_sampling_mode: sequence_truncate`), verl (`rollout_is: sequence`)
    Departs: TRL can bound the ratio from below too; verl cuts log-ratios to [-20, 20] and can divide by the mean
    Use: For short sequences, or a mismatch too large for `tis_token`'s bias.

    Args:
        log_ratio_N: Proximal minus behaviour log-probability, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        sequence_N: Sequence of each token, int64 from 0, shape ``[N]``.
        cap: Largest weight, above 0.

    Returns:
        The weights and which of them were capped; nothing is dropped.

    Raises:
        ValueError: If the shapes differ, the cap is not positive, or a counted log-ratio is NaN or infinite upwards.
    """
    return _correct(log_ratio_N, weight_N, sequence_N, "sequence", "truncate", _log_bounds(0, cap, "cap"), cap=cap)


def mis_token(
    log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor, *, low: float = 0.5, high: float = 2.0
) -> Correction:
    """Masked importance sampling (IcePop): each token is weighted by its ratio, or dropped if that leaves an interval.

        weight = r if low <= r <= high else 0

    Truncated sampling: covered for tokens that stay. The ratio of a kept token is the kept mass ``Z``, so ``low``
    must lie below it: top-p keeps ``Z >= p``, while top-k keeps any mass, and then drops sound tokens too.

    Source: IcePop, Ring-1T, https://arxiv.org/abs/2510.18855, with [0.5, 5]
    Peers: TRL (`vllm_importance_sampling_mode: token_mask`), verl (`rollout_is: token` with `rollout_rs: token_k1`)
    Departs: verl also takes what it drops out of the denominators of the loss, and bounds the inverse ratio
    Use: Where single tokens differ widely between engine and trainer, as in mixtures of experts.

    Args:
        log_ratio_N: Proximal minus behaviour log-probability, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        sequence_N: Sequence of each token, int64 from 0, shape ``[N]``.
        low: Smallest ratio that stays, 0 or more.
        high: Largest ratio that stays, above ``low``.

    Returns:
        The weights and which tokens were dropped; nothing is truncated.

    Raises:
        ValueError: If the shapes differ, the bounds are no interval, or a counted log-ratio is NaN or infinite
            upwards.
    """
    return _correct(log_ratio_N, weight_N, sequence_N, "token", "mask", _log_bounds(low, high))


def mis_sequence(
    log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor, *, low: float = 0.5, high: float = 2.0
) -> Correction:
    """Masked importance sampling of whole sequences: weighted by the product of ratios, or dropped outside an interval.

        weight = prod_t r_t if low <= prod_t r_t <= high else 0

    Long sequences leave the interval sooner than short ones of the same mismatch per token.

    Truncated sampling: covered for sequences that stay, but the product of the kept masses falls below ``low`` with
    the length, so long sequences are dropped however sound they are.

    Source: Seq-MIS, "When Speed Kills Stability", https://richardli.xyz/rl-collapse
    Peers: TRL (`vllm_importance_sampling_mode: sequence_mask`), verl (`rollout_is: sequence` with `rollout_rs:
        seq_sum_k1`)
    Departs: verl also takes what it drops out of the denominators of the loss, and bounds the inverse ratio
    Use: For short sequences, where a large product means a broken sequence rather than a long one.

    Args:
        log_ratio_N: Proximal minus behaviour log-probability, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        sequence_N: Sequence of each token, int64 from 0, shape ``[N]``.
        low: Smallest product that stays, 0 or more.
        high: Largest product that stays, above ``low``.

    Returns:
        The weights and which tokens were dropped; nothing is truncated.

    Raises:
        ValueError: If the shapes differ, the bounds are no interval, or a counted log-ratio is NaN or infinite
            upwards.
    """
    return _correct(log_ratio_N, weight_N, sequence_N, "sequence", "mask", _log_bounds(low, high))


def geometric_mask(log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor, *, low: float, high: float) -> Correction:
    """Drops whole sequences whose geometric mean of ratios leaves an interval; all others keep the weight 1.

        weight = 1 if low <= (prod_t r_t)^(1 / T) <= high else 0

    The mean does not depend on the length, so bounds are narrow: 0.999 and 1.001 in verl's presets.

    Truncated sampling: not covered. What stays has weight 1, so the factor ``1 / Z`` stays, and the geometric mean of
    the kept masses counts as a mismatch.

    Source: Geo-RS, "When Speed Kills Stability", part 3, https://richardli.xyz/rl-collapse-3
    Peers: verl (`rollout_rs: seq_mean_k1`)
    Departs: verl also takes what it drops out of the denominators of the loss, and bounds the inverse ratio
    Use: To keep sequences out that the engine computed differently throughout, whatever their length.

    Args:
        log_ratio_N: Proximal minus behaviour log-probability, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        sequence_N: Sequence of each token, int64 from 0, shape ``[N]``.
        low: Smallest mean that stays, 0 or more.
        high: Largest mean that stays, above ``low``.

    Returns:
        Weights of 0 and 1 and which tokens were dropped; nothing is truncated.

    Raises:
        ValueError: If the shapes differ, the bounds are no interval, or a counted log-ratio is NaN or infinite
            upwards.
    """
    return _correct(log_ratio_N, weight_N, sequence_N, "mean", "reject", _log_bounds(low, high))


def reject_k1(log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor, *, threshold: float) -> Correction:
    """Drops whole sequences whose mean k1 estimate of ``KL(behaviour || proximal)`` exceeds a threshold.

        weight = 1 if mean_t(-log r_t) <= threshold else 0

    Tokens that the trainer finds likelier than the engine did pull the mean down, so errors of both signs can cancel.

    Truncated sampling: not covered. What stays has weight 1, so the factor ``1 / Z`` stays, and ``-log Z`` counts as
    a mismatch.

    Source: off-policy sequence masking, DeepSeek-V3.2, equation 9, https://arxiv.org/abs/2512.02556
    Peers: TRL (`off_policy_mask_threshold`), verl (`rollout_rs: seq_mean_k1`)
    Departs: the paper and TRL drop only sequences of negative advantage, and measure the current policy; verl bounds
        the mean on both sides, which is `geometric_mask` here
    Use: To drop sequences that the trainer finds too unlikely.

    Args:
        log_ratio_N: Proximal minus behaviour log-probability, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        sequence_N: Sequence of each token, int64 from 0, shape ``[N]``.
        threshold: Largest mean that stays, in nats per token, 0 or more.

    Returns:
        Weights of 0 and 1 and which tokens were dropped; nothing is truncated.

    Raises:
        ValueError: If the shapes differ, the threshold is negative, or a counted log-ratio is NaN or infinite upwards.
    """
    return _reject(kl_k1, log_ratio_N, weight_N, sequence_N, threshold)


def reject_k3(log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor, *, threshold: float) -> Correction:
    """Drops whole sequences whose mean k3 estimate of ``KL(behaviour || proximal)`` exceeds a threshold.

        weight = 1 if mean_t(r_t - 1 - log r_t) <= threshold else 0

    No term is negative, so errors of both signs add up.

    Truncated sampling: not covered. What stays has weight 1, so the factor ``1 / Z`` stays, and ``Z - 1 - log Z``
    counts as a mismatch.

    Source: K3-RS, verl's rollout correction, https://verl.readthedocs.io/en/latest/algo/rollout_corr.html
    Peers: verl (`rollout_rs: seq_mean_k3`)
    Departs: verl also takes what it drops out of the denominators of the loss
    Use: To drop sequences that the engine computed differently, in either direction; 0.01 in verl's presets.

    Args:
        log_ratio_N: Proximal minus behaviour log-probability, shape ``[N]``.
        weight_N: Weight of each token in the loss, shape ``[N]``; 0 where it does not count.
        sequence_N: Sequence of each token, int64 from 0, shape ``[N]``.
        threshold: Largest mean that stays, in nats per token, 0 or more.

    Returns:
        Weights of 0 and 1 and which tokens were dropped; nothing is truncated.

    Raises:
        ValueError: If the shapes differ, the threshold is negative, or a counted log-ratio is NaN or infinite upwards.
    """
    return _reject(kl_k3, log_ratio_N, weight_N, sequence_N, threshold)


def _reject(
    estimator: Callable[[Tensor, Tensor], Tensor],
    log_ratio_N: Tensor,
    weight_N: Tensor,
    sequence_N: Tensor,
    threshold: float,
) -> Correction:
    if not 0 <= threshold < math.inf:
        raise ValueError(f"expected a finite threshold >= 0, but got {threshold}")
    return _correct(log_ratio_N, weight_N, sequence_N, "mean", "reject", (-math.inf, threshold), estimator=estimator)


@torch.no_grad()
def _correct(
    log_ratio_N: Tensor,
    weight_N: Tensor,
    sequence_N: Tensor,
    level: Literal["token", "sequence", "mean"],
    action: Literal["truncate", "mask", "reject"],
    bounds: tuple[float, float],
    *,
    cap: float = 1.0,
    estimator: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Correction:
    """Bounds the log-ratio, or what an estimator makes of it, at a level, and acts on what lies outside."""
    counted = _counted(log_ratio_N, weight_N, sequence_N)
    value_N = torch.where(counted, log_ratio_N, 0.0).to(torch.promote_types(log_ratio_N.dtype, torch.float32))
    if estimator is not None:
        value_N = estimator(-value_N, torch.zeros_like(value_N))
    if level != "token":
        value_N = _over_sequences(value_N, counted, sequence_N, mean=level == "mean")
    outside = counted & ~((value_N >= bounds[0]) & (value_N <= bounds[1]))
    nothing = torch.zeros_like(outside)
    kept = torch.ones_like(value_N) if action == "reject" else torch.where(counted & ~outside, value_N, 0.0).exp()
    if action == "truncate":
        return Correction(torch.where(outside, cap, kept), nothing, outside)
    return Correction(torch.where(outside, 0.0, kept), outside, nothing)


def _counted(log_ratio_N: Tensor, weight_N: Tensor, sequence_N: Tensor) -> Tensor:
    shapes = {tuple(t.shape) for t in (log_ratio_N, weight_N, sequence_N)}
    if len(shapes) != 1 or log_ratio_N.ndim != 1:
        raise ValueError(f"expected three tensors of one shape [N], but got shapes {sorted(shapes)}")
    counted = weight_N != 0
    # Minus infinity is sound: the trainer would never have sampled the token, so its ratio is 0.
    bad = counted & (log_ratio_N.isnan() | log_ratio_N.isposinf())
    if bad.any():
        place = int(bad.nonzero()[0])
        value = float(log_ratio_N[place])
        why = "" if math.isnan(value) else ": the engine cannot have sampled a token that it gives probability 0"
        raise ValueError(f"expected log-ratios below inf, but got log_ratio_N[{place}] = {value}{why}")
    return counted


def _over_sequences(value_N: Tensor, counted: Tensor, sequence_N: Tensor, *, mean: bool) -> Tensor:
    """Sum or mean of each sequence's counted tokens, at each of its tokens; values of the others are 0."""
    if not len(sequence_N):
        return value_N
    zeros_S = value_N.new_zeros(int(sequence_N.max()) + 1)
    total_S = zeros_S.index_add(0, sequence_N, value_N)
    if mean:
        total_S = total_S / zeros_S.index_add(0, sequence_N, counted.to(value_N.dtype)).clamp_min(1)
    return total_S[sequence_N]


def _log_bounds(low: float, high: float, name: str = "high") -> tuple[float, float]:
    if not 0 < high < math.inf:
        raise ValueError(f"expected a finite {name} > 0, but got {high}")
    if not 0 <= low < high:
        raise ValueError(f"expected 0 <= low < {name}, but got low {low} and {name} {high}")
    return math.log(low) if low > 0 else -math.inf, math.log(high)


CORRECTIONS: dict[str, Callable[..., Correction]] = {
    "tis_token": tis_token,
    "tis_sequence": tis_sequence,
    "mis_token": mis_token,
    "mis_sequence": mis_sequence,
    "geometric_mask": geometric_mask,
    "reject_k1": reject_k1,
    "reject_k3": reject_k3,
}
"""Corrections by name."""

COVERS_TRUNCATION = frozenset({"tis_token", "tis_sequence", "mis_token", "mis_sequence"})
"""Corrections whose weights hold the ratio, so that they undo truncated sampling on the tokens it keeps."""
