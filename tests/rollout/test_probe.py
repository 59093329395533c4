"""Trying environments before anything expensive starts."""

import pytest
from chat_models import TOOLS, chat_encoder, templates_of
from games import Echo, Picky, user

from grpo_lightning.envs import Observation
from grpo_lightning.envs.kinds import as_environments
from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.episode_settings import EpisodeSettings
from grpo_lightning.rollout.probe import probe
from grpo_lightning.rollout.prompts import PromptEncoder
from grpo_lightning.rollout.types import Task


class Broken(Echo):
    async def reset(self, task):
        raise OSError("the disk is gone")


def tried(model, environment, *names, rewards=False, **settings):
    tasks = [Task(f"t{i}", env=name) for i, name in enumerate(names or [""])]
    probe(as_environments(environment), tasks, PromptEncoder(model, 100), EpisodeSettings(**settings), rewards)


def test_every_kind_of_environment_is_begun_twice(tiny_model):
    made = []

    def make():
        made.append(Echo())
        return made[-1]

    tried(tiny_model, {"a": make, "b": make}, "a", "b", "a", "b")
    assert [(env.task.id, env.closed) for env in made] == [("t0", 1), ("t0", 1), ("t1", 1), ("t1", 1)]


def test_a_kind_that_comes_later_is_tried_too(tiny_model):
    with pytest.raises(
        ConfigurationError, match=r"environment b, task 't2', turn 0: reset\(\) raised OSError: the disk"
    ):
        tried(tiny_model, {"a": Echo, "b": Broken}, "a", "a", "b")


def test_a_name_that_no_environment_has(tiny_model):
    with pytest.raises(ConfigurationError, match="task 't1': .* it is 'c' and there are 'a', 'b'"):
        tried(tiny_model, {"a": Echo, "b": Echo}, "a", "c")


def test_a_default_action_must_be_there_if_it_will_be_asked_for(tiny_model):
    tried(tiny_model, Picky, invalid_action="default")
    tried(tiny_model, Echo, invalid_action="message")
    with pytest.raises(ConfigurationError, match=r"default_action\(\) raised NotImplementedError: Echo has no default"):
        tried(tiny_model, Echo, invalid_action="default")


def test_a_function_that_forgets_to_return_the_environment(tiny_model):
    with pytest.raises(ConfigurationError, match="returned None; give a subclass of"):
        tried(tiny_model, lambda: None)


def test_the_same_task_begins_the_same_way(tiny_model):
    class Moody(Echo):
        begun = 0

        async def reset(self, task):
            Moody.begun += 1
            return Observation(user(f"Game {Moody.begun}"))

    with pytest.raises(ConfigurationError, match="begin with the same messages each time.*Game 1.*Game 2"):
        tried(tiny_model, Moody)


class Unpaid(Echo):
    async def reset(self, task):
        return Observation(user("go"), reward=None)


class Scoring(Unpaid):
    def score(self, episode):
        return {"bonus": 1.0}


def test_something_must_give_rewards(tiny_model):
    with pytest.raises(ConfigurationError, match=r"gives none .*reward=None.*; set rewards"):
        tried(tiny_model, Unpaid)
    tried(tiny_model, Unpaid, rewards=True)
    tried(tiny_model, Scoring)
    tried(tiny_model, Echo)


@pytest.mark.parametrize("setting", ["thinking", "context_limit"])
def test_a_template_that_cannot_begin_a_sequence_with_the_result_of_a_tool(tiny_model, tmp_path, setting):
    class Tools(Echo):
        async def reset(self, task):
            return Observation(user("What?"), tools=TOOLS)

    encoder = chat_encoder(tiny_model, tmp_path, templates_of("trl", "chat_templates")["gptoss"])
    environments, tasks = as_environments(Tools), [Task("t")]
    probe(environments, tasks, encoder, EpisodeSettings(), True)
    with pytest.raises(ConfigurationError, match=r"calls of tools too, .*gptoss.*Set episodes.thinking='keep'"):
        probe(environments, tasks, encoder, EpisodeSettings(**{setting: "split"}), True)
