"""Advantages follow from the rewards: computed again, in plain loops, from what the episodes hold.

Symbols: ``r`` what is compared of an episode or turn, ``A`` its advantage; means run over a group.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.functional.advantages import STD_FLOOR
from grpo_lightning.rollout.episode import Episode, Group

TOLERANCE = 1e-5
"""Largest difference between an advantage and the one computed again, relative to the largest of the group: far above
the rounding of float64, far below what any other formula gives."""

OPPOSITE = -0.95
"""Cosine between given and expected advantages up to which their sign is wrong, and not their order."""

_NAME = "advantages"


@dataclass(frozen=True)
class Judged:
    """One group: what is compared, the advantages it was given, and those that follow."""

    returns: tuple[float, ...]
    given: tuple[float, ...]
    expected: tuple[float, ...]

    @property
    def varies(self) -> bool:
        """Whether anything should be made likelier or less likely."""
        return any(value != 0 for value in self.expected)

    @property
    def covariance(self) -> float:
        """Sum of ``(r - mean r) A``: above 0 if what is better has higher advantages."""
        mean = math.fsum(self.returns) / len(self.returns)
        return math.fsum((r - mean) * a for r, a in zip(self.returns, self.given, strict=True))

    @property
    def difference(self) -> float:
        """Largest difference from what follows, relative to the largest advantage that follows."""
        largest = max([1e-12, *map(abs, self.expected)])
        return max((abs(a - b) for a, b in zip(self.given, self.expected, strict=True)), default=0.0) / largest


def check_advantages(groups: Sequence[Group], credit: str, again: Sequence[Group] | None = None) -> Verdict:
    """The groups' advantages have the sign, the centre and the size that their rewards give them.

    Args:
        groups: The rollout.
        credit: ``"episode"`` or ``"reward_to_go"``, as in `with_advantages`.
        again: The same groups with advantages that were computed anew, where they are others than GRPO's. These are
            computed here, in plain loops.
    """
    others: Sequence[Group | None] = [None] * len(groups) if again is None else again
    judged = [judge(group, credit, other) for group, other in zip(groups, others, strict=True)]
    rewards = [e.reward for g in groups for e in g.episodes if e.reward is not None]
    infinite = sum(not math.isfinite(reward) for reward in rewards)
    if infinite:
        return _failed(
            "advantages_wrong", f"{infinite} rewards are NaN or infinite.", judged, {"rewards": len(rewards)}
        )
    varying = [group for group in judged if group.varies]
    if not varying:
        given = max((abs(a) for group in judged for a in group.given), default=0.0)
        if given > 0:
            message = "All rewards of each group are equal, so that nothing is better than anything, but advantages"
            return _failed("advantages_wrong", f"{message} are up to {given:.3g}.", judged, {})
        note = "All rewards of each group are equal: advantages of 0 are right, and nothing is learned here."
        return Verdict(_NAME, Status.PASS, note, evidence={"groups": len(groups), "groups that vary": 0})
    if all(a == 0 for group in varying for a in group.given):
        message = f"All advantages are zero, although the rewards vary in {len(varying)} of {len(groups)} groups."
        return _failed("advantages_zero", message, judged, {})
    covariance = math.fsum(group.covariance for group in varying)
    if _alike(varying) <= OPPOSITE:
        message = "Better samples have lower advantages: training would make the policy worse."
        return _failed("advantages_sign", message, judged, {"covariance of reward and advantage": covariance})
    wrong = [group for group in judged if group.difference > TOLERANCE]
    if wrong:
        message = (
            f"In {len(wrong)} of {len(groups)} groups the advantages are not those of the rewards: {_how(judged)}."
        )
        largest = max(group.difference for group in wrong)
        return _failed("advantages_wrong", message, judged, {"largest relative difference": largest})
    return Verdict(_NAME, Status.PASS, evidence={"groups": len(groups), "groups that vary": len(varying)})


def judge(group: Group, credit: str, again: Group | None = None) -> Judged:
    """What follows from a group's rewards.

    Args:
        group: The group, with advantages.
        credit: As in `check_advantages`.
        again: As there.
    """
    if again is not None:
        known = judge(again, credit)
        return replace(judge(group, credit), expected=known.given)
    compared: list[float] = []
    given: list[float] = []
    for episode, values in zip(group.episodes, group.advantages, strict=False):
        if episode.reward is None or not values:
            continue
        if credit == "episode":
            compared.append(episode.reward)
            # All turns share one advantage; a turn that differs shows in the worst of them.
            given.append(_most_unlike(values))
        else:
            for turn, value in enumerate(values):
                if not episode.turns[turn].action.was_forced:
                    compared.append(_still_to_come(episode, turn))
                    given.append(value)
    return Judged(tuple(compared), tuple(given), tuple(_expected(compared)))


def _most_unlike(values: Sequence[float]) -> float:
    return max(values, key=lambda value: abs(value - values[0]))


def _still_to_come(episode: Episode, turn: int) -> float:
    assert episode.reward is not None
    earned = 0.0
    for earlier in episode.turns[:turn]:
        earned += earlier.reward or 0.0
    return episode.reward - earned


def _expected(compared: Sequence[float]) -> list[float]:
    if not compared or max(compared) == min(compared):
        return [0.0] * len(compared)
    mean = math.fsum(compared) / len(compared)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in compared) / len(compared))
    return [(value - mean) / (std + STD_FLOOR) for value in compared]


def _alike(judged: Sequence[Judged]) -> float:
    """Cosine between the given and the expected advantages."""
    pairs = [pair for group in judged for pair in zip(group.given, group.expected, strict=True)]
    size = math.hypot(*(a for a, _ in pairs)) * math.hypot(*(b for _, b in pairs))
    return math.fsum(a * b for a, b in pairs) / size if size > 0 else 0.0


def _how(judged: Sequence[Judged]) -> str:
    """In what way they differ."""
    varying = [group for group in judged if group.varies]
    given = [a for group in varying for a in group.given]
    expected = [a for group in varying for a in group.expected]
    off_centre = max(abs(math.fsum(g.given)) / (len(g.given) * max([1e-12, *map(abs, g.given)])) for g in varying)
    scale = math.fsum(a * b for a, b in zip(given, expected, strict=True)) / math.fsum(b * b for b in expected)
    rest = math.fsum((a - scale * b) ** 2 for a, b in zip(given, expected, strict=True))
    if rest <= 1e-8 * math.fsum(a * a for a in given):
        return f"they are {scale:.4g} times as large"
    if off_centre > TOLERANCE:
        rewards = [r for group in varying for r in group.returns]
        if abs(math.fsum(given)) < 1e-3 * math.fsum(map(abs, given)) and len(set(rewards)) > 1:
            return "they do not sum to 0 in each group, only over all groups, as if compared between prompts"
        return "they do not sum to 0 in each group"
    if all(g.covariance > 0 for g in varying):
        return "they have another size in each group"
    return "they do not follow the order of the rewards"


def _failed(cause: str, message: str, judged: Sequence[Judged], evidence: dict[str, float | int | str]) -> Verdict:
    example = next((group for group in judged if group.difference > TOLERANCE), judged[0])
    return Verdict(
        _NAME,
        Status.FAIL,
        message,
        "Look at what computes or changes advantages between the rewards and the batches.",
        {
            **evidence,
            "groups": len(judged),
            "groups that vary": sum(group.varies for group in judged),
            "for example, rewards": _shown(example.returns),
            "their advantages": _shown(example.given),
            "expected": _shown(example.expected),
            "allowed relative difference": TOLERANCE,
        },
        cause=cause,
        ruled_out=("a solved task (there all rewards of a group are equal)",) if cause == "advantages_zero" else (),
    )


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:8]) + (", ..." if len(values) > 8 else "")
