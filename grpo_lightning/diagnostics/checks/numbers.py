"""The numbers of an update are numbers."""

import math

import torch
from torch import Tensor

from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.verdict import Status, Verdict


def check_finite(evidence: MicroBatchEvidence) -> Verdict:
    """Current logprobs and log-ratios are numbers."""
    bad = int((~torch.isfinite(evidence.logprobs) | ~torch.isfinite(evidence.log_ratio)).sum())
    if not bad:
        return Verdict("finite", Status.PASS)
    return Verdict(
        "finite",
        Status.FAIL,
        f"{bad} of {len(evidence)} current logprobs or log-ratios are NaN or infinite.",
        "Look for an overflow in the model (float16?), a too large learning rate, or NaN in the weights.",
        {"tokens": len(evidence), "not finite": bad},
        cause="not_finite",
    )


def check_logprobs(logprobs: Tensor, whose: str) -> Verdict:
    """Before the first rollout: logprobs of a few tokens are numbers.

    Args:
        logprobs: The logprobs ``[N]``.
        whose: Who says so, as the message names it.
    """
    name = "finite"
    bad = int((~logprobs.isfinite()).sum())
    shown: dict[str, float | int | str] = {"tokens": len(logprobs), "not finite": bad, "allowed": 0}
    if not bad:
        return Verdict(name, Status.PASS, evidence=shown)
    return Verdict(
        name,
        Status.FAIL,
        f"{bad} of {len(logprobs)} logprobs of {whose} are NaN or infinite, before any update.",
        "Look for an overflow in the model (float16?), or NaN in its weights or in the adapter's.",
        shown,
        cause="not_finite",
    )


def check_gradient(norm: float) -> Verdict:
    """The gradient is a number. Clipping would turn an infinite one into NaN weights."""
    name = "finite gradient"
    if math.isfinite(norm):
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        f"The gradient's norm is {norm}; the step would destroy the weights.",
        "Look for an overflow in the model, extreme log-ratios, or NaN in the weights; lower the learning rate.",
        {"gradient norm": norm},
        cause="gradient_not_finite",
    )
