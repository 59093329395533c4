"""What a log of scalars can tell, of whatever trainer: pure functions of the log.

Nothing here halts anything: the run is over. Where healthy runs show the same the answer is NO POWER, with what would
decide. A printed loss of 0 is normal, and so is a ratio of 1 with one update per rollout.
"""

from collections.abc import Callable

from grpo_lightning.diagnostics.beyond_a_log import beyond_a_log
from grpo_lightning.diagnostics.causes import CAUSES, Reaction
from grpo_lightning.diagnostics.foreign.log import Log
from grpo_lightning.diagnostics.foreign.ratio import check_clipping, check_ratio
from grpo_lightning.diagnostics.foreign.sampling import (
    check_endings,
    check_entropy,
    check_mismatch,
    check_rewards,
    check_sampler,
)
from grpo_lightning.diagnostics.foreign.training import check_finite, check_gradient, check_kl, check_learning_rate
from grpo_lightning.diagnostics.verdict import Verdict


def examine_log(log: Log, updates_per_rollout: int | None = None) -> tuple[list[Verdict], dict[str, Reaction]]:
    """Apply what can be applied; all other checks have no power.

    Args:
        log: The log.
        updates_per_rollout: Optimizer steps on each rollout (TRL: ``num_iterations`` times the batches of a
            generation); None if it is not known and the log does not say.

    Returns:
        Verdicts, and how serious the uncertain ones are, for `diagnose`.
    """
    lags = log.finite("ppo/updates_since_sampling")
    updates = updates_per_rollout or (int(max(lags)) + 1 if lags else None)
    checks: tuple[Callable[[], Verdict], ...] = (
        lambda: check_finite(log, "finite", "loss", "not_finite"),
        lambda: check_finite(log, "finite gradient", "policy/grad_norm", "gradient_not_finite"),
        lambda: check_learning_rate(log),
        lambda: check_rewards(log),
        lambda: check_gradient(log),
        lambda: check_ratio(log, updates),
        lambda: check_clipping(log, updates),
        lambda: check_kl(log),
        lambda: check_mismatch(log),
        lambda: check_sampler(log),
        lambda: check_entropy(log),
        lambda: check_endings(log),
    )
    verdicts = [check() for check in checks]
    asked = {verdict.check for verdict in verdicts}
    others = dict.fromkeys(cause.check for cause in CAUSES if cause.check not in asked)
    verdicts += [beyond_a_log(check) for check in others]
    reactions: dict[str, Reaction] = {"other_weights": "warn", "logprobs_copied": "warn", "clip fraction": "warn"}
    if not log.finite("policy/kl_reference"):
        reactions["gradient_zero"] = "warn"
    return verdicts, reactions
