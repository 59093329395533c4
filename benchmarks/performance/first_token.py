"""The command line with a clock: prints when the engine first sampled anything, and when first for a task.

Run: python -m benchmarks.performance.first_token fit ...    as grpo-lightning fit
"""

import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from grpo_lightning import TransformersEngine, VLLMEngine
from grpo_lightning.rollout import sampler
from grpo_lightning.rollout.types import Generation, SamplingSettings


class Clock:
    """Prints the moment at which something happens for the first time.

    Attributes:
        answering: Whether the engine answers tasks, in training or validation, and not the doctor's questions.
    """

    def __init__(self) -> None:
        self.answering = False
        self._said: set[str] = set()

    def sampled(self) -> None:
        """A token was sampled."""
        for name in ("any", "task") if self.answering else ("any",):
            if name not in self._said:
                self._said.add(name)
                # On a line of its own: a progress bar may stand there.
                print("\n" + json.dumps({name: time.monotonic()}), flush=True)

    def watch(self, play: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """`collect`, during which the engine answers tasks."""

        async def watched(*args: Any, **kwargs: Any) -> Any:
            self.answering = True
            try:
                return await play(*args, **kwargs)
            finally:
                self.answering = False

        return watched


CLOCK = Clock()


class _FirstToken:
    """An engine that asks for a single token before each completion: the first one of all is what is timed."""

    async def generate(self, prompt_ids: Sequence[int], params: SamplingSettings, **settings: Any) -> Generation:
        """Sample one token, look at the clock, then sample the completion."""
        generate = super().generate  # type: ignore[misc]
        await generate(prompt_ids, replace(params, max_tokens=1), **settings)
        CLOCK.sampled()
        found: Generation = await generate(prompt_ids, params, **settings)
        return found

    async def score(self, token_ids: Sequence[int], **settings: Any) -> list[float]:
        """Scoring samples a token as well."""
        found: list[float] = await super().score(token_ids, **settings)  # type: ignore[misc]
        CLOCK.sampled()
        return found


class FirstTokenVLLM(_FirstToken, VLLMEngine):
    """`VLLMEngine` with the clock."""


class FirstTokenTransformers(_FirstToken, TransformersEngine):
    """`TransformersEngine` with the clock."""


def main() -> int:
    """The command line."""
    from grpo_lightning.cli import main as command_line

    # Around it the sampler publishes the adapter, where the doctor asks its questions.
    sampler.collect = CLOCK.watch(sampler.collect)  # type: ignore[assignment, attr-defined]
    return command_line()


if __name__ == "__main__":
    # The command line finds the engine by import path: in that module the clock must run, not in this one.
    from benchmarks.performance import first_token

    sys.exit(first_token.main())
