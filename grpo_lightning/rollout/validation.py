"""Checks of what the engine returned, before any update is computed from it."""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.errors import LogprobValidationError
from grpo_lightning.rollout.episode import Group, ledgers_of
from grpo_lightning.rollout.ledger import POSITIVE_TOLERANCE
from grpo_lightning.rollout.types import Generation

logger = logging.getLogger(__name__)

_MIN_TOKENS_TO_JUDGE = 64
_LOW_VARIANCE = 1e-8


def validate_generation(generation: Generation, task_id: str) -> None:
    """Refuse a completion whose logprobs are missing, not finite, positive, or not one per sampled token.

    Raises:
        LogprobValidationError: Naming the task and what was wrong.
    """
    tokens, logprobs = generation.token_ids, generation.logprobs
    if not tokens:
        raise LogprobValidationError(f"task {task_id!r}: the engine returned no token at all")
    if None in logprobs or not logprobs:
        raise LogprobValidationError(
            f"task {task_id!r}: the engine returned no sample-time logprobs. Ask it for the sampled token's "
            "logprob (vLLM: SamplingParams(logprobs=0)); they are never replaced by zeros"
        )
    if len(tokens) != len(logprobs):
        raise LogprobValidationError(
            f"task {task_id!r}: expected one logprob per sampled token, but got {len(logprobs)} for {len(tokens)}"
        )
    values = np.array(logprobs, dtype=np.float64)
    wrong = values[~(np.isfinite(values) & (values <= POSITIVE_TOLERANCE))]
    if len(wrong):
        raise LogprobValidationError(
            f"task {task_id!r}: expected finite logprobs <= 0, but {len(wrong)} of {len(logprobs)} are not, "
            f"for example {wrong[0]}"
        )


def validate_rollout(groups: Sequence[Group]) -> None:
    """Look at the logprobs of a whole rollout.

    Raises:
        LogprobValidationError: If all logprobs are one constant, which no sampler returns.
    """
    values = sampled_logprobs(groups)
    if len(values) < _MIN_TOKENS_TO_JUDGE:
        return
    if (values == values[0]).all():
        raise LogprobValidationError(
            f"all {len(values)} sample-time logprobs are exactly {values[0]}: the engine's logprobs were "
            "replaced or filled in on their way here"
        )
    if values.var() < _LOW_VARIANCE:
        logger.warning(
            "Sample-time logprobs hardly vary (variance %.2g over %d tokens): is the policy deterministic by now?",
            values.var(),
            len(values),
        )


def sampled_logprobs(groups: Sequence[Group]) -> NDArray[np.float64]:
    """The engine's logprobs of all sampled tokens."""
    return np.concatenate([np.empty(0), *(ledger.logprobs[ledger.sampled] for ledger in ledgers_of(groups))])
