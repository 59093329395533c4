"""Checks of one update, as pure functions. Each answers PASS, FAIL with its evidence, or NO POWER with the reason.

Symbols: ``s`` the sampler's stored logprob of a token, ``c`` the current policy's, ``b`` the base model's,
``k`` the number of changes of the policy between sampling and now, ``A`` the advantage.
"""

import math

import torch
from torch import Tensor

from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.verdict import Status, Verdict

Z_FAIL = 5.3
"""Standard errors beyond which a deviation is no accident: p = 1.2e-7, so 20 checks in 10,000 updates raise about
0.02 false alarms a run."""

MIN_TOKENS = 32
"""Fewer sampled tokens than this decide nothing."""

STORED_TOLERANCE = 1e-6
STORED_RELATIVE_TOLERANCE = 2.4e-7
"""The log-ratio used and (current - stored) are the same subtraction. They may differ by its rounding in float32, two
units in the last place of the operands, and by next to nothing more."""

MAX_LAG = 2
_CERTAIN = -0.01
MIN_SHIFTED_CORRELATION = 0.9

MISMATCH_FACTOR = 20.0
MISMATCH_MIN = 1e-3
"""Right after sampling, trainer and engine hold the same weights. A mismatch of more than 20 times the one
measured on the run's first rollout and of more than 1e-3 nats is no rounding: healthy runs of the demo model stay
within a factor of 3 of their first rollout in float32 (about 1e-5) and bfloat16 (about 5e-2)."""

MAX_MISMATCH = 0.5
"""Default limit in nats for any rollout: ten times what bfloat16 shows on the demo model."""

HALF_SERVED = 0.5
MIN_SIGNAL = 3.0
"""The adapter's effect must be three times the rounding noise. If the noise is the trainer's alone, the slope of a
healthy run is then 0.9 and not, as with an effect the size of the noise, 0.5."""

UNKNOWN_NOISE = 0.1
"""Rounding noise in nats to reckon with as long as none was measured: twice what bfloat16 shows on the demo model."""

EXPECTED_DRIFT_FACTOR = 10.0
"""A std below the limit is degenerate where the gradient says that the log-ratio moved ten times the limit."""


def check_finite(evidence: MicroBatchEvidence) -> Verdict:
    """Current logprobs and log-ratios are numbers."""
    bad = int((~torch.isfinite(evidence.logprobs) | ~torch.isfinite(evidence.log_ratio)).sum())
    if not bad:
        return Verdict("finite", Status.PASS)
    return Verdict(
        "finite",
        Status.FAIL,
        f"{bad} of {len(evidence)} current logprobs or log-ratios are NaN or infinite.",
        "Look for an overflow in the model (float16?), a too large learning rate, or NaN in the weights.",
        {"tokens": len(evidence), "not finite": bad},
    )


def check_gradient(norm: float) -> Verdict:
    """The gradient is a number. Clipping would turn an infinite one into NaN weights."""
    name = "finite gradient"
    if math.isfinite(norm):
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        f"The gradient's norm is {norm}; the step would destroy the weights.",
        "Look for an overflow in the model, extreme log-ratios, or NaN in the weights; lower the learning rate.",
        {"gradient norm": norm},
    )


def check_stored(evidence: MicroBatchEvidence) -> Verdict:
    """The old logprobs in the loss are the ones that the sampler stored, not a recomputation."""
    name = "old logprobs"
    known = torch.isfinite(evidence.stored)
    if not bool(known.any()):
        return Verdict(name, Status.NO_POWER, "The data module keeps no ledger of the engine's logprobs.")
    current, stored, used = evidence.logprobs[known], evidence.stored[known], evidence.log_ratio[known]
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
    )


def check_sampler(evidence: MicroBatchEvidence) -> Verdict:
    """Right after sampling: the stored logprobs are neither filled in with zeros nor copies of the trainer's."""
    name = "sampler logprobs"
    fresh = _fresh(evidence)
    if fresh is None:
        return _not_fresh(name)
    s, c, sequence = fresh
    unsure = c < _CERTAIN
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
        )
    copies = int(((s == c) & unsure).sum())
    if copies == int(unsure.sum()):
        return Verdict(
            name,
            Status.FAIL,
            f"All {copies} stored logprobs equal the trainer's bit for bit. Two programs that compute them in "
            "different order never agree so: the trainer computed both.",
            "Store what the engine returned. If your engine is bitwise consistent with the trainer, set "
            "bitwise_consistent_engine.",
            {"equal": copies, "uncertain tokens": int(unsure.sum())},
        )
    return Verdict(name, Status.PASS)


