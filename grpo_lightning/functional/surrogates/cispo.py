"""REINFORCE weighted by clipped ratios."""

from grpo_lightning.functional.masked import counted_terms, refuse_infinite, without_bounds
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss


def cispo(terms: PolicyTerms, *, clip_high: float = 4.0, clip_low: float | None = None) -> TokenLoss:
    """REINFORCE with the clipped ratio as a constant weight, so that every token keeps its gradient.

        loss = -sg[clip(r, 1 - clip_low, 1 + clip_high)] A log policy(y)

    ``sg`` stops the gradient. No token's gradient is removed, so no token is reported as clipped.

    Source: CISPO, MiniMax-M1, definition of the objective, https://arxiv.org/abs/2506.13585; the default cap of 5,
        ScaleRL, https://arxiv.org/abs/2510.13786
    Peers: TRL (`cispo`; its `epsilon_high` is the cap itself, here ``1 + clip_high``), verl (`cispo`)
    Departs: no lower bound by default, as in the paper's runs and TRL; verl has one.
    Use: long reasoning, where rare tokens that PPO would clip at once decide the rest of the answer.

    Args:
        terms: Sampled tokens, see `PolicyTerms`.
        clip_high: How far above 1 the weight may rise, 0 or more.
        clip_low: How far below 1 the weight may fall, in [0, 1), or None for no lower bound.

    Returns:
        Loss of each token; nothing is clipped.

    Raises:
        ValueError: If an argument is out of range, shapes differ or a log-probability is infinite where the weight is
            not 0.
    """
    if not clip_high >= 0:
        raise ValueError(f"expected clip_high >= 0, but got {clip_high}")
    if clip_low is not None and not 0 <= clip_low < 1:
        raise ValueError(f"expected 0 <= clip_low < 1 or None, but got {clip_low}")
    terms = counted_terms(terms)
    refuse_infinite("logprobs where the weight is not 0", terms.logprobs)
    ratio_N = terms.log_ratio.detach().exp().clamp(0.0 if clip_low is None else 1 - clip_low, 1 + clip_high)
    return without_bounds(-(ratio_N * terms.advantages * terms.logprobs))
