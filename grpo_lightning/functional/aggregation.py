"""How the losses of tokens are averaged over an optimizer step."""

from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["sequence", "token"]
"""Mean over the tokens of a sequence first, or over all tokens at once; see `token_weights`."""


def token_weights(lengths_S: Sequence[int], aggregation: Aggregation = "sequence") -> list[float]:
    """Weight of each token of a sequence in the loss of the whole optimizer step.

    ``"sequence"``: mean over the tokens of a sequence, then over sequences, ``1 / (S length_s)`` (GRPO,
    https://arxiv.org/abs/2402.03300, equation 3). ``"token"``: mean over all tokens,
    ``1 / sum_s length_s`` (DAPO, https://arxiv.org/abs/2503.14476, equation 8). The counts are those of
    the whole optimizer step, so that the result does not depend on how it is cut into micro-batches.

    Args:
        lengths_S: Sampled tokens of each sequence of the step.
        aggregation: Which of the two.

    Raises:
        ValueError: If a length is not positive or the aggregation is unknown.
    """
    if any(length < 1 for length in lengths_S):
        raise ValueError(f"expected lengths >= 1, but got {min(lengths_S)}")
    if not lengths_S:
        return []
    if aggregation == "sequence":
        return [1 / (len(lengths_S) * length) for length in lengths_S]
    if aggregation == "token":
        return [1 / sum(lengths_S)] * len(lengths_S)
    raise ValueError(f"unknown aggregation {aggregation!r}; choose 'sequence' or 'token'")