def check_alignment(evidence: MicroBatchEvidence) -> Verdict:
    """Right after sampling: the stored logprobs belong to these tokens, not to their neighbours."""
    name = "alignment"
    fresh = _fresh(evidence)
    if fresh is None:
        return _not_fresh(name)
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
    )


def mismatch_rms(evidence: MicroBatchEvidence) -> float | None:
    """RMS of ``c - s`` in nats, if the tokens were sampled with the current weights."""
    fresh = _fresh(evidence)
    return None if fresh is None else float((fresh[1] - fresh[0]).square().mean().sqrt())


def check_mismatch(evidence: MicroBatchEvidence, first_rms: float | None, max_rms: float) -> Verdict:
    """Right after sampling: trainer and engine agree, and as well as they did on the run's first rollout.

    Args:
        evidence: The update's tokens.
        first_rms: `mismatch_rms` of the first rollout; None on that rollout.
        max_rms: What no rounding explains, in nats.
    """
    name = "mismatch"
    rms = mismatch_rms(evidence)
    if rms is None or len(evidence) < MIN_TOKENS:
        return _not_fresh(name)
    limit = max_rms if first_rms is None else min(max_rms, max(MISMATCH_FACTOR * first_rms, MISMATCH_MIN))
    shown: dict[str, float | int | str] = {"mismatch RMS": rms, "allowed": limit, "tokens": len(evidence)}
    if rms <= limit:
        return Verdict(name, Status.PASS, evidence=shown)
    if first_rms is None:
        return Verdict(
            name,
            Status.FAIL,
            "Trainer and engine disagree on the very first rollout, where both hold the same weights.",
            "Do both load the same checkpoint? Are the engine's logprobs the processed ones, at the sampling "
            "temperature, and of these tokens? If the engine is that coarse by design, raise max_mismatch.",
            shown,
        )
    shown["on the first rollout"] = first_rms
    return Verdict(
        name,
        Status.FAIL,
        "The engine sampled with other weights than the trainer holds, although both report the same policy version.",
        "The adapter that was published did not reach the engine, or only in part. Look at LoRAWeightSync, at the "
        "adapter's directory, and at what the engine says when it loads it.",
        shown,
    )


def check_served_adapter(evidence: MicroBatchEvidence, base: Tensor, noise: float | None) -> Verdict:
    """Right after sampling: the engine's distribution moved away from the base model as far as the trainer's.

        alpha = sum((s - b) (c - b)) / sum((c - b)^2)
        standard error = noise / (rms(c - b) sqrt(n))

    1 if the engine serves the trainer's adapter, 0 if it serves the base model. Judged only where the adapter's
    effect, the part of ``c - b`` beyond the rounding noise, exceeds `MIN_SIGNAL` times that noise.

    Args:
        evidence: The update's tokens.
        base: The base model's logprobs of the leading tokens of ``evidence``, float64 ``[M]``.
        noise: RMS of ``c - s`` on the first rollout; None on that rollout, where the smaller of the RMS of ``c - s``
            and of ``s - b``, but at least `UNKNOWN_NOISE`, stands for it.
    """
    name = "served adapter"
    fresh = _fresh(evidence)
    if fresh is None or len(base) < MIN_TOKENS:
        return _not_fresh(name)
    s, c = fresh[0][: len(base)], fresh[1][: len(base)]
    distance = float((c - base).square().mean().sqrt())
    if noise is None:
        # Whichever of the two the engine serves, it differs from that one by rounding. Not less than the constant:
        # a trainer noisier than its adapter's effect looks as if the base were served.
        noise = float(
            torch.minimum((c - s).square().mean(), (base - s).square().mean()).sqrt().clamp_min(UNKNOWN_NOISE)
        )
    # Rounding is part of c - b: only what exceeds it is movement.
    moved = math.sqrt(max(0.0, distance**2 - noise**2))
    if moved <= MIN_SIGNAL * noise:
        return Verdict(
            name, Status.NO_POWER, f"The policy is too close to the base model ({distance:.2g} nats) to tell."
        )
    alpha = float(((s - base) * (c - base)).sum() / (c - base).square().sum())
    shown: dict[str, float | int | str] = {
        "alpha": alpha,
        "expected": 1.0,
        "standard error": noise / (moved * math.sqrt(len(base))),
        "trainer against base, RMS": moved,
        "tokens": len(base),
    }
    if alpha >= HALF_SERVED:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        "The engine samples from (nearly) the base model although an adapter was published.",
        "Look at LoRAWeightSync and at what the engine loads: a path or adapter name that was used before, an adapter "
        "saved before training, a request without the adapter.",
        shown,
    )


