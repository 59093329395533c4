"""Truncated sampling: the likeliest tokens alone can be drawn, top-k first and then top-p.

Shapes: ``B`` positions, ``V`` vocabulary.
"""

import math

import torch
from torch import Tensor


def kept_counts(sorted_BV: Tensor, *, top_p: float = 1.0, top_k: int = 0, tilt: float = 0.0) -> Tensor:
    """How many of the likeliest tokens are kept.

    Top-k keeps the ``k`` likeliest and those that tie with the last of them; top-p keeps of these the fewest that hold
    ``p`` of their mass. This is what vLLM does.

    Args:
        sorted_BV: Probabilities in falling order, float64, shape ``[B, V]``.
        top_p: Least mass that is kept, in (0, 1]; 1 for all.
        top_k: How many tokens are kept; 0 for all.
        tilt: Nats by which the odds of the bounds are moved, for distributions that are known but roughly: above 0 what
            may be kept, below 0 what surely is.

    Returns:
        Counts, int64, shape ``[B]``, at least 1.

    Raises:
        ValueError: If a bound is out of its range.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"expected 0 < top_p <= 1, but got {top_p}")
    if top_k < 0:
        raise ValueError(f"expected top_k >= 0, but got {top_k}")
    vocabulary = sorted_BV.shape[1]
    count_B = torch.full(sorted_BV.shape[:1], vocabulary, device=sorted_BV.device)
    if 0 < top_k < vocabulary:
        least_B1 = sorted_BV[:, top_k - 1, None] * math.exp(-tilt)
        count_B = (sorted_BV >= least_B1).sum(-1).clamp_min(1)
    if top_p < 1:
        odds = top_p / (1 - top_p) * math.exp(tilt)
        mass_BV = sorted_BV.cumsum(-1)
        enough_B1 = mass_BV.gather(1, count_B[:, None] - 1) * (odds / (1 + odds))
        count_B = count_B.minimum((mass_BV - sorted_BV < enough_B1).sum(-1).clamp_min(1))
    return count_B


def truncated(logp_BV: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Log-probabilities of the kept tokens, normalised again; minus infinity for all others.

    Args:
        logp_BV: Log-probabilities, shape ``[B, V]``.
        top_p: As in `kept_counts`. Which of tied tokens at its edge stay is arbitrary.
        top_k: As in `kept_counts`.

    Raises:
        ValueError: If a bound is out of its range.
    """
    sorted_BV, order_BV = logp_BV.sort(-1, descending=True)
    count_B = kept_counts(sorted_BV.double().exp(), top_p=top_p, top_k=top_k)
    place_V = torch.arange(logp_BV.shape[1], device=logp_BV.device)
    cut_BV = torch.empty_like(order_BV, dtype=torch.bool).scatter_(1, order_BV, place_V >= count_B[:, None])
    return logp_BV.masked_fill(cut_BV, -torch.inf).log_softmax(-1)
