"""What several checks need.

Symbols in all of them: ``s`` the sampler's stored logprob of a token, ``c`` the current policy's, ``b`` the base
model's, ``k`` the number of changes of the policy between sampling and now, ``A`` the advantage.
"""

import torch
from torch import Tensor

from grpo_lightning.diagnostics.evidence import MicroBatchEvidence
from grpo_lightning.diagnostics.verdict import Status, Verdict

Z_FAIL = 5.3
"""Standard errors beyond which a deviation is no accident: p = 1.2e-7, so 20 checks in 10,000 updates raise about
0.02 false alarms a run."""

MIN_TOKENS = 32
"""Fewer sampled tokens than this decide nothing."""

CERTAIN = -0.01
"""A logprob above this one says that hardly anything else could have been chosen."""


def uncertain_tokens(logprobs: Tensor) -> int:
    """How many tokens had a probability below 0.99."""
    return int((logprobs < CERTAIN).sum())


def fresh_tokens(evidence: MicroBatchEvidence) -> tuple[Tensor, Tensor, Tensor] | None:
    """Stored and current logprobs and sequences, if all tokens were sampled with the current weights.

    Where sampling is truncated on purpose, of the tokens whose kept mass is known; the current logprobs are then those
    after truncation, as the stored ones are.
    """
    if not len(evidence) or bool((evidence.updates_since_sampling != 0).any()):
        return None
    if not bool(torch.isfinite(evidence.stored).all()):
        return None
    known = evidence.log_mass.isfinite()
    current = evidence.logprobs - evidence.log_mass
    return evidence.stored[known], current[known], evidence.sequence[known]


def not_fresh(name: str) -> Verdict:
    """The answer where tokens are not fresh."""
    return Verdict(name, Status.NO_POWER, "Needs tokens sampled with the current weights, and a ledger.")
