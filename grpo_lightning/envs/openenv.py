"""Environments that a server of OpenEnv runs."""

import inspect
import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from grpo_lightning.envs.adapter import TextAdapter, imported, require_one, user_message
from grpo_lightning.envs.environment import Observation
from grpo_lightning.envs.openenv_client import OpenEnvClient
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task
from grpo_lightning.threads import call


class OpenEnv(TextAdapter):
    """An environment on a server of OpenEnv (https://github.com/meta-pytorch/OpenEnv).

    Every episode has a session of its own. Messages of the task come before its first observation. What the server
    refuses counts as a fault of the environment, and the episode is begun again.

    Args:
        url: Where the server listens, for example ``"ws://localhost:8000"``. Actions are then mappings.
        client: What makes a client, instead of ``url``: an object with ``reset(seed=...)``, ``step(action)`` and
            ``close()``, plain or async, whose answers have ``observation``, ``reward`` and ``done``. In YAML its
            import path.
        action_field: The field of an action that holds the move.
        action_type: Class of actions, called with that field by name, or its import path. By default actions are
            mappings.
        observation_field: The field of an observation that the policy is shown. Not needed where observations are
            plain text.
        answer_pattern: Regular expression with one group, which matches the move in an answer; by default the whole
            answer is the move.
        default_move: What is said in the policy's place after an invalid action where ``episodes.invalid_action`` is
            ``"default"``.

    Raises:
        ConfigurationError: If there is not exactly one of ``url`` and ``client``.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        client: str | Callable[[], Any] | None = None,
        action_field: str = "message",
        action_type: str | Callable[..., Any] | None = None,
        observation_field: str | None = None,
        answer_pattern: str | None = None,
        default_move: str | None = None,
    ) -> None:
        super().__init__(answer_pattern, default_move)
        require_one("OpenEnv", url=url, client=client)
        self._make_client = partial(OpenEnvClient, str(url)) if client is None else imported("client", client)
        self._action_field = action_field
        self._action_type = dict if action_type is None else imported("action_type", action_type)
        self._observation_field = observation_field
        self._client: Any = None

    async def reset(self, task: Task) -> Observation:
        """The first observation of the task's seed."""
        self._client = await call(self._make_client)
        # Clients of servers that draw nothing take no seed.
        arguments = {"seed": task.seed} if _takes_seed(self._client.reset) else {}
        result = await call(self._client.reset, **arguments)
        return Observation((*task.messages, user_message(self._text(result.observation))))

    async def step(self, action: Action) -> Observation:
        """Make a move."""
        result = await call(self._client.step, self._action_type(**{self._action_field: self.move(action)}))
        return Observation(
            (user_message(self._text(result.observation)),),
            reward=0.0 if result.reward is None else float(result.reward),
            terminated=bool(result.done),
        )

    async def close(self) -> None:
        """End the session, if it was begun."""
        if self._client is not None:
            await call(self._client.close)

    def _text(self, observation: Any) -> str:
        if self._observation_field is None:
            if not isinstance(observation, str):
                raise ConfigurationError(
                    f"expected observations to be text, but got {type(observation).__name__}; name the field to show "
                    f"with observation_field: {_names(observation)}"
                )
            return observation
        fields = observation if isinstance(observation, Mapping) else vars(observation)
        if self._observation_field not in fields:
            raise ConfigurationError(
                f"expected observations to have the field {self._observation_field!r}, but they have "
                f"{_names(observation)}"
            )
        value = fields[self._observation_field]
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _takes_seed(reset: Callable[..., Any]) -> bool:
    parameters = inspect.signature(reset).parameters
    return "seed" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _names(observation: Any) -> str:
    fields = observation if isinstance(observation, Mapping) else getattr(observation, "__dict__", {})
    return ", ".join(map(repr, fields)) or "no fields"
