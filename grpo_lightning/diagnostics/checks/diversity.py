"""Samples are drawn anew: copies that chance cannot explain, and tasks that come back too soon.

Symbols: ``p`` the probability of what the policy said in an episode, by its own logprobs.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from grpo_lightning.diagnostics.verdict import Status, Verdict
from grpo_lightning.rollout.episode import Group
from grpo_lightning.rollout.generation_record import digest

_NAME = "sample diversity"

_STAKE = 0.01
"""Share of the capital on each of two bets: what is lost on a rollout of 128 different samples is 2.6 nats, and a copy
of probability p wins about ``-4.6 - log p``."""


@dataclass(frozen=True)
class Said:
    """What the policy said in one episode.

    Attributes:
        group: Number of its group in the rollout.
        tokens: Digest of its tokens, turn by turn.
        logprob: Sum of their logprobs, nats.
        exact: Digest of tokens and logprobs.
    """

    group: int
    tokens: bytes
    logprob: float
    exact: bytes


def said(groups: Sequence[Group]) -> list[Said]:
    """What was said in all episodes in which the policy acted."""
    found = []
    for number, group in enumerate(groups):
        for episode in group.episodes:
            actions = [turn.action for turn in episode.turns if not turn.action.was_forced]
            tokens = list(chain.from_iterable((*action.token_ids, -1) for action in actions))
            logprobs = list(chain.from_iterable(action.token_logprobs for action in actions))
            if logprobs and all(map(math.isfinite, logprobs)):
                named = digest(tokens, np.int64)
                found.append(Said(number, named, math.fsum(logprobs), named + digest(logprobs, np.float64)))
    return found


def check_diversity(samples: Sequence[Said], before: Sequence[Said], limit: float) -> Verdict:
    """Samples repeat each other no more than their own probabilities allow.

    A game against chance: before each sample, two small stakes go on its being one of the earlier samples of its
    group, or of all earlier ones, which pays ``1 / (n p)`` for one of ``n``. Where samples are drawn with these
    probabilities no such game is won in the mean, so the capital grows beyond ``exp(limit)`` with a probability of at
    most ``exp(-limit)`` (Ville's inequality), whatever the prompts are. A policy that is certain of its answers
    repeats them with ``p`` about 1, which wins nothing.

    Args:
        samples: Of this rollout, group by group.
        before: Of the one before.
        limit: Nats; 16.1 stands for p = 1e-7.
    """
    if len(samples) < 2:
        return Verdict(_NAME, Status.NO_POWER, "Fewer than two samples.")
    earlier, near = {sample.tokens for sample in before}, defaultdict[int, set[bytes]](set)
    again = sum(sample.tokens in earlier for sample in samples)
    won, within = 0.0, 0
    for sample in samples:
        group = near[sample.group]
        copies = [len(others) for others in (group, earlier) if sample.tokens in others]
        won += _factor([-sample.logprob - math.log(count) for count in copies])
        within += sample.tokens in group
        group.add(sample.tokens)
        earlier.add(sample.tokens)
    evidence: dict[str, float | int | str] = {
        "samples": len(samples),
        "distinct": len({sample.tokens for sample in samples}),
        "copies within a group": within,
        "also in the rollout before": again,
        "surprise, nats": won,
        "allowed, nats": limit,
    }
    if won > limit:
        return _repeated(samples, before, within >= again, evidence)
    if _if_copied(samples) <= limit:
        message = "Completions are so likely that copies would not be strange; longer or less certain ones decide."
        return Verdict(_NAME, Status.NO_POWER, message, "", evidence)
    return Verdict(_NAME, Status.PASS, evidence=evidence)


def _factor(payments: Sequence[float]) -> float:
    """Logarithm of what one round leaves of the capital, from those of the payments that are won."""
    terms = [math.log(1 - 2 * _STAKE), *(math.log(_STAKE) + payment for payment in payments)]
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


def _if_copied(samples: Sequence[Said]) -> float:
    """What would be won if all samples of each group were its first."""
    firsts: dict[int, Said] = {}
    won = 0.0
    for sample in samples:
        first = firsts.get(sample.group)
        won += _factor([] if first is None else [-first.logprob])
        firsts.setdefault(sample.group, sample)
    return won


def _repeated(
    samples: Sequence[Said], before: Sequence[Said], within: bool, evidence: dict[str, float | int | str]
) -> Verdict:
    known = {sample.exact for sample in before}
    stale = sum(sample.exact in known for sample in samples) > len(samples) / 2
    if stale:
        message = "Most samples are those of the rollout before, with the same logprobs: it is trained on again."
        fix = "Have each epoch make its own rollout: look at what keeps or returns rollouts or batches."
    else:
        where = "each other" if within else "samples of other groups or of the rollout before"
        message = f"Completions are copies of {where} that are too unlikely to be drawn twice."
        fix = (
            "Give every request a seed of its own (by task, sample, turn and rollout), and every episode its own data."
        )
    return Verdict(
        _NAME,
        Status.FAIL,
        message,
        fix,
        evidence,
        cause="stale_rollout" if stale else "samples_repeated",
        ruled_out=("a policy that is certain of its answers (its copies would be likely)",),
    )


def check_tasks(rollouts: Sequence[tuple[int, ...]], source: int, limit: float) -> Verdict:
    """Consecutive rollouts draw different tasks.

    Args:
        rollouts: Tasks of the rollouts so far that are equal to the last one's, and directly before it.
        source: Tasks there are.
        limit: Nats; repeats that chance explains with a probability above ``exp(-limit)`` are nothing.
    """
    name = "task order"
    count = len(rollouts[-1])
    if source <= count:
        return Verdict(
            name, Status.NO_POWER, f"A rollout draws {count} tasks, and there are {source}: they must repeat."
        )
    repeats = len(rollouts) - 1
    surprise = repeats * math.fsum(math.log(source - i) for i in range(count))
    if surprise <= limit:
        return Verdict(name, Status.PASS)
    return Verdict(
        name,
        Status.FAIL,
        f"The last {repeats + 1} rollouts drew the same tasks in the same order, although there are {source}.",
        "Look at order and at the count of tasks drawn. To repeat tasks on purpose, use Trainer(overfit_batches=1).",
        {
            "rollouts": repeats + 1,
            "tasks of each": count,
            "tasks there are": source,
            "nats": surprise,
            "allowed": limit,
        },
        cause="tasks_repeated",
    )
