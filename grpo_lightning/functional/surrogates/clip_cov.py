"""PPO's clipped surrogate without the tokens that lower the entropy most."""

import torch

from grpo_lightning.functional.surrogates.clipped import clipped
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss


def clip_cov(terms: PolicyTerms, *, clip_low: float = 0.2, clip_high: float = 0.2) -> TokenLoss:
    """PPO's clipped surrogate, in which the marked tokens lose their gradient.

        loss = 0 where marked, else -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)

    The marks are those of `clip_cov_marks`. They are not reported as clipped.

    Source: Clip-Cov, https://arxiv.org/abs/2505.22617
    Peers: verl (`clip_cov`)
    Departs: the marks are chosen once for the optimizer step, see `clip_cov_marks`.
    Use: against collapsing entropy, when a higher ``clip_high`` does not suffice.

    Args:
        terms: Sampled tokens, see `PolicyTerms`.
        clip_low: How far below 1 the ratio of a bad token may fall, in [0, 1).
        clip_high: How far above 1 the ratio of a good token may rise, 0 or more.

    Returns:
        Loss of each token and where a bound removes its gradient.

    Raises:
        ValueError: If an argument is out of range or shapes differ.
    """
    whole = clipped(terms, clip_low=clip_low, clip_high=clip_high)
    loss_N = torch.where(terms.marked, 0.0, whole.loss)
    return TokenLoss(loss_N, whole.clipped_low & ~terms.marked, whole.clipped_high & ~terms.marked)
