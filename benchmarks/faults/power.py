"""How surely each cause is found, and how often a healthy run is accused of it: derived, or measured by the tests.

Numbers of tokens and repetitions are those of the tests under ``tests/diagnostics``: `test_distribution`,
`test_semantics`, ``checks/test_ascent`` and ``checks/test_gradient``.
"""

from typing import NamedTuple


class Power(NamedTuple):
    """Of the check that finds a cause.

    Attributes:
        power: Probability that the fault is found, and from when on.
        false_alarms: Probability that a healthy run is halted or warned.
    """

    power: str
    false_alarms: str


EXACT = Power("1: exact", "0: exact")
_CLOSED_FORM = Power("20 of 20 draws; above a relative error of 1e-3", "0 of 1,200 draws; rounding stays below 1e-5")
_MARKER = Power(
    "20 of 20 draws where a marker moves the logprobs by 6 times the noise",
    "p < 1.2e-7 and 10% of tolerance",
)
_HEALTHY_DRAWS = "0 of 90 draws; p < 1.2e-7"
_HEALTHY_WINDOWS = "0 of 180 windows; p < 1.2e-7"
_ASCENT = Power("500 of 500 draws where the predicted change is 5 standard errors", "0 of 2,000 draws")
_HYPOTHESES = Power("4 of 4 at 256 tokens, with the noise of float32 and of bfloat16", _HEALTHY_DRAWS)
_MISMATCH = Power("1 above 20 times the noise floor and 1e-3 nats", "healthy runs stay below 4 times the floor")
_BETS = Power("1 as soon as chance is below 1e-7", "1e-7 a rollout (Ville's inequality)")

POWER = {
    **dict.fromkeys(
        (
            "logprobs_missing",
            "logprobs_constant",
            "logprobs_replaced",
            "retokenised",
            "context_changed",
            "environment_in_mask",
            "stale_rollout",
            "groups_mixed",
            "advantages_zero",
            "advantages_sign",
            "advantages_wrong",
            "all_masked",
            "wrong_count",
            "frozen_parameters",
            "not_in_optimizer",
            "lr_zero",
            "base_changed",
            "not_finite",
            "gradient_not_finite",
            "old_recomputed",
            "old_replaced",
            "gradient_accumulated",
            "reference_wrong",
            "adapter_changed",
            "skipped_steps",
            "parameters_stuck",
        ),
        EXACT,
    ),
    **dict.fromkeys(("old_attached", "wrong_sign", "wrong_scale", "wrong_gradient"), _CLOSED_FORM),
    **dict.fromkeys(("adapter_partial", "adapter_scale", "adapter_ignored", "merged_rounding", "sync_noop"), _MARKER),
    **dict.fromkeys(("wrong_temperature", "truncated_sampling"), _HYPOTHESES),
    **dict.fromkeys(("mismatch", "other_weights", "base_differs", "wrong_forward"), _MISMATCH),
    **dict.fromkeys(("samples_repeated", "tasks_repeated"), _BETS),
    "logprobs_zero": Power(
        "1 from 3 unlikely tokens with a logprob of 0 on, and 1 in 100,000", "0: no rounding makes such a token"
    ),
    "forced_in_mask": Power("1: exact; from 3 unlikely tokens on where no record exists", "0: exact"),
    "logprobs_copied": Power(
        "1: exact; where no record exists, 1 if the noise floor is not 0", "0: two programs never agree bit for bit"
    ),
    "groups_shuffled": Power("needs equal answers within a task; none for long answers", "p < 1.2e-7; only warns"),
    "rewards_wrong": Power(
        "1 - 1/2^n after n rescored episodes with two possible rewards", "0 for deterministic rewards"
    ),
    "adapter_rounded": Power("1: the published file exactly; inside the engine in float32 alone", "0: exact"),
    "sync_stale": Power("1 once the policy moved by 6 times the canary's error: 2e-5 in float32", "p < 1.2e-7"),
    "prefix_cache_stale": Power("1 where adapters differ by 6 times what caching does", "p < 1.2e-7"),
    "raw_logprobs": Power("4 of 4 at 64 tokens, with the noise of float32 and of bfloat16", _HEALTHY_DRAWS),
    "shifted_logprobs": Power("8 of 8 at 64 tokens, by 1 and 2 in both directions", _HEALTHY_DRAWS),
    "logprob_units": Power("as the other meanings of logprobs; not repeated by a test", _HEALTHY_DRAWS),
    "sharpened_sampling": Power("T 0.7 for 1: 5 of 5 at 1,024 tokens; 0.9: 5 of 5 at 4,096", _HEALTHY_WINDOWS),
    "foreign_tokens": Power("5% foreign: 5 of 5 at 4,096 tokens", _HEALTHY_WINDOWS),
    "noisy_forward": Power("1 where noise hides a quarter of the predicted change", "only warns"),
    "updates_absorbed": Power("1 where less than half of the step arrives", "0 in float32"),
    "step_too_small": Power("1 below 1e-3 learning rates an element", "only warns"),
    "policy_frozen": Power("1: not one bit of a logprob changes", "0 of 2,000 draws"),
    **dict.fromkeys(("frozen_behind_dropout", "frozen_behind_noise", "wrong_direction"), _ASCENT),
    "rewards_constant": Power("1: exact, after 5 rollouts", "a solved task looks the same; only warns"),
    "never_stops": Power("1: exact, from 32 turns on", "only warns"),
    "answers_empty": Power("1: exact, from 32 turns on", "only warns"),
    "template": EXACT,
    "policy_collapsed": Power("1 below 1% of the first entropy, or 3 updates far away", "only warns"),
}
"""By the first name that is expected of a fault."""

POWER_OF_FAULT = {
    "top_p_not_replayed": Power(
        "top-p 0.95: 4 of 4 at 256 tokens by its logprobs, 5 of 5 at 1,024 by what is never sampled",
        _HEALTHY_WINDOWS,
    ),
    "top_k_not_replayed": Power(
        "top-k 20: 4 of 4 at 256 tokens by its logprobs; without them called sharper, 5 of 5 at 1,024",
        _HEALTHY_WINDOWS,
    ),
}
"""By name of a fault for which its cause's row says too little."""
