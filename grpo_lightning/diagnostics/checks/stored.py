"""The sampler's logprobs: the loss uses these very ones, and they are what a sampler computes."""

import math

import torch
from torch import Tensor

from grpo_lightning.diagnostics.checks.common import CERTAIN, MIN_TOKENS, Z_FAIL, fresh_tokens, not_fresh
from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.verdict import Status, Verdict

STORED_TOLERANCE = 1e-6

STORED_RELATIVE_TOLERANCE = 2.4e-7
"""The log-ratio used and (current - stored) are the same subtraction. They may differ by its rounding in float32, two
units in the last place of the operands, and by next to nothing more."""

MAX_LAG = 2

MIN_SHIFTED_CORRELATION = 0.9


def check_stored(evidence: MicroBatchEvidence) -> Verdict:
    """The old logprobs in the loss are the ones that the sampler stored, not a recomputation."""
    name = "old logprobs"
    declared = torch.where(evidence.proximal.isfinite(), evidence.proximal, evidence.stored)
    known = torch.isfinite(declared)
    if not bool(known.any()):
        return Verdict(name, Status.NO_POWER, "The data module keeps no ledger of the engine's logprobs.")
    current, stored, used = evidence.logprobs[known], declared[known], evidence.log_ratio[known]
    expected = current - stored
    difference = (used - expected).abs()
    if bool((difference <= STORED_TOLERANCE + STORED_RELATIVE_TOLERANCE * (current.abs() + stored.abs())).all()):
        return Verdict(name, Status.PASS)
    recomputed = bool((used == 0).all())
    return Verdict(
        name,
        Status.FAIL,
        "The old logprobs in the loss are not the ones the sampler stored: "
        + (
            "they equal the current policy's bit for bit, so every ratio is exactly 1 and nothing can be learned."
            if recomputed
            else "they were replaced between the rollout and the loss."
        ),
        "Use the batch's old_logprobs as they are. Do not compute old and new logprobs with the same weights, "
        "in particular not in both branches of a condition.",
        {
            "log-ratio used, std": float(used.std(correction=0)),
            "current - stored, std": float(expected.std(correction=0)),
            "largest difference": float(difference.max()),
            "allowed, beside rounding": STORED_TOLERANCE,
            "tokens": int(known.sum()),
            "updates since sampling": int(evidence.updates_since_sampling.max()),
        },
        cause="old_recomputed" if recomputed else "old_replaced",
    )


def check_sampler(evidence: MicroBatchEvidence, *, alike: bool = False) -> Verdict:
    """Right after sampling: the stored logprobs are neither filled in with zeros nor copies of the trainer's.

    Args:
        evidence: The update's tokens.
        alike: Trainer and engine may agree bit for bit: by design, as measured, or because they compute in half
            precision.
    """
    name = "sampler logprobs"
    fresh = fresh_tokens(evidence)
    if fresh is None:
        return not_fresh(name)
    s, c, sequence = fresh
    unsure = c < CERTAIN
    if int(unsure.sum()) < MIN_TOKENS:
        return Verdict(name, Status.NO_POWER, f"Only {int(unsure.sum())} tokens were not certain; needs {MIN_TOKENS}.")
    zero = (s == 0) & unsure
    _, inverse = torch.unique(sequence, return_inverse=True)
    lengths = torch.bincount(inverse)
    zero_sequences = (
        (torch.bincount(inverse, (s == 0).double()) == lengths) & (torch.bincount(inverse, c) < -2) & (lengths >= 4)
    )
    if int(zero.sum()) > 0.5 * int(unsure.sum()) or bool(zero_sequences.any()):
        return Verdict(
            name,
            Status.FAIL,
            f"The sampler's logprobs were filled in with zeros: {int(zero.sum())} of {int(unsure.sum())} tokens that "
            "the policy was not certain of have a stored logprob of exactly 0.",
            "Missing logprobs must stop the run, not become 0. Look where the engine's output is turned into actions.",
            {
                "zeros": int(zero.sum()),
                "uncertain tokens": int(unsure.sum()),
                "mean current logprob of the zeros": float(c[zero].mean()),
                "sequences all zero": int(zero_sequences.sum()),
            },
            cause="logprobs_zero",
        )
    # What the trainer says itself knows of no truncation.
    own = evidence.logprobs[evidence.log_mass.isfinite()]
    copies = int(((s == own) & unsure).sum())
    if copies == int(unsure.sum()) and alike:
        reason = "All stored logprobs equal the trainer's, as they may where both compute alike or in half precision; "
        return Verdict(name, Status.NO_POWER, reason + "the record of what the engine returned decides.")
    if copies == int(unsure.sum()):
        return Verdict(
            name,
            Status.FAIL,
            f"All {copies} stored logprobs equal the trainer's bit for bit. Two programs that compute them in "
            "different order never agree so: the trainer computed both.",
            "Store what the engine returned. If your engine is bitwise consistent with the trainer, set "
            "bitwise_consistent_engine.",
            {"equal": copies, "uncertain tokens": int(unsure.sum())},
            cause="logprobs_copied",
        )
    return Verdict(name, Status.PASS)


def check_alignment(evidence: MicroBatchEvidence) -> Verdict:
    """Right after sampling: the stored logprobs belong to these tokens, not to their neighbours."""
    name = "alignment"
    fresh = fresh_tokens(evidence)
    if fresh is None:
        return not_fresh(name)
    s, c, sequence = fresh
    correlations = {lag: _lagged_correlation(s, c, sequence, lag) for lag in range(-MAX_LAG, MAX_LAG + 1)}
    r0, pairs = correlations[0]
    if pairs < MIN_TOKENS or math.isnan(r0):
        return Verdict(name, Status.NO_POWER, f"Only {pairs} tokens, or logprobs without variance.")
    lag = max(correlations, key=lambda i: -math.inf if math.isnan(correlations[i][0]) else correlations[i][0])
    best, pairs = correlations[lag]
    gap = (_fisher(best) - _fisher(r0)) * math.sqrt(max(pairs - 3, 1) / 2)
    if lag == 0 or gap < Z_FAIL or best < MIN_SHIFTED_CORRELATION:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        f"The sampler's logprobs are shifted by {abs(lag)} against the tokens.",
        "Logprob t must be that of token t. Look for an off-by-one where prompt and completion are cut apart, or "
        "where a list of logprobs is flattened.",
        {
            f"correlation at shift {lag}": best,
            "correlation as stored": r0,
            "gap in standard errors": gap,
            "allowed": Z_FAIL,
            "tokens": pairs,
        },
        cause="shifted_logprobs",
    )


def _lagged_correlation(s: Tensor, c: Tensor, sequence: Tensor, lag: int) -> tuple[float, int]:
    """Correlation of ``s[t]`` with ``c[t + lag]`` over pairs within a sequence, and their number."""
    n = len(s)
    left, right = slice(max(0, -lag), n - max(0, lag)), slice(max(0, lag), n - max(0, -lag))
    same = sequence[left] == sequence[right]
    x, y = s[left][same], c[right][same]
    if len(x) < 3:
        return math.nan, len(x)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.square().sum().sqrt() * y.square().sum().sqrt())
    return (float((x * y).sum()) / scale if scale > 1e-9 else math.nan), len(x)


def _fisher(r: float) -> float:
    return math.atanh(max(-0.999999, min(0.999999, r)))
