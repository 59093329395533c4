"""The reference of the KL term is the policy that training started from."""

import torch
from torch import Tensor

from grpo_lightning.diagnostics.checks.common import CERTAIN, MIN_TOKENS
from grpo_lightning.diagnostics.verdict import Status, Verdict

MOVED = 20.0
"""Times the rounding by which the policy must have moved before bits that are equal mean anything."""

MIN_ALLOWED = 1e-3
"""RMS difference in nats below which nothing is said: kernels with and without gradient may round differently."""


def check_reference(reference: Tensor, logprobs: Tensor, stored: Tensor, rounding: float) -> Verdict:
    """Before anything is trained, reference and policy are one.

    They are computed by one program on one batch, so they must agree at least as well as trainer and engine do.

    Args:
        reference: Log-probabilities under the reference, ``[N]``.
        logprobs: Under the policy before its first update, without dropout, ``[N]``.
        stored: What the engine said of the same tokens, ``[N]``; NaN if unknown.
        rounding: RMS difference in nats that is nothing unusual in the dtypes.
    """
    name = "reference"
    known = torch.isfinite(reference)
    if not bool(known.any()):
        return Verdict(name, Status.NO_POWER, "The reference was not computed: kl_coef is 0.")
    difference = _rms(reference[known] - logprobs[known])
    apart = (stored - logprobs)[torch.isfinite(stored)]
    allowed = max(MIN_ALLOWED, rounding, _rms(apart) if len(apart) else 0.0)
    evidence: dict[str, float | int | str] = {
        "RMS difference, nats": difference,
        "allowed": allowed,
        "tokens": int(known.sum()),
    }
    if difference <= allowed:
        return Verdict(name, Status.PASS, evidence=evidence)
    return Verdict(
        name,
        Status.FAIL,
        "Before the first update the reference differs from the policy: the KL term pulls towards something else.",
        "The reference is the policy before training: the base model for a fresh adapter, the adapter's start for a "
        "continued one.",
        evidence,
        cause="reference_wrong",
        ruled_out=("a trained policy (it has version 0)", "dropout (there is none)"),
    )


def check_reference_apart(reference: Tensor, logprobs: Tensor, moved: float, rounding: float) -> Verdict:
    """After the policy has moved, the reference is another policy.

    Args:
        reference: Log-probabilities under the reference, ``[N]``.
        logprobs: Under the policy, ``[N]``.
        moved: How far its steps moved the logprobs at least, to first order, in nats.
        rounding: RMS difference in nats that is nothing unusual in the dtypes.
    """
    name = "reference"
    unsure = torch.isfinite(reference) & (logprobs < CERTAIN)
    count, allowed = int(unsure.sum()), MOVED * rounding
    if count < MIN_TOKENS or moved < allowed:
        reason = f"{count} tokens were not certain, and the policy moved by {moved:.2g} nats; needs {MIN_TOKENS} and"
        return Verdict(name, Status.NO_POWER, f"{reason} {allowed:.2g}.")
    equal = int((reference == logprobs)[unsure].sum())
    evidence: dict[str, float | int | str] = {
        "equal bit for bit": equal,
        "uncertain tokens": count,
        "the policy's steps, nats": moved,
        "steps that must show": allowed,
    }
    if equal < count:
        return Verdict(name, Status.PASS, evidence=evidence)
    return Verdict(
        name,
        Status.FAIL,
        f"The reference equals the current policy bit for bit on all {count} tokens, although the policy has moved: "
        "the KL term is 0 and holds nothing.",
        "Compute the reference's logprobs under policy.reference(): with the adapter off, or with the weights that "
        "training started from.",
        evidence,
        cause="reference_wrong",
        ruled_out=("a policy that has not moved yet (its steps did)",),
    )


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
