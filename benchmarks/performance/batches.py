"""Rollouts made of random tokens, of any shape, through the project's own ledgers, groups and packing."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from grpo_lightning.functional.aggregation import sequence
from grpo_lightning.rollout.advantages import with_advantages
from grpo_lightning.rollout.batch import PackedBatch
from grpo_lightning.rollout.engine import CURRENT, Adapter
from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.types import Action, Generation, SamplingSettings, Task

OBSERVATION_TOKENS = 16
"""What the environment says between two turns."""

VOCABULARY = 49_000
"""Below the size of the demo's vocabulary, and below all of its special tokens but the first few."""

_FIRST_ORDINARY = 100
_QUESTION = ({"role": "user", "content": "How many?"},)


@dataclass(frozen=True)
class Shape:
    """Size of a rollout.

    Attributes:
        prompts: Groups.
        samples: Episodes of each.
        prompt_tokens: Length of each prompt.
        completion_tokens: Tokens that the policy says in each turn.
        turns: Turns of each episode, `OBSERVATION_TOKENS` of the environment between them.
    """

    prompts: int = 1
    samples: int = 4
    prompt_tokens: int = 64
    completion_tokens: int = 64
    turns: int = 1

    @property
    def sampled_tokens(self) -> int:
        """Tokens of the policy in the whole rollout."""
        return self.prompts * self.samples * self.turns * self.completion_tokens

    @property
    def episode_tokens(self) -> int:
        """Tokens of one episode behind its prompt."""
        return self.turns * self.completion_tokens + (self.turns - 1) * OBSERVATION_TOKENS

    @property
    def input_tokens(self) -> int:
        """Tokens of the packed rollout: prompts once, and of each episode all but the last token."""
        return self.prompts * (self.prompt_tokens + self.samples * (self.episode_tokens - 1))


def made_groups(shape: Shape, seed: int = 0) -> list[Group]:
    """Groups as the collector returns them, with advantages; every token, logprob and reward is random.

    Args:
        shape: Their size.
        seed: Of the random numbers.
    """
    rng = np.random.default_rng(seed)
    return with_advantages([_group(rng, number, shape) for number in range(shape.prompts)])


def made_batch(shape: Shape, seed: int = 0) -> PackedBatch:
    """The whole rollout as one micro-batch, cut and packed as the data module does."""
    ((batch,),) = cut(made_groups(shape, seed), Layout(1, 1, 1, 1), sequence, SamplingSettings(shape.completion_tokens))
    return batch


def _ids(rng: np.random.Generator, count: int) -> list[int]:
    return list(rng.integers(_FIRST_ORDINARY, VOCABULARY, count).tolist())


def _group(rng: np.random.Generator, number: int, shape: Shape) -> Group:
    begun = Ledger.of_prompt(_ids(rng, shape.prompt_tokens))
    return Group(Task(f"task {number}", _QUESTION), tuple(_episode(rng, begun, shape) for _ in range(shape.samples)))


def _episode(rng: np.random.Generator, ledger: Ledger, shape: Shape) -> Episode:
    turns = []
    for turn in range(shape.turns):
        if turn:
            ledger = ledger.extended(_ids(rng, OBSERVATION_TOKENS), Source.ENVIRONMENT, turn)
        said = made_generation(rng, shape.completion_tokens)
        ledger = ledger.extended(said.token_ids, Source.SAMPLED, turn, said.logprobs, said.policy_version)
        action = Action("", said.token_ids, said.logprobs, sum(said.logprobs), False, "length", said.policy_version)
        turns.append(Turn(_QUESTION, action))
    reward = float(rng.random())
    return Episode(tuple(turns), (ledger,), {"reward": reward}, reward)


def made_generation(rng: np.random.Generator, tokens: int) -> Generation:
    """A completion with logprobs like an engine's: float32 values as Python numbers.

    Args:
        rng: Random numbers.
        tokens: Its length.
    """
    logprobs = (-rng.exponential(0.5, tokens)).astype(np.float32).astype(float)
    return Generation(tuple(_ids(rng, tokens)), tuple(logprobs.tolist()), "length", 0)


@dataclass(frozen=True)
class InstantEngine:
    """Answers each request at once with a completion made before: what is left is the collector's own time.

    Attributes:
        answers: Completions, taken in turn by the request's seed.
    """

    answers: Sequence[Generation]

    @classmethod
    def of(cls, shape: Shape, seed: int = 0) -> "InstantEngine":
        """Completions of a rollout's lengths."""
        rng = np.random.default_rng(seed)
        return cls([made_generation(rng, shape.completion_tokens) for _ in range(64)])

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingSettings,
        *,
        seed: int | None = None,
        adapter: Adapter = CURRENT,
        cache_salt: str | None = None,
    ) -> Generation:
        """One of the completions, up to the length that was asked for."""
        answer = self.answers[(seed or 0) % len(self.answers)]
        if params.max_tokens >= len(answer.token_ids):
            return answer
        cut_off: dict[str, Any] = {n: getattr(answer, n)[: params.max_tokens] for n in ("token_ids", "logprobs")}
        return replace(answer, **cut_off)
