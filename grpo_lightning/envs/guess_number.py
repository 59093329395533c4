"""A guessing game: a secret number, and hints that a good player must use. The environment of the multi-turn demo."""

import random
import re
from collections.abc import Mapping

from grpo_lightning.envs.environment import Environment, InvalidAction, Observation
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.episode import Episode
from grpo_lightning.rollout.types import Action, Message, Task

_NUMBER = re.compile(r"\d+")

_LOWEST = 10
"""Two digits each, so that all games cost the same tokens."""

_MOST_DIGITS = 9
"""Of a guess. Python refuses to read numbers of thousands of digits."""


class GuessNumber(Environment):
    """Find a secret number; after each guess the numbers that are still possible are told.

    Of 7 numbers and with 3 turns (``episodes.max_turns``) whoever halves what is left always wins, whoever picks any of
    what is left wins two games of three, and whoever does not listen two of five.

    A game that is won earns ``won`` 1. One that is lost earns ``consolation`` for each guess that was one of the
    numbers left at that time. An answer without exactly one number in it is invalid and earns nothing.

    The numbers and the secret are drawn from `Task.seed`.

    Args:
        numbers: How many numbers there are at first, in a row.
        highest: Highest number that any game has; the lowest is 10.
        consolation: What each sensible guess of a lost game earns, less than 1 in all.
    """

    def __init__(self, numbers: int = 7, highest: int = 99, consolation: float = 0.1) -> None:
        most = highest - _LOWEST + 1
        if not 2 <= numbers <= most:
            raise ConfigurationError(
                f"expected numbers from 2 to {most}, as many as there are from {_LOWEST} to highest ({highest}), but "
                f"got {numbers}"
            )
        if not 0 <= consolation < 1:
            raise ConfigurationError(f"expected consolation from 0 to less than 1, but got {consolation}")
        self._numbers = numbers
        self._highest = highest
        self._consolation = consolation
        self._left = range(0)
        self._secret = 0
        self._sensible = 0
        self._won = False

    def reset(self, task: Task) -> Observation:
        """Draw the numbers and the secret, and tell the numbers."""
        draw = random.Random(task.seed)
        first = draw.randint(_LOWEST, self._highest - self._numbers + 1)
        self._left = range(first, first + self._numbers)
        self._secret = draw.choice(self._left)
        return Observation((*task.messages, self._said("Guess my number. Answer with one number only.")), reward=None)

    def step(self, action: Action) -> Observation:
        """Judge a guess.

        Raises:
            InvalidAction: If the action does not hold exactly one number.
        """
        found = _NUMBER.findall(action.text)
        if len(found) != 1 or len(found[0]) > _MOST_DIGITS:
            raise InvalidAction(str(self._said("Answer with one number only.")["content"]))
        guess = int(found[0])
        self._sensible += guess in self._left
        if guess == self._secret:
            self._won = True
            return Observation(({"role": "user", "content": "Right!"},), reward=None, terminated=True)
        low = guess < self._secret
        if low:
            self._left = range(max(self._left.start, guess + 1), self._left.stop)
        else:
            self._left = range(self._left.start, min(self._left.stop, guess))
        return Observation((self._said(f"{guess} is too {'low' if low else 'high'}."),), reward=None)

    def score(self, episode: Episode) -> Mapping[str, float]:
        """``won`` (0 or 1) and the ``consolation`` for a lost game."""
        return {
            "won": float(self._won),
            "consolation": 0.0 if self._won else self._consolation * self._sensible,
        }

    def _said(self, text: str) -> Message:
        return {"role": "user", "content": f"{text} Numbers left: {' '.join(map(str, self._left))}"}
