"""How the losses of tokens are averaged over an optimizer step."""

from collections.abc import Callable, Sequence
from typing import Literal

Aggregation = Literal["sequence", "token", "constant", "sequence_sum"]
"""How the losses of tokens become one number; see `AGGREGATIONS`."""


def sequence(lengths_S: Sequence[int], max_length: int | None = None) -> list[float]:
    """Mean over the tokens of a sequence, then over sequences.

        w = 1 / (S length_s)

    All sequences weigh the same, so that a token of a long one weighs less.

    Source: GRPO, equation 3, https://arxiv.org/abs/2402.03300
    Peers: TRL (`loss_type="grpo"`), verl (`seq-mean-token-mean`)
    Departs: the sequences are those of the whole optimizer step; TRL averages the means of micro-batches.
    Use: the default, and with sequence-level ratios. Long wrong answers are punished less per token than short ones.

    Args:
        lengths_S: Sampled tokens of each sequence of the step.
        max_length: Not used.

    Returns:
        Weight of each token, one per sequence.
    """
    return [1 / (len(lengths_S) * length) for length in lengths_S]


def token(lengths_S: Sequence[int], max_length: int | None = None) -> list[float]:
    """Mean over all tokens of the optimizer step.

        w = 1 / sum_s length_s

    All tokens weigh the same, so that long sequences weigh more.

    Source: DAPO, equation 8, https://arxiv.org/abs/2503.14476
    Peers: TRL (`loss_type="dapo"`), verl (`token-mean`)
    Departs: TRL's `loss_type="bnpo"` is the token mean over each micro-batch, averaged over micro-batches, and depends
        on how the step is cut. Counted over the whole optimizer step, as all weights are here, it is this one.
    Use: for long answers, whose tokens should learn as fast as those of short ones.

    Args:
        lengths_S: Sampled tokens of each sequence of the step.
        max_length: Not used.

    Returns:
        Weight of each token, one per sequence.
    """
    return [1 / sum(lengths_S)] * len(lengths_S) if lengths_S else []


def constant(lengths_S: Sequence[int], max_length: int | None = None) -> list[float]:
    """Sum over tokens, over a constant that does not depend on what was sampled.

        w = 1 / (S max_length)

    Of the size of `sequence` for sequences of max_length tokens; smaller for shorter ones.

    Source: Dr. GRPO, section 3.2, https://arxiv.org/abs/2503.20783
    Peers: TRL (`loss_type="dr_grpo"`), verl (`seq-mean-token-sum-norm`)
    Departs: verl divides by the constant alone and not by the number of sequences.
    Use: with the advantages `group_mean`, for the policy gradient without a bias by length.

    Args:
        lengths_S: Sampled tokens of each sequence of the step; only their number counts.
        max_length: The constant: most tokens that a sequence may have.

    Returns:
        Weight of each token, one per sequence.

    Raises:
        ValueError: If max_length is not given or not positive.
    """
    if max_length is None or not max_length >= 1:
        raise ValueError(f"expected max_length >= 1, which aggregation 'constant' divides by, but got {max_length}")
    return [1 / (len(lengths_S) * max_length) for _ in lengths_S]


def sequence_sum(lengths_S: Sequence[int], max_length: int | None = None) -> list[float]:
    """Sum over the tokens of a sequence, then mean over sequences.

        w = 1 / S

    The policy gradient as REINFORCE has it, in which a sequence is one action: log-probabilities add up.

    Source: RLOO, the whole sequence as one action, https://arxiv.org/abs/2402.14740
    Peers: TRL (`loss_type="luspo"`), verl (`seq-mean-token-sum`)
    Use: to reproduce results of REINFORCE or RLOO. The gradient grows with the length of the sequences, so that
        learning rate and gradient clipping must fit them.

    Args:
        lengths_S: Sampled tokens of each sequence of the step; only their number counts.
        max_length: Not used.

    Returns:
        Weight of each token, one per sequence.
    """
    return [1 / len(lengths_S) for _ in lengths_S]


AGGREGATIONS: dict[str, Callable[[Sequence[int], int | None], list[float]]] = {
    "sequence": sequence,
    "token": token,
    "constant": constant,
    "sequence_sum": sequence_sum,
}
"""Every aggregation by name."""


def token_weights(
    lengths_S: Sequence[int], aggregation: Aggregation = "sequence", *, max_length: int | None = None
) -> list[float]:
    """Weight of each token of a sequence in the loss of the whole optimizer step.

    The counts are those of the whole optimizer step, so that the result does not depend on how it is cut into
    micro-batches.

    Args:
        lengths_S: Sampled tokens of each sequence of the step.
        aggregation: Which of `AGGREGATIONS`.
        max_length: The constant that ``"constant"`` divides by; the others do not use it.

    Raises:
        ValueError: If a length is not positive, the aggregation is unknown, or a constant is needed but not given.
    """
    if aggregation not in AGGREGATIONS:
        *most, last = map(repr, AGGREGATIONS)
        raise ValueError(f"unknown aggregation {aggregation!r}; choose {', '.join(most)} or {last}")
    if any(length < 1 for length in lengths_S):
        raise ValueError(f"expected lengths >= 1, but got {min(lengths_S)}")
    return AGGREGATIONS[aggregation](lengths_S, max_length)
