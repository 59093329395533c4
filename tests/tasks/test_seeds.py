from copy import deepcopy

import pytest
from jsonargparse import ArgumentParser

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.rollout.types import Task
from grpo_lightning.tasks import SeedTasks, TaskSource

SYSTEM = {"role": "system", "content": "Play."}


def test_one_task_per_seed():
    tasks = SeedTasks(3, seed=17, env="maze", messages=[SYSTEM], data={"size": 5})
    assert isinstance(tasks, TaskSource)
    assert len(tasks) == 3
    assert [tasks[index] for index in range(3)] == [
        Task(f"seed-{seed}", (SYSTEM,), {"size": 5}, seed=seed, env="maze") for seed in (17, 18, 19)
    ]


def test_what_messages_of_a_configuration_say_stays_text():
    messages = [{"role": "user", "content": "Numbers left: 3 4"}, {"role": "assistant", "content": "34"}]
    parser = ArgumentParser()
    parser.add_argument("--tasks", type=TaskSource)
    settings = {"size": 1, "messages": deepcopy(messages)}
    config = parser.parse_object({"tasks": {"class_path": "grpo_lightning.tasks.SeedTasks", "init_args": settings}})
    assert parser.instantiate_classes(config).tasks[0].messages == tuple(messages)


def test_an_index_means_the_same_task_however_many_there_are():
    assert SeedTasks(100)[42] == SeedTasks(50)[42] == Task("seed-42", seed=42)


def test_a_task_that_is_changed_leaves_the_others_alone():
    tasks = SeedTasks(2, data={"size": 5})
    tasks[0].data["size"] = 6
    assert tasks[0].data == tasks[1].data == {"size": 5}


@pytest.mark.parametrize("index", [-1, 3])
def test_index_outside_is_refused(index):
    with pytest.raises(IndexError):
        SeedTasks(3)[index]


def test_no_tasks_are_refused():
    with pytest.raises(ConfigurationError, match="expected size >= 1, but got 0"):
        SeedTasks(0)


def test_negative_seeds_are_refused():
    with pytest.raises(ConfigurationError, match="expected seed >= 0, because not all .* take others, but got -1"):
        SeedTasks(1, seed=-1)
