"""Scores of held-out tasks."""

from collections.abc import Sequence

from grpo_lightning.functional.pass_at_k import pass_at_k
from grpo_lightning.rollout.episode import Episode, Group

Scores = dict[str, list[float]]
"""Values by name, each of the tasks that the name applies to."""


def greedy_scores(groups: Sequence[Group], reward_names: Sequence[str], success_reward: float) -> Scores:
    """Scores of one greedy episode a task.

    Args:
        groups: Held-out tasks with one episode each.
        reward_names: The reward functions.
        success_reward: Reward from which on an answer is correct.

    Returns:
        ``reward`` (weighted sum) and ``reward_<name>``, of the tasks they apply to; ``accuracy`` (0 or 1) of every
        task whose environment did not fail.
    """
    # An environment that failed says nothing about the policy.
    episodes = [group.episodes[0] for group in groups if group.episodes[0].status != "error"]
    scores = {
        "reward": [e.reward for e in episodes if e.reward is not None],
        "accuracy": [float(_is_correct(e, success_reward)) for e in episodes],
    }
    for name in dict.fromkeys([*reward_names, *(name for e in episodes for name in e.rewards)]):
        scores[f"reward_{name}"] = [v for e in episodes if (v := e.rewards.get(name)) is not None]
    return scores


def sampled_scores(groups: Sequence[Group], success_reward: float) -> Scores:
    """Scores of several sampled episodes a task.

    Args:
        groups: Held-out tasks with ``n >= 2`` episodes each, the same number everywhere.
        success_reward: Reward from which on an answer is correct.

    Returns:
        Of every task of which no environment failed ``avg_at_<n>``, the share of correct episodes, and ``pass_at_<k>``
        for ``k`` of `pass_sizes`.
    """
    scores: Scores = {}
    for group in groups:
        if any(episode.status == "error" for episode in group.episodes):
            continue
        n = len(group.episodes)
        correct = sum(_is_correct(episode, success_reward) for episode in group.episodes)
        scores.setdefault(f"avg_at_{n}", []).append(correct / n)
        for k in pass_sizes(n):
            scores.setdefault(f"pass_at_{k}", []).append(pass_at_k(correct, n, k))
    return scores


def pass_sizes(samples: int) -> list[int]:
    """The powers of two from 2 to ``samples``, and ``samples`` itself."""
    return sorted({2**power for power in range(1, samples.bit_length())} | {samples})


def _is_correct(episode: Episode, success_reward: float) -> bool:
    # An answer that cannot be scored is not correct.
    return episode.reward is not None and episode.reward >= success_reward
