"""Made-up trajectories of a guessing game, in several turns, with everything that can happen in one."""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np

from grpo_lightning.rollout.episode import Episode, Group, Turn
from grpo_lightning.rollout.ledger import Ledger, Source
from grpo_lightning.rollout.micro_batches import Layout
from grpo_lightning.rollout.rollout import Origin
from grpo_lightning.rollout.types import Action, Task, ToolCall
from grpo_lightning.trajectories.stored import StoredEpoch

Encode = Callable[[str], Sequence[int]]

SYSTEM = "You guess a number between 1 and 20. Say it in <guess></guess>. After each guess you are told more."


def byte_ids(text: str) -> list[int]:
    """A token for each byte of UTF-8: enough to split characters."""
    return list(text.encode())


def stored(groups: Sequence[Group], *, number: int = 0, trained: bool = True, seed: int = 0) -> StoredEpoch:
    """Groups as a stored epoch; with log-ratios of sampled tokens if it was trained to its end."""
    ledgers = [ledger for group in groups for episode in group.episodes for ledger in episode.ledgers]
    sampled = np.concatenate([ledger.sampled for ledger in ledgers]) if ledgers else np.zeros(0, bool)
    drawn = np.random.default_rng(seed).normal(0, 0.06, len(sampled))
    return StoredEpoch(
        origin=Origin(number * 2, number, number, tuple(range(len(groups))), {}),
        layout=Layout(1, 1, 1, 1),
        temperature=1.0,
        banned_token_ids=(),
        groups=tuple(groups),
        log_ratios=np.where(sampled, drawn, np.nan) if trained else None,
    )


def episode_of(turns: Sequence[tuple[str, str]], encode: Encode = byte_ids, *, reward: float | None = 1.0, **more):
    """An episode from what was said to the policy and what it answered, turn by turn.

    Args:
        turns: (what it was told, what it said).
        encode: Of the tokenizer.
        reward: Of the episode.
        more: Further attributes of `Episode`.
    """
    ledger: Ledger | None = None
    said = []
    for number, (told, answer) in enumerate(turns):
        ids, logprobs = _sampled(answer, encode)
        if ledger is None:
            ledger = Ledger.of_prompt(encode(told))
        else:
            ledger = ledger.extended(encode(told), Source.ENVIRONMENT, number)
        ledger = ledger.extended(ids, Source.SAMPLED, number, logprobs, policy_version=3)
        said.append(Turn((), Action(answer, ids, logprobs, math.fsum(logprobs), False, "stop", 3)))
    more = {"rewards": {"environment": reward}, "turns": tuple(said)} | more
    return Episode(ledgers=(ledger,) if ledger else (), reward=reward, **more)


def _sampled(text: str, encode: Encode, draw: random.Random | None = None) -> tuple[tuple[int, ...], tuple[float, ...]]:
    draw = draw or random.Random(len(text))
    ids = tuple(encode(text))
    return ids, tuple(-(abs(draw.gauss(0, 1)) ** 3) for _ in ids)


def guessing_group(number: int, encode: Encode, *, size: int = 8, skill: float = 0.5, seed: int = 0) -> Group:
    """Games for one secret number; the last one is broken in every fourth group."""
    draw = random.Random(f"{seed} {number}")
    secret = draw.randint(1, 20)
    games = [_game(secret, encode, draw, skill) for _ in range(size)]
    if number % 4 == 3:
        failure = "environment GuessTheNumber: reset timed out after 30 s, 3 times"
        games[-1] = Episode((), (), {}, None, "error", failure, attempts=3)
    rewards = [game.reward for game in games if game.reward is not None]
    mean, std = np.mean(rewards), np.std(rewards)
    advantages = tuple(
        (0.0 if game.reward is None else float((game.reward - mean) / (std + 1e-4)),) * len(game.turns)
        for game in games
    )
    task = Task(
        f"guess-{number:04d}", data={"secret": secret, "range": [1, 20]}, seed=1000 + number, env="GuessTheNumber"
    )
    return Group(task, tuple(games), advantages)


def _game(secret: int, encode: Encode, draw: random.Random, skill: float) -> Episode:
    asked = "What is your first guess?"
    told = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    ledger = Ledger.of_prompt(encode(told))
    turns: list[Turn] = []
    low, high, won = 1, 20, False
    while len(turns) < 5 and not won:
        number = len(turns)
        guess = (low + high) // 2 if draw.random() < skill else draw.randint(1, 20)
        if draw.random() < 0.08:
            action, error, said = _refused(encode, draw)
        elif draw.random() < 0.05:
            guess = low
            action = Action(f"<guess>{low}</guess>", tuple(encode(f"<guess>{low}</guess>")), (), 0.0, True, "stop", -1)
            error, said = None, _answer(guess, secret)
        else:
            thought = draw.choice(("I will try ", "It lies between, so ", "Let me think… 🤔 ", "Perhaps ", "次は "))
            call = ToolCall("guess", {"number": guess}, id=f"call_{number}")
            text = f"{thought}<guess>{guess}</guess><|im_end|>"
            ids, logprobs = _sampled(text, encode, draw)
            action = Action(text, ids, logprobs, math.fsum(logprobs), False, "stop", 3, (call,))
            error, said = None, _answer(guess, secret)
        source = Source.FORCED if action.was_forced else Source.SAMPLED
        logprobs = None if action.was_forced else action.token_logprobs
        ledger = ledger.extended(action.token_ids, source, number, logprobs, action.policy_version)
        won = error is None and guess == secret
        if error is None:
            low, high = (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))
            low, high = min(low, 20), max(high, low, 1)
        reward = 1.0 if won else -0.1
        info = {} if error else {"guess": guess, "distance": abs(guess - secret)}
        turns.append(Turn((), action, reward, error, info))
        if not won and len(turns) < 5:
            closed = "\n" if action.token_ids[-1:] == tuple(encode("<|im_end|>"))[-1:] else "<|im_end|>\n"
            message = f"{closed}<|im_start|>user\n{said}<|im_end|>\n<|im_start|>assistant\n"
            ledger = ledger.extended(encode(message), Source.ENVIRONMENT, number + 1)
    played = sum(turn.reward or 0 for turn in turns)
    form = sum(turn.error is None for turn in turns) / len(turns)
    status = "terminated" if won else "truncated"
    closing = ({"role": "user", "content": "Right! You found it." if won else f"No more guesses. It was {secret}."},)
    rewards = {"environment": played, "good_form": form, "brevity": None}
    return Episode(tuple(turns), (ledger,), rewards, played + 0.2 * form, status, closing=closing)


def _answer(guess: int, secret: int) -> str:
    return f"{guess} is too {'low' if guess < secret else 'high'}. Guess again."


def _refused(encode: Encode, draw: random.Random) -> tuple[Action, str, str]:
    text = draw.choice(("I am not sure, it may be seven or eight", "<guess>twelve"))
    ids, logprobs = _sampled(text, encode, draw)
    error = "expected a number in <guess></guess>, but found none; say for example <guess>7</guess>"
    call = ToolCall("", {}, error="there is no closing </guess>")
    return Action(text, ids, logprobs, math.fsum(logprobs), False, "length", 3, (call,)), error, error


def guessing_epoch(
    number: int, encode: Encode, *, groups: int = 16, size: int = 8, trained: bool = True
) -> StoredEpoch:
    """One epoch of games; the later, the better they are played."""
    skill = min(0.95, 0.1 + 0.06 * number)
    played = [guessing_group(g, encode, size=size, skill=skill, seed=number) for g in range(groups)]
    return stored(played, number=number, trained=trained, seed=number)
