"""A completion as one JSON object."""

from typing import Any

from grpo_lightning.rollout.types import Sample, Task


def sample_record(task: Task, sample: Sample) -> dict[str, Any]:
    """What every file of completions says of one.

    Args:
        task: The task.
        sample: One answer to it.
    """
    action = sample.action
    return {
        "task": task.id,
        "prompt": [dict(message) for message in task.messages],
        "completion": action.text,
        "reward": sample.reward,
        "rewards": dict(sample.rewards),
        "finish_reason": action.finish_reason,
        "policy_version": action.policy_version,
        **({"failure": sample.failure} if sample.failure else {}),
    }