def check_ratio(
    std: float,
    count: int,
    k: int,
    expected_drift: float,
    *,
    uncertain: int,
    min_std: float,
    strict: bool,
    details: dict[str, float],
) -> Verdict:
    """The ratios vary where they should.

    On the first update after sampling (``k = 0``) policy and sampler hold the same weights and a std of 1e-5 is
    right. Later a std below ``min_std`` is degenerate if the gradient says that the policy moved: to first order
    an update changes the loss by ``<grad, step>``, which bounds the mean change of the logprobs from below.

    Args:
        std: Standard deviation of the ratio.
        count: Sampled tokens.
        k: Updates since sampling.
        expected_drift: Sum over the updates since sampling of the bound on the mean change of their own tokens'
            logprobs, weighted by advantage, in nats.
        uncertain: Tokens that the policy is not certain of (`uncertain_tokens`); the others hardly can change.
        min_std: The limit.
        strict: Judge by the limit alone, whatever k.
        details: Shown with the verdict.
    """
    name = "ratio"
    if count < 2:
        return Verdict(name, Status.NO_POWER, f"{count} sampled tokens have no spread.")
    if not std < min_std:
        return Verdict(name, Status.PASS)
    shown: dict[str, float | int | str] = {
        "ratio mean": details["mean"],
        "ratio std": std,
        "ratio min": details["min"],
        "ratio max": details["max"],
        "tokens": count,
        "limit for the std": min_std,
        "updates since sampling": k,
        "expected drift (nats)": expected_drift,
    }
    if strict:
        why = "strict mode judges by the std alone"
    elif k == 0:
        return Verdict(name, Status.NO_POWER, "First update after sampling: a ratio of 1 is right.", evidence=shown)
    elif uncertain < MIN_TOKENS:
        return Verdict(name, Status.NO_POWER, f"Only {uncertain} tokens were not certain.", evidence=shown)
    elif expected_drift < EXPECTED_DRIFT_FACTOR * min_std:
        return Verdict(
            name, Status.NO_POWER, "The policy hardly moved since sampling (lr, advantages).", evidence=shown
        )
    else:
        why = "the policy was updated since sampling, yet its logprobs did not change"
    return Verdict(
        name,
        Status.FAIL,
        f"PPO ratios are degenerate (std={std:.3g}). Training cannot proceed. Why: {why}.",
        "Check that new logprobs come from the current policy with its adapter active and gradients on, and old ones "
        "from the sampler; that the optimizer holds the parameters the forward uses.",
        shown,
    )


def uncertain_tokens(logprobs: Tensor) -> int:
    """How many tokens had a probability below 0.99."""
    return int((logprobs < _CERTAIN).sum())


def check_moved(*, grad_norm: float, lr: float, update_norm: float, updates: int) -> Verdict:
    """An optimizer step with a gradient and a learning rate moves the parameters."""
    name = "parameters move"
    if grad_norm == 0 or lr == 0:
        return Verdict(name, Status.NO_POWER, "Learning rate or gradient is 0: nothing should move.")
    if update_norm > 0:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        "The optimizer step changed no trainable parameter, although neither gradient nor learning rate is 0.",
        "Check that the optimizer holds the policy's trainable parameters, and that their dtype can take the update.",
        {"gradient norm": grad_norm, "learning rate": lr, "update norm": update_norm, "updates": updates},
    )


def _fresh(evidence: MicroBatchEvidence) -> tuple[Tensor, Tensor, Tensor] | None:
    """Stored and current logprobs and sequences, if all tokens were sampled with the current weights."""
    if not len(evidence) or bool((evidence.updates_since_sampling != 0).any()):
        return None
    if not bool(torch.isfinite(evidence.stored).all()):
        return None
    return evidence.stored, evidence.logprobs, evidence.sequence


def _not_fresh(name: str) -> Verdict:
    return Verdict(name, Status.NO_POWER, "Needs tokens sampled with the current weights, and a ledger.")


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
