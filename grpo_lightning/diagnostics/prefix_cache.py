"""Filling the engine's prefix cache under one adapter and asking the same under the next."""

import asyncio
import itertools
import secrets
from collections.abc import Sequence

from grpo_lightning.diagnostics.canary import Canary
from grpo_lightning.diagnostics.checks.engine import CachePair
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.types import Generation, SamplingSettings

_PROMPT_TOKENS = 72
"""Two blocks of vLLM's cache on CPU and four on a GPU, and something behind them."""

_ANSWER = SamplingSettings(max_tokens=8, temperature=0.0)

_SEED = 8
"""An engine that samples against its orders draws the same warm and cold."""


class PrefixCache:
    """Prompts that are continued greedily, with what the cache holds of them and without.

    Requests that ask for the logprobs of their prompt pass by the cache, so `Canary` cannot see it.

    Args:
        engine: The engine.
        canary: Its sequences make the prompts.
        max_context: Longest sequence, in tokens.
    """

    def __init__(self, engine: RolloutEngine, canary: Canary, max_context: int) -> None:
        self._engine = engine
        length = min(_PROMPT_TOKENS, max_context - _ANSWER.max_tokens)
        endless = [itertools.cycle(ids) for ids in canary.sequences[:2]]
        self._prompts = [tuple(itertools.islice(ids, length)) for ids in endless]
        self._salts = (f"doctor-{secrets.token_hex(4)}-{n}" for n in itertools.count())
        self._last: list[Generation] = []
        self._noise: list[CachePair] = []

    def fill(self) -> None:
        """Fill the cache with the adapter that is served now, and measure what caching itself changes."""
        cold, warm = self._answers(False), self._answers(False)
        self._last, self._noise = warm, _pairs(warm, cold)

    def compare(self) -> tuple[list[CachePair], list[CachePair], list[CachePair]]:
        """After another adapter was published: the arguments of `check_cache`."""
        answers = self._answers(False, True)
        warm, cold = answers[: len(self._prompts)], answers[len(self._prompts) :]
        before, self._last = self._last, warm
        return _pairs(warm, cold), self._noise, _pairs(before, cold)

    def _answers(self, *cold: bool) -> list[Generation]:
        async def ask() -> list[Generation]:
            return await asyncio.gather(
                *(
                    self._engine.generate(ids, _ANSWER, seed=_SEED, cache_salt=next(self._salts) if fresh else None)
                    for fresh in cold
                    for ids in self._prompts
                )
            )

        return self._engine.run(ask())


def _pairs(warm: Sequence[Generation], cold: Sequence[Generation]) -> list[CachePair]:
    return [CachePair(w, c) for w, c in zip(warm, cold, strict=True)]
