import math

import numpy as np
import pytest
import torch
from games import user

from grpo_lightning.envs import Observation
from grpo_lightning.rollout.observed import ObservationError, observed


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("hello", "should return an Observation, but returned 'hello'"),
        (None, "should return an Observation, but returned None"),
        (Observation(), "said nothing and did not end the episode"),
        (Observation([]), "said nothing and did not end the episode"),
        (Observation("hello"), "should return a tuple of mappings as messages, but returned 'hello'"),
        (
            Observation({"role": "user", "content": "x"}),
            "should return a tuple of mappings as messages, but returned {",
        ),
        (Observation(None), "should return a tuple of mappings as messages, but returned None"),
        (Observation(("hello",)), "should return a tuple of mappings as messages"),
        (Observation(({"content": "x"},)), "one of them is {'content': 'x'}"),
        (Observation(({"role": "user"},)), "one of them is {'role': 'user'}"),
        (Observation(({"role": "user", "content": None},)), 'messages like {"role": "user", "content": "..."}'),
        (Observation(({"role": "assistant", "content": "I"},)), "a message of the assistant; use forced_action"),
        (Observation(user("x"), reward=math.nan), "gave a reward of nan, which is no finite number"),
        (Observation(user("x"), reward="1"), "gave a reward of '1', which is no finite number"),
        (Observation(user("x"), error=ValueError("no")), "a text or None as error, but returned ValueError('no')"),
        (Observation(user("x"), forced_action=3), "a text or None as forced_action, but returned 3"),
        (Observation(user("x"), tools=(print,)), "a tuple of mappings as tools, but returned (<built-in"),
        (Observation(user("x"), tools={"name": "f"}), "a tuple of mappings as tools"),
        (Observation(user("x"), tool_format="json"), "one of 'auto', 'hermes', .* as tool_format, but returned 'json'"),
        (Observation(user("x"), info=None), "a mapping as info, but returned None"),
    ],
)
def test_what_an_environment_must_not_say(said, message):
    with pytest.raises(ObservationError) as error:
        observed(said)
    begin, _, end = message.partition(".*")
    assert begin in str(error.value)
    assert end in str(error.value)


@pytest.mark.parametrize("reward", [np.float32(1), torch.tensor(1.0), True, 1])
def test_rewards_are_plain_numbers(reward):
    said = observed(Observation(user("x"), reward=reward))
    assert (type(said.reward), said.reward) == (float, 1.0)


def test_flags_are_plain_too():
    said = observed(Observation(terminated=np.bool_(True), truncated=0))
    assert (said.terminated, said.truncated) == (True, False)


def test_an_environment_may_change_its_own_objects_afterwards():
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    messages, info = [message], {"board": [1]}
    said = observed(Observation(messages, info=info))
    message["role"] = "tool"
    message["content"][0]["text"] = "y"
    messages.append(message)
    info["board"].append(2)
    assert said.messages == ({"role": "user", "content": [{"type": "text", "text": "x"}]},)
    assert said.info == {"board": [1]}
