"""Collecting the episodes of a rollout, all concurrently against the engine's continuous batching."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from grpo_lightning.functional import group_advantages
from grpo_lightning.rewards.scorer import Scorer
from grpo_lightning.rollout.engine import RolloutEngine
from grpo_lightning.rollout.types import Action, Generation, Group, Sample, SamplingSettings, Task
from grpo_lightning.rollout.validation import validate_generation

Decode = Callable[[Sequence[int]], str]
OnSample = Callable[[Sample], None]

_CONCURRENT_SCORES = 32


async def collect(
    engine: RolloutEngine,
    tasks: Sequence[tuple[Task, Sequence[int]]],
    *,
    samples_per_task: int,
    sampling: SamplingSettings,
    scorer: Scorer,
    decode: Decode,
    seed_key: str,
    on_sample: OnSample = lambda sample: None,
) -> list[Group]:
    """Sample and score every task's group.

    Every episode is a coroutine that returns its own data; nothing is kept on a shared object, so no episode can
    overwrite another's. The first failure cancels the rest.

    Args:
        engine: A started engine that serves the wanted policy version.
        tasks: Tasks with their prompts as token ids.
        samples_per_task: Samples of each task.
        sampling: Sampling settings.
        scorer: The rewards.
        decode: From token ids to text.
        seed_key: Names this rollout; with task and sample number it gives each request its seed.
        on_sample: Called as samples finish, in any order.

    Returns:
        One group per task, in order, without advantages.
    """

    scoring = asyncio.Semaphore(_CONCURRENT_SCORES)

    async def episode(task: Task, prompt_ids: Sequence[int], number: int) -> Sample:
        generation = await engine.generate(prompt_ids, sampling, seed=request_seed(seed_key, task.id, number))
        validate_generation(generation, task.id)
        action = to_action(generation, decode)
        # Waiting for a turn does not count towards the time limit of a reward.
        async with scoring:
            rewards, reward, failure = await scorer.score(task, action.text)
        sample = Sample(action, rewards, reward, failure)
        on_sample(sample)
        return sample

    # A task that comes twice in one rollout goes on counting, or its groups would be copies of each other.
    drawn: Counter[str] = Counter()
    try:
        async with asyncio.TaskGroup() as running:
            pending = []
            for task, prompt_ids in tasks:
                numbers = range(drawn[task.id], drawn[task.id] + samples_per_task)
                drawn[task.id] += samples_per_task
                pending.append([running.create_task(episode(task, prompt_ids, number)) for number in numbers])
    except ExceptionGroup as failures:
        # One cause is enough to act on; the others were cancelled or are the same.
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [
        Group(task, tuple(prompt_ids), tuple(sample.result() for sample in samples))
        for (task, prompt_ids), samples in zip(tasks, pending, strict=True)
    ]


def to_action(generation: Generation, decode: Decode) -> Action:
    """The rich action of one generation (never forced: the policy chose it)."""
    return Action(
        text=decode(generation.token_ids),
        token_ids=generation.token_ids,
        token_logprobs=generation.logprobs,
        logprob_sum=sum(generation.logprobs),
        was_forced=False,
        finish_reason=generation.finish_reason,
        policy_version=generation.policy_version,
    )


def with_advantages(groups: Sequence[Group]) -> list[Group]:
    """The same groups with their group-relative advantages; samples without a reward get 0 and count for nothing."""
    rewards = torch.tensor(
        [[0.0 if s.reward is None else s.reward for s in g.samples] for g in groups], dtype=torch.float64
    )
    valid = torch.tensor([[s.reward is not None for s in g.samples] for g in groups])
    advantages = group_advantages(rewards, valid).tolist()
    return [Group(g.task, g.prompt_ids, g.samples, tuple(values)) for g, values in zip(groups, advantages, strict=True)]


def request_seed(*parts: object) -> int:
    """A 31-bit seed that depends on all parts and on nothing else."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4]) >> 1
