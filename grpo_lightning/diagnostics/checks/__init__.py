"""Checks as pure functions. Each answers PASS, FAIL with its cause and evidence, or NO POWER with the reason."""

from grpo_lightning.diagnostics.checks.mismatch import MAX_MISMATCH, check_mismatch, check_served_adapter, mismatch_rms
from grpo_lightning.diagnostics.checks.numbers import check_finite, check_gradient
from grpo_lightning.diagnostics.checks.ratio import check_ratio
from grpo_lightning.diagnostics.checks.step import check_moved
from grpo_lightning.diagnostics.checks.stored import check_alignment, check_sampler, check_stored

__all__ = [
    "MAX_MISMATCH",
    "check_alignment",
    "check_finite",
    "check_gradient",
    "check_mismatch",
    "check_moved",
    "check_ratio",
    "check_sampler",
    "check_served_adapter",
    "check_stored",
    "mismatch_rms",
]
