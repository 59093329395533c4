"""Collecting the episodes of a rollout, all concurrently against the engine's continuous batching."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.rollout.player import Player
from grpo_lightning.rollout.types import Task

OnEpisode = Callable[[Episode], None]
Finished = dict[tuple[int, int], Episode]
"""Finished episodes by the position of their task and their number in its group."""


async def collect(
    player: Player,
    tasks: Sequence[Task],
    *,
    samples_per_task: int,
    finished: Finished | None = None,
    on_episode: OnEpisode = lambda episode: None,
) -> list[Group]:
    """Play every task's group.

    Every episode is a coroutine that returns its own data; nothing is kept on a shared object, so no episode can
    overwrite another's. The first failure that is not an environment's cancels the rest.

    Args:
        player: What plays an episode.
        tasks: The tasks.
        samples_per_task: Episodes of each task.
        finished: Episodes that need not be played again; those that finish are added, so that they outlive a failure.
        on_episode: Called as episodes finish, in any order.

    Returns:
        One group per task, in order, without advantages.
    """
    done: Finished = {} if finished is None else finished

    async def episode(key: tuple[int, int], task: Task, number: int) -> None:
        done[key] = await player.play(task, number)
        on_episode(done[key])

    # A task that comes twice in one rollout goes on counting, or its groups would be copies of each other.
    drawn: Counter[str] = Counter()
    try:
        async with asyncio.TaskGroup() as running:
            for position, task in enumerate(tasks):
                for index in range(samples_per_task):
                    if (position, index) not in done:
                        running.create_task(episode((position, index), task, drawn[task.id] + index))
                drawn[task.id] += samples_per_task
    except ExceptionGroup as failures:
        # One cause is enough to act on; the others were cancelled or are the same.
        first = failures.exceptions[0]
        raise first from first.__cause__
    return [
        Group(task, tuple(done[position, index] for index in range(samples_per_task)))
        for position, task in enumerate(tasks)
    ]
