"""The plain policy gradient."""

from grpo_lightning.functional.masked import counted_terms, refuse_infinite, without_bounds
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss


def reinforce(terms: PolicyTerms) -> TokenLoss:
    """REINFORCE: the advantage times the log-probability, without any ratio.

        loss = -A log policy(y)

    This is also the loss of GPG (https://arxiv.org/abs/2504.02546), which differs in its advantages only.

    Source: REINFORCE, Williams, Simple statistical gradient-following algorithms for connectionist reinforcement
        learning, Machine Learning 8, 1992
    Peers: verl (`gpg`)
    Use: one update per batch of samples, where all ratios are 1. With several updates per batch it is biased and
        nothing holds the policy back.

    Args:
        terms: Sampled tokens, see `PolicyTerms`; their log-ratios have no effect.

    Returns:
        Loss of each token; nothing is clipped.

    Raises:
        ValueError: If shapes differ or a log-probability is infinite where the weight is not 0.
    """
    terms = counted_terms(terms)
    refuse_infinite("logprobs where the weight is not 0", terms.logprobs)
    return without_bounds(-(terms.advantages * terms.logprobs))
