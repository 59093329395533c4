"""What is done to a rollout's groups between sampling and advantages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from grpo_lightning.functional.reward_shaping import overlong_penalty
from grpo_lightning.rollout.episode import Episode, Group
from grpo_lightning.rollout.ledger import Source
from grpo_lightning.rollout.packing import locate

OVERLONG, KL = "overlong", "kl"
"""Names, among an episode's rewards, of what is added to them here."""


def varies(group: Group) -> bool:
    """Whether anything in a group is better than anything else."""
    rewards = [episode.reward for episode in group.episodes if episode.reward is not None]
    return len(rewards) >= 2 and max(rewards) > min(rewards)


def add_reward(groups: Sequence[Group], name: str, values: Iterable[float]) -> list[Group]:
    """The same groups with one more reward, of weight 1, in every episode that has one.

    Args:
        groups: The groups.
        name: The reward's name.
        values: Its values, one for each episode of each group, in order.

    Raises:
        ValueError: If there are not as many values as episodes.
    """
    given, episodes = list(values), sum(len(group.episodes) for group in groups)
    if len(given) != episodes:
        raise ValueError(f"expected a value for each of {episodes} episodes, but got {len(given)}")
    extra = iter(given)

    def rewarded(episode: Episode) -> Episode:
        value = next(extra)
        if episode.reward is None:
            return episode
        return replace(episode, rewards={**episode.rewards, name: value}, reward=episode.reward + value)

    return [replace(group, episodes=tuple(map(rewarded, group.episodes))) for group in groups]


def punish_kl(groups: Sequence[Group], kl: Tensor, weight: float) -> list[Group]:
    """The same groups with the KL to the reference, summed over each episode's tokens, as a penalty.

    Args:
        groups: The groups.
        kl: KL of each ledger row, float64 ``[R]``; NaN where nothing is trained on.
        weight: What it is multiplied by.
    """
    penalties: list[float] = []
    for located in locate(groups):
        own = [0.0] * len(located.group.episodes)
        for index, ledger, row in located.ledgers():
            own[index] -= weight * float(kl[row : row + len(ledger)].nansum())
        penalties += own
    return add_reward(groups, KL, penalties)


def punish_overlong(groups: Sequence[Group], *, max_length: int, buffer: int) -> list[Group]:
    """The same groups with DAPO's soft overlong punishment (`functional.reward_shaping.overlong_penalty`).

    Args:
        groups: The groups.
        max_length: Most tokens that the policy may sample in an episode.
        buffer: Tokens before that over which the penalty grows.
    """
    lengths = (episode.count(Source.SAMPLED) for group in groups for episode in group.episodes)
    return add_reward(
        groups, OVERLONG, (overlong_penalty(length, max_length=max_length, buffer=buffer) for length in lengths)
    )


def with_greedy(group: Group, reward: float | None) -> Group:
    """A group with the reward of the greedy answer to its task; without one there is nothing to compare with.

    Args:
        group: The group.
        reward: That reward; None if it could not be told, which leaves the group's episodes without one too.
    """
    if reward is not None:
        return replace(group, greedy=reward)
    failure = "the greedy answer to its task has no reward"
    return replace(group, episodes=tuple(replace(e, reward=None, failure=failure) for e in group.episodes))


def mask_truncated(groups: Sequence[Group]) -> list[Group]:
    """The same groups with episodes that a limit cut off kept out of the loss; they still count in their group."""
    return [
        replace(group, episodes=tuple(replace(e, masked=e.status == "truncated") for e in group.episodes))
        for group in groups
    ]


def refill(
    first: Sequence[tuple[int, Group]], draw: Callable[[int, int], Sequence[tuple[int, Group]]], rounds: int
) -> tuple[list[tuple[int, Group]], int, int]:
    """Replace groups whose rewards are all equal by others, for some rounds (dynamic sampling).

    What cannot be replaced stays, with advantages of 0: a rollout is always as large as it was planned. Source: DAPO,
    equation 11, https://arxiv.org/abs/2503.14476, where sampling goes on until the batch is full.

    Args:
        first: Groups with the index of their task.
        draw: Samples groups of further tasks, given the round and how many.
        rounds: How often at most.

    Returns:
        As many groups as at first, those that were not replaced in their places; how many groups without variance were
        dropped; all tasks drawn.
    """
    found, drawn = list(first), len(first)
    # Groups keep their places, which decide what update they are trained in.
    flat = [place for place, (_, group) in enumerate(found) if not varies(group)]
    for number in range(rounds):
        if not flat:
            break
        more = draw(number, len(flat))
        drawn += len(more)
        good = [item for item in more if varies(item[1])]
        for place, item in zip(flat, good, strict=False):
            found[place] = item
        flat = flat[len(good) :]
    return found, drawn - len(found), drawn
