"""Where the difference between sampler and trainer comes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grpo_lightning.diagnostics.hypotheses import Hypothesis, fit

SHARES = ("noise", "staleness", "temperature", "truncation", "retokenisation", "missing", "unexplained")
"""What the mean square of ``s - o`` is divided into."""

MIN_GAIN = 0.02
"""A hypothesis that takes away less than this part of the mean square is left out."""

LOCAL = 0.1
"""At most this part of the tokens differs where single tokens are not the ones that were sampled."""

MOST_NOISE = 2.0
"""RMS of rounding noise in units of its typical size: its tails are heavy."""

NEAR = 4.0
"""A difference of up to this many times the noise is noise: it is measured on few tokens of an untrained adapter, and
healthy runs of the demo model stay within 3 times."""

LOCAL_DIFFERENCE = 0.5
"""Nats by which such a token differs at least."""


def attribute(
    s: Tensor,
    o: Tensor,
    sequence: Tensor,
    hypotheses: Sequence[Hypothesis],
    noise: float | None,
    z: float,
) -> dict[str, float] | None:
    """Shares of the mean square of ``s - o``, which sum to 1.

    Missing and zero-filled logprobs come first. Then the hypothesis that takes away most is subtracted with its fitted
    part, again and again, while one is significant. Of what remains, single large differences count as retokenisation,
    as much as the noise as noise, and the rest as unexplained.

    Args:
        s: The sampler's logprobs, float64 ``[N]``; NaN where there is none, which counts as 0.
        o: The trainer's with the same weights, float64 ``[N]``.
        sequence: Sequence of each token, int64 ``[N]``.
        hypotheses: What may explain it.
        noise: RMS of ``s - o`` in nats if all is well; None if unknown, then that of most of what remains.
        z: Standard errors that make a hypothesis significant.

    Returns:
        A share for each of `SHARES`; None if there is no difference.
    """
    missing = ~s.isfinite() | ((s == 0) & (o < -0.01))
    difference = torch.where(missing, -o, s.nan_to_num() - o)
    total = float(difference.square().sum())
    if total == 0:
        return None
    squares = dict.fromkeys(SHARES, 0.0)
    squares["missing"] = float(difference[missing].square().sum())
    rest, left = difference[~missing], list(hypotheses)
    while (step := _best(rest, o[~missing], sequence[~missing], left, ~missing, z)) is not None:
        hypothesis, remaining = step
        squares[hypothesis.share] += float(rest.square().sum() - remaining.square().sum())
        rest, left = remaining, [h for h in left if h is not hypothesis]
    typical = float(rest.abs().median()) * 1.4826 if len(rest) else 0.0
    level = MOST_NOISE * typical if noise is None else noise
    local = rest.abs() > max(LOCAL_DIFFERENCE, 10 * level)
    if float(local.double().mean()) <= LOCAL if len(rest) else False:
        squares["retokenisation"] += float(rest[local].square().sum())
        rest = rest[~local]
    remaining_squares = float(rest.square().sum())
    near = noise is not None and remaining_squares <= len(rest) * (NEAR * level) ** 2
    squares["noise"] = remaining_squares if near else min(remaining_squares, len(rest) * level**2)
    squares["unexplained"] = remaining_squares - squares["noise"]
    return {name: value / total for name, value in squares.items()}


def _best(
    rest: Tensor, o: Tensor, sequence: Tensor, hypotheses: Sequence[Hypothesis], kept: Tensor, z: float
) -> tuple[Hypothesis, Tensor] | None:
    """The hypothesis that takes away most of what remains, and what then remains."""
    total = float(rest.square().sum())
    best: tuple[Hypothesis, Tensor] | None = None
    smallest = total * (1 - MIN_GAIN)
    for hypothesis in hypotheses:
        logprobs = hypothesis.logprobs[kept]
        moved = Hypothesis(hypothesis.cause, hypothesis.share, hypothesis.name, logprobs)
        found = fit(moved, o + rest, o, sequence)
        if found is None or found.alpha < min(0.0, hypothesis.alphas[0]) or found.z <= z:
            continue
        remaining = rest - min(found.alpha, 1.0) * (logprobs - o).nan_to_num()
        if float(remaining.square().sum()) < smallest:
            smallest, best = float(remaining.square().sum()), (hypothesis, remaining)
    return best
