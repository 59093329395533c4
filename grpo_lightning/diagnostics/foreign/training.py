"""Is anything trained: finite numbers, a learning rate, a gradient, a distance to the reference."""

import math

from grpo_lightning.diagnostics.beyond_a_log import beyond_a_log
from grpo_lightning.diagnostics.foreign.common import ENTRIES, KL_ENTRIES, no_power, too_few, varied_groups
from grpo_lightning.diagnostics.foreign.log import Log
from grpo_lightning.diagnostics.verdict import Status, Verdict


def check_finite(log: Log, check: str, name: str, cause: str) -> Verdict:
    """A number stays finite. Single values that are not, with finite ones after them, are steps that were skipped."""
    values = log.values(name)
    if not values:
        return no_power(check, f"The log does not hold {name}.", f"Needed: {name} at each step.")
    bad = [not math.isfinite(value) for value in values]
    if not any(bad):
        return Verdict(check, Status.PASS)
    at_end = len(bad) - 1 - max((i for i, is_bad in enumerate(bad) if not is_bad), default=-1)
    shown = {"values that are not finite": sum(bad), "the last in a row": at_end, "values": len(bad)}
    if at_end >= min(ENTRIES, len(bad)):
        return Verdict(
            check,
            Status.FAIL,
            f"{name} is NaN or infinite to the end of the log.",
            "Find the first step where it is, and look at its batch: a logprob of -inf, a division by a count of 0, "
            "float16 overflow, a learning rate that is too high.",
            {**shown, "limit, in a row at the end": min(ENTRIES, len(bad))},
            cause,
            ("steps that mixed precision skips: finite values follow those, and here none does",),
        )
    return Verdict(
        check,
        Status.NO_POWER,
        f"{sum(bad)} of {len(bad)} values of {name} are not finite, with finite ones after them or too few to the end: "
        f"mixed precision skips such steps. {ENTRIES} in a row at the end would decide.",
        evidence=shown,
    )


def check_learning_rate(log: Log) -> Verdict:
    """The learning rate is not 0 all the time; warm-up begins and decay ends with 0."""
    check, rates = "learning rate", log.finite("learning_rate")
    if any(rate > 0 for rate in rates):
        return Verdict(check, Status.PASS)
    if len(rates) < ENTRIES:
        return too_few(check, "the learning rate", rates)
    return Verdict(
        check,
        Status.FAIL,
        f"The learning rate is 0 at all {len(rates)} logged steps.",
        "Look at learning_rate and at the scheduler: its number of steps, its warm-up, and whether a resumed run "
        "restored the scheduler of one that had ended.",
        {"largest learning rate": max(rates), "logged steps": len(rates), "limit, steps": ENTRIES},
        "lr_zero",
        ("a warm-up from 0 or a decay to 0: those are 0 at one end only",),
    )


def _moves(log: Log) -> bool:
    """Whether something shows that the policy changes."""
    names = ("policy/kl_reference", "ppo/clip_fraction", "ppo/clip_fraction_low", "ppo/clip_fraction_high")
    return any(value > 0 for name in names for value in log.finite(name))


def check_gradient(log: Log) -> Verdict:
    """A gradient reaches the parameters where rewards differ."""
    check, norms = "gradient", log.finite("policy/grad_norm")
    if any(norm > 0 for norm in norms):
        return Verdict(check, Status.PASS)
    if len(norms) < ENTRIES:
        return too_few(check, "the gradient's norm", norms)
    varied = varied_groups(log)
    if sum(varied) < ENTRIES:
        return no_power(
            check,
            "The gradient is 0, which is right where all rewards of a group are equal.",
            f"Needed: {ENTRIES} logged steps at which rewards differ.",
        )
    if _moves(log):
        return no_power(
            check,
            "The logged gradient is 0, yet KL or clip fraction show that the policy moves: the logged norm is wrong, "
            "as with some versions of DeepSpeed.",
            "Needed: the gradient itself.",
        )
    return Verdict(
        check,
        Status.FAIL,
        f"The gradient's norm is 0 at all {len(norms)} logged steps, although rewards differ.",
        "Check that the old logprobs are detached and the new ones are not, that the adapter is active and trainable, "
        "and that gradient checkpointing has inputs that require gradients.",
        {"largest gradient norm": 0.0, "logged steps": len(norms), "steps with unequal rewards": sum(varied)},
        "gradient_zero",
        (
            "groups whose rewards are all equal: at some logged steps they differ",
            "a norm that is logged wrongly (DeepSpeed): then KL or clip fraction would be above 0, and none is",
        ),
    )


def check_kl(log: Log) -> Verdict:
    """The KL to the reference leaves 0 once the policy is updated."""
    check, kl = "reference", log.finite("policy/kl_reference")
    if any(value != 0 for value in kl):
        return Verdict(check, Status.PASS)
    if not kl:
        return beyond_a_log(check)
    if len(kl) < KL_ENTRIES:
        return no_power(check, f"The KL is 0 at {len(kl)} logged steps, which are too few.", f"Needed: {KL_ENTRIES}.")
    if sum(varied_groups(log)) < ENTRIES:
        return no_power(
            check,
            "The KL is 0, which is right as long as no rewards differ: nothing moves the policy.",
            f"Needed: {ENTRIES} logged steps at which rewards differ.",
        )
    return Verdict(
        check,
        Status.FAIL,
        f"The KL to the reference is exactly 0 at all {len(kl)} logged steps.",
        "Either the policy does not change, or the reference is the policy itself: check that the adapter is disabled "
        "for the reference alone, that the optimizer holds the parameters the forward uses, and their dtype.",
        {"largest KL": 0.0, "logged steps": len(kl), "limit, steps": KL_ENTRIES},
        "policy_frozen",
        (
            f"the first steps of a warm-up, which round away: there are more than {KL_ENTRIES} steps",
            "a KL that is not part of the loss: it would not be logged",
        ),
    )
