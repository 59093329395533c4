"""Single-player games of textarena."""

import difflib
import importlib
import random
import sys
from typing import Any

from grpo_lightning.envs.adapter import TextAdapter, optional_package, user_message
from grpo_lightning.envs.environment import InvalidAction, Observation
from grpo_lightning.envs.own_random import drawing_from, isolate
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task

_ECHO = "PLAYER_ACTION"
_playable: set[str] = set()


class TextArena(TextAdapter):
    """A single-player game of textarena (https://github.com/LeonGuertler/TextArena).

    The task's seed is the game's, with a random generator of the episode's own; messages of the task come before the
    game's. The game pays once, when it is over. An invalid move never ends it, whatever the game's own rule (two in a
    row end most games, and some pay for the part that was played): what follows is ``episodes.invalid_action``.

    Args:
        env_id: Name of the game, for example ``"GuessTheNumber-v0-raw"``. Only names that end in ``-raw`` are taken:
            the others say the whole history again in each turn.
        settings: Further settings of the game.
        invalid_reward: What an invalid move earns; 0 or less.
        answer_pattern: Regular expression with one group, which matches the move in an answer; by default the whole
            answer is the move. Most games look for the move in square brackets themselves.
        default_move: What is said in the policy's place after an invalid action where ``episodes.invalid_action`` is
            ``"default"``.

    Raises:
        ConfigurationError: If textarena is not installed, has no such game, or cannot play it alone.
    """

    def __init__(
        self,
        env_id: str,
        *,
        settings: dict[str, Any] | None = None,
        invalid_reward: float = 0.0,
        answer_pattern: str | None = None,
        default_move: str | None = None,
    ) -> None:
        super().__init__(answer_pattern, default_move)
        if invalid_reward > 0:
            raise ConfigurationError(f"expected invalid_reward <= 0, but got {invalid_reward}")
        self._env_id = env_id
        self._settings = settings or {}
        self._invalid_reward = invalid_reward
        self._game: Any = None
        self._random = random.Random()
        _check_playable(env_id, self._settings)

    def reset(self, task: Task) -> Observation:
        """The rules and the first position."""
        self._random = random.Random(task.seed)
        self._game = _begun(self._env_id, self._settings, task.seed, self._random)
        self._game.state.error_allowance = sys.maxsize
        return Observation((*task.messages, user_message(self._said())))

    def step(self, action: Action) -> Observation:
        """Make a move.

        Raises:
            InvalidAction: If the game refuses it.
        """
        move = self.move(action)
        with drawing_from(self._random):
            done, _ = self._game.step(move)
        said = self._said()
        if not done and self._game.state.error_count:
            raise InvalidAction(said, self._invalid_reward)
        messages = (user_message(said),) if said or not done else ()
        if not done:
            return Observation(messages)
        rewards, info = self._game.close()
        return Observation(messages, reward=float((rewards or {}).get(0, 0.0)), terminated=True, info=info[0])

    def _said(self) -> str:
        """What the game has said since it was asked last, without its echo of the player's own words."""
        _, said = self._game.get_observation()
        # Some games mix up the arguments of the echo, so that its kind is the player's text.
        return "\n\n".join(text for _, text, kind in said if getattr(kind, "name", _ECHO) != _ECHO)


def _begun(env_id: str, settings: dict[str, Any], seed: int, own: random.Random) -> Any:
    """A new game after its reset."""
    import textarena

    with drawing_from(own):
        # Some games draw, or keep a function that draws, before they are reset.
        game = textarena.make(env_id, **settings)
        game.reset(num_players=1, seed=seed)
    return game


def _check_playable(env_id: str, settings: dict[str, Any]) -> None:
    """Begin a game once: only then does it show whether it is for one player and has all it needs."""
    textarena = optional_package("textarena", adapter="TextArena", extra="textarena")
    registry = textarena.envs.registration.ENV_REGISTRY
    names = [name for name in registry if name.endswith("-raw")]
    if env_id not in names:
        near = [f"{env_id}-raw"] if f"{env_id}-raw" in names else difflib.get_close_matches(env_id, names)
        suggestion = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(sorted(names))}"
        raise ConfigurationError(f"expected a game of textarena that ends in -raw, but got {env_id!r}; {suggestion}")
    key = f"{env_id} {settings}"
    if key in _playable:
        return
    try:
        _isolate_draws(registry[env_id].entry_point)
        game = _begun(env_id, settings, 0, random.Random())
    except Exception as error:
        raise ConfigurationError(
            f"expected {env_id} to be a game for one player that runs offline, but it cannot begin: "
            f"{type(error).__name__}: {str(error).strip()}; choose another game, or give it what it asks for"
        ) from error
    if not isinstance(game.state, textarena.SinglePlayerState):
        raise ConfigurationError(f"expected a game for one player, but {env_id} is for several; choose another game")
    _playable.add(key)


def _isolate_draws(entry_point: Any) -> None:
    """Import a game's module and give it, like all of textarena, the episode's random generator."""
    module = entry_point.partition(":")[0] if isinstance(entry_point, str) else entry_point.__module__
    importlib.import_module(module)
    isolate("textarena")
    isolate(module)
