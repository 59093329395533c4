"""Scores of held-out tasks."""

from collections.abc import Sequence

from grpo_lightning.functional.pass_at_k import pass_at_k
from grpo_lightning.rollout.types import Group, Sample

Scores = dict[str, list[float]]
"""Values by name, each of the tasks that the name applies to."""


def greedy_scores(groups: Sequence[Group], reward_names: Sequence[str], success_reward: float) -> Scores:
    """Scores of one greedy answer a task.

    Args:
        groups: Held-out tasks with one sample each.
        reward_names: The reward functions.
        success_reward: Reward from which on an answer is correct.

    Returns:
        ``reward`` (weighted sum) and ``reward_<name>``, of the tasks they apply to; ``accuracy`` (0 or 1) of every
        task.
    """
    samples = [group.samples[0] for group in groups]
    scores = {
        "reward": [s.reward for s in samples if s.reward is not None],
        "accuracy": [float(_is_correct(s, success_reward)) for s in samples],
    }
    for name in reward_names:
        scores[f"reward_{name}"] = [v for s in samples if (v := s.rewards.get(name)) is not None]
    return scores


def sampled_scores(groups: Sequence[Group], success_reward: float) -> Scores:
    """Scores of several sampled answers a task.

    Args:
        groups: Held-out tasks with ``n >= 2`` samples each, the same number everywhere.
        success_reward: Reward from which on an answer is correct.

    Returns:
        Of every task ``avg_at_<n>``, the share of correct samples, and ``pass_at_<k>`` for ``k`` of `pass_sizes`.
    """
    scores: Scores = {}
    for group in groups:
        n = len(group.samples)
        correct = sum(_is_correct(s, success_reward) for s in group.samples)
        scores.setdefault(f"avg_at_{n}", []).append(correct / n)
        for k in pass_sizes(n):
            scores.setdefault(f"pass_at_{k}", []).append(pass_at_k(correct, n, k))
    return scores


def pass_sizes(samples: int) -> list[int]:
    """The powers of two from 2 to ``samples``, and ``samples`` itself."""
    return sorted({2**power for power in range(1, samples.bit_length())} | {samples})


def _is_correct(sample: Sample, success_reward: float) -> bool:
    # An answer that cannot be scored is not correct.
    return sample.reward is not None and sample.reward >= success_reward
