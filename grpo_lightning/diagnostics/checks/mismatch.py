"""Right after sampling trainer and engine hold the same weights, so they agree."""

import math

import torch
from torch import Tensor

from grpo_lightning.diagnostics.checks.common import MIN_TOKENS, fresh_tokens, not_fresh
from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.rounding import MIN_APART
from grpo_lightning.diagnostics.verdict import Status, Verdict

MISMATCH_FACTOR = 20.0
"""Right after sampling, trainer and engine hold the same weights. A mismatch of more than 20 times the one
measured on the run's first rollout, and of more than 20 times what is usual in the dtype, is no rounding: healthy runs
of the demo model stay within a factor of 3 of their first rollout in float32 (about 1e-5) and bfloat16 (about 5e-2)."""

MAX_MISMATCH = 0.5
"""Default limit in nats for any rollout: ten times what bfloat16 shows on the demo model."""

MISMATCH_MIN = MISMATCH_FACTOR * MIN_APART
"""In nats: a smaller mismatch is rounding in any dtype."""

HALF_SERVED = 0.5

MIN_SIGNAL = 3.0
"""The adapter's effect must be three times the rounding noise. If the noise is the trainer's alone, the slope of a
healthy run is then 0.9 and not, as with an effect the size of the noise, 0.5."""

UNKNOWN_NOISE = 0.1
"""Rounding noise in nats to reckon with as long as none was measured: twice what bfloat16 shows on the demo model."""


def mismatch_rms(evidence: MicroBatchEvidence) -> float | None:
    """RMS of ``c - s`` in nats, if the tokens were sampled with the current weights."""
    fresh = fresh_tokens(evidence)
    return None if fresh is None or not len(fresh[0]) else float((fresh[1] - fresh[0]).square().mean().sqrt())


def mismatch_limit(noise: float | None, max_rms: float, rounding: float) -> float:
    """Largest mismatch in nats that is no other weights, given one that surely was rounding."""
    return max_rms if noise is None else min(max_rms, MISMATCH_FACTOR * max(noise, rounding))


def check_mismatch(
    evidence: MicroBatchEvidence,
    first_rms: float | None,
    max_rms: float,
    noise_floor: float | None = None,
    rounding: float = MIN_APART,
) -> Verdict:
    """Right after sampling: trainer and engine agree, and as well as they did on the run's first rollout.

    Args:
        evidence: The update's tokens.
        first_rms: `mismatch_rms` of the first rollout; None on that rollout.
        max_rms: What no rounding explains, in nats.
        noise_floor: What was measured before the first rollout, in nats, and anew after a resume, perhaps on other
            hardware: of what is known of the two the larger counts.
        rounding: What is nothing unusual in the dtypes of trainer and engine, in nats.
    """
    name = "mismatch"
    rms = mismatch_rms(evidence)
    tokens = int(evidence.log_mass.isfinite().sum())
    if rms is None or tokens < MIN_TOKENS:
        return not_fresh(name)
    noise = max((value for value in (first_rms, noise_floor) if value is not None), default=None)
    limit = mismatch_limit(noise, max_rms, rounding)
    shown: dict[str, float | int | str] = {"mismatch RMS": rms, "allowed": limit, "tokens": tokens}
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
            cause="mismatch",
        )
    shown["on the first rollout"] = first_rms
    return Verdict(
        name,
        Status.FAIL,
        "The engine sampled with other weights than the trainer holds, although both report the same policy version.",
        "The adapter that was published did not reach the engine, or only in part. Look at LoRAWeightSync, at the "
        "adapter's directory, and at what the engine says when it loads it.",
        shown,
        cause="other_weights",
    )


def check_first_mismatch(s: Tensor, o: Tensor, limit: float) -> Verdict:
    """Before the first rollout, of tokens sampled for this: trainer and engine agree to rounding.

    Args:
        s: The engine's logprobs, float64 ``[N]``.
        o: The trainer's with the same weights, float64 ``[N]``.
        limit: RMS difference in nats that rounding explains in their dtypes.
    """
    name = "mismatch"
    rms = float((s - o).square().mean().sqrt())
    if len(s) < MIN_TOKENS:
        return Verdict(name, Status.NO_POWER, f"Only {len(s)} tokens; needs {MIN_TOKENS}.")
    shown: dict[str, float | int | str] = {"mismatch RMS": rms, "allowed": limit, "tokens": len(s)}
    if rms <= limit:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        "Trainer and engine disagree about the probability of tokens that the engine has just sampled.",
        "Do both load the same checkpoint? Are the engine's logprobs the processed ones, at the sampling "
        "temperature, and of these tokens? If the engine is that coarse by design, raise max_mismatch.",
        shown,
        cause="mismatch",
    )


def check_earlier_weights(apart: Tensor, limit: float) -> Verdict:
    """A rollout that was sampled ahead: the engine agrees with the trainer as it was at the version that is named.

    The policy has been updated since, as declared, so what compares it with the engine right after sampling
    (`check_mismatch`, `check_served_adapter`, `check_sampler`, `check_alignment`) has nothing to say of such a rollout:
    the difference holds the updates. Here the trainer computes with the weights of that version once more, and what
    is left is rounding. It is judged of the leading tokens alone, and where those weights were kept: not with full
    fine-tuning, nor for the first rollout after a resume within an epoch.

    Args:
        apart: Differences of the engine's logprobs to those of the trainer at that version, float64 ``[N]``.
        limit: RMS in nats that rounding explains.
    """
    name = "earlier weights"
    if len(apart) < MIN_TOKENS:
        return Verdict(name, Status.NO_POWER, f"Only {len(apart)} tokens; needs {MIN_TOKENS}.")
    rms = float(apart.square().mean().sqrt())
    shown: dict[str, float | int | str] = {"mismatch RMS": rms, "allowed": limit, "tokens": len(apart)}
    if rms <= limit:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        "The engine sampled ahead with other weights than those of the version that it reported.",
        "The adapter that was published did not reach the engine's requests, or was replaced while they ran. Look at "
        "LoRAWeightSync, and at what loads weights without RolloutDataModule.ensure_synced.",
        shown,
        cause="other_weights",
        ruled_out=("the declared lag: the trainer computed with the weights of that version",),
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
    fresh = fresh_tokens(evidence)
    if fresh is None or len(base) < MIN_TOKENS:
        return not_fresh(name)
    # The leading tokens are those whose kept mass is known, where there is one.
    base = base[: len(fresh[0])] - evidence.log_mass[evidence.log_mass.isfinite()][: len(base)]
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
        cause="adapter_ignored",
    )
