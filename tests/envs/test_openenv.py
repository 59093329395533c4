import asyncio
import json
import queue
import sys
import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from grpo_lightning.envs import InvalidAction
from grpo_lightning.envs.openenv import OpenEnv
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task

SYSTEM = {"role": "system", "content": "Play."}
TASK = Task("t", (SYSTEM,), seed=7)


def said(text):
    return Action(text, (), (), 0.0, was_forced=True, finish_reason="stop", policy_version=-1)


def user(text):
    return {"role": "user", "content": text}


class PlainClient:
    """A client as OpenEnv's are, without a server."""

    def __init__(self):
        self.actions = []
        self.closed = 0

    def reset(self, seed=None):
        return SimpleNamespace(observation=SimpleNamespace(echo=f"seed {seed}", n=0), reward=None, done=False)

    def step(self, action):
        assert threading.current_thread() is not threading.main_thread()
        self.actions.append(action)
        n = len(self.actions)
        return SimpleNamespace(observation=SimpleNamespace(echo=action, n=n), reward=0.5, done=n == 2)

    def close(self):
        self.closed += 1


class AsyncClient(PlainClient):
    async def reset(self):
        return SimpleNamespace(observation="begin", reward=None, done=False)

    async def step(self, action):
        self.actions.append(action)
        return SimpleNamespace(observation="plain text", reward=None, done=False)

    async def close(self):
        super().close()


@dataclass
class Move:
    where: str


def test_a_plain_client():
    made = []
    environment = OpenEnv(
        client=lambda: made.append(PlainClient()) or made[-1],
        action_type=Move,
        action_field="where",
        observation_field="n",
    )

    async def episode():
        begin = await environment.reset(TASK)
        steps = [await environment.step(said(text)) for text in ("left", "right")]
        await environment.close()
        return begin, *steps

    begin, first, last = asyncio.run(episode())
    assert begin.messages == (SYSTEM, user("0"))
    assert (first.messages, first.reward, first.terminated) == ((user("1"),), 0.5, False)
    assert (last.messages, last.reward, last.terminated) == ((user("2"),), 0.5, True)
    [client] = made
    assert client.actions == [Move("left"), Move("right")]
    assert client.closed == 1


def test_an_async_client_that_takes_no_seed():
    client = AsyncClient()
    environment = OpenEnv(client=lambda: client, answer_pattern="<(.*?)>")

    async def episode():
        begin = await environment.reset(TASK)
        step = await environment.step(said("go <left>"))
        with pytest.raises(InvalidAction, match="Your answer has no move in it"):
            await environment.step(said("left"))
        await environment.close()
        return begin, step

    begin, step = asyncio.run(episode())
    assert begin.messages == (SYSTEM, user("begin"))
    assert (step.messages, step.reward) == ((user("plain text"),), 0.0)
    assert client.actions == [{"message": "left"}]
    assert client.closed == 1


def test_the_seed_reaches_the_client():
    environment = OpenEnv(client=PlainClient, observation_field="echo")
    assert asyncio.run(environment.reset(TASK)).messages[-1] == user("seed 7")


def test_an_observation_of_fields_needs_one_of_them():
    with pytest.raises(
        ConfigurationError, match="but got SimpleNamespace; name the field .* observation_field: 'echo', "
    ):
        asyncio.run(OpenEnv(client=PlainClient).reset(TASK))
    with pytest.raises(ConfigurationError, match="to have the field 'text', but they have 'echo', 'n'"):
        asyncio.run(OpenEnv(client=PlainClient, observation_field="text").reset(TASK))


def test_closing_is_always_safe():
    asyncio.run(OpenEnv(client=PlainClient).close())
    asyncio.run(OpenEnv("ws://localhost:1").close())


def test_url_or_client():
    with pytest.raises(ConfigurationError, match="expected OpenEnv to have either url or client, but got neither"):
        OpenEnv()


ended: queue.Queue[int] = queue.Queue()


async def serve(connection):
    """One session of the protocol: counts the letters of what it is told."""
    assert connection.request.path == "/ws"
    total = 0
    async for raw in connection:
        message = json.loads(raw)
        if message["type"] == "close":
            ended.put(total)
            break
        data = message["data"]
        if message["type"] == "step" and "message" not in data:
            answer = {"type": "error", "data": {"message": "Field required", "code": "VALIDATION_ERROR"}}
        else:
            total = data["seed"] if message["type"] == "reset" else total + len(data["message"])
            reward = None if message["type"] == "reset" else float(total)
            answer = {
                "type": "observation",
                "data": {"observation": {"total": total}, "reward": reward, "done": total > 15},
            }
        await connection.send(json.dumps(answer))


@pytest.fixture
def url():
    server = pytest.importorskip("websockets.asyncio.server")
    ready, over, found = threading.Event(), asyncio.Event(), {}

    async def main():
        async with server.serve(serve, "127.0.0.1", 0) as running:
            found["port"] = running.sockets[0].getsockname()[1]
            found["loop"] = asyncio.get_running_loop()
            ready.set()
            await over.wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(10)
    yield f"http://127.0.0.1:{found['port']}/"
    found["loop"].call_soon_threadsafe(over.set)
    thread.join()


def test_a_server(url):
    async def episode(words):
        environment = OpenEnv(url, observation_field="total")
        try:
            return [await environment.reset(TASK), *[await environment.step(said(word)) for word in words]]
        finally:
            await environment.close()

    async def both():
        return await asyncio.gather(episode(["left", "right"]), episode(["up"]))

    (begin, first, last), other = asyncio.run(both())
    # The server may read a session's last message after its client has left.
    assert sorted(ended.get(timeout=10) for _ in range(2)) == [9, 16]
    assert begin.messages == (SYSTEM, user("7"))
    assert (first.messages, first.reward, first.terminated) == ((user("11"),), 11.0, False)
    assert (last.messages, last.reward, last.terminated) == ((user("16"),), 16.0, True)
    assert [step.messages[-1] for step in other] == [user("7"), user("9")]


def test_what_a_server_refuses_is_said(url):
    async def episode():
        environment = OpenEnv(url, observation_field="total", action_field="where")
        try:
            await environment.reset(TASK)
            await environment.step(said("left"))
        finally:
            await environment.close()

    with pytest.raises(RuntimeError, match=r"the server ws://.*/ws refused step: Field required \(VALIDATION_ERROR\)"):
        asyncio.run(episode())


def test_no_server():
    with pytest.raises(OSError, match="Connect"):
        asyncio.run(OpenEnv("ws://127.0.0.1:9").reset(TASK))


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "websockets.asyncio.client", None)
    with pytest.raises(ConfigurationError, match=r"OpenEnv needs websockets.*: install grpo-lightning\[openenv\]"):
        asyncio.run(OpenEnv("ws://127.0.0.1:9").reset(TASK))
