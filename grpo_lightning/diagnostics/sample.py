"""A few completions of the engine, drawn and scored before the first rollout, with the run's own settings."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_lightning.diagnostics.canary import prompts_of
from grpo_lightning.diagnostics.scoring import scored_batch
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.player import request_seed
from grpo_lightning.rollout.types import Generation

if TYPE_CHECKING:
    from grpo_lightning.datamodule import RolloutDataModule

PROMPTS = 4
SAMPLES = 4
TOKENS = 16
"""256 tokens in all: they show a wrong temperature or mode at once, and a top-p of 0.95 beside bfloat16's noise."""

_CANDIDATES = 16
"""Tasks among which the shortest prompts are taken: the trainer computes all of their tokens."""


@dataclass(frozen=True)
class Sample:
    """Completions, in the order of the batch's targets.

    Attributes:
        batch: Prompts and completions for the trainer, on the CPU.
        logprobs: The engine's, float64 ``[N]``; NaN where it returned none.
    """

    batch: PackedBatch
    logprobs: Tensor

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        generations: Sequence[Generation],
        temperature: float,
        banned: tuple[int, ...],
    ) -> "Sample":
        """The sample of these completions."""
        logprobs: list[float] = []
        for generation in generations:
            # What an engine returns, and not what it should.
            returned: Sequence[float | None] = generation.logprobs or ()
            given = [math.nan if value is None else float(value) for value in returned]
            count = len(generation.token_ids)
            logprobs += [*given, *[math.nan] * count][:count]
        pairs = [(p, g.token_ids) for p, g in zip(prompts, generations, strict=True) if g.token_ids]
        return cls(scored_batch(pairs, temperature, banned), torch.tensor(logprobs, dtype=torch.float64))


def draw_sample(data: "RolloutDataModule", *, truncated: bool = False) -> Sample:
    """Have the engine complete a few of the run's prompts, with seeds that no rollout uses.

    Args:
        data: A data module that was set up, with an engine that serves the current policy.
        truncated: Whether to sample with the run's ``top_p`` and ``top_k``.

    Raises:
        ConfigurationError: If a task's messages do not fit the chat template.
    """
    sampler, count = data.sampler, len(data.tasks)
    encoded = sorted(prompts_of(data, min(count, _CANDIDATES)), key=len)
    prompts = [ids for ids in encoded[:PROMPTS] for _ in range(PROMPTS * SAMPLES // min(count, PROMPTS))]
    settings = sampler.settings(data.temperature, truncated=truncated)
    settings = replace(settings, max_tokens=min(TOKENS, settings.max_tokens))

    async def generate() -> list[Generation]:
        return await asyncio.gather(
            *(
                data.engine.generate(ids, settings, seed=request_seed(data.seed, "doctor", number))
                for number, ids in enumerate(prompts)
            )
        )

    generations = data.engine.run(generate())
    return Sample.of(prompts, generations, data.temperature, settings.banned_token_ids)
