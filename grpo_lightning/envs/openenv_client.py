"""The few messages of OpenEnv's protocol that an episode needs.

OpenEnv's own client cannot be installed beside vLLM: its package needs fastmcp, which excludes the version of mcp that
vLLM needs.
"""

import asyncio
import contextlib
import json
import re
from dataclasses import dataclass
from typing import Any

from grpo_lightning.envs.adapter import optional_package


@dataclass(frozen=True)
class StepResult:
    """What a server answers.

    Attributes:
        observation: The environment's fields.
        reward: What the last action earned, if anything was said of it.
        done: Whether the episode is over.
    """

    observation: dict[str, Any]
    reward: float | None
    done: bool


class OpenEnvClient:
    """One session with a server of OpenEnv; every session has an environment of its own.

    Args:
        url: Where the server listens, for example ``"ws://localhost:8000"``; ``http`` and ``https`` will do as well.
        timeout: Seconds to wait for a connection and for each answer.
    """

    def __init__(self, url: str, timeout: float = 60.0) -> None:
        self._url = f"{re.sub('^http', 'ws', url.rstrip('/'))}/ws"
        self._timeout = timeout
        self._connection: Any = None

    async def reset(self, **arguments: Any) -> StepResult:
        """Begin an episode."""
        client = optional_package("websockets.asyncio.client", adapter="OpenEnv", extra="openenv")
        if self._connection is None:
            self._connection = await client.connect(self._url, open_timeout=self._timeout, max_size=None)
        return await self._answer("reset", arguments)

    async def step(self, action: dict[str, Any]) -> StepResult:
        """Take an action."""
        return await self._answer("step", action)

    async def close(self) -> None:
        """End the session, if there is one."""
        if self._connection is None:
            return
        # A server that is told ends the session at once; one that is gone already cannot be told.
        with contextlib.suppress(Exception):
            await self._connection.send(json.dumps({"type": "close"}))
        await self._connection.close()

    async def _answer(self, kind: str, data: dict[str, Any]) -> StepResult:
        await self._connection.send(json.dumps({"type": kind, "data": data}))
        answer = json.loads(await asyncio.wait_for(self._connection.recv(), self._timeout))
        data = answer.get("data", {})
        if answer.get("type") == "error":
            raise RuntimeError(f"the server {self._url} refused {kind}: {data.get('message')} ({data.get('code')})")
        return StepResult(data.get("observation", {}), data.get("reward"), bool(data.get("done", False)))
