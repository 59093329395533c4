"""Is the ratio of new to old probabilities alive, as far as its spread and the clip fraction tell?"""

from grpo_lightning.diagnostics.beyond_a_log import beyond_a_log
from grpo_lightning.diagnostics.foreign.common import (
    ENTRIES,
    KL_ENTRIES,
    ROUNDING,
    SAME_COMPUTATION,
    no_power,
    too_few,
    varied_groups,
)
from grpo_lightning.diagnostics.foreign.log import Log
from grpo_lightning.diagnostics.verdict import Status, Verdict


def check_ratio(log: Log, updates: int | None) -> Verdict:
    """The ratio differs from 1 after the first update on a rollout."""
    check, stds = "ratio", log.finite("ppo/ratio_std")
    if not stds:
        return beyond_a_log(check)
    if any(std >= SAME_COMPUTATION for std in stds):
        if updates is not None and updates > 1 and max(stds) < ROUNDING:
            return no_power(
                check,
                "The ratios spread no more than rounding makes them, as with a frozen policy or very small steps.",
                "Needed: how far the gradient says that the policy moved. RunDoctor has it.",
            )
        return Verdict(check, Status.PASS)
    if updates is None or updates < 2:
        return no_power(
            check,
            "With one update per rollout a ratio of 1 is right"
            + ("." if updates else ", and the log does not say how many there are."),
            "Needed: several updates per rollout (--updates-per-rollout).",
        )
    if len(stds) < ENTRIES:
        return too_few(check, "the ratio's spread", stds)
    if sum(varied := varied_groups(log)) < ENTRIES:
        return no_power(
            check,
            "The ratio is 1, which is right as long as no rewards differ: nothing moves the policy.",
            f"Needed: {ENTRIES} logged steps at which rewards differ.",
        )
    return Verdict(
        check,
        Status.FAIL,
        f"The PPO ratios are pinned at 1 (largest std {max(stds):.3g}), also after several updates on a rollout.",
        "Check that old logprobs are those that the sampler stored, and not recomputed by the policy that is being "
        "updated.",
        {
            "largest std of the ratio": max(stds),
            "limit": SAME_COMPUTATION,
            "updates per rollout": updates,
            "steps with unequal rewards": sum(varied),
        },
        "old_recomputed",
        (
            f"a first update after sampling: there are {updates} on each rollout",
            "a solved task, where nothing moves the policy: at some logged steps rewards differ",
        ),
    )


def check_clipping(log: Log, updates: int | None) -> Verdict:
    """With several updates per rollout some ratio is clipped at some time; small steps move the policy without."""
    check = "clip fraction"
    names = ("ppo/clip_fraction", "ppo/clip_fraction_low", "ppo/clip_fraction_high")
    values = [value for name in names for value in log.finite(name)]
    if any(value > 0 for value in values):
        return Verdict(check, Status.PASS)
    if len(values) < ENTRIES:
        return too_few(check, "the clip fraction", values)
    if updates is None or updates < 2:
        return no_power(
            check,
            "Nothing is ever clipped, which is right with one update per rollout"
            + ("." if updates else "; the log does not say how many there are."),
            "Needed: --updates-per-rollout.",
        )
    stds, kl = log.finite("ppo/ratio_std"), log.finite("policy/kl_reference")
    if any(std >= ROUNDING for std in stds) or any(value > 0 for value in kl):
        return Verdict(check, Status.PASS)
    pinned = len(stds) >= ENTRIES and max(stds) < SAME_COMPUTATION
    if not (pinned or (not stds and len(kl) >= KL_ENTRIES)):
        return no_power(
            check,
            "Nothing is ever clipped, which is right where steps are small.",
            f"Needed: the spread of the ratio at {ENTRIES} steps, or the KL at {KL_ENTRIES}.",
        )
    if sum(varied_groups(log)) < ENTRIES:
        return no_power(
            check,
            "Nothing is ever clipped, which is right as long as no rewards differ: nothing moves the policy.",
            f"Needed: {ENTRIES} logged steps at which rewards differ.",
        )
    return Verdict(
        check,
        Status.FAIL,
        f"Nothing is ever clipped, although each rollout is used for {updates} updates, and nothing that was logged "
        "shows that the policy moves.",
        "Check that old logprobs are those that the sampler stored, that the learning rate is not 0, and that the "
        "optimizer holds the parameters that the forward uses.",
        {
            "largest clip fraction": 0.0,
            "logged values": len(values),
            "updates per rollout": updates,
            **({"largest std of the ratio": max(stds)} if stds else {}),
            **({"largest KL": max(kl)} if kl else {}),
        },
        "policy_frozen",
        ("small steps: the ratio would spread or the KL leave 0, and neither does",),
    )
