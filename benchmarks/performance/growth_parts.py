"""Seconds and bytes of packing, of the collector alone, and of a rollout with an engine, for one shape each."""

import gc
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from benchmarks.performance.batches import InstantEngine, Shape, made_groups
from grpo_lightning.envs import Environment, Observation
from grpo_lightning.functional.aggregation import sequence
from grpo_lightning.rewards import Scorer
from grpo_lightning.rollout.collector import collect
from grpo_lightning.rollout.engine import Generates, RolloutEngine
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.generation_record import GenerationRecord, NotedEngine
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.loop import EventLoopThread
from grpo_lightning.rollout.micro_batches import Layout, cut
from grpo_lightning.rollout.player import Player
from grpo_lightning.rollout.prompts import PromptEncoder, PromptSettings
from grpo_lightning.rollout.types import Action, SamplingSettings, Task

_WORD, _OBSERVATION = " word", " And then?" * 5


class Talk(Environment):
    """Says the same after every turn, for as long as the episode may go on."""

    async def reset(self, task: Task) -> Observation:
        """The task."""
        return Observation(task.messages)

    async def step(self, action: Action) -> Observation:
        """Another question."""
        return Observation(({"role": "user", "content": _OBSERVATION},), reward=float(len(action.text)))


def encoder(model: str) -> PromptEncoder:
    """Texts as they are, without a chat template: so many words are so many tokens.

    Args:
        model: Folder of the model.
    """
    return PromptEncoder(model, 10**6, PromptSettings(plain_prompts=True))


def packing_point(shape: Shape, repeats: int) -> dict[str, float]:
    """A rollout's groups cut into two micro-batches.

    Args:
        shape: The rollout.
        repeats: How often; the fastest counts.

    Returns:
        ``seconds`` of processor time; ``bytes`` of the largest allocation on the way, by Python and NumPy.
    """
    groups, sampling = made_groups(shape), SamplingSettings(shape.completion_tokens)

    def work() -> Any:
        return cut(groups, Layout(1, 2, 1, 1), sequence, sampling)

    return {"seconds": _processor_seconds(work, repeats), "bytes": _peak(work)}


def collector_point(shape: Shape, chat: PromptEncoder, repeats: int) -> dict[str, float]:
    """A rollout whose engine answers at once: what the first process itself does for it.

    Args:
        shape: The rollout.
        chat: Encodes prompts and decodes completions.
        repeats: How often; the fastest counts.

    Returns:
        ``seconds`` of processor time; ``bytes`` of the largest allocation on the way, by Python and NumPy.
    """
    engine, loop = InstantEngine.of(shape), EventLoopThread("collector")
    try:

        def work() -> Any:
            return loop.run(collected(engine, chat, shape, "collector"))

        return {"seconds": _processor_seconds(work, repeats), "bytes": _peak(work)}
    finally:
        loop.close()


def rollout_point(engine: RolloutEngine, shape: Shape, chat: PromptEncoder, key: str, repeats: int) -> dict[str, float]:
    """A rollout with an engine that was started.

    Args:
        engine: The engine.
        shape: The rollout.
        chat: Encodes prompts and decodes completions.
        key: Unlike that of any other point: no prompt is served from the cache of an earlier one.
        repeats: How often; the fastest counts.

    Returns:
        ``seconds``, wall clock.
    """
    found = []
    for number in range(repeats):
        begin = time.perf_counter()
        engine.run(collected(engine, chat, shape, f"{key} {number}"))
        found.append(time.perf_counter() - begin)
    return {"seconds": min(found)}


async def collected(engine: Generates, chat: PromptEncoder, shape: Shape, key: str) -> list[Group]:
    """A rollout of a shape, by the collector.

    Args:
        engine: What answers.
        chat: Encodes prompts and decodes completions.
        shape: The rollout.
        key: Names it, its prompts and its seeds.
    """
    record = GenerationRecord()
    player = Player(
        engine=NotedEngine(engine, record),
        encoder=chat,
        # Nothing ends a completion before its length.
        sampling=SamplingSettings(shape.completion_tokens, banned_token_ids=chat.stop_token_ids),
        scorer=Scorer([]),
        settings=EpisodeSettings(max_turns=shape.turns, truncated_action="step", step_timeout=3600.0),
        max_context=10**6,
        environments={"": Talk},
        seed_key=key,
        record=record,
    )
    tasks = [_task(number, shape.prompt_tokens, key) for number in range(shape.prompts)]
    groups = await collect(player, tasks, samples_per_task=shape.samples)
    sampled = sum(episode.count(Source.SAMPLED) for group in groups for episode in group.episodes)
    assert sampled == shape.sampled_tokens, f"expected {shape.sampled_tokens} sampled tokens, but got {sampled}"
    return groups


def _task(number: int, tokens: int, key: str) -> Task:
    """A task with about so many tokens, which begins like no other."""
    begun = f"{number} {key}"
    return Task(f"task {number}", ({"role": "user", "content": begun + _WORD * max(1, tokens - len(begun) // 2)},))


def _processor_seconds(work: Callable[[], Any], repeats: int) -> float:
    found = []
    for _ in range(repeats):
        gc.collect()
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def _peak(work: Callable[[], Any]) -> int:
    """Apart from the seconds: whoever counts allocations slows them down."""
    gc.collect()
    tracemalloc.start()
    try:
        kept = work()
        del kept
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
