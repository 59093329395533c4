import sys

import pytest

from grpo_lightning.envs import InvalidAction
from grpo_lightning.envs.skyrl_gym import SkyRLGym
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Action, Task

pytest.importorskip("skyrl_gym")

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
TASK = Task("t", (QUESTION,), {"reward_spec": {"ground_truth": "4"}, "max_turns": 3})


class Echo:
    """The shape without skyrl-gym."""

    closed = 0

    def __init__(self, env_config, extras):
        self.ends = (env_config["end"], env_config.end)
        self.extras = extras

    def init(self, prompt):
        return [*prompt, {"role": "user", "content": self.extras["hint"]}], {"hinted": True}

    def step(self, action):
        silent = action == "hush"
        said = [] if silent else [{"role": "user", "content": action.upper()}]
        return {"observations": said, "reward": 0.5, "done": action in self.ends, "metadata": {"n": 1}}

    def close(self):
        Echo.closed += 1


def said(text):
    return Action(text, (), (), 0.0, was_forced=True, finish_reason="stop", policy_version=-1)


def test_an_environment_of_skyrl_gym_is_played():
    environment = SkyRLGym("gsm8k_multi_turn")
    assert environment.reset(TASK).messages == (QUESTION,)
    first = environment.step(said("It is #### 5"))
    assert first.messages[0]["content"].startswith("Please provide your step-by-step reasoning")
    assert (first.reward, first.terminated) == (pytest.approx(0.2 / 3), False)
    last = environment.step(said("It is #### 4"))
    assert (last.messages, last.reward, last.terminated) == ((), 1.0, True)
    environment.close()


def test_the_tasks_data_are_its_extras():
    environment = SkyRLGym("gsm8k_multi_turn")
    environment.reset(TASK)
    assert [environment.step(said("?")).terminated for _ in range(3)] == [False, False, True]


def test_any_class_of_the_shape_will_do():
    environment = SkyRLGym(factory=Echo, env_config={"end": "bye"})
    begin = environment.reset(Task("t", (QUESTION,), {"hint": "Think."}))
    assert begin.messages == (QUESTION, {"role": "user", "content": "Think."})
    assert begin.info == {"hinted": True}
    step = environment.step(said("four"))
    assert step.messages == ({"role": "user", "content": "FOUR"},)
    assert (step.reward, step.terminated, step.info) == (0.5, False, {"n": 1})
    assert environment.step(said("bye")).terminated
    closed = Echo.closed
    environment.close()
    assert Echo.closed == closed + 1


def test_a_turn_without_an_observation_goes_on():
    environment = SkyRLGym(factory=Echo, env_config={"end": "bye"})
    environment.reset(Task("t", (), {"hint": ""}))
    assert environment.step(said("hush")).messages == ({"role": "user", "content": ""},)


def test_a_setting_that_is_missing_is_named():
    environment = SkyRLGym(factory=lambda env_config, extras: env_config.topk)
    with pytest.raises(AttributeError, match="env_config has no 'topk'"):
        environment.reset(TASK)


def test_the_move_is_what_the_pattern_finds():
    environment = SkyRLGym(factory=Echo, env_config={"end": "bye"}, answer_pattern="<a>(.*?)</a>")
    environment.reset(Task("t", (), {"hint": ""}))
    assert environment.step(said("so <a>bye</a>")).terminated
    with pytest.raises(InvalidAction, match="Your answer has no move in it"):
        environment.step(said("bye"))


def test_closing_is_always_safe():
    SkyRLGym("gsm8k").close()


def test_unknown_environments_are_refused():
    with pytest.raises(ConfigurationError, match="environment of skyrl-gym, but got 'gsm'; choose one of aime, gsm8k,"):
        SkyRLGym("gsm")


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skyrl_gym", None)
    with pytest.raises(ConfigurationError, match=r"SkyRLGym needs skyrl_gym: install grpo-lightning\[skyrl\]"):
        SkyRLGym("gsm8k")
