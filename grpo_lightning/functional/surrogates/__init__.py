"""Surrogates: what is minimised instead of the negative expected reward, one small file per idea."""

from collections.abc import Callable

from torch import Tensor

from grpo_lightning.functional.marks import clip_cov_marks, kl_cov_marks
from grpo_lightning.functional.surrogates.cispo import cispo
from grpo_lightning.functional.surrogates.clip_cov import clip_cov
from grpo_lightning.functional.surrogates.clipped import clipped
from grpo_lightning.functional.surrogates.dppo import dppo
from grpo_lightning.functional.surrogates.gmpo import gmpo
from grpo_lightning.functional.surrogates.kl_cov import kl_cov
from grpo_lightning.functional.surrogates.reinforce import reinforce
from grpo_lightning.functional.surrogates.sapo import sapo
from grpo_lightning.functional.surrogates.vespo import vespo
from grpo_lightning.functional.terms import TokenLoss

Surrogate = Callable[..., TokenLoss]
"""``f(terms, *, settings) -> TokenLoss`` with defaults for all settings."""

SURROGATES: dict[str, Surrogate] = {
    "cispo": cispo,
    "clip_cov": clip_cov,
    "clipped": clipped,
    "dppo": dppo,
    "gmpo": gmpo,
    "kl_cov": kl_cov,
    "reinforce": reinforce,
    "sapo": sapo,
    "vespo": vespo,
}
"""Surrogates by name."""

MARKS: dict[Surrogate, Callable[..., Tensor]] = {clip_cov: clip_cov_marks, kl_cov: kl_cov_marks}
"""What chooses `PolicyTerms.marked`, for surrogates that look at it."""

TOKEN_RATIO_ONLY = frozenset({dppo, gmpo})
"""Surrogates that need the ratio level ``token``; the others take any."""

__all__ = [
    "MARKS",
    "SURROGATES",
    "TOKEN_RATIO_ONLY",
    "Surrogate",
    "cispo",
    "clip_cov",
    "clipped",
    "dppo",
    "gmpo",
    "kl_cov",
    "reinforce",
    "sapo",
    "vespo",
]
