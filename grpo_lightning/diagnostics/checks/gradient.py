"""The gradient that arrives is that of the loss."""

from collections.abc import Mapping

import torch
from torch import Tensor

from grpo_lightning.diagnostics.checks.counts import explain_factor
from grpo_lightning.diagnostics.checks.declared_loss import ROUNDING, DeclaredLoss
from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.verdict import Status, Verdict

NAME = "gradient"

PROCESSES, LOCAL_MICRO_BATCHES = "processes", "micro-batches of an update"
MICRO_BATCHES = "micro-batches of an update in all processes"
"""Keys of the counts that the Trainer and DDP divide the loss by, and that it is multiplied by to make up for that."""

_OWN_LOSS = "If a subclass changes the loss on purpose, set reactions={'gradient': 'log'}."


def check_closed_form(
    evidence: MicroBatchEvidence, loss: DeclaredLoss, *, counts: Mapping[str, float], max_error: float
) -> Verdict:
    """What the backward pass brought to the logprobs is the derivative of the declared loss.

        expected_t = processes * d loss / d c_t; for the clipped surrogate and k3
        expected_t = processes (-w_t A_t r_t [no clip binds] + kl_coef w_t (1 - exp(reference_t - c_t)))
        error = |arrived - expected| / |expected|

    Args:
        evidence: The update's tokens.
        loss: The declared loss.
        counts: Counts that a wrong average may have divided by, by what is counted.
        max_error: Largest relative error.
    """
    got = evidence.gradient
    surrogate, kl = loss.surrogate_gradient(evidence), loss.kl_gradient(evidence)
    expected, noise = surrogate + kl, ROUNDING * loss.scale(evidence)
    size = float(expected.norm())
    if bool(got.isnan().all()) and len(got):
        return _nothing_arrived(size, noise, len(got))
    if not bool(torch.isfinite(got).all() & torch.isfinite(expected).all()):
        return Verdict(NAME, Status.NO_POWER, "Gradient, ratios or reference are not finite.")
    judged = ~loss.at_limit(evidence)
    difference = float((got - expected)[judged].norm())
    if difference <= max_error * size + noise:
        if size > noise:
            shown = {"relative error": difference / size, "allowed": max_error, "tokens": len(got)}
            return Verdict(NAME, Status.PASS, evidence=shown)
        return Verdict(
            NAME, Status.NO_POWER, "The gradient should be 0 and is (all advantages 0, or every token clipped)."
        )
    cause, message = _name_error(evidence, loss, judged, counts, max_error)
    return Verdict(
        NAME,
        Status.FAIL,
        message,
        _FIXES[cause] + " " + _OWN_LOSS,
        {
            "relative error": difference / max(size, noise),
            "allowed": max_error,
            "gradient norm at the logprobs": float(got.norm()),
            "expected": size,
            "tokens": len(got),
        },
        cause=cause,
        ruled_out=(f"all advantages 0 or every token clipped (the gradient should have norm {size:.3g})",)
        if size > noise
        else (),
    )


def _nothing_arrived(size: float, noise: float, tokens: int) -> Verdict:
    if size <= noise:
        return Verdict(NAME, Status.NO_POWER, "No gradient arrived, and none should have.")
    return Verdict(
        NAME,
        Status.FAIL,
        "No gradient reached the current logprobs.",
        "Look for detach() or no_grad() between the logprobs and the loss, and for a loss computed from something "
        "else. A subclass that overrides batch_loss must call super().batch_loss, or the gradient cannot be seen; "
        "then set reactions={'gradient': 'log'}.",
        {"gradient norm at the logprobs": "none", "expected": size, "tokens": tokens},
        cause="wrong_gradient",
        ruled_out=(f"all advantages 0 or every token clipped (the gradient should have norm {size:.3g})",),
    )


