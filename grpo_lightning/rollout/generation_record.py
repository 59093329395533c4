"""What the engine returned, noted where it returned it, apart from the episodes that are made of it."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from grpo_lightning.rollout.engine import CURRENT, Adapter, Generates
from grpo_lightning.rollout.types import Generation, SamplingSettings


def digest(values: Any, dtype: type) -> bytes:
    """Names a list of numbers.

    Args:
        values: The numbers, ``[L]``.
        dtype: What they are taken as: equal numbers of different dtypes then have the same name.
    """
    return blake2b(np.asarray(values, dtype=dtype).tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Noted:
    """One generation, beside its tokens.

    Attributes:
        prompt: Digest of the tokens it continues.
        logprobs: Digest of its logprobs.
        version: Policy version that sampled it.
    """

    prompt: bytes
    logprobs: bytes
    version: int

    @classmethod
    def of(cls, prompt_ids: Any, logprobs: Any, version: int) -> "Noted":
        """The same of a generation or of a turn in a ledger."""
        return cls(digest(prompt_ids, np.int64), digest(logprobs, np.float64), version)


class GenerationRecord:
    """Digests of all that the engine returned for one rollout; some 100 bytes each."""

    def __init__(self) -> None:
        self._by_tokens: defaultdict[bytes, Counter[Noted]] = defaultdict(Counter)
        self._prompts: set[bytes] = set()
        self._begun: defaultdict[str, set[bytes]] = defaultdict(set)

    def note(self, prompt_ids: Sequence[int], generation: Generation) -> None:
        """A request was answered."""
        noted = Noted.of(prompt_ids, generation.logprobs, generation.policy_version)
        self._by_tokens[digest(generation.token_ids, np.int64)][noted] += 1
        self._prompts.add(noted.prompt)

    def begin(self, task: str, prompt_ids: Sequence[int]) -> None:
        """An episode of a task began with a prompt, as the template showed it then."""
        self._begun[task].add(digest(prompt_ids, np.int64))

    def began(self, task: str, prompt_ids: Sequence[int]) -> bool:
        """Whether an episode of a task began with this prompt."""
        return digest(prompt_ids, np.int64) in self._begun[task]

    def returned(self, token_ids: Any) -> Counter[Noted]:
        """All generations of just these tokens."""
        return self._by_tokens.get(digest(token_ids, np.int64), Counter())

    def was_asked(self, prompt: bytes) -> bool:
        """Whether there was a request with a prompt of this digest."""
        return prompt in self._prompts


@dataclass(frozen=True)
class NotedEngine:
    """An engine whose answers are noted.

    Attributes:
        engine: What answers.
        record: Where it is noted.
    """

    engine: Generates
    record: GenerationRecord

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingSettings,
        *,
        seed: int | None = None,
        adapter: Adapter = CURRENT,
        cache_salt: str | None = None,
    ) -> Generation:
        """Sample one completion."""
        generation = await self.engine.generate(prompt_ids, params, seed=seed, adapter=adapter, cache_salt=cache_salt)
        self.record.note(prompt_ids, generation)
        return generation
