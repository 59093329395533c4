import sys

import pytest

from grpo_lightning.errors import ConfigurationError
from grpo_lightning.tasks import ReasoningGymTasks, TaskSource

reasoning_gym = pytest.importorskip("reasoning_gym")


def test_tasks_are_the_datasets_entries():
    tasks = ReasoningGymTasks("chain_sum", size=5, seed=3)
    dataset = reasoning_gym.create_dataset("chain_sum", size=5, seed=3)
    assert isinstance(tasks, TaskSource)
    assert len(tasks) == 5
    for index in range(5):
        task, entry = tasks[index], dataset[index]
        assert task.id == f"chain_sum-{index}"
        [message] = task.messages
        assert message["role"] == "user"
        assert message["content"] == entry["question"] + "\nGive the final answer between <answer> and </answer>."
        assert task.data == {"answer": entry["answer"], "reasoning_gym_entry": entry}


def test_same_seed_same_tasks():
    def questions(seed):
        return [t.messages[0]["content"] for t in ReasoningGymTasks("chain_sum", size=8, seed=seed)]

    assert questions(1) == questions(1)
    assert questions(1) != questions(2)


def test_config_reaches_the_dataset():
    tasks = ReasoningGymTasks(
        "chain_sum", size=20, config={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    )
    for task in tasks:
        question = task.data["reasoning_gym_entry"]["question"]
        assert question.count(" + ") + question.count(" - ") == 1


def test_instructions_can_be_changed():
    task = ReasoningGymTasks("chain_sum", size=1, instructions=" !")[0]
    assert task.messages[0]["content"] == task.data["reasoning_gym_entry"]["question"] + " !"


@pytest.mark.parametrize("index", [-1, 3])
def test_index_outside_is_refused(index):
    # reasoning-gym itself would go on for ever.
    with pytest.raises(IndexError):
        ReasoningGymTasks("chain_sum", size=3)[index]


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigurationError, match=r"install grpo-lightning\[reasoning-gym\]"):
        ReasoningGymTasks("chain_sum")


def test_a_name_that_is_close_is_suggested():
    with pytest.raises(
        ConfigurationError, match="expected a dataset of reasoning-gym, but got 'chain_sums'; did you mean chain_sum"
    ):
        ReasoningGymTasks("chain_sums")


def test_else_all_are_named():
    with pytest.raises(ConfigurationError, match="choose one of ab, .*, chain_sum, "):
        ReasoningGymTasks("0000000000")
