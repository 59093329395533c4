"""A guessing game: a secret number, and hints that a good player must use. The environment of the multi-turn demo."""

import random
import re

from grpo_lightning.envs.environment import Environment, InvalidAction, Observation
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Message, Task

_NUMBER = re.compile(r"\d+")

_LOWEST = 10
"""Two digits each, so that all games cost the same tokens."""

_MOST_DIGITS = 9
"""Of a guess. Python refuses to read numbers of thousands of digits."""


class GuessNumber(Environment):
    """Find a secret number; after each guess the numbers that are still possible are told.

    The right guess earns 1 and ends the game. Any other costs ``miss``, and twice that if it was not one of the numbers
    left or could not be read as one number. There is no limit on guesses but ``episodes.max_turns``: with 4 turns for
    9 numbers, whoever halves what is left always wins, whoever does not listen wins 4 games of 9 at most on average.

    The numbers and the secret are drawn from `Task.seed`.

    Args:
        numbers: How many numbers there are at first, in a row.
        highest: Highest number that any game has; the lowest is 10.
        miss: What a wrong guess costs.
    """

    def __init__(self, numbers: int = 9, highest: int = 99, miss: float = 0.1) -> None:
        if not 2 <= numbers <= highest - _LOWEST + 1:
            raise ConfigurationError(
                f"expected numbers from 2 to {highest - _LOWEST + 1}, as many as there are from {_LOWEST} to highest "
                f"({highest}), but got {numbers}"
            )
        if miss < 0:
            raise ConfigurationError(f"expected miss >= 0, because it is a cost, but got {miss}")
        self._numbers = numbers
        self._highest = highest
        self._miss = miss
        self._left = range(0)
        self._secret = 0

    def reset(self, task: Task) -> Observation:
        """Draw the numbers and the secret, and tell the numbers."""
        draw = random.Random(task.seed)
        first = draw.randint(_LOWEST, self._highest - self._numbers + 1)
        self._left = range(first, first + self._numbers)
        self._secret = draw.choice(self._left)
        return Observation((*task.messages, self._said("Guess my number. Answer with one number only.")))

    def step(self, action: Action) -> Observation:
        """Judge a guess.

        Raises:
            InvalidAction: If the action does not hold exactly one number.
        """
        found = _NUMBER.findall(action.text)
        if len(found) != 1 or len(found[0]) > _MOST_DIGITS:
            raise InvalidAction(str(self._said("Answer with one number only.")["content"]), reward=-2 * self._miss)
        guess = int(found[0])
        if guess == self._secret:
            return Observation(({"role": "user", "content": "Right!"},), reward=1.0, terminated=True)
        possible = guess in self._left
        if guess < self._secret:
            self._left = range(max(self._left.start, guess + 1), self._left.stop)
        else:
            self._left = range(self._left.start, min(self._left.stop, guess))
        return Observation(
            (self._said(f"{guess} is too {'low' if guess < self._secret else 'high'}."),),
            reward=-self._miss if possible else -2 * self._miss,
            info={"left": len(self._left)},
        )

    def _said(self, text: str) -> Message:
        return {"role": "user", "content": f"{text} Numbers left: {' '.join(map(str, self._left))}"}