def _name_error(
    evidence: MicroBatchEvidence, loss: DeclaredLoss, judged: Tensor, counts: Mapping[str, float], max_error: float
) -> tuple[str, str]:
    """Cause and statement for a gradient that is not the expected one on the tokens that can be judged."""
    got = evidence.gradient[judged]
    surrogate, kl = loss.surrogate_gradient(evidence)[judged], loss.kl_gradient(evidence)[judged]
    noise = ROUNDING * loss.scale(evidence)

    def fits(other: Tensor) -> bool:
        return float((got - other).norm()) <= max_error * float(got.norm()) + noise

    if float(surrogate.norm()) > noise and fits(kl):
        return "old_attached", (
            "The surrogate's gradient cancels: none of it reaches the logprobs although advantages and ratios "
            "demand some."
        )
    for whole, rest, of in (
        (surrogate + kl, torch.zeros_like(kl), "gradient"),
        (surrogate, kl, "surrogate's gradient"),
    ):
        factor = _factor(got - rest, whole)
        if fits(factor * whole + rest):
            return _name_factor(factor, of, counts)
    factor = _factor(got - surrogate, kl)
    if float(kl.norm()) > noise and fits(surrogate + factor * kl):
        return "wrong_gradient", f"The KL term enters the gradient {factor:.4g} times, but kl_coef is {loss.kl_coef:g}."
    for name, other in loss.alternatives(evidence).items():
        if fits(other[judged]):
            return "wrong_gradient", f"The gradient is that of another loss: {name}."
    evidence = _only(evidence, judged)
    if reason := _by_sequence(evidence, surrogate + kl, int(counts.get(MICRO_BATCHES, 1))):
        return "wrong_count", f"The gradient is averaged over the wrong count: {reason}."
    return "wrong_gradient", f"The gradient is not that of the declared loss{_where(evidence, surrogate + kl)}."


def _name_factor(factor: float, of: str, counts: Mapping[str, float]) -> tuple[str, str]:
    if factor < 0:
        size = "" if abs(factor + 1) < ROUNDING**0.5 else f" and is {-factor:.4g} times as large"
        return "wrong_sign", f"The {of} points the wrong way{size}: the update makes good samples less likely."
    reason = explain_factor(factor, counts)
    message = f"The {of} is {factor:.4g} times what it should be{f': {reason}' if reason else ''}."
    # What divides behind the loss is no mean that the loss takes.
    behind = {name: counts[name] for name in (PROCESSES, LOCAL_MICRO_BATCHES, MICRO_BATCHES) if name in counts}
    if reason is None or (factor < 1 and explain_factor(factor, behind)):
        return "wrong_scale", message
    return "wrong_count", message


def _factor(got: Tensor, expected: Tensor) -> float:
    return float(torch.dot(got, expected) / expected.square().sum().clamp_min(1e-300))


def _by_sequence(evidence: MicroBatchEvidence, expected: Tensor, micro_batches: int) -> str | None:
    """How a count explains that each sequence's gradient has a factor of its own; None if none does."""
    some = expected.abs() > 1e-3 * expected.abs().max()
    _, member, lengths = torch.unique(evidence.sequence, return_inverse=True, return_counts=True)
    if not bool(some.any()):
        return None
    factors, member = (evidence.gradient / expected)[some], member[some]
    own = lengths[member].double()

    def constant(values: Tensor) -> bool:
        return float(values.std(correction=0)) <= 1e-2 * abs(float(values.mean()))

    if len(set(own.tolist())) > 1 and (constant(factors * own) or constant(factors / own)):
        return "each sequence has a factor that depends on its length"
    means = torch.zeros(len(lengths), dtype=factors.dtype).scatter_reduce(
        0, member, factors, "mean", include_self=False
    )
    within = bool(((factors - means[member]).abs() <= 1e-2 * means[member].abs()).all())
    levels = 1 + int((means[member].sort().values.diff() > 1e-2 * means[member].abs().mean()).sum())
    sequences = len(set(member.tolist()))
    if within and bool((factors > 0).all()) and 1 < levels <= micro_batches < sequences:
        return f"the sequences have {levels} different factors, as if each micro-batch were averaged by itself"
    return None


