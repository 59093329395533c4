"""The geometric mean of the ratios of a sequence, clipped token by token."""

import torch

from grpo_lightning.functional.masked import counted_terms, ratio_where, sequence_mean
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss


def gmpo(terms: PolicyTerms, *, clip_low: float = 0.4, clip_high: float = 0.4) -> TokenLoss:
    """The geometric mean of a sequence's ratios, each clipped in log space, times the sequence's advantage.

        loss = -A exp(mean over the tokens t of the sequence of l_t)
        l_t = min(log r_t, clip_high) where A > 0, max(log r_t, -clip_low) where A < 0

    Every token carries the loss of its whole sequence, so the weights should be those of a mean over the tokens of
    each sequence. Tokens of weight 0 are not in the mean. Ratios must be of the level ``token``.

    Source: GMPO, https://arxiv.org/abs/2507.20673
    Peers: TRL (experimental `GMPOTrainer`), verl (`geo_mean`)
    Departs: verl averages the advantages of a sequence; here they must be equal, since a mean would silently undo
        credit that was assigned to single turns or tokens. With the weights of a mean over all tokens (DAPO), long
        sequences count more than in the paper.
    Use: when single tokens with extreme ratios disturb the update; the clips are wider than PPO's.

    Args:
        terms: Sampled tokens, see `PolicyTerms`, with log-ratios of the level ``token`` and one advantage per sequence.
        clip_low: How far the log-ratio of a bad token may fall below 0 in nats, 0 or more.
        clip_high: How far the log-ratio of a good token may rise above 0 in nats, 0 or more.

    Returns:
        Loss of each token and where a bound removes its gradient.

    Raises:
        ValueError: If an argument is out of range, shapes differ or the tokens of a sequence with weight other than 0
            have different advantages.
    """
    if not clip_low >= 0 or not clip_high >= 0:
        raise ValueError(f"expected clip_low >= 0 and clip_high >= 0, but got {clip_low} and {clip_high}")
    terms = counted_terms(terms)
    _expect_one_advantage(terms)
    log_ratio_N = terms.log_ratio
    low_N = (terms.advantages < 0) & (log_ratio_N < -clip_low)
    high_N = (terms.advantages > 0) & (log_ratio_N > clip_high)
    log_ratio_N = torch.where(low_N, -clip_low, torch.where(high_N, clip_high, log_ratio_N))
    mean_N = sequence_mean(log_ratio_N, terms.weight, terms.sequence)
    return TokenLoss(-(ratio_where(terms.advantages != 0, mean_N) * terms.advantages), low_N, high_N)


def _expect_one_advantage(terms: PolicyTerms) -> None:
    advantages_K, sequence_K = terms.advantages[terms.weight != 0], terms.sequence[terms.weight != 0]
    sequences = int(sequence_K.max()) + 1 if len(sequence_K) else 0
    # Whichever token of a sequence is written last, all others must equal it.
    one_K = advantages_K.new_zeros(sequences).scatter(0, sequence_K, advantages_K)[sequence_K]
    if not torch.equal(one_K, advantages_K):
        different = len(set(sequence_K[one_K != advantages_K].tolist()))
        raise ValueError(f"expected one advantage per sequence, but got different ones in {different} sequences")
