"""An episode as one JSON object."""

from typing import Any

from grpo_lightning.rollout.episode import Episode
from grpo_lightning.rollout.ledger import NO_VERSION, Source
from grpo_lightning.rollout.types import Task


def episode_record(task: Task, episode: Episode) -> dict[str, Any]:
    """What every file of completions says of one.

    Args:
        task: The task.
        episode: One episode of it.
    """
    first = episode.turns[0] if episode.turns else None
    return {
        "task": task.id,
        "prompt": [dict(message) for message in (task.messages if first is None else first.messages)],
        "completion": "" if first is None else first.action.text,
        **({"turns": _turns(episode)} if len(episode.turns) > 1 or (first and first.action.was_forced) else {}),
        "reward": episode.reward,
        "rewards": dict(episode.rewards),
        "status": episode.status,
        "finish_reason": None if first is None else episode.turns[-1].action.finish_reason,
        "policy_version": max((turn.action.policy_version for turn in episode.turns), default=NO_VERSION),
        "tokens": episode.count(Source.SAMPLED),
        **({"failure": episode.failure} if episode.failure else {}),
    }


def _turns(episode: Episode) -> list[dict[str, Any]]:
    return [
        {
            "messages": [dict(message) for message in turn.messages],
            "completion": turn.action.text,
            "forced": turn.action.was_forced,
            "reward": turn.reward,
        }
        for turn in episode.turns
    ]
