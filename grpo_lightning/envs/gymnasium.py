"""Environments of gymnasium that speak text, and any other of the same shape."""

from collections.abc import Callable
from functools import partial
from typing import Any

from grpo_lightning.envs.adapter import TextAdapter, imported, optional_package, require_one, user_message
from grpo_lightning.envs.environment import InvalidAction, Observation
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task


class GymnasiumText(TextAdapter):
    """An environment of gymnasium (https://gymnasium.farama.org) whose observations and actions are text.

    Any object with ``reset(seed=...) -> (text, info)`` and ``step(text) -> (text, reward, terminated, truncated,
    info)`` will do, so also the environments of gem-llm, by way of ``factory``. Messages of the task come before its
    first observation. A move that its action space does not contain is an invalid action.

    Args:
        env_id: Name in gymnasium's registry; ``"my_package:MyGame-v0"`` imports the package that registers it.
        factory: What makes the environment, instead of ``env_id``; in YAML its import path.
        settings: Keyword arguments of the environment.
        invalid_reward: What a move outside of the action space earns.
        answer_pattern: Regular expression with one group, which matches the move in an answer; by default the whole
            answer is the move.
        default_move: What is said in the policy's place after an invalid action where ``episodes.invalid_action`` is
            ``"default"``.

    Raises:
        ConfigurationError: If there is not exactly one of ``env_id`` and ``factory``, gymnasium is not installed or
            has no such environment, or the environment does not speak text.
    """

    def __init__(
        self,
        env_id: str | None = None,
        *,
        factory: str | Callable[..., Any] | None = None,
        settings: dict[str, Any] | None = None,
        invalid_reward: float = 0.0,
        answer_pattern: str | None = None,
        default_move: str | None = None,
    ) -> None:
        super().__init__(answer_pattern, default_move)
        require_one("GymnasiumText", env_id=env_id, factory=factory)
        self._invalid_reward = invalid_reward
        self._name = str(getattr(factory, "__name__", factory) if env_id is None else env_id)
        make = partial(_registered, self._name) if factory is None else imported("factory", factory)
        self._env: Any = make(**settings or {})
        for role in ("observation", "action"):
            _check_text(self._name, role, getattr(self._env, f"{role}_space", None))

    def reset(self, task: Task) -> Observation:
        """The first observation of the task's seed."""
        text, info = self._env.reset(seed=task.seed)
        return Observation((*task.messages, user_message(self._text(text))), info=info)

    def step(self, action: Action) -> Observation:
        """Make a move.

        Raises:
            InvalidAction: If the action space does not contain it.
        """
        move, space = self.move(action), getattr(self._env, "action_space", None)
        if space is not None and not space.contains(move):
            raise InvalidAction(f"{move!r} is not a possible action: expected {space}", self._invalid_reward)
        text, reward, terminated, truncated, info = self._env.step(move)
        return Observation(
            (user_message(self._text(text)),),
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
            info=info,
        )

    def close(self) -> None:
        """Close the environment, if it can be closed."""
        if hasattr(self._env, "close"):
            self._env.close()

    def _text(self, observation: Any) -> str:
        if not isinstance(observation, str):
            raise ConfigurationError(
                f"expected the observations of {self._name} to be text, but got {type(observation).__name__}; wrap it "
                "in an environment that puts them into words"
            )
        return observation


def _registered(env_id: str, **settings: Any) -> Any:
    gymnasium = optional_package("gymnasium", adapter="GymnasiumText", extra="gymnasium")
    try:
        # Its checker warns of every text that is not an array.
        return gymnasium.make(env_id, disable_env_checker=True, **settings)
    except (gymnasium.error.Error, ImportError) as error:
        raise ConfigurationError(
            f"expected an environment that gymnasium can make, but got {env_id!r}: {error}"
        ) from error


def _check_text(name: str, role: str, space: Any) -> None:
    if space is not None and type(space).__name__ != "Text":
        raise ConfigurationError(
            f"expected {name} to have Text spaces, but its {role}_space is {space}; wrap it in an environment that "
            "puts observations into words and reads moves"
        )
