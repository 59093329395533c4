"""What a group compares belongs together, and its rewards say something."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.episode import Episode, Group

CONSTANT_ROLLOUTS = 5
"""Rollouts without any difference in reward, from the start, after which a run is told that it learns nothing."""

FAR = 0.75
"""Equal answers whose rewards differ by more than this share of what permuted rewards do are no reason for them. A
reward of which half is noise stays below it."""

_PERMUTATIONS = 200


def check_groups(groups: Sequence[Group], own: Mapping[int, bool]) -> Verdict:
    """All episodes of a group begin with one prompt, and it is their task's.

    Args:
        groups: The rollout.
        own: Whether a group's prompt is one that its task had when it was sampled, by the group's position; some or
            none.
    """
    name = "groups"
    mixed = [g for g in groups if len({e.ledgers[0].prompt_ids for e in g.episodes if e.ledgers}) > 1]
    other = [groups[i] for i, is_own in own.items() if not is_own]
    evidence: dict[str, float | int | str] = {
        "groups": len(groups),
        "with several prompts": len(mixed),
        "prompts compared": len(own),
        "with another task's prompt": len(other),
        "allowed": 0,
    }
    if not mixed and not other:
        return Verdict(name, Status.PASS, evidence=evidence)
    what = "hold episodes of several prompts" if mixed else "answer another prompt than their task gives"
    return Verdict(
        name,
        Status.FAIL,
        f"{len(mixed or other)} of {len(groups)} groups {what}, for example task {(mixed or other)[0].task.id!r}: "
        "advantages then compare how hard the prompts are, not how good the answers are.",
        "Keep the episodes of one task together, and with it, from the rollout to the batches.",
        evidence,
        cause="groups_mixed",
    )


@dataclass(frozen=True)
class EqualAnswers:
    """Pairs of equal answers to one task in a rollout.

    Attributes:
        pairs: How many.
        differ: Sum of their differences in reward, in standard deviations of the rollout's rewards.
        expected: The same if the rollout's rewards were permuted.
        variance: Variance of that.
    """

    pairs: int
    differ: float
    expected: float
    variance: float


def equal_answers(groups: Sequence[Group]) -> EqualAnswers:
    """Count them."""
    pairs: list[tuple[int, int]] = []
    rewards: list[float] = []
    for group in groups:
        by_answer: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
        for episode in group.episodes:
            if episode.reward is not None:
                by_answer[_answer(episode)].append(len(rewards))
                rewards.append(episode.reward)
        pairs += [pair for equal in by_answer.values() for pair in combinations(equal, 2)]
    values, index = np.array(rewards), np.array(pairs)
    if not pairs or values.std() == 0:
        return EqualAnswers(len(pairs), 0.0, 0.0, 0.0)
    values = values / values.std()
    random = np.random.default_rng(0)
    by_chance = [_differing(random.permutation(values), index) for _ in range(_PERMUTATIONS)]
    return EqualAnswers(len(pairs), _differing(values, index), float(np.mean(by_chance)), float(np.var(by_chance)))


def check_equal_answers(rollouts: Sequence[EqualAnswers], z: float) -> Verdict:
    """Equal answers to one task earn equal rewards, or at least closer ones than any two episodes of the rollout.

    Rewards that were given to the wrong samples are as far apart as permuted ones. Judged are as many of the last
    rollouts as are needed for the difference to show; with a reward that is a function of the answer no pair ever
    differs, so that there are no false alarms.

    Args:
        rollouts: The run's so far.
        z: Standard deviations, under permutation, that must lie between what is allowed and what is expected.
    """
    name = "equal answers"
    taken, pairs, differ, expected, variance, spread = 0, 0, 0.0, 0.0, 0.0, 0.0
    for rollout in reversed(rollouts):
        taken, pairs, differ = taken + 1, pairs + rollout.pairs, differ + rollout.differ
        expected, variance = expected + rollout.expected, variance + rollout.variance
        spread = math.sqrt(variance)
        if z * spread < (1 - FAR) * expected:
            break
    evidence: dict[str, float | int | str] = {
        "last rollouts": taken,
        "pairs of equal answers": pairs,
        "sum of their differences, in reward's std": differ,
        "expected with permuted rewards": expected,
        "standard deviation of that": spread,
        "allowed": FAR * expected,
    }
    if z * spread >= (1 - FAR) * expected:
        message = f"{pairs} pairs of equal answers whose rewards could differ: too few."
        return Verdict(name, Status.NO_POWER, f"{message} More rollouts or shorter answers decide.", "", evidence)
    if differ <= FAR * expected:
        note = "Some equal answers have different rewards: the reward is no function of the answer." if differ else ""
        return Verdict(name, Status.PASS, note, evidence=evidence)
    return Verdict(
        name,
        Status.FAIL,
        "Equal answers to one task have rewards about as far apart as any two samples: rewards are given to the wrong "
        "samples, or do not depend on the answer.",
        "Compare rewards and completions of one group by hand (grpo-lightning trajectories). Look at what reorders "
        "episodes, tasks or rewards.",
        evidence,
        cause="groups_shuffled",
        ruled_out=("a noisy reward (equal answers would still have closer ones)",),
    )


def _answer(episode: Episode) -> tuple[object, ...]:
    """All that a reward can see of an episode that others of its group may share."""
    return tuple((turn.action.token_ids, tuple(str(m.get("content")) for m in turn.messages)) for turn in episode.turns)


def _differing(values: NDArray[np.float64], pairs: NDArray[np.int64]) -> float:
    return float(np.abs(values[pairs[:, 0]] - values[pairs[:, 1]]).sum())


def check_rewards(rollouts: int, differing: int) -> Verdict:
    """Rewards differ within some group, sooner or later.

    Args:
        rollouts: Rollouts of this run.
        differing: How many of them had a group in which rewards differ.
    """
    name = "rewards"
    evidence: dict[str, float | int | str] = {"rollouts": rollouts, "with differing rewards": differing}
    if differing:
        return Verdict(name, Status.PASS, evidence=evidence)
    if rollouts < CONSTANT_ROLLOUTS:
        return Verdict(
            name, Status.NO_POWER, f"No group of {rollouts} rollouts had differing rewards yet.", "", evidence
        )
    return Verdict(
        name,
        Status.FAIL,
        f"In {rollouts} rollouts no two samples of a prompt had different rewards: nothing can be learned.",
        "Look at what the reward says of some completions (grpo-lightning trajectories). Tasks that are all too hard "
        "or all solved teach nothing; nor does a reward that cannot read the answer.",
        {**evidence, "needed rollouts": CONSTANT_ROLLOUTS},
        cause="rewards_constant",
    )
