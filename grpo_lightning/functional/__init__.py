"""Pure functions: ratios, surrogates, advantages, KL estimators, corrections, chunked log-probabilities, pass@k."""

from grpo_lightning.functional.advantages import ESTIMATORS, Judged, group_advantages
from grpo_lightning.functional.aggregation import AGGREGATIONS, Aggregation, token_weights
from grpo_lightning.functional.correction import CORRECTIONS, Correction
from grpo_lightning.functional.kl import KL_ESTIMATORS, KLEstimator, kl_k3
from grpo_lightning.functional.logprobs import TokenLogprobs, log_distributions, token_logprobs
from grpo_lightning.functional.pass_at_k import pass_at_k
from grpo_lightning.functional.ratio import RATIO_LEVELS, RatioName
from grpo_lightning.functional.surrogates import SURROGATES
from grpo_lightning.functional.terms import PolicyTerms, TokenLoss

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "RATIO_LEVELS",
    "SURROGATES",
    "Aggregation",
    "Correction",
    "Judged",
    "KLEstimator",
    "PolicyTerms",
    "RatioName",
    "TokenLogprobs",
    "TokenLoss",
    "group_advantages",
    "kl_k3",
    "log_distributions",
    "pass_at_k",
    "token_logprobs",
    "token_weights",
]
