"""PPO's clipped surrogate and its bounds for bad tokens."""

import math

import torch

from grpo_lightning.functional.masked import counted_terms, ratio_where
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss


def clipped(
    terms: PolicyTerms,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> TokenLoss:
    """PPO's clipped surrogate with separate clips and an optional bound for the ratios of bad tokens.

        loss = -min(min(r, delta) A, clip(r, 1 - clip_low, 1 + clip_high) A)
        and where A < 0, with dual clip: loss = min(that, -dual_clip A)

    Plain PPO leaves the loss of a bad token (A < 0) unbounded when its ratio is large. Both ``dual_clip`` and
    ``delta`` bound it, and in their allowed ranges they are the same function: for A < 0 the ratio counts as at most
    the smaller of the two, and beyond it the token has no gradient.

    Source: PPO, equation 7, https://arxiv.org/abs/1707.06347; separate clips, DAPO, equation 8,
        https://arxiv.org/abs/2503.14476; dual clip, Ye et al., https://arxiv.org/abs/1912.09729; delta, INTELLECT-2,
        section 4.1, https://arxiv.org/abs/2505.07291
    Peers: TRL (`grpo`: `epsilon`, `epsilon_high`, `delta`), verl (`vanilla`: `clip_ratio_low`, `clip_ratio_high`,
        `clip_ratio_c`)
    Departs: no dual clip by default, where verl takes 3. ``delta`` up to ``1 + clip_high`` is refused: it would
        move the upper clip of good tokens.
    Use: the default. ``clip_high=0.28`` (DAPO) keeps more entropy; a bound for bad tokens (``delta=4``) helps when old
        log-probabilities are stale or come from another engine.

    Args:
        terms: Sampled tokens, see `PolicyTerms`.
        clip_low: How far below 1 the ratio of a bad token may fall, in [0, 1).
        clip_high: How far above 1 the ratio of a good token may rise, 0 or more.
        dual_clip: Largest ratio of a bad token, above 1, or None.
        delta: Largest ratio of any token, above ``1 + clip_high``, or None.

    Returns:
        Loss of each token and where a bound removes its gradient.

    Raises:
        ValueError: If an argument is out of range or shapes differ.
    """
    if not 0 <= clip_low < 1 or not clip_high >= 0:
        raise ValueError(f"expected 0 <= clip_low < 1 and clip_high >= 0, but got {clip_low} and {clip_high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"expected dual_clip > 1, but got {dual_clip}")
    if delta is not None and not delta > 1 + clip_high:
        raise ValueError(f"expected delta > 1 + clip_high = {1 + clip_high}, but got {delta}")
    terms = counted_terms(terms)
    good_N, bad_N = terms.advantages > 0, terms.advantages < 0
    bad_bound = min((bound for bound in (dual_clip, delta) if bound is not None), default=math.inf)
    bound_N = torch.full_like(terms.log_ratio, bad_bound).masked_fill(good_N, 1 + clip_high)
    unclipped_N = terms.log_ratio.detach().exp()
    low_N = (unclipped_N < 1 - clip_low) & bad_N
    high_N = (unclipped_N > bound_N) & (good_N | bad_N)
    ratio_N = ratio_where((good_N | bad_N) & ~low_N & ~high_N, terms.log_ratio)
    ratio_N = torch.where(low_N, 1 - clip_low, torch.where(high_N, bound_N, ratio_N))
    return TokenLoss(-(ratio_N * terms.advantages), low_N, high_N)
