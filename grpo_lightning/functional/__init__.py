"""Pure functions: advantages, the surrogate loss, KL estimators, chunked log-probabilities, pass@k."""

from grpo_lightning.functional.advantage import group_advantages
from grpo_lightning.functional.aggregation import Aggregation, token_weights
from grpo_lightning.functional.kl import kl_k3
from grpo_lightning.functional.logprobs import TokenLogprobs, log_distributions, token_logprobs
from grpo_lightning.functional.loss import PolicyLoss, clipped_surrogate
from grpo_lightning.functional.pass_at_k import pass_at_k

__all__ = [
    "Aggregation",
    "PolicyLoss",
    "TokenLogprobs",
    "clipped_surrogate",
    "group_advantages",
    "kl_k3",
    "log_distributions",
    "pass_at_k",
    "token_logprobs",
    "token_weights",
]
