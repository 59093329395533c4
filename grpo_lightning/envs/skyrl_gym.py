"""Environments of skyrl-gym, and any other of the same shape."""

from collections.abc import Callable
from typing import Any

from grpo_lightning.envs.adapter import TextAdapter, imported, optional_package, require_one, user_message
from grpo_lightning.envs.environment import Observation
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task


class SkyRLGym(TextAdapter):
    """An environment of skyrl-gym (https://github.com/NovaSky-AI/SkyRL).

    Any class with ``init(prompt) -> (messages, info)`` and ``step(text) -> {"observations": messages, "reward": ...,
    "done": ..., "metadata": ...}`` will do. One is made for each episode, with the task's data as its ``extras``
    (skyrl-gym's own want ``reward_spec`` there); its prompt are the task's messages.

    Args:
        env_id: Name in skyrl-gym's registry, for example ``"gsm8k"``.
        factory: What makes the environment from ``env_config`` and ``extras``, instead of ``env_id``: a class, or in
            YAML its import path.
        env_config: The environment's settings.
        answer_pattern: Regular expression with one group, which matches the move in an answer; by default the whole
            answer is the move.
        default_move: What is said in the policy's place after an invalid action where ``episodes.invalid_action`` is
            ``"default"``.

    Raises:
        ConfigurationError: If there is not exactly one of ``env_id`` and ``factory``, or skyrl-gym is not installed or
            has no such environment.
    """

    def __init__(
        self,
        env_id: str | None = None,
        *,
        factory: str | Callable[..., Any] | None = None,
        env_config: dict[str, Any] | None = None,
        answer_pattern: str | None = None,
        default_move: str | None = None,
    ) -> None:
        super().__init__(answer_pattern, default_move)
        require_one("SkyRLGym", env_id=env_id, factory=factory)
        self._make = _registered(str(env_id)) if factory is None else imported("factory", factory)
        self._env_config = _Settings(env_config or {})
        self._env: Any = None

    def reset(self, task: Task) -> Observation:
        """The prompt, as the environment gives it."""
        self._env = self._make(env_config=self._env_config, extras=dict(task.data))
        messages, info = self._env.init([dict(message) for message in task.messages])
        return Observation(tuple(messages), info=info or {})

    def step(self, action: Action) -> Observation:
        """Give the environment what the policy said."""
        answer = self._env.step(self.move(action))
        done = bool(answer["done"])
        # skyrl-gym lets the policy go on without a word; a chat needs one.
        messages = tuple(answer["observations"]) or (() if done else (user_message(""),))
        return Observation(messages, reward=float(answer["reward"]), terminated=done, info=answer.get("metadata") or {})

    def close(self) -> None:
        """Close the environment, if it was begun."""
        if self._env is not None:
            self._env.close()


class _Settings(dict[str, Any]):
    """Settings that are read either way: some environments say ``config["topk"]``, others ``config.topk``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"env_config has no {name!r}") from None


def _registered(env_id: str) -> Callable[..., Any]:
    skyrl_gym = optional_package("skyrl_gym", adapter="SkyRLGym", extra="skyrl")
    if env_id not in skyrl_gym.registry:
        raise ConfigurationError(
            f"expected an environment of skyrl-gym, but got {env_id!r}; choose one of "
            f"{', '.join(sorted(skyrl_gym.registry))}, or register it first"
        )

    def make(**arguments: Any) -> Any:
        return skyrl_gym.make(env_id, **arguments)

    return make
