"""Are there rewards that differ, and is what was sampled what the policy would sample?"""

from statistics import median

from grpo_lightning.diagnostics.foreign.common import ALL, ENTRIES, no_power, too_few, varied_groups
from grpo_lightning.diagnostics.foreign.log import Log
from grpo_lightning.diagnostics.verdict import Status, Verdict

LARGE_MISMATCH = 0.5
"""Mean difference in nats between sampler and trainer that no precision explains; bfloat16 shows 0.02 to 0.05."""

ODD_MISMATCH = 0.1
"""Mean difference in nats that asks for a reason: fp8, a mixture of experts, or truncated sampling may be one."""

GROWTH = 5.0
"""Factor by which the mean difference must grow to point to the sync."""

LOST_ENTROPY = 0.1
"""Share of its first entropy, and nats per token, below which a policy has collapsed."""


def check_rewards(log: Log) -> Verdict:
    """Rewards differ within some group at some step: without that there is no advantage."""
    check, varied = "rewards", varied_groups(log)
    if any(varied):
        return Verdict(check, Status.PASS)
    if len(varied) < ENTRIES:
        return too_few(check, "reward_std or frac_reward_zero_std", [0.0] * len(varied))
    rewards = log.finite("reward/mean")
    return Verdict(
        check,
        Status.FAIL,
        f"At all {len(varied)} logged steps the rewards of every group are equal, so that every advantage is 0.",
        "Look at completions with their rewards: a reward function that always returns the same, answers that cannot "
        "be read, tasks that are all too easy or too hard, or a temperature of 0.",
        {
            "steps with unequal rewards": 0,
            "logged steps": len(varied),
            **({"lowest mean reward": min(rewards), "highest mean reward": max(rewards)} if rewards else {}),
        },
        "rewards_constant",
        ("a task that training has solved: rewards would have differed at earlier steps",),
    )


def check_mismatch(log: Log) -> Verdict:
    """Sampler and trainer agree as far as their precision lets them, to the end as at the start."""
    check, values = "mismatch", log.finite("mismatch/logprob_abs_mean")
    if len(values) < ENTRIES:
        return too_few(check, "the difference between sampler and trainer", values)
    first, last = median(values[:ENTRIES]), median(values[-ENTRIES:])
    shown = {"mean difference at the start (nats)": first, "at the end (nats)": last}
    if first > LARGE_MISMATCH:
        return Verdict(
            check,
            Status.FAIL,
            f"Sampler and trainer disagree by {first:.3g} nats a token from the start.",
            "Compare what both are asked for: temperature, processed or raw logprobs, top-p and top-k, the chat "
            "template, the base model and its dtype.",
            {**shown, "limit (nats)": LARGE_MISMATCH},
            "mismatch",
            ("numeric noise: bfloat16 shows 0.02 to 0.05 nats",),
        )
    if last > ODD_MISMATCH and last > GROWTH * first:
        return Verdict(
            check,
            Status.FAIL,
            f"The difference between sampler and trainer has grown from {first:.3g} to {last:.3g} nats a token.",
            "Check that the sampler gets the new weights after each update, all of them: the sync, the adapter's name, "
            "the prefix cache.",
            {**shown, "limit (nats)": ODD_MISMATCH, "limit, times the start": GROWTH},
            "other_weights",
            ("numeric noise: it does not grow with the updates",),
        )
    if first > ODD_MISMATCH:
        return no_power(
            check,
            f"A difference of {first:.3g} nats from the start is more than bfloat16 makes; fp8, a mixture of experts "
            "and top-p below 1 can be the reason.",
            "What decides: the same tokens, scored by both with the same weights.",
        )
    return Verdict(check, Status.PASS, evidence=shown)


def check_sampler(log: Log) -> Verdict:
    """Sampler and trainer do not agree bit for bit: two programs never do."""
    check, values = "sampler logprobs", log.finite("mismatch/logprob_abs_mean")
    if any(value > 0 for value in values):
        return Verdict(check, Status.PASS)
    if len(values) < ENTRIES:
        return too_few(check, "the difference between sampler and trainer", values)
    return Verdict(
        check,
        Status.FAIL,
        f"The difference between sampler and trainer is exactly 0 at all {len(values)} logged steps.",
        "Check that the sampler returns logprobs, and that they are not replaced by the trainer's.",
        {"largest mean difference (nats)": 0.0, "logged steps": len(values), "limit, steps": ENTRIES},
        "logprobs_copied",
    )


def check_entropy(log: Log) -> Verdict:
    """The policy keeps some entropy, or has used it to learn."""
    check, values = "policy", log.finite("policy/entropy")
    if len(values) < 2 * ENTRIES:
        return no_power(check, f"{len(values)} logged entropies are too few.", f"Needed: {2 * ENTRIES} or more.")
    first, last = median(values[:ENTRIES]), median(values[-ENTRIES:])
    if not (last < LOST_ENTROPY * first and last < LOST_ENTROPY):
        return Verdict(check, Status.PASS)
    rewards = log.finite("reward/mean")
    if len(rewards) >= 2 * ENTRIES and median(rewards[-ENTRIES:]) > median(rewards[:ENTRIES]):
        return Verdict(check, Status.PASS)
    return Verdict(
        check,
        Status.FAIL,
        f"The policy's entropy fell from {first:.3g} to {last:.3g} nats a token, and the reward did not rise with it.",
        "Lower the learning rate, raise the upper clip or the KL's weight, or sample at a higher temperature.",
        {
            "entropy at the start": first,
            "entropy at the end": last,
            "limit (nats, and share of the start)": LOST_ENTROPY,
        },
        "policy_collapsed",
        ("a solved task: its reward would have risen",),
    )


def check_endings(log: Log) -> Verdict:
    """Not every completion is cut off."""
    check, shares = "endings", log.finite("completion/truncated_fraction")
    if any(share < ALL for share in shares):
        return Verdict(check, Status.PASS)
    if len(shares) < ENTRIES:
        return too_few(check, "the share of completions that were cut off", shares)
    return Verdict(
        check,
        Status.FAIL,
        f"Every completion is cut off at the length limit, at all {len(shares)} logged steps.",
        "Raise the limit, or check that the end-of-turn token of the chat template ends a completion.",
        {"lowest share cut off": min(shares), "logged steps": len(shares), "limit": ALL},
        "never_stops",
    )