def _where(evidence: MicroBatchEvidence, expected: Tensor) -> str:
    clipped = evidence.clipped_low | evidence.clipped_high
    wrong = (evidence.gradient - expected).abs() > 1e-2 * expected.abs().mean()
    if not bool(wrong.any()):
        return ""
    shares = [f"on {int(wrong.sum())} of {len(wrong)} tokens", f"{int((wrong & clipped).sum())} of them clipped"]
    off = wrong & (evidence.advantage < 0)
    return f": {', '.join(shares)}, {int(off.sum())} with a negative advantage"


def _only(evidence: MicroBatchEvidence, kept: Tensor) -> MicroBatchEvidence:
    return type(evidence)(**{name: values[kept] for name, values in vars(evidence).items()})


_FIXES = {
    "old_attached": "Detach the old logprobs, and use those that the sampler stored: with ratio = exp(c - c) the "
    "gradient is 0 whatever the advantages. Look also for advantages set to 0 on the way into the loss.",
    "wrong_sign": "The loss is minimised: it must be minus the surrogate. Look for a missing or doubled minus.",
    "wrong_scale": "Look for what multiplies the loss between batch_loss and backward, and compare it with "
    "accumulate_grad_batches times the number of processes, which Lightning and DDP divide by.",
    "wrong_count": "The loss weights must be averages over the whole optimizer step, of all micro-batches and "
    "processes; do not take another mean.",
    "wrong_gradient": "Compare the loss with objective.policy_loss, and the KL term with the estimator that is set.",
}


def check_reached(
    *, at_logprobs: float, at_parameters: float, trainable: int, arrived: int, arrived_nonzero: bool
) -> Verdict:
    """A gradient that reaches the logprobs reaches the parameters, and is still there when the step is taken.

    Args:
        at_logprobs: Norm of the gradient at the logprobs.
        at_parameters: Norm of the parameters' gradients when the step is about to be taken.
        trainable: Trainable parameters.
        arrived: How many of them the backward pass reached.
        arrived_nonzero: Whether it brought any of them something else than 0.
    """
    name = "parameter gradient"
    if not at_logprobs > 0:
        return Verdict(name, Status.NO_POWER, "No gradient at the logprobs: none should reach the parameters.")
    if at_parameters != 0:
        return Verdict(name, Status.PASS)
    cause, message, fix = (
        "wrong_gradient",
        ("The gradient reaches the logprobs, but not the parameters."),
        "Look for detach(), no_grad() or another copy of the model in the forward pass, and for a merged adapter.",
    )
    if not trainable:
        cause, message, fix = "frozen_parameters", "No parameter is trainable.", "Set requires_grad of the adapter."
    elif arrived_nonzero:
        cause, message, fix = (
            "skipped_steps",
            ("Gradients reached the parameters, but were cleared before the optimizer could use them."),
            "Look for zero_grad() in hooks before the step, and for a guard that drops gradients that are not finite.",
        )
    elif arrived:
        cause, message, fix = (
            "old_attached",
            ("The gradients cancel: the logprobs have one, but it adds up to exactly 0 in every parameter."),
            "Detach the old logprobs: they must not be recomputed with gradients by the model that is trained.",
        )
    return Verdict(
        name,
        Status.FAIL,
        message,
        fix,
        {
            "gradient norm at the logprobs": at_logprobs,
            "gradient norm of the parameters": at_parameters,
            "trainable parameters": trainable,
            "reached by the backward pass": arrived,
        },
        cause=cause,
        ruled_out=("all advantages 0 (the logprobs have a gradient)", "a fresh adapter (its B has a gradient)"),
    )


def check_cleared(leftover: float) -> Verdict:
    """Nothing is left in the parameters' gradients when an update's first backward pass begins.

    Args:
        leftover: Norm of what was left.
    """
    name = "gradient cleared"
    if leftover == 0:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        "Gradients of earlier updates are still there when an update's first backward pass begins.",
        "Look at overrides of optimizer_zero_grad and at manual backward passes outside training_step.",
        {"norm of the gradients left": leftover, "expected": 0.0},
        cause="gradient_accumulated",
        ruled_out=("gradient accumulation (this is the first micro-batch of an update)",),
    )
