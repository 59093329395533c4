"""Checks of what the engine returned, before any update is computed from it."""

import logging
import math
from collections.abc import Sequence

import torch

from grpo_lightning.errors import LogprobValidationError
from grpo_lightning.rollout.types import Generation, Group

logger = logging.getLogger(__name__)

_POSITIVE_TOLERANCE = 1e-3
"""A log-probability may exceed 0 by rounding, not by more."""

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
    if any(value is None for value in logprobs) or not logprobs:
        raise LogprobValidationError(
            f"task {task_id!r}: the engine returned no sample-time logprobs. Ask it for the sampled token's "
            "logprob (vLLM: SamplingParams(logprobs=0)); they are never replaced by zeros"
        )
    if len(tokens) != len(logprobs):
        raise LogprobValidationError(
            f"task {task_id!r}: expected one logprob per sampled token, but got {len(logprobs)} for {len(tokens)}"
        )
    wrong = [v for v in logprobs if not math.isfinite(v) or v > _POSITIVE_TOLERANCE]
    if wrong:
        raise LogprobValidationError(
            f"task {task_id!r}: expected finite logprobs <= 0, but {len(wrong)} of {len(logprobs)} are not, "
            f"for example {wrong[0]}"
        )


def validate_rollout(groups: Sequence[Group]) -> None:
    """Look at the logprobs of a whole rollout.

    Raises:
        LogprobValidationError: If an action was forced, or all logprobs are one constant, which no sampler returns.
    """
    actions = [s.action for g in groups for s in g.samples]
    forced = sum(a.was_forced for a in actions)
    if forced:
        raise LogprobValidationError(f"{forced} forced actions are among the samples; they must not be trained on")
    values = torch.tensor([v for a in actions for v in a.token_logprobs], dtype=torch.float64)
    if len(values) < _MIN_TOKENS_TO_JUDGE:
        return
    if bool((values == values[0]).all()):
        raise LogprobValidationError(
            f"all {len(values)} sample-time logprobs are exactly {float(values[0])}: the engine's logprobs were "
            "replaced or filled in on their way here"
        )
    if float(values.var()) < _LOW_VARIANCE:
        logger.warning(
            "Sample-time logprobs hardly vary (variance %.2g over %d tokens): is the policy deterministic by now?",
            float(values.var()),
            len(values),
        )
