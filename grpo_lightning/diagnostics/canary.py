"""The same few tokens scored by engine and trainer: what shows which weights each of them computes with.

Shapes: ``N`` tokens that are scored, over all sequences.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo_lightning.diagnostics.examination import Run
from grpo_lightning.diagnostics.scoring import quiet
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.engine import CURRENT, Adapter, RolloutEngine
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.packing import PackedSequence, Row, pack

if TYPE_CHECKING:
    from grpo_lightning.datamodule import RolloutDataModule

TokenIds = tuple[int, ...]

_SEQUENCE_TOKENS = 32
"""Two sequences make the default canary. Each ends a prompt and begins an answer."""

_ANSWER_TOKENS = 8
"""Each sequence ends with at least so many tokens of the policy's own, where its distribution is what is trained."""

_SEED = 5
_UNTOLD = ({"role": "user", "content": "What comes next?"},)
"""Stands for what an environment would begin with."""


@dataclass(frozen=True)
class Canary:
    """Token sequences that both sides score.

    Every token but the first of each is scored, those of the prompt too.

    Attributes:
        sequences: The tokens.
        batch: The same for the trainer, on the CPU.
    """

    sequences: tuple[TokenIds, ...]
    batch: PackedBatch

    @classmethod
    def of(cls, sequences: Sequence[TokenIds]) -> "Canary":
        """A canary of sequences of two tokens and more."""
        return cls(tuple(sequences), pack([_row(ids) for ids in sequences], temperature=1.0))

    def __len__(self) -> int:
        """``N``."""
        return self.batch.num_targets

    def first(self) -> "Canary":
        """The first of its sequences, whose tokens are the first of ``N``."""
        return Canary.of(self.sequences[:1])

    def served(self, engine: RolloutEngine, adapter: Adapter = CURRENT) -> Tensor:
        """What the engine says of the tokens, float64 ``[N]``."""

        async def score() -> list[list[float]]:
            return await asyncio.gather(*(engine.score(ids, adapter=adapter) for ids in self.sequences))

        return torch.tensor([value for values in engine.run(score()) for value in values], dtype=torch.float64)

    def trained(self, run: Run) -> Tensor:
        """What the trainer says of them with the weights that the policy holds now, float64 ``[N]``."""
        policy = run.module.policy
        batch = self.batch.to(run.module.device)
        with quiet(run):
            return policy.token_logprobs(batch).logprobs.double().cpu()


def make_canary(data: "RolloutDataModule", tokens: int) -> Canary:
    """A canary of prompts of the run, each with the beginning of an answer that the engine samples.

    Args:
        data: The run's data module, its engine synced.
        tokens: About how many tokens it has.
    """
    sampler = data.sampler
    length = min(_SEQUENCE_TOKENS, sampler.max_context - 1)
    count = max(1, round(tokens / length))
    room = max(1, length - _ANSWER_TOKENS)
    prompts = [tuple(prompt[-room:]) for prompt in prompts_of(data, count)]
    settings = sampler.settings(temperature=1.0)

    async def answers() -> list[TokenIds]:
        async def answered(number: int, prompt: TokenIds) -> TokenIds:
            limited = replace(settings, max_tokens=length - len(prompt))
            return prompt + (await sampler.engine.generate(prompt, limited, seed=_SEED + number)).token_ids

        return await asyncio.gather(*(answered(i, prompt) for i, prompt in enumerate(prompts)))

    return Canary.of(sampler.engine.run(answers()))


def prompts_of(data: "RolloutDataModule", count: int) -> list[list[int]]:
    """Prompts of tasks that are evenly spread over the source."""
    tasks = (data.tasks[i * len(data.tasks) // count] for i in range(count))
    # What an environment begins without a message of the task is not known without beginning it.
    return [data.sampler.encoder.first(task.messages or _UNTOLD) for task in tasks]


def _row(token_ids: TokenIds) -> Row:
    begun = Ledger.of_prompt(token_ids[:1])
    rest = token_ids[1:]
    return Row(
        token_ids[:1], (PackedSequence(begun.extended(rest, Source.SAMPLED, 0, [0.0] * len(rest), 0), 0, (0.0,), 0.0),)
    )
