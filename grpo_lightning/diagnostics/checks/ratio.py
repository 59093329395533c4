"""The ratios vary where they should."""

from grpo_lightning.diagnostics.checks.common import MIN_TOKENS
from grpo_lightning.diagnostics.verdict import Status, Verdict

EXPECTED_DRIFT_FACTOR = 10.0
"""A std below the limit is degenerate where the gradient says that the log-ratio moved ten times the limit."""


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
    an update changes the loss by ``<grad, step>``, which bounds the mean change of the logprobs from below. Where
    the mean is below 1 the std is compared with its share of the mean: ratios of a policy that fell apart are all
    near 0, and are not alike.

    Args:
        std: Standard deviation of the ratio.
        count: Sampled tokens.
        k: Updates since what the ratio compares with: since sampling, or since the trainer computed it.
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
    limit = min_std if strict else min_std * min(1.0, details["mean"])
    if not std < limit:
        return Verdict(name, Status.PASS)
    shown: dict[str, float | int | str] = {
        "ratio mean": details["mean"],
        "ratio std": std,
        "ratio min": details["min"],
        "ratio max": details["max"],
        "tokens": count,
        "limit for the std": limit,
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
        cause="policy_frozen",
    )
